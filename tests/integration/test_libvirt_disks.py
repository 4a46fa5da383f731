"""Disks of every kind and back end, under real guests: what a guest sees, boots from and leaves on the host."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import pycdlib
import pytest
from support.fake_lvm import FakeLvm

from agent.drivers.base import CallContext, DriverContext, PreparedImage
from agent.drivers.libvirt import LibvirtDriver
from agent.drivers.libvirt.seed import _iso
from agent.errors import FailedPrecondition, NotFound
from agent.messages.spec import InstanceSpec, RootDisk, Seed
from agent.messages.spec_disks import (
    Boot,
    BootFile,
    CdromDisk,
    DataDisk,
    Encryption,
    EphemeralDisk,
    ImageSource,
    SwapDisk,
)
from agent.messages.spec_limits import DiskLimits
from devstack.guest_image import GuestImage, guest_image
from devstack.libvirtd import PrivateLibvirtd

pytest.importorskip("libvirt", reason="the Python binding of libvirt is not installed")
pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(os.geteuid() != 0, reason="a private system libvirtd needs root"),
    pytest.mark.skipif(shutil.which("libvirtd") is None, reason="libvirtd is not installed"),
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not installed"),
    pytest.mark.timeout(900),
]

MIB = 1024 * 1024
PLAIN = b"PLAIN TEXT OF THE GUEST"
SOURCE = ImageSource(url="file:///any", sha256="0" * 64, format="raw")
FILE = BootFile(url="file:///any", sha256="0" * 64)


class Bench:
    """A driver with LVM, keys and a private daemon, and the instances that a test makes."""

    def __init__(self, daemon: PrivateLibvirtd, folder: Path, lvm: FakeLvm) -> None:
        self.daemon, self.lvm, self.folder = daemon, lvm, folder
        self.keys = folder / "keys"
        self.keys.mkdir()
        (self.keys / "k1").write_bytes(b"a passphrase with a newline\n")
        (self.keys / "k1").chmod(0o600)
        backends = {
            "flat": {"type": "raw", "dir": str(folder / "flat")},
            "thick": lvm.settings(),
            "thin": lvm.settings(thin_pool="pool"),
        }
        settings = {
            "uri": daemon.uri, "virt_type": "qemu", "min_free_mib": 0, "backends": backends,
            "keys_dir": str(self.keys), "luks_iter_time_ms": 10,
        }  # fmt: skip
        context = DriverContext(host="h1", state_dir=folder, settings=settings, emit=lambda _event: None)
        self.driver = LibvirtDriver(context)
        self.made: list[str] = []

    def make(
        self, root: RootDisk, images: Mapping[str, PreparedImage] | None = None, *, start: bool = True, **fields
    ) -> str:
        instance_id = str(uuid.uuid4())
        memory_mib = fields.pop("memory_mib", 64)
        spec = InstanceSpec(name=f"vm-{instance_id[:8]}", vcpus=1, memory_mib=memory_mib, root_disk=root, **fields)
        self.made.append(instance_id)
        self.driver.create_storage(instance_id, spec, images or {}, CallContext())
        self.driver.define(instance_id, spec, generation=1)
        if start:
            self.driver.start(instance_id)
        return instance_id

    def console(self, instance_id: str, text: str, times: int = 1) -> str:
        deadline = time.monotonic() + 240.0
        while True:
            console = self.driver.console_log(instance_id, MIB).data.decode(errors="replace")
            if console.count(text) >= times:
                return console
            assert time.monotonic() < deadline, f"{text!r} is not on the console:\n{console}"
            time.sleep(0.05)

    def place(self, instance_id: str, name: str):
        spec = self.driver.get(instance_id).spec
        return self.driver._storage.files(instance_id, spec).disks[name]

    def remove(self, instance_id: str) -> None:
        try:
            self.driver.destroy(instance_id)
            self.driver.undefine(instance_id)
        except NotFound:
            pass
        self.driver.delete_storage(instance_id)

    def left(self) -> list[str]:
        """Files, volumes, loop devices and secrets."""
        files = [str(path) for name in ("instances", "flat") for path in (self.folder / name).glob("*")]
        secrets = self.daemon.virsh("secret-list").split()
        return files + list(self.lvm.volumes) + self.lvm.loops() + secrets


@pytest.fixture(scope="module")
def daemon(request: pytest.FixtureRequest) -> Iterator[PrivateLibvirtd]:
    # Not tmp_path: a Unix socket's path must be short.
    folder = Path(tempfile.mkdtemp(prefix="lvd-"))
    private = PrivateLibvirtd(folder, capabilities_cache=Path(request.config.cache.mkdir("libvirt-capabilities")))
    try:
        private.start()
        yield private
    finally:
        private.stop()
        shutil.rmtree(folder)


@pytest.fixture
def bench(daemon: PrivateLibvirtd, tmp_path: Path) -> Iterator[Bench]:
    with FakeLvm(tmp_path / "lvm") as lvm:
        made = Bench(daemon, tmp_path, lvm)
        made.driver.connect()
        try:
            yield made
            for instance_id in made.made:
                made.remove(instance_id)
            assert made.left() == []
        finally:
            for instance_id in made.made:
                daemon.virsh("destroy", instance_id) if instance_id in daemon.virsh("list", "--uuid") else None
            made.driver.close()


@pytest.fixture(scope="module")
def bootable(request: pytest.FixtureRequest) -> GuestImage:
    return guest_image(Path(request.config.cache.mkdir("guest-image")))


@pytest.fixture
def guest(bootable: GuestImage) -> PreparedImage:
    return PreparedImage(bootable.path, "qcow2", bootable.virtual_size_bytes, bootable.sha256)


def raw(path: Path, content: bytes, size: int | None = None) -> PreparedImage:
    path.write_bytes(content)
    if size is not None:
        os.truncate(path, size)
    return PreparedImage(path, "raw", path.stat().st_size, "0" * 64)


def speaking_sector(text: str) -> bytes:
    """A boot sector that writes a text on the serial console, from a disk or a CD."""
    code = bytes.fromhex("0e1f e80000 5e 83c612 ac 84c0 7406 baf803 ee ebf5 f4 ebfd")
    assert len(code) == 23
    return (code + text.encode() + b"\r\n\0").ljust(510, b"\0") + b"\x55\xaa"


def speaking_cd(text: str) -> bytes:
    """An ISO image that boots, by El Torito without emulation."""
    iso, image, sector = pycdlib.PyCdlib(), io.BytesIO(), speaking_sector(text).ljust(2048, b"\0")
    iso.new(interchange_level=3)
    iso.add_fp(io.BytesIO(sector), len(sector), "/BOOT.;1")
    iso.add_eltorito("/BOOT.;1", boot_load_size=4)
    iso.write_fp(image)
    iso.close()
    return image.getvalue()


def lines(console: str) -> dict[str, str]:
    """Serial number (or, of a CD, label) of each disk → the guest's line about it."""
    found = {}
    for line in console.splitlines():
        if line.startswith("disk: name="):
            words = dict(word.split("=", 1) for word in line.removeprefix("disk: ").split())
            found[words.get("serial") or words["label"]] = line
    return found


