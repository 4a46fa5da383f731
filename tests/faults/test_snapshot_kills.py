"""kill -9 of the agent in exports, backups and snapshots, on real QEMU: finished or taken back, nothing left, told once."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path

import pytest
from support.agent_process import AgentProcess
from support.fleet import World
from support.recorder import describe

from agent.controller.failures import FINAL_KINDS
from agent.messages.commands import InstanceDelete, InstanceShow, OperationCancel
from agent.messages.spec import RootDisk
from agent.messages.verb import CommandData
from agent.messages.verbs_snapshot import (
    ExportTarget,
    InstanceBackup,
    InstanceExport,
    SnapshotCreate,
    SnapshotDelete,
    SnapshotList,
    SnapshotRevert,
)
from devstack.libvirtd import PrivateLibvirtd

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(120)]


class Bench:
    """An agent on real QEMU with an export store."""

    def __init__(self, world: World, agent: AgentProcess, libvirtd: PrivateLibvirtd, store: Path) -> None:
        self.world = world
        self.agent = agent
        self.libvirtd = libvirtd
        self.store = store

    async def run_and_die(self, data: CommandData, instance_id: str, point: str) -> str:
        """Have the agent killed at a point of a command, and started again; the command's id."""
        await self.agent.stop()
        await self.agent.start(failpoint=f"{data.verb}:{point}")
        command = await self.world.send(self.agent.host, data, instance_id)
        assert await self.agent.wait_ended() == -9, "the failpoint was never reached"
        await self.agent.start()
        return command

    async def succeeded(self, command: str) -> dict[str, object]:
        final = await self.world.recorder.wait_final(self.agent.host, command)
        assert final.kind == "operation.succeeded", describe(final)
        return dict(final.data["result"])

    async def runs(self, instance_id: str) -> None:
        shown = await self.world.succeed(self.agent.host, InstanceShow(), instance_id)
        assert shown.data["result"]["observed"] == "running"

    async def snapshots(self, instance_id: str) -> list[str]:
        event = await self.world.succeed(self.agent.host, SnapshotList(), instance_id)
        return [one["name"] for one in event.data["result"]["snapshots"]]

    def stored(self) -> list[str]:
        return sorted(path.name for path in self.store.iterdir())

    async def judge(self, *instances: str) -> None:
        await self.world.judge(self.agent, instances, self.libvirtd)


@pytest.fixture
async def bench(world: World, libvirtd: PrivateLibvirtd, tmp_path: Path) -> Bench:
    store = tmp_path / "store"
    store.mkdir()
    agent = await world.libvirt_agent(libvirtd, settings={"exports": {"stores": {"main": str(store)}}})
    await agent.start()
    return Bench(world, agent, libvirtd, store)


# Every other boundary: tests/unit/test_crash_points.py, on the fake.
@pytest.mark.parametrize("point", ["export:after", "publish-root:after"])
async def test_export(bench: Bench, point: str) -> None:
    guest = await bench.world.create(bench.agent.host)
    target = ExportTarget(store="main", name="copy")
    command = await bench.run_and_die(InstanceExport(target=target), guest, point)
    await bench.succeeded(command)
    assert bench.stored() == ["copy.qcow2", "copy.qcow2.sha256"]
    await asyncio.to_thread(subprocess.run, ["sha256sum", "-c", "copy.qcow2.sha256"], cwd=bench.store, check=True)
    await bench.runs(guest)
    await bench.judge(guest)


@pytest.mark.parametrize("point", ["note:after", "rotate:after"])
async def test_backup(bench: Bench, point: str) -> None:
    guest = await bench.world.create(bench.agent.host)
    data = InstanceBackup(series="daily", keep=1, store="main")
    await bench.world.succeed(bench.agent.host, data, guest)
    command = await bench.run_and_die(data, guest, point)
    result = await bench.succeeded(command)
    assert len(result["backups"]) == len(result["removed"]) == 1
    assert len(bench.stored()) == 3
    await bench.judge(guest)


