"""The libvirt driver against a real libvirtd and real QEMU guests: what only this driver has to get right.

The verbs' general behaviour is in the contract suite. Guests are emulated, so a boot takes some seconds.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import struct
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.drivers.base import CallContext, ConnectionChanged, DriverContext, PowerChanged, PreparedImage, Reported
from agent.drivers.libvirt import LibvirtDriver
from agent.errors import AlreadyExists, DeadlineExceeded, FailedPrecondition, NotFound, Unavailable
from agent.messages.events import InstanceIoError, InstanceRebooted
from agent.messages.spec import InstanceSpec, NetworkNic, RootDisk, Seed, UserNic
from devstack.guest_image import guest_image
from devstack.libvirtd import PrivateLibvirtd

pytest.importorskip("libvirt", reason="the Python binding of libvirt is not installed")
pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="a private system libvirtd needs root"),
    pytest.mark.skipif(shutil.which("libvirtd") is None, reason="libvirtd is not installed"),
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not installed"),
]

MIB = 1024 * 1024
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAA me@x"


class Recorder:
    """An event sink that a test can wait on."""

    def __init__(self) -> None:
        self.events: list = []
        self._changed = threading.Condition()

    def __call__(self, event) -> None:
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    def wait(self, matches: Callable[[object], bool], limit_s: float = 120.0, start: int = 0):
        """Return the first matching event from position `start` on; fail after `limit_s` seconds."""
        deadline = time.monotonic() + limit_s
        with self._changed:
            while True:
                for event in self.events[start:]:
                    if matches(event):
                        return event
                if not self._changed.wait(deadline - time.monotonic()):
                    raise AssertionError(f"no such event among {self.events[start:]}")


class Bench:
    """A driver on a private daemon, and the instances that a test makes."""

    def __init__(self, daemon: PrivateLibvirtd, state_dir: Path, **settings) -> None:
        self.daemon = daemon
        self.seen = Recorder()
        context = DriverContext(
            host="h1",
            state_dir=state_dir,
            settings={"uri": daemon.uri, "virt_type": "qemu", "min_free_mib": 0, **settings},
            emit=self.seen,
        )
        self.driver = LibvirtDriver(context)
        self.made: list[str] = []

    def make(self, image: PreparedImage | None = None, *, start: bool = True, **fields) -> str:
        instance_id = str(uuid.uuid4())
        size = max(1, (image.virtual_size_bytes if image else MIB) // MIB)
        root_disk = fields.pop("root_disk", RootDisk(size_mib=size))
        spec = InstanceSpec(
            name=f"vm-{instance_id[:8]}", vcpus=1, memory_mib=fields.pop("memory_mib", 64), root_disk=root_disk, **fields
        )
        self.made.append(instance_id)
        self.driver.create_storage(instance_id, spec, {"root": image} if image else {}, CallContext())
        self.driver.define(instance_id, spec, generation=1)
        if start:
            self.driver.start(instance_id)
        return instance_id

    def qemu(self, instance_id: str) -> int:
        return self.daemon.qemu_pids()[f"vm-{instance_id[:8]}"]

    def power(self, instance_id: str) -> tuple[str, str]:
        info = self.driver.get(instance_id)
        return info.power, info.reason

    def wait_console(self, instance_id: str, text: str, times: int = 1, limit_s: float = 240.0) -> str:
        deadline = time.monotonic() + limit_s
        while True:
            console = self.driver.console_log(instance_id, MIB).data.decode(errors="replace")
            if console.count(text) >= times:
                return console
            assert time.monotonic() < deadline, f"{text!r} is not on the console:\n{console}"
            time.sleep(0.05)

    def clean(self) -> None:
        for instance_id in self.made:
            try:
                self.driver.destroy(instance_id)
                self.driver.undefine(instance_id)
            except NotFound:
                pass
            self.driver.delete_storage(instance_id)


@pytest.fixture(scope="module")
def small_fs() -> Iterator[Path]:
    """A file system of 4 MiB; made before the daemon, whose mount namespace would not see it otherwise."""
    folder = Path(tempfile.mkdtemp(prefix="lvfs-"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=0755", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        folder.rmdir()


@pytest.fixture(scope="module")
def daemon(small_fs: Path, request: pytest.FixtureRequest) -> Iterator[PrivateLibvirtd]:
    # Not tmp_path: a Unix socket's path must be short.
    folder = Path(tempfile.mkdtemp(prefix="lv-"))
    cache = request.config.cache.mkdir("libvirt-capabilities")
    # libvirt's own default, which devstack raises: the driver must live with it.
    settings = {"max_client_requests": "5"}
    private = PrivateLibvirtd(folder, daemon_settings=settings, capabilities_cache=Path(cache))
    try:
        # Not `with`: a start that fails half-way must be ended too.
        private.start()
        yield private
    finally:
        private.stop()
        shutil.rmtree(folder)


@pytest.fixture
def bench(daemon: PrivateLibvirtd, tmp_path: Path) -> Iterator[Bench]:
    daemon.start_daemon()
    made = Bench(daemon, tmp_path)
    made.driver.connect()
    try:
        yield made
        made.clean()
    finally:
        made.driver.close()


@pytest.fixture(scope="module")
def guest(request: pytest.FixtureRequest) -> PreparedImage:
    built = guest_image(Path(request.config.cache.mkdir("guest-image")))
    return PreparedImage(built.path, "qcow2", built.virtual_size_bytes, built.sha256)


def power_event(instance_id: str, power: str, reason: str) -> Callable[[object], bool]:
    return lambda event: event == PowerChanged(instance_id, power, reason)


def connection_event(connected: bool) -> Callable[[object], bool]:
    return lambda event: isinstance(event, ConnectionChanged) and event.connected is connected


# --- a guest's life ---------------------------------------------------------------------------------------------------


def test_a_guest_boots_with_its_seed_reboots_and_shuts_down(bench: Bench, guest: PreparedImage):
    seed = Seed(
        user_data='#cloud-config of <this> & "that"\n', ssh_keys=[KEY], network_config="version: 2\n", hostname="web"
    )
    instance_id = bench.make(
        guest, root_disk=RootDisk(size_mib=96), seed=seed, nics=[UserNic(type="user")], memory_mib=128, vnc=True
    )
    console = bench.wait_console(instance_id, "guest: tick 1")
    details = bench.driver.details(instance_id)
    assert "guest: boots=1" in console
    assert f"disk_sectors={96 * MIB // 512}" in console
    assert "seed: label=cidata" in console
    assert f"seed: instance-id={instance_id}" in console
    assert 'user-data-first-line=#cloud-config of <this> & "that"' in console
    assert f"seed: ssh-key={KEY.rpartition(' ')[0]}" in console
    assert "seed: network-config=present" in console
    assert f"guest: mac={details.mac_addresses[0]}" in console
    assert details.vnc_address is not None
    assert details.vnc_address.startswith("127.0.0.1:")
    assert details.console_log is not None

    qemu = bench.qemu(instance_id)
    bench.driver.reboot(instance_id)
    bench.seen.wait(lambda event: event == Reported(InstanceRebooted(instance_id=instance_id)))
    bench.wait_console(instance_id, "guest: boots=2")
    bench.wait_console(instance_id, "guest: tick 1", times=2)
    assert bench.qemu(instance_id) == qemu

    bench.driver.shutdown(instance_id)
    bench.seen.wait(power_event(instance_id, "stopped", "shutdown"))
    assert bench.power(instance_id) == ("stopped", "shutdown")
    assert "guest: powering off" in bench.driver.console_log(instance_id, 4096).data.decode()
    assert bench.driver.console_log(instance_id, 10).truncated


def test_a_config_drive_reaches_the_guest(bench: Bench, guest: PreparedImage):
    seed = Seed(datasource="config-drive", user_data="#!/bin/sh\n", network_config='{"links": []}')
    instance_id = bench.make(guest, seed=seed, memory_mib=128)
    console = bench.wait_console(instance_id, "guest: tick 1")
    assert "seed: label=config-2" in console
    assert f"seed: instance-id={instance_id}" in console
    assert "seed: user-data-first-line=#!/bin/sh" in console


def test_a_killed_qemu_is_crashed(bench: Bench):
    instance_id = bench.make()
    os.kill(bench.qemu(instance_id), signal.SIGKILL)
    bench.seen.wait(power_event(instance_id, "crashed", "failed"))
    assert bench.power(instance_id) == ("crashed", "crashed")
    bench.driver.start(instance_id)
    assert bench.power(instance_id) == ("running", "booted")


def test_a_saved_domain_is_suspended_and_can_be_restored_or_dropped(bench: Bench):
    instance_id = bench.make()
    bench.daemon.virsh("managedsave", instance_id)
    bench.seen.wait(power_event(instance_id, "suspended", "saved"))
    assert bench.power(instance_id) == ("suspended", "saved")
    assert [(info.power, info.reason) for info in bench.driver.recover()] == [("suspended", "saved")]
    bench.driver.start(instance_id)
    assert bench.power(instance_id)[0] == "running"
    bench.daemon.virsh("managedsave", instance_id)
    bench.driver.destroy(instance_id)
    assert bench.power(instance_id)[0] == "stopped"


def test_undefine_takes_saved_state_and_snapshots_along(bench: Bench):
    instance_id = bench.make(start=False)
    bench.daemon.virsh("snapshot-create-as", instance_id, "s1")
    bench.driver.start(instance_id)
    bench.daemon.virsh("managedsave", instance_id)
    bench.driver.undefine(instance_id)
    with pytest.raises(NotFound):
        bench.driver.get(instance_id)


# --- other people's domains -------------------------------------------------------------------------------------------


def test_a_foreign_domain_is_listed_and_never_touched(bench: Bench, tmp_path: Path):
    foreign = str(uuid.uuid4())
    (tmp_path / "foreign.xml").write_text(
        f"<domain type='qemu'><name>theirs</name><uuid>{foreign}</uuid><memory unit='MiB'>32</memory>"
        "<os><type arch='x86_64'>hvm</type></os></domain>"
    )
    bench.daemon.virsh("define", str(tmp_path / "foreign.xml"))
    try:
        info = bench.driver.get(foreign)
        assert (info.name, info.owned, info.spec, info.generation) == ("theirs", False, None, None)
        assert [entry.id for entry in bench.driver.recover()] == [foreign]
        driver = bench.driver
        for verb in (driver.start, driver.shutdown, driver.destroy, driver.reboot, driver.pause, driver.resume,
                     driver.undefine):  # fmt: skip
            with pytest.raises(FailedPrecondition) as caught:
                verb(foreign)
            assert caught.value.code == "foreign_domain", verb
        spec = InstanceSpec(name="theirs", vcpus=1, memory_mib=32, root_disk=RootDisk(size_mib=1))
        with pytest.raises(AlreadyExists):
            driver.define(str(uuid.uuid4()), spec, generation=1)
        with pytest.raises(AlreadyExists):
            driver.define(foreign, spec.model_copy(update={"name": "ours"}), generation=1)
        assert driver.get(foreign).power == "stopped"
    finally:
        bench.daemon.virsh("undefine", foreign)


def test_what_the_host_lacks_is_named(bench: Bench):
    instance_id = bench.make(start=False, nics=[NetworkNic(type="network", network="none-such")])
    with pytest.raises(FailedPrecondition) as caught:
        bench.driver.start(instance_id)
    assert caught.value.code == "network_missing"
    assert bench.power(instance_id)[0] == "stopped"


# --- a full disk ------------------------------------------------------------------------------------------------------


def writing_boot_sector() -> bytes:
    """A guest of 512 bytes: it writes one sector into every 64 KiB of its disk, by BIOS int 13h."""
    start = 0x7C00
    packet, drive = start + 0x40, start + 0x50
    setup = bytes.fromhex("31c0 8ed8 8ed0 bc007c") + b"\x88\x16" + struct.pack("<H", drive)
    loop = b"".join(
        [
            b"\xb8\x00\x43",  # mov ax, 0x4300: extended write
            b"\x8a\x16" + struct.pack("<H", drive),  # mov dl, [drive]
            b"\xbe" + struct.pack("<H", packet),  # mov si, packet
            b"\xcd\x13",  # int 0x13
            b"\x66\x81\x06" + struct.pack("<HI", packet + 8, 128),  # add dword [packet + 8], 128
        ]
    )
    code = setup + loop + b"\xeb" + struct.pack("b", -(len(loop) + 2))
    data = struct.pack("<BBHHHQ", 16, 0, 1, start, 0, 2048)
    return code.ljust(0x40, b"\0") + data.ljust(510 - 0x40, b"\0") + b"\x55\xaa"


def test_a_full_host_pauses_the_guest_says_so_and_can_be_healed(
    daemon: PrivateLibvirtd, small_fs: Path, tmp_path: Path
):
    base = tmp_path / "writer.raw"
    base.write_bytes(writing_boot_sector())
    os.truncate(base, 32 * MIB)
    image = PreparedImage(base, "raw", 32 * MIB, "0" * 64)
    bench = Bench(daemon, tmp_path, instances_dir=str(small_fs))
    bench.driver.connect()
    try:
        instance_id = bench.make(image, vnc=True)
        reported = bench.seen.wait(lambda event: isinstance(getattr(event, "event", None), InstanceIoError)).event
        assert (reported.instance_id, reported.reason, reported.action) == (instance_id, "enospc", "pause")
        assert reported.device == "virtio-disk0"
        assert reported.path == bench.driver.details(instance_id).disk_paths[0]
        bench.seen.wait(power_event(instance_id, "paused", "io-error"))
        assert bench.power(instance_id) == ("paused", "io-error")

        subprocess.run(["mount", "-o", "remount,size=64m", str(small_fs)], check=True)
        bench.driver.resume(instance_id)
        time.sleep(1.0)
        assert bench.power(instance_id)[0] == "running"
        bench.clean()
    finally:
        bench.driver.close()


# --- a frozen QEMU ----------------------------------------------------------------------------------------------------


def test_a_frozen_qemu_holds_up_nobody_else(bench: Bench):
    frozen, other = bench.make(), bench.make()
    pid = bench.qemu(frozen)
    os.kill(pid, signal.SIGSTOP)
    # More than a client's five requests, on one domain: the first waits for QEMU, the others for the first.
    stuck = [threading.Thread(target=_ignoring_errors(bench.driver.reboot, frozen), daemon=True) for _ in range(7)]
    try:
        for thread in stuck:
            thread.start()
        time.sleep(0.5)
        assert all(thread.is_alive() for thread in stuck)
        began = time.monotonic()
        assert {info.id for info in bench.driver.recover()} == {frozen, other}
        assert bench.power(frozen)[0] == "running"
        bench.driver.details(frozen)
        bench.driver.capacity()
        bench.driver.capabilities()
        bench.driver.pause(other)
        bench.seen.wait(power_event(other, "paused", "paused"))
        bench.driver.resume(other)
        third = bench.make()
        bench.driver.destroy(third)
        assert time.monotonic() - began < 5.0
        assert all(thread.is_alive() for thread in stuck)
    finally:
        os.kill(pid, signal.SIGCONT)
    for thread in stuck:
        thread.join(30.0)
        assert not thread.is_alive()


def test_a_frozen_qemu_can_be_destroyed(bench: Bench):
    instance_id = bench.make()
    os.kill(bench.qemu(instance_id), signal.SIGSTOP)
    bench.driver.destroy(instance_id)
    assert bench.power(instance_id) == ("stopped", "destroyed")


def _ignoring_errors(call: Callable[[str], None], instance_id: str) -> Callable[[], None]:
    def run() -> None:
        with contextlib.suppress(FailedPrecondition, DeadlineExceeded, Unavailable):
            call(instance_id)

    return run


# --- a daemon that goes away ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kill", [True, False], ids=["SIGKILL", "SIGTERM"])
def test_after_a_restart_of_the_daemon_calls_work_and_events_flow_again(bench: Bench, kill: bool):
    instance_id = bench.make()
    qemu = bench.qemu(instance_id)
    # Calls from several threads before and after: each has a connection of its own that must be replaced.
    others = [threading.Thread(target=bench.driver.get, args=(instance_id,)) for _ in range(3)]
    for thread in others:
        thread.start()
        thread.join()
    if kill:
        bench.daemon.kill_daemon()
    else:
        bench.daemon.stop_daemon()
    bench.seen.wait(connection_event(False), 120.0)
    assert not bench.driver.is_connected()
    began = time.monotonic()
    for call in (bench.driver.recover, bench.driver.capacity, lambda: bench.driver.get(instance_id)):
        with pytest.raises(Unavailable):
            call()
    assert time.monotonic() - began < 5.0  # the driver's own limit for a connection is twice that

    bench.daemon.start_daemon()
    bench.seen.wait(connection_event(True), 120.0)
    assert bench.driver.is_connected()
    assert bench.power(instance_id)[0] == "running"
    assert bench.qemu(instance_id) == qemu
    mark = len(bench.seen.events)
    bench.driver.pause(instance_id)
    bench.seen.wait(power_event(instance_id, "paused", "paused"), 120.0, mark)
    time.sleep(0.2)
    # Registered once, not once per epoch.
    assert bench.seen.events[mark:].count(PowerChanged(instance_id, "paused", "paused")) == 1
    changes = [event.connected for event in bench.seen.events if isinstance(event, ConnectionChanged)]
    assert changes == [False, True]


def test_a_call_in_flight_fails_when_the_daemon_dies(bench: Bench):
    instance_id = bench.make()
    os.kill(bench.qemu(instance_id), signal.SIGSTOP)
    raised: list[Exception] = []

    def pause() -> None:
        try:
            bench.driver.pause(instance_id)
        except Exception as exc:
            raised.append(exc)

    thread = threading.Thread(target=pause)
    thread.start()
    time.sleep(0.3)
    bench.daemon.kill_daemon()
    thread.join(5.0)
    os.kill(bench.qemu(instance_id), signal.SIGCONT)
    assert [type(exc) for exc in raised] == [Unavailable]
    bench.daemon.start_daemon()
    bench.seen.wait(connection_event(True), 120.0)


def test_reconnecting_leaks_neither_descriptors_nor_threads(bench: Bench):
    def count() -> tuple[int, int]:
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()

    bench.driver.capacity()
    before = count()
    for _ in range(5):
        mark = len(bench.seen.events)
        bench.daemon.restart_daemon(kill=True)
        bench.seen.wait(connection_event(True), 120.0, mark)
        bench.driver.capacity()
    assert count() == before


def test_a_frozen_daemon_is_noticed_and_comes_back(bench: Bench):
    bench.driver.capacity()
    bench.daemon.pause_daemon()
    try:
        began = time.monotonic()
        with pytest.raises(Unavailable):
            bench.driver.capacity()
        bench.seen.wait(connection_event(False), 120.0)
        # Keepalive: 5 s * (3 + 1), counted from the last sign of life.
        assert time.monotonic() - began < 30.0
    finally:
        bench.daemon.unpause_daemon()
    bench.seen.wait(connection_event(True), 120.0)
    bench.driver.capacity()


def test_connecting_to_nothing_or_to_a_frozen_daemon_ends(daemon: PrivateLibvirtd, tmp_path: Path):
    nothing = Bench(daemon, tmp_path, uri=f"qemu+unix:///system?socket={tmp_path}/none")
    with pytest.raises(Unavailable):
        nothing.driver.connect()
    frozen = Bench(daemon, tmp_path, connect_timeout_s=0.5)
    daemon.pause_daemon()
    try:
        for _ in range(3):
            with pytest.raises(Unavailable):
                frozen.driver.connect()
        assert sum(thread.name == "libvirt-open" for thread in threading.enumerate()) == 1
    finally:
        daemon.unpause_daemon()
    frozen.driver.connect()
    assert frozen.driver.capacity().cpus > 0
    assert [event for event in frozen.seen.events if isinstance(event, ConnectionChanged)] == []
    frozen.driver.close()
    assert not frozen.driver.is_connected()
    with pytest.raises(Unavailable):
        frozen.driver.capacity()