def test_a_guest_sees_disks_of_every_kind(bench: Bench, guest: PreparedImage, tmp_path: Path):
    disks = [
        DataDisk(kind="data", name="empty", size_mib=5, bus="sata", limits=DiskLimits(total_iops=5000)),
        DataDisk(kind="data", name="filled", size_mib=6, image=SOURCE, bus="scsi", backend="flat"),
        EphemeralDisk(kind="ephemeral", name="scratch", size_mib=16),
        SwapDisk(kind="swap", name="swap", size_mib=4),
        CdromDisk(kind="cdrom", name="cd", image=SOURCE),
        DataDisk(kind="data", name="write-luks", size_mib=8, encryption=Encryption(key="k1")),
        DataDisk(kind="data", name="write-flat", size_mib=7, encryption=Encryption(key="k1"), backend="flat"),
    ]
    filled = raw(tmp_path / "filled.raw", b"\0" * 4086 + b"SWAPSPACE2", MIB)
    cd = raw(tmp_path / "cd.iso", _iso("TOOLS", {"readme": b"hello"}))
    images = {"root": guest, "filled": filled, "cd": cd}
    made = bench.make(RootDisk(size_mib=96), images, disks=disks, seed=Seed(), memory_mib=128)
    console = bench.console(made, "guest: tick 3")
    seen = lines(console)
    assert set(seen) == {"root", *(disk.name for disk in disks if disk.name != "cd"), "cidata", "TOOLS"}, console
    assert "name=vda sectors=196608" in seen["root"]
    assert "name=sd" in seen["empty"]
    assert "sectors=10240 serial=empty type=none" in seen["empty"]
    assert "sectors=12288 serial=filled type=swap" in seen["filled"]
    assert "sectors=32768 serial=scratch type=ext4 label=scratch" in seen["scratch"]
    assert "serial=swap type=swap label=swap" in seen["swap"]
    assert "name=sr" in seen["TOOLS"]
    assert "seed: label=cidata" in console
    assert f"kib={4 * 1024 - 4}" in console
    assert console.count(f"read={PLAIN.decode()}") == 2
    assert "sectors=16384 serial=write-luks" in seen["write-luks"]
    assert "sectors=14336 serial=write-flat" in seen["write-flat"]

    # What is on the host is not what the guest wrote, and no process has the key in its arguments.
    bench.driver.destroy(made)
    for name in ("write-luks", "write-flat"):
        assert PLAIN not in bench.place(made, name).path.read_bytes()
    assert PLAIN[:8] not in cd.path.read_bytes()

    # A daemon that forgot the secrets gets them again; the guest finds its data.
    bench.daemon.kill_daemon()
    bench.daemon.start_daemon()
    deadline = time.monotonic() + 240
    while not bench.driver.is_connected():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert bench.daemon.virsh("secret-list").split() == []
    bench.driver.start(made)
    bench.console(made, f"read={PLAIN.decode()}", times=4)
    xml = bench.daemon.virsh("dumpxml", made)
    assert "passphrase with" not in xml
    secrets = bench.daemon.virsh("secret-list")
    assert all(f"compute-agent/{made}/{name}" in secrets for name in ("write-luks", "write-flat"))
    qemu = bench.daemon.qemu_pids()[f"vm-{made[:8]}"]
    assert b"passphrase with" not in Path(f"/proc/{qemu}/cmdline").read_bytes()
    # libvirtd may restart while the guest runs, which goes on with its disks.
    bench.daemon.kill_daemon()
    bench.daemon.start_daemon()
    assert qemu == bench.daemon.qemu_pids()[f"vm-{made[:8]}"]
    deadline = time.monotonic() + 240
    while not bench.driver.is_connected():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert bench.driver.get(made).power == "running"


