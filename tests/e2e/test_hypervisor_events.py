"""What real QEMU reports about a guest, seen on the bus as the typed event that it is.

Each is provoked behind the agent's back, through virsh, the guest itself or its QEMU, since the agent's own commands are
proven elsewhere.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import signal
import struct
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from support.agent_process import AgentProcess
from support.fleet import World
from support.host import clean_libvirt

from agent.messages.commands import ConsoleLog, InstanceCreate, InstanceDelete, InstanceStart
from agent.messages.events import Event
from agent.messages.spec import ImageSource, InstanceSpec, RootDisk, UserNic
from agent.messages.verb import CommandData
from devstack.guest_image import GuestImage
from devstack.libvirtd import PrivateLibvirtd

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(900)]

MIB = 1024 * 1024
EVENT_S = 120.0


# --- the bench --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_fs() -> Iterator[Path]:
    """A file system that a test can fill up; above 1 GiB, or the host would have no DISK_GB to promise."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    folder = Path(tempfile.mkdtemp(prefix="lvfs-"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1100m,mode=0755", "tmpfs", str(folder)], check=True, timeout=240)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=240)
        folder.rmdir()


@pytest.fixture(scope="module")
def module_daemons(
    small_fs: Path, request: pytest.FixtureRequest, session_libvirtd: PrivateLibvirtd
) -> Iterator[tuple[PrivateLibvirtd, PrivateLibvirtd]]:
    """Two hosts: the agent's, and one to migrate to. After the mount, which they would not see otherwise."""
    del session_libvirtd  # named for its skips
    cache = request.config.cache.mkdir("libvirt-capabilities")
    folder = Path(tempfile.mkdtemp(prefix="lv-"))
    daemons = [PrivateLibvirtd(folder / name, capabilities_cache=cache) for name in ("a", "b")]
    assert small_fs.is_mount()
    try:
        for daemon in daemons:
            daemon.start()
        yield daemons[0], daemons[1]
    finally:
        for daemon in daemons:
            daemon.stop()
        shutil.rmtree(folder)


@pytest.fixture
def daemon(module_daemons: tuple[PrivateLibvirtd, PrivateLibvirtd]) -> Iterator[PrivateLibvirtd]:
    yield module_daemons[0]
    for one in module_daemons:
        clean_libvirt(one)


class Host:
    """One agent, and its hypervisor as somebody else uses it."""

    def __init__(self, world: World, daemon: PrivateLibvirtd, agent: AgentProcess, images: Path) -> None:
        self.world = world
        self.daemon = daemon
        self.agent = agent
        self.images = images

    async def do(self, data: CommandData, instance_id: str) -> dict[str, Any]:
        return (await self.world.succeed(self.agent.host, data, instance_id)).data["result"]

    async def virsh(self, *arguments: str) -> str:
        return await asyncio.to_thread(self.daemon.virsh, *arguments)

    def boot_sector(self, code: bytes, size: int = MIB) -> ImageSource:
        """An image whose whole content is a boot sector."""
        path = self.images / f"{hashlib.sha256(code).hexdigest()[:12]}.raw"
        path.write_bytes(code.ljust(510, b"\0") + b"\x55\xaa" + bytes(size - 512))
        return self.image(path, "raw")

    def image(self, path: Path, kind: str) -> ImageSource:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return ImageSource.model_validate({"url": path.as_uri(), "sha256": digest, "format": kind})

    async def create(self, name: str, source: ImageSource | None = None, *, start: bool = True, **changes: Any) -> str:
        values: dict[str, Any] = {
            "name": name, "vcpus": 1, "memory_mib": 128, "root_disk": RootDisk(size_mib=256, image=source), "rng": False,
        }  # fmt: skip
        instance_id = str(uuid.uuid4())
        await self.do(InstanceCreate(spec=InstanceSpec(**(values | changes)), start=start), instance_id)
        return instance_id

    async def console(self, instance_id: str, wanted: str) -> None:
        async with asyncio.timeout(240):
            # The console has no events.
            while wanted not in (await self.do(ConsoleLog(), instance_id))["text"]:
                await asyncio.sleep(0.25)

    @property
    def mark(self) -> int:
        return self.world.recorder.mark

    async def event(
        self, kind: str, instance_id: str, since: int = 0, where: Callable[[dict[str, Any]], bool] = lambda _data: True
    ) -> Event:
        found = await self.world.recorder.wait_for(
            self.agent.host, kind, timeout_s=EVENT_S, since=since,
            where=lambda event: event.subject == instance_id and where(event.data),
        )  # fmt: skip
        assert found.data["instance_id"] == instance_id
        assert found.sequence is not None
        return found

    async def state(self, instance_id: str, observed: str, reasons: str, since: int) -> None:
        found = await self.event("instance.state", instance_id, since, lambda data: data["observed"] == observed)
        assert found.data["reason"] in reasons.split()

    async def gone(self, instance_id: str) -> None:
        await self.do(InstanceDelete(), instance_id)
        await self.world.judge(self.agent, (), self.daemon)