async def random_guest(bench: Bench, folder: Path, size_mib: int, *, live: bool) -> tuple[str, Path]:
    """An instance whose disk is full of data that take a while to be copied."""
    guest = await bench.world.create(bench.agent.host, root_disk=RootDisk(size_mib=size_mib))
    disk = bench.agent.state_dir / "instances" / guest / "disk.qcow2"
    await asyncio.to_thread(bench.libvirtd.virsh, "destroy", f"i-{guest[:8]}")

    def fill() -> None:
        raw = folder / "random.raw"
        with raw.open("wb") as file:
            for _ in range(size_mib // 4):
                file.write(os.urandom(1 << 22))
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(disk)], check=True)
        raw.unlink()

    await asyncio.to_thread(fill)
    if live:
        await asyncio.to_thread(bench.libvirtd.virsh, "start", f"i-{guest[:8]}")
    return guest, disk


async def begun(bench: Bench, guest: str) -> str:
    """Begin an export and wait until bytes are being copied; the command's id."""
    data = InstanceExport(target=ExportTarget(store="main", name="copy"))
    mark = bench.world.recorder.mark
    command = await bench.world.send(bench.agent.host, data, guest, progress=True)
    # Where we are slower than the copy, what follows comes after its end: that is right as well.
    await bench.world.recorder.wait_for(
        bench.agent.host, {"operation.progress", *FINAL_KINDS}, since=mark,
        where=lambda event: event.kind != "operation.progress"
        or 0 < event.data.get("done_bytes", 0) < event.data.get("total_bytes", 0),
    )  # fmt: skip
    return command


@pytest.mark.parametrize("live", [True, False], ids=["live", "cold"])
async def test_killed_while_bytes_are_copied(bench: Bench, tmp_path: Path, live: bool) -> None:
    """The job in QEMU, or the qemu-img, that outlived the agent is ended, and the copy made anew."""
    guest, disk = await random_guest(bench, tmp_path, 256, live=live)
    command = await begun(bench, guest)
    await bench.agent.kill()
    assert bench.stored() in ([], ["copy.qcow2", "copy.qcow2.sha256"]), "whole or not there"
    await bench.agent.start()
    await bench.succeeded(command)
    assert bench.stored() == ["copy.qcow2", "copy.qcow2.sha256"]
    if live:
        await asyncio.to_thread(bench.libvirtd.virsh, "destroy", f"i-{guest[:8]}")
    check = ["qemu-img", "compare", str(disk), str(bench.store / "copy.qcow2")]
    await asyncio.to_thread(subprocess.run, check, check=True)
    await bench.world.succeed(bench.agent.host, InstanceDelete(), guest)
    await bench.judge()


async def test_the_guest_ends_while_its_disk_is_copied(bench: Bench, tmp_path: Path) -> None:
    """The backup dies with its QEMU; what the guest left is copied instead."""
    guest, disk = await random_guest(bench, tmp_path, 512, live=True)
    command = await begun(bench, guest)
    await asyncio.to_thread(bench.libvirtd.virsh, "destroy", f"i-{guest[:8]}")
    in_time = command not in bench.world.recorder.finals(bench.agent.host)
    result = await bench.succeeded(command)
    assert result["live"] is False or not in_time
    check = ["qemu-img", "compare", str(disk), str(bench.store / "copy.qcow2")]
    await asyncio.to_thread(subprocess.run, check, check=True)
    await bench.judge(guest)