def test_a_missing_or_wrong_key_is_named_at_the_start(bench: Bench):
    made = bench.make(RootDisk(size_mib=1, encryption=Encryption(key="k1")), start=False)
    (bench.keys / "k1").rename(bench.keys / "k2")
    with pytest.raises(FailedPrecondition) as caught:
        bench.driver.start(made)
    assert caught.value.code == "encryption_key_missing"
    assert bench.driver.get(made).power == "stopped"


def test_the_boot_order_is_that_of_the_spec(bench: Bench, tmp_path: Path):
    images = {
        "root": raw(tmp_path / "root.raw", speaking_sector("booted root"), MIB),
        "second": raw(tmp_path / "second.raw", speaking_sector("booted second"), MIB),
        "cd": raw(tmp_path / "cd.iso", speaking_cd("booted cd")),
    }
    disks = [
        DataDisk(kind="data", name="second", size_mib=1, image=SOURCE, bus="sata"),
        CdromDisk(kind="cdrom", name="cd", image=SOURCE),
    ]
    root = RootDisk(size_mib=1)
    for order, text in ([], "root"), (["second"], "second"), (["cd", "second"], "cd"):
        made = bench.make(root, images, disks=disks, boot=Boot(order=order), vnc=True)
        bench.console(made, f"booted {text}")
    # An installation: nothing is on the root disk yet.
    made = bench.make(root, {name: images[name] for name in ("cd",)}, disks=disks[1:], vnc=True)
    bench.console(made, "booted cd")


def test_a_guest_boots_from_a_logical_volume(bench: Bench, guest: PreparedImage):
    disks = [DataDisk(kind="data", name="write-luks", size_mib=8, backend="thin", encryption=Encryption(key="k1"))]
    made = bench.make(RootDisk(size_mib=90, backend="thick"), {"root": guest}, disks=disks, memory_mib=128)
    console = bench.console(made, "guest: tick 1")
    assert "guest: boots=1" in console
    assert f"disk_sectors={92 * 2048}" in console  # whole extents
    assert f"read={PLAIN.decode()}" in console
    place = bench.place(made, "root")
    assert (place.kind, place.path.is_block_device()) == ("block", True)
    assert str(place.path) in bench.driver.details(made).disk_paths
    xml = bench.daemon.virsh("dumpxml", made)
    assert "<disk type='block' device='disk'>" in xml
    names = list(bench.lvm.volumes)
    assert len(names) == 2
    assert PLAIN not in bench.place(made, "write-luks").path.read_bytes()
    bench.remove(made)
    assert bench.left() == []
    assert not (bench.lvm.discarded / f"{made}.root").read_bytes().strip(b"\0")


def test_libvirt_takes_many_disks_on_every_bus(bench: Bench, tmp_path: Path):
    cd = raw(tmp_path / "cd.iso", _iso("MANY", {}))
    for bus in ("virtio", "sata", "scsi"):
        disks = [DataDisk(kind="data", name=f"d{n}", size_mib=1, bus=bus, backend="flat") for n in range(18)]
        disks += [CdromDisk(kind="cdrom", name=f"cd{n}", image=SOURCE) for n in range(2)]
        root = RootDisk(size_mib=1, bus=bus, backend="flat")
        made = bench.make(root, {"cd0": cd, "cd1": cd}, disks=disks, seed=Seed())
        assert len(bench.driver.details(made).disk_paths) == 19
        bench.remove(made)


def test_access_modes_reach_qemu(bench: Bench):
    disks = [
        DataDisk(kind="data", name="ring", size_mib=1, io="io_uring", cache="none", backend="flat"),
        DataDisk(kind="data", name="native", size_mib=1, io="native", cache="directsync"),
        DataDisk(kind="data", name="cached", size_mib=1, cache="writethrough", discard=False),
        DataDisk(kind="data", name="auto", size_mib=1, backend="thick"),
    ]
    made = bench.make(RootDisk(size_mib=1), disks=disks)
    xml = bench.daemon.virsh("dumpxml", made)
    spec = bench.driver.get(made).spec
    tuning = bench.driver._storage.files(made, spec).tuning
    assert tuning["cached"].io == "threads"
    assert "discard='ignore'" in xml
    for name, tuned in tuning.items():
        assert f"cache='{tuned.cache}'" in xml, name
        assert f"io='{tuned.io}'" in xml, name
    if tuning["native"].cache == "directsync":
        assert tuning["native"].io == "native"