@pytest.fixture
async def host(world: World, daemon: PrivateLibvirtd, bootable: GuestImage, tmp_path: Path) -> Host:
    images = tmp_path / "images"
    images.mkdir()
    agent = await world.libvirt_agent(
        daemon, settings={"images": {"file_roots": [str(images), str(bootable.path.resolve().parent)]}}
    )
    await agent.start()
    return Host(world, daemon, agent, images)


# --- lifecycle and reboot ---------------------------------------------------------------------------------------------


async def test_lifecycle(host: Host) -> None:
    """Whatever somebody else does to the domain is told, with what was done and what it was before."""
    guest = await host.create("life")
    pid = (await asyncio.to_thread(host.daemon.qemu_pids))["life"]
    for command, observed, reason in (
        (("suspend", "life"), "paused", "paused"),
        (("resume", "life"), "running", "resumed"),
        (("managedsave", "life"), "suspended", "saved"),
        # QEMU always begins paused, and libvirt tells of its resuming before it tells of the start.
        (("start", "life"), "running", "restored resumed"),
        (("destroy", "life"), "stopped", "destroyed"),
        (("start", "life"), "running", "booted resumed"),
    ):
        mark = host.mark
        await host.virsh(*command)
        await host.state(guest, observed, reason, mark)
    mark, killed = host.mark, (await asyncio.to_thread(host.daemon.qemu_pids))["life"]
    assert killed != pid
    os.kill(killed, signal.SIGKILL)
    await host.event("instance.state", guest, mark, lambda data: data["observed"] == "crashed")
    await host.gone(guest)


async def test_reboot(host: Host) -> None:
    """One event for one reset, though QEMU sends several."""
    guest = await host.create("reset")
    for _ in range(2):
        mark = host.mark
        await host.virsh("reset", "reset")
        await host.event("instance.rebooted", guest, mark)
        # What QEMU repeats comes within a second, and nothing announces that no more comes.
        await asyncio.sleep(1.2)
        await host.world.settle(host.agent.host)
        assert len(host.world.recorder.events(host.agent.host, "instance.rebooted", since=mark)) == 1
    await host.gone(guest)


# --- disk -------------------------------------------------------------------------------------------------------------


def writing_boot_sector() -> bytes:
    """It writes one sector into every 64 KiB of its disk, by BIOS int 13h, and begins again at the end."""
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
    return code.ljust(0x40, b"\0") + struct.pack("<BBHHHQ", 16, 0, 1, start, 0, 2048)


async def test_io_error_on_a_full_host(
    world: World, daemon: PrivateLibvirtd, small_fs: Path, tmp_path: Path
) -> None:
    """The guest is paused and says why; with space again it goes on where it was, by itself.

    That it waits for space outlives the agent and the connection to libvirtd.
    """
    images = tmp_path / "images"
    images.mkdir()
    agent = await world.agent(
        driver="libvirt",
        driver_settings={"uri": daemon.uri, "virt_type": "qemu", "instances_dir": str(small_fs / "i"), "min_free_mib": 0},
        settings={"capacity": {"reserved_disk_gib": 0}},
    )
    await agent.start()
    host = Host(world, daemon, agent, images)
    filler, facts = small_fs / "filler", os.statvfs(small_fs)
    try:
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, facts.f_bavail * facts.f_frsize - 2 * MIB)
        image = host.boot_sector(writing_boot_sector())
        guest = await host.create("writer", image, memory_mib=32, vnc=True)
        error = await host.event("instance.io-error", guest)
        disk = str(small_fs / "i" / guest / "disk.qcow2")
        assert error.data == {
            "instance_id": guest, "device": "virtio-disk0", "path": disk, "reason": "enospc", "action": "pause",
        }  # fmt: skip
        await host.state(guest, "paused", "io-error", 0)
        due = await host.event("instance.policy", guest)
        assert (due.data["cause"], due.data["action"]) == ("on-io-error", "resume")
        await agent.restart()
        mark = host.mark
        await asyncio.to_thread(daemon.kill_daemon)
        await asyncio.to_thread(daemon.start_daemon)
        await host.state(guest, "paused", "io-error", mark)
        assert not world.recorder.events(agent.host, "operation.succeeded", since=mark)
        mark = host.mark
        filler.unlink()
        await host.state(guest, "running", "resumed", mark)
        await world.settle(agent.host)
        assert not host.world.recorder.events(agent.host, "instance.io-error", since=mark)
        await host.gone(guest)
        assert not list((small_fs / "i").iterdir())
    finally:
        filler.unlink(missing_ok=True)