async def test_cancelled_while_bytes_are_copied(bench: Bench, tmp_path: Path) -> None:
    guest, _disk = await random_guest(bench, tmp_path, 256, live=True)
    command = await begun(bench, guest)
    cancel = await bench.world.run(bench.agent.host, OperationCancel(operation_id=command))
    final = await bench.world.recorder.wait_final(bench.agent.host, command)
    if cancel.kind == "operation.succeeded":
        assert final.kind == "operation.cancelled", describe(final)
        assert bench.stored() == []
    else:
        assert final.kind == "operation.succeeded", describe(final)
    assert "None" in await asyncio.to_thread(bench.libvirtd.virsh, "domjobinfo", f"i-{guest[:8]}")
    await bench.runs(guest)
    await bench.judge(guest)


@pytest.mark.parametrize("point", ["snapshot-running:before", "snapshot-running:after"])
async def test_snapshot(bench: Bench, point: str) -> None:
    guest = await bench.world.create(bench.agent.host)
    command = await bench.run_and_die(SnapshotCreate(name="one"), guest, point)
    await bench.succeeded(command)
    assert await bench.snapshots(guest) == ["one"]
    await bench.runs(guest)
    await bench.world.succeed(bench.agent.host, InstanceDelete(), guest)
    await bench.judge()


@pytest.mark.parametrize("point", ["revert:before", "define:before"])
async def test_revert(bench: Bench, point: str) -> None:
    guest = await bench.world.create(bench.agent.host)
    await bench.world.succeed(bench.agent.host, SnapshotCreate(name="one"), guest)
    before = await asyncio.to_thread(bench.libvirtd.qemu_pids)
    command = await bench.run_and_die(SnapshotRevert(name="one"), guest, point)
    result = await bench.succeeded(command)
    assert (result["desired"], result["observed"]) == ("running", "running")
    assert await asyncio.to_thread(bench.libvirtd.qemu_pids) != before
    marked = await asyncio.to_thread(bench.libvirtd.virsh, "dumpxml", "--inactive", f"i-{guest[:8]}")
    assert "reverted=" not in marked
    await bench.runs(guest)
    await bench.judge(guest)


async def test_a_revert_that_was_done_is_not_done_again(bench: Bench) -> None:
    """What the guest did between the revert and the return of the agent is kept."""
    guest = await bench.world.create(bench.agent.host)
    name = f"i-{guest[:8]}"
    await bench.world.succeed(bench.agent.host, SnapshotCreate(name="one"), guest)
    await bench.agent.stop()
    await bench.agent.start(failpoint="snapshot.revert:revert:after")
    command = await bench.world.send(bench.agent.host, SnapshotRevert(name="one"), guest)
    assert await bench.agent.wait_ended() == -9
    after = await asyncio.to_thread(bench.libvirtd.qemu_pids)
    await bench.agent.start()
    await bench.succeeded(command)
    assert (await asyncio.to_thread(bench.libvirtd.qemu_pids))[name] == after[name]


async def test_delete(bench: Bench) -> None:
    guest = await bench.world.create(bench.agent.host)
    await bench.world.succeed(bench.agent.host, SnapshotCreate(name="one"), guest)
    await bench.succeeded(await bench.run_and_die(SnapshotDelete(name="one"), guest, "remove:after"))
    assert await bench.snapshots(guest) == []
    await bench.judge(guest)


async def test_the_daemon_dies_in_a_snapshot_with_memory(bench: Bench) -> None:
    """QEMU goes on saving without libvirtd; the guest runs on as before, and the snapshot is whole."""
    guest = await bench.world.create(bench.agent.host, memory_mib=256)
    mark = bench.world.recorder.mark
    command = await bench.world.send(bench.agent.host, SnapshotCreate(name="one"), guest)
    await bench.world.recorder.wait_for(
        bench.agent.host, "instance.state", since=mark, where=lambda event: event.data["observed"] == "paused"
    )
    await asyncio.to_thread(bench.libvirtd.kill_daemon)
    await asyncio.to_thread(bench.libvirtd.start_daemon)
    await bench.succeeded(command)
    assert await bench.snapshots(guest) == ["one"]
    await bench.runs(guest)
    await bench.world.succeed(bench.agent.host, InstanceDelete(), guest)
    await bench.judge()
