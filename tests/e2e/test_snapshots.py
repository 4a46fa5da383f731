"""Exports and snapshots of guests that run, write and count: what is in the image, and where the guest goes on."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support import guests
from support.agent_process import AgentProcess
from support.fleet import World
from support.guests import UP, boots_on_disk
from support.uploads import Uploads

from agent.messages.commands import (
    InstanceDelete,
    InstanceShow,
    InstanceStart,
    InstanceStop,
)
from agent.messages.spec import ImageSource, RootDisk, Seed
from agent.messages.verbs_snapshot import (
    ExportTarget,
    InstanceExport,
    SnapshotCreate,
    SnapshotDelete,
    SnapshotList,
    SnapshotRevert,
)
from devstack.guest_image import GuestImage
from devstack.libvirtd import PrivateLibvirtd

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(900)]

MIB = 1 << 20


class Host(guests.Host):
    """A host with an export store."""

    def __init__(self, world: World, agent: AgentProcess, source: ImageSource, store: Path) -> None:
        super().__init__(world, agent, source)
        self.store = store

    async def to_raw(self, path: Path) -> bytes:
        raw = path.with_suffix(".check")
        command = ["qemu-img", "convert", "-f", path.suffix[1:], "-O", "raw", str(path), str(raw)]
        await asyncio.to_thread(subprocess.run, command, check=True)
        data = await asyncio.to_thread(raw.read_bytes)
        raw.unlink()
        return data


@pytest.fixture
async def host(world: World, libvirtd: PrivateLibvirtd, source: ImageSource, bootable: GuestImage, tmp_path: Path) -> Host:
    store = tmp_path / "store"
    store.mkdir()
    settings = {
        "images": {"file_roots": [str(bootable.path.resolve().parent), str(store)]},
        "exports": {"stores": {"main": str(store)}, "allowed_hosts": ["127.0.0.1"]},
    }
    agent = await world.libvirt_agent(libvirtd, settings=settings)
    await agent.start()
    return Host(world, agent, source, store)


def counted(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"guest: wrote (\d+)\r?\n", text)]


def check(disk: bytes, written: str) -> int:
    """Expect what the guest said it wrote, and one moment of what it goes on writing; the counter in the image."""
    assert hashlib.sha256(disk[80 * MIB : 88 * MIB]).hexdigest() == written
    first, second = (int(disk[at : at + 511].strip(b" \0\n") or b"0") for at in (100 * MIB, 101 * MIB))
    assert first - second in (0, 1)
    return second


async def test_exports_of_a_guest_that_writes(host: Host, libvirtd: PrivateLibvirtd) -> None:
    guest = await host.create(host.spec("writer", seed=Seed(user_data="#writer\n")))
    text = await host.console(guest, r"guest: wrote 3\r?\n")
    written = re.search(r"guest: data sha256=([0-9a-f]{64})", text)
    assert written is not None
    before = (await host.do(InstanceShow(), guest))["disk_paths"]

    live = await host.do(InstanceExport(target=ExportTarget(store="main", name="live")), guest)
    said = await host.said(guest)
    path = host.store / "live.qcow2"
    assert live["live"]
    assert live["disks"][0]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    info = await asyncio.to_thread(subprocess.run, ["qemu-img", "info", str(path)], capture_output=True, text=True)
    assert "backing" not in info.stdout
    assert 3 <= check(await host.to_raw(path), written[1]) <= max(counted(said)) + 1

    # It goes on, on the same disk and in the same boot.
    text = await host.console(guest, rf"guest: wrote {max(counted(said)) + 2}\r?\n")
    assert text.count(UP) == 1
    assert (await host.do(InstanceShow(), guest))["disk_paths"] == before

    async with Uploads(answers=[503]) as server:
        target = ExportTarget(url=server.url("bucket/copy.qcow2?secret=1"))
        sent = await host.do(InstanceExport(target=target, compress=True), guest)
        assert server.received == {"bucket/copy.qcow2": sent["disks"][0]["sha256"]}
        assert server.lengths == [sent["disks"][0]["size_bytes"]] * 2
        assert sent["disks"][0]["url"] == server.url("bucket/copy.qcow2")
        received = host.store / "received.qcow2"
        received.write_bytes(server.bodies["bucket/copy.qcow2"])
    check(await host.to_raw(received), written[1])

    await host.do(InstanceStop(force=True), guest)
    cold = await host.do(InstanceExport(target=ExportTarget(store="main", name="cold"), format="raw"), guest)
    assert not cold["live"]
    check((host.store / "cold.raw").read_bytes(), written[1])
    assert (host.store / "cold.raw").stat().st_blocks * 512 < 64 * MIB

    image = ImageSource(url=path.as_uri(), sha256=live["disks"][0]["sha256"], format="qcow2")
    other = await host.create(host.spec("copy", root_disk=RootDisk(size_mib=256, image=image)))
    await host.console(other, r"guest: boots=2")
    for instance in (guest, other):
        await host.do(InstanceDelete(), instance)
    await host.world.judge(host.agent, (), libvirtd)


async def test_a_snapshot_takes_memory_and_disk_back(host: Host, libvirtd: PrivateLibvirtd) -> None:
    guest = await host.create(host.spec("counter", seed=Seed(user_data="#writer\n")))
    await host.console(guest, r"guest: wrote 3\r?\n")
    made = await host.do(SnapshotCreate(name="one", description="while it counts"), guest)
    assert (made["snapshot"]["memory"], made["observed"]) == (True, "running")
    text = await host.said(guest)
    at = max(counted(text))
    # The guest goes on after it was paused for the snapshot.
    text = await host.console(guest, rf"guest: wrote {at + 3}\r?\n")

    reverted = await host.do(SnapshotRevert(name="one"), guest)
    assert (reverted["desired"], reverted["observed"]) == ("running", "running")
    text = await host.console(guest, r"guest: wrote \d+\r?\n", after=len(text) + 40)
    numbers = counted(text)
    drop = next(b for a, b in itertools.pairwise(numbers) if b < a)
    assert drop <= at + 1, "the counter in the guest's memory goes on where the snapshot was"
    assert text.count(UP) == 1, "it was not booted anew"

    # The disk went back with it, also with the guest down, and the counter there is not ahead of the snapshot.
    await host.do(InstanceStop(force=True), guest)
    await host.do(SnapshotCreate(name="off"), guest)
    await host.do(InstanceStart(), guest)
    await host.console(guest, r"guest: boots=2", after=len(text))
    back = await host.do(SnapshotRevert(name="off"), guest)
    assert (back["desired"], back["observed"]) == ("stopped", "stopped")
    (disk,) = (await host.do(InstanceShow(), guest))["disk_paths"]
    assert await asyncio.to_thread(boots_on_disk, Path(disk)) == 1, "what the second boot wrote is gone"
    await host.do(InstanceStart(), guest)
    held = await host.do(SnapshotRevert(name="one", start=False), guest)
    assert (held["desired"], held["observed"]) == ("paused", "paused")
    await host.do(SnapshotDelete(name="off"), guest)
    assert [one["name"] for one in (await host.do(SnapshotList(), guest))["snapshots"]] == ["one"]
    await host.do(InstanceDelete(), guest)
    await host.world.judge(host.agent, (), libvirtd)


@pytest.mark.parametrize("part", ["store", "staging_dir"])
async def test_without_space_nothing_is_left(
    world: World, libvirtd: PrivateLibvirtd, tmp_path: Path, part: str
) -> None:
    small, store = tmp_path / "small", tmp_path / "store"
    for folder in (small, store):
        folder.mkdir()
    await asyncio.to_thread(subprocess.run, ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(small)], check=True)
    try:
        exports: dict[str, Any] = {"stores": {"main": str(small if part == "store" else store)}}
        if part == "staging_dir":
            exports["staging_dir"] = str(small)
        agent = await world.libvirt_agent(libvirtd, settings={"exports": exports})
        await agent.start()
        image = tmp_path / "full.raw"
        image.write_bytes(b"\1" * (4 * MIB))
        source = ImageSource(
            url=image.as_uri(), sha256=hashlib.sha256(image.read_bytes()).hexdigest(), format="raw"
        )
        guest = await world.create(agent.host, root_disk=RootDisk(size_mib=8, image=source))
        for kind in ("qcow2", "raw"):
            command = InstanceExport(target=ExportTarget(store="main", name="copy"), format=kind)
            failed = await world.run(agent.host, command, guest)
            assert failed.kind == "operation.failed", failed.data
            assert (failed.data["error"]["code"], failed.data["undone"]) == ("no_space", True)
        assert list(small.iterdir()) == list(store.iterdir()) == []
        shown = await world.succeed(agent.host, InstanceShow(), guest)
        assert shown.data["result"]["observed"] == "running"
        await world.judge(agent, [guest], libvirtd)
    finally:
        await asyncio.to_thread(subprocess.run, ["umount", "-l", str(small)], check=True)