async def test_block_job(host: Host, source: ImageSource) -> None:
    """A pull, which ends by itself, and an active commit, which is ready first and ends when it is told to."""
    guest = await host.create("disk", source)
    await host.virsh("blockpull", "disk", "vda", "--wait")
    done = await host.event("instance.block-job", guest)
    assert done.data == {"instance_id": guest, "device": "vda", "job": "pull", "status": "completed"}
    overlay = host.agent.state_dir / "instances" / guest / "over.qcow2"
    mark = host.mark
    await host.virsh(
        "snapshot-create-as", "disk", "--disk-only", "--no-metadata", "--diskspec", f"vda,file={overlay}"
    )  # fmt: skip
    await host.virsh("blockcommit", "disk", "vda", "--active", "--pivot", "--wait")
    for status in ("ready", "completed"):
        found = await host.event("instance.block-job", guest, mark, lambda data, status=status: data["status"] == status)
        assert (found.data["device"], found.data["job"]) == ("vda", "active-commit")
    await host.gone(guest)


async def test_job_completed(host: Host, tmp_path: Path) -> None:
    """A backup is a job of the domain and, under it, of its disk."""
    guest = await host.create("copied")
    xml = tmp_path / "backup.xml"
    copy = tmp_path / "copy.qcow2"
    xml.write_text(
        f"<domainbackup mode='push'><disks><disk name='vda' type='file'><target file='{copy}'/>"
        "<driver type='qcow2'/></disk></disks></domainbackup>"
    )
    await host.virsh("backup-begin", "copied", str(xml))
    done = await host.event("instance.job-completed", guest)
    assert (done.data["operation"], done.data["succeeded"]) == ("backup", True)
    assert "disk_total" in done.data["figures"]
    block = await host.event("instance.block-job", guest)
    assert (block.data["job"], block.data["status"]) == ("backup", "completed")
    await host.gone(guest)


# --- what the guest has to do with ------------------------------------------------------------------------------------


async def test_device_removed(host: Host, source: ImageSource) -> None:
    """Only when the guest has let go of it."""
    mac = "52:54:00:00:00:07"
    guest = await host.create("nics", source, nics=[UserNic(type="user", mac=mac)])
    await host.console(guest, "guest: boots=")
    await host.virsh("detach-interface", "nics", "user", "--mac", mac, "--live")
    gone = await host.event("instance.device-removed", guest)
    assert gone.data == {"instance_id": guest, "alias": "net0", "removed": True}
    await host.gone(guest)


async def test_balloon(host: Host, source: ImageSource) -> None:
    guest = await host.create("balloon", source)
    await host.console(guest, "guest: boots=")
    for size in (112, 128):
        mark = host.mark
        await host.virsh("setmem", "balloon", f"{size}M", "--live")
        await host.event("instance.balloon", guest, mark, lambda data, size=size: data["actual_mib"] == size)
    await host.gone(guest)


