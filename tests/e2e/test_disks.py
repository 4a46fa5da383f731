"""Disks and boot files of every kind through the whole agent: fetched, made, seen by the guest, removed."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import uuid
from pathlib import Path

import pytest
from support.fleet import World

from agent.drivers.libvirt.seed import _iso
from agent.messages.commands import ConsoleLog, InstanceCreate, InstanceDelete, InstanceShow, OperationShow
from agent.messages.spec import ImageSource, InstanceSpec, RootDisk
from agent.messages.spec_disks import (
    Boot,
    BootFile,
    CdromDisk,
    DataDisk,
    Encryption,
    EphemeralDisk,
    KernelBoot,
    SwapDisk,
)
from devstack.guest_image import COMMAND_LINE, GuestImage
from devstack.libvirtd import PrivateLibvirtd

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(900)]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


async def test_an_instance_with_disks_of_every_kind(
    world: World, libvirtd: PrivateLibvirtd, source: ImageSource, bootable: GuestImage, tmp_path: Path
) -> None:
    (tmp_path / "tools.iso").write_bytes(_iso("TOOLS", {"readme": b"hello"}))
    (tmp_path / "data.raw").write_bytes(b"content of a data disk".ljust(1 << 20, b"\0"))
    keys = tmp_path / "keys"
    keys.mkdir()
    (keys / "k1").write_text("the passphrase of this test")
    (keys / "k1").chmod(0o600)

    initrd = tmp_path / "initrd.cpio"
    initrd.write_bytes(gzip.decompress(bootable.initrd.read_bytes()))

    def image(name: str) -> ImageSource:
        path = tmp_path / name
        return ImageSource(url=path.as_uri(), sha256=sha256(path), format="raw")

    def file(path: Path) -> BootFile:
        return BootFile(url=path.resolve().as_uri(), sha256=sha256(path))

    roots = {"images": {"file_roots": [str(bootable.path.resolve().parent), str(tmp_path)]}}
    own = {"uri": libvirtd.uri, "virt_type": "qemu", "keys_dir": str(keys), "luks_iter_time_ms": 10}
    agent = await world.agent(driver="libvirt", driver_settings=own, settings=roots)
    await agent.start()
    spec = InstanceSpec(
        name="many",
        vcpus=1,
        memory_mib=128,
        root_disk=RootDisk(size_mib=128, image=source),
        disks=[
            DataDisk(kind="data", name="data", size_mib=2, image=image("data.raw"), bus="scsi"),
            EphemeralDisk(kind="ephemeral", name="scratch", size_mib=8),
            SwapDisk(kind="swap", name="swap", size_mib=4),
            CdromDisk(kind="cdrom", name="tools", image=image("tools.iso")),
            DataDisk(kind="data", name="write-secret", size_mib=4, encryption=Encryption(key="k1")),
        ],
        boot=Boot(
            kernel=KernelBoot(
                kernel=file(bootable.kernel), initrd=file(initrd), cmdline=f"{COMMAND_LINE} test.mark=kernel"
            )
        ),
    )
    guest = str(uuid.uuid4())
    created = await world.succeed(agent.host, InstanceCreate(spec=spec), guest)
    assert created.data["result"]["observed"] == "running"
    async with asyncio.timeout(240):
        while True:
            log = (await world.succeed(agent.host, ConsoleLog(max_bytes=65536), guest)).data["result"]["text"]
            if "guest: tick 3" in log:
                break
            await asyncio.sleep(0.25)
    assert "guest: mark=kernel" in log
    assert "sectors=262144 serial=root" in log
    assert "sectors=4096 serial=data type=none" in log
    assert "serial=scratch type=ext4 label=scratch" in log
    assert "serial=swap type=swap label=swap" in log
    assert "type=iso9660 label=TOOLS" in log
    assert "read=PLAIN TEXT OF THE GUEST" in log
    folder = agent.state_dir / "instances" / guest
    assert b"PLAIN TEXT OF THE GUEST" not in (folder / "disk-write-secret.qcow2").read_bytes()

    shown = (await world.succeed(agent.host, OperationShow(operation_id=created.data["operation_id"]))).data["result"]
    images = ["image", "image:data", "image:tools", "image:boot.kernel", "image:boot.initrd"]
    assert [step["name"] for step in shown["steps"]] == ["claim", *images, "storage", "define", "start"]
    paths = (await world.succeed(agent.host, InstanceShow(), guest)).data["result"]["disk_paths"]
    assert len(paths) == 5

    refused = spec.model_copy(update={"name": "other", "root_disk": RootDisk(size_mib=1, backend="nowhere")})
    failed = await world.run(agent.host, InstanceCreate(spec=refused), str(uuid.uuid4()))
    assert failed.data["error"]["code"] == "unknown_backend"

    await world.succeed(agent.host, InstanceDelete(), guest)
    assert libvirtd.virsh("secret-list").split() == []
    for path in (path for path in agent.directory.rglob("*") if path.is_file()):
        assert b"passphrase of this test" not in path.read_bytes()
    await world.judge(agent, (), libvirtd)