def archive(name: str, data: bytes, mode: int) -> bytes:
    """A cpio archive (newc) with one file; the kernel unpacks several one after the other."""
    found = b""
    for path, content, kind in ((name, data, mode), ("TRAILER!!!", b"", 0)):
        fields = (0, kind, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(path) + 1, 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        entry = header + path.encode() + b"\0"
        entry += bytes(-len(entry) % 4) + content
        found += entry + bytes(-len(entry) % 4)
    return found


AGENT = """
(
  for port in /dev/vport*p*; do
    exec 3<>"${port}"
    sleep 2
    exec 3>&-
  done
) &
load second
"""


@pytest.fixture
def talkative(bootable: GuestImage, tmp_path: Path) -> Path:
    """The guest, with an init that opens the guest agent's channel for two seconds, as qemu-ga does for ever."""
    init = (Path(__file__).resolve().parents[2] / "devstack" / "guest_init.sh").read_text()
    assert init.count("\nload second\n") == 1
    changed = init.replace("\nload second\n", AGENT).encode()
    initrd, raw = tmp_path / "initrd.img", tmp_path / "talkative.raw"
    base = bootable.initrd.read_bytes()
    initrd.write_bytes(base + bytes(-len(base) % 4) + archive("init", changed, 0o100755))
    for command in (
        ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(bootable.path), str(raw)],
        ["mcopy", "-o", "-i", f"{raw}@@{MIB}", str(initrd), "::/initrd.img"],
    ):
        environment = os.environ | {"MTOOLS_SKIP_CHECK": "1"}
        subprocess.run(command, check=True, timeout=60, env=environment, stdin=subprocess.DEVNULL)
    return raw


async def test_agent_lifecycle(host: Host, talkative: Path) -> None:
    """The guest agent's channel is opened and closed from inside the guest."""
    image = talkative.rename(host.images / talkative.name)
    guest = await host.create("talker", host.image(image, "raw"))
    opened = await host.event("instance.agent-lifecycle", guest, 0, lambda data: data["state"] == "connected")
    assert opened.data["reason"] == "channel"
    # Another one was told at the start of the domain: nobody had opened the channel yet.
    first = await host.event("instance.agent-lifecycle", guest, 0, lambda data: data["reason"] == "domain-started")
    assert first.data["state"] == "disconnected"
    closed = await host.event(
        "instance.agent-lifecycle", guest, 0, lambda data: (data["state"], data["reason"]) == ("disconnected", "channel")
    )
    assert first.sequence < opened.sequence < closed.sequence
    await host.gone(guest)


WATCHDOG = bytes.fromhex("ba4304 b00e ee f4 ebfd")
"""mov dx, 0x443; mov al, 14; out dx, al; hlt for ever: arms QEMU's ib700, which then fires after two seconds."""


async def test_watchdog(host: Host) -> None:
    """A spec has none, but an administrator may have given the domain one."""
    guest = await host.create("dog", host.boot_sector(WATCHDOG), start=False, memory_mib=32)
    domain = ET.fromstring(await host.virsh("dumpxml", "--inactive", "dog"))
    devices = domain.find("devices")
    assert devices is not None
    for given in devices.findall("watchdog"):
        devices.remove(given)
    ET.SubElement(devices, "watchdog", {"model": "ib700", "action": "pause"})
    xml = host.images / "dog.xml"
    xml.write_text(ET.tostring(domain, encoding="unicode"))
    await host.virsh("define", str(xml))
    await host.do(InstanceStart(), guest)
    mark = 0
    fired = await host.event("instance.watchdog", guest, mark)
    assert fired.data == {"instance_id": guest, "action": "pause"}
    await host.state(guest, "paused", "watchdog", mark)
    await host.gone(guest)


# --- migration --------------------------------------------------------------------------------------------------------


async def test_migration_iteration(host: Host, module_daemons: tuple[PrivateLibvirtd, PrivateLibvirtd]) -> None:
    """Somebody migrates the guest away, with its disk on storage that both hosts have."""
    other = module_daemons[1]
    guest = await host.create("mover", host.boot_sector(writing_boot_sector()), memory_mib=32)
    mark = host.mark
    await host.virsh(
        "migrate", "--live", "--unsafe", "--persistent", "mover", other.uri,
        "--migrateuri", f"unix://{host.daemon.directory / 'm.sock'}",
    )  # fmt: skip
    first = await host.event("instance.migration-iteration", guest, mark)
    assert first.data["iteration"] == 1
    done = await host.event("instance.job-completed", guest, mark)
    assert (done.data["operation"], done.data["succeeded"]) == ("migration-out", True)
    assert done.data["figures"]["memory_total"] > 0
    await host.state(guest, "stopped", "migrated", mark)
    assert "mover" in await asyncio.to_thread(other.qemu_pids)
    await asyncio.to_thread(other.virsh, "destroy", "mover")
    await host.gone(guest)
