"""`instance.stats` of real guests: figures that the guest's own doings explain, and a QEMU that answers nobody."""

from __future__ import annotations

import asyncio
import os
import signal
import time
import uuid
from typing import Any

import pytest
from support.agent_process import AgentProcess
from support.fleet import World

from agent.messages.commands import (
    ConsoleLog,
    InstanceCreate,
    InstanceDelete,
    InstancePause,
    InstanceShow,
    InstanceStart,
    InstanceStop,
)
from agent.messages.spec import ImageSource, InstanceSpec, RootDisk, Seed, UserNic
from agent.messages.spec_disks import DataDisk
from agent.messages.verbs_stats import InstanceStats, InstanceStatsResult
from devstack.guest_image import GuestImage
from devstack.libvirtd import PrivateLibvirtd

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(240)]

BOOT_S = 90.0
QUERY_S = 3.0
MIB = 1024 * 1024


@pytest.fixture
async def agent(world: World, libvirtd: PrivateLibvirtd, bootable: GuestImage) -> AgentProcess:
    roots = {"images": {"file_roots": [str(bootable.path.resolve().parent)]}}
    made = await world.libvirt_agent(libvirtd, settings=roots | {"deadlines": {"query_s": QUERY_S}})
    await made.start()
    return made


async def read(world: World, agent: AgentProcess, instance_id: str) -> InstanceStatsResult:
    done = await world.succeed(agent.host, InstanceStats(), instance_id)
    return InstanceStatsResult.model_validate(done.data["result"])


async def console(world: World, agent: AgentProcess, instance_id: str, wanted: str) -> None:
    """Wait until the guest has said it. The console has no events."""
    async with asyncio.timeout(BOOT_S):
        while True:
            done = await world.succeed(agent.host, ConsoleLog(max_bytes=256 * 1024), instance_id)
            if wanted in done.data["result"]["text"]:
                return
            await asyncio.sleep(0.25)


async def test_what_a_guest_writes_is_counted(
    world: World, agent: AgentProcess, libvirtd: PrivateLibvirtd, source: ImageSource
) -> None:
    """The guest writes 8 MiB to its root disk, then a little for ever, and reads the 8 MiB back."""
    guest = str(uuid.uuid4())
    spec = InstanceSpec(
        name="counted",
        vcpus=1,
        max_vcpus=2,
        memory_mib=112,
        root_disk=RootDisk(size_mib=256, image=source),
        disks=[DataDisk(kind="data", name="data", size_mib=64)],
        nics=[UserNic(type="user")],
        seed=Seed(user_data="#writer\n"),
    )
    await world.succeed(agent.host, InstanceCreate(spec=spec, start=False), guest, timeout_s=90)
    made = await read(world, agent, guest)
    assert (made.power, made.complete, made.cpu.cpu_time_ns, made.cpu.max_vcpus) == ("stopped", True, None, 2)
    assert [(disk.name, disk.capacity_bytes) for disk in made.disks] == [("root", 256 * MIB), ("data", 64 * MIB)]
    assert [disk.write_bytes for disk in made.disks] == [None, None]

    await world.succeed(agent.host, InstanceStart(), guest)
    early = await read(world, agent, guest)
    await console(world, agent, guest, "guest: wrote 2")
    late = await read(world, agent, guest)
    for found in (early, late):
        assert (found.power, found.complete, found.cpu.vcpus, found.cpu.max_vcpus) == ("running", True, 1, 2)
    assert _known(late.cpu.cpu_time_ns) > _known(early.cpu.cpu_time_ns) > 0
    assert _known(late.cpu.user_time_ns) > 0
    assert late.at > early.at
    before, root, data = early.disks[0], *late.disks
    assert (root.name, data.name) == ("root", "data")
    # What it wrote, beyond the few MiB that a boot writes, and read again past its cache.
    assert _known(root.write_bytes) - _known(before.write_bytes) >= 8 * MIB
    assert _known(root.write_bytes) < 64 * MIB
    assert _known(root.read_bytes) >= 8 * MIB
    assert _known(root.write_requests) > 0
    assert _known(root.write_time_ns) > 0
    assert _known(root.allocation_bytes) >= 8 * MIB
    assert _known(root.written_up_to_bytes) > 0
    assert data.write_bytes == 0
    assert data.capacity_bytes == 64 * MIB
    assert _known(late.memory.rss_kib) > 32 * 1024
    assert late.memory.current_kib == late.memory.maximum_kib == 112 * 1024
    # Its balloon driver says it some time later, every few seconds.
    async with asyncio.timeout(BOOT_S):
        while (told := (await read(world, agent, guest)).memory).guest_at is None:
            await asyncio.sleep(0.5)
    assert 0 < _known(told.unused_kib) <= _known(told.available_kib) <= 112 * 1024
    assert [(nic.nic, nic.rx_bytes) for nic in late.nics] == [(0, None)]
    assert late.nics[0].mac is not None

    await world.succeed(agent.host, InstanceStop(force=True), guest)
    after = await read(world, agent, guest)
    assert (after.power, after.cpu.cpu_time_ns, after.disks[0].write_bytes) == ("stopped", None, None)
    assert _known(after.disks[0].allocation_bytes) >= 8 * MIB
    await world.succeed(agent.host, InstanceDelete(), guest)
    await world.judge(agent, (), libvirtd)


async def test_a_frozen_qemu_holds_up_nothing(world: World, agent: AgentProcess, libvirtd: PrivateLibvirtd) -> None:
    """Its reads are answered without QEMU's part, the first at its limit; then at once, beside a stuck operation too."""
    host = agent.host
    frozen, healthy = [await world.create(host) for _ in range(2)]
    assert (await read(world, agent, frozen)).complete
    pid = (await asyncio.to_thread(libvirtd.qemu_pids))[f"i-{frozen[:8]}"]
    os.kill(pid, signal.SIGSTOP)
    try:
        begin = time.monotonic()
        _check_frozen(await read(world, agent, frozen))
        first_s = time.monotonic() - begin
        begin = time.monotonic()
        for _ in range(20):  # more than there are threads for reads
            _check_frozen(await read(world, agent, frozen))
        more_s = time.monotonic() - begin
        print(f"first {first_s:.2f} s, twenty more {more_s:.2f} s")
        assert QUERY_S <= first_s < QUERY_S + 10
        assert more_s < 20
        await world.recorder.heartbeat(host, where=lambda beat: beat.stuck_threads == 1)
        assert (await read(world, agent, healthy)).complete
        # A change that waits for the frozen QEMU, and a read beside it.
        pausing = await world.send(host, InstancePause(), frozen)
        _check_frozen(await read(world, agent, frozen))
        assert pausing not in world.recorder.finals(host)
        assert (await world.succeed(host, InstanceShow(), frozen)).data["result"]["observed"] == "running"
    finally:
        os.kill(pid, signal.SIGCONT)
    final = await world.recorder.wait_final(host, pausing, timeout_s=60)
    assert final.kind == "operation.succeeded"
    await world.recorder.heartbeat(host, where=lambda beat: beat.stuck_threads == 0)
    thawed = await read(world, agent, frozen)
    assert (thawed.power, thawed.complete) == ("paused", True)
    for instance_id in (frozen, healthy):
        await world.succeed(host, InstanceDelete(), instance_id)
    await world.judge(agent, (), libvirtd)


def _check_frozen(found: InstanceStatsResult) -> None:
    assert (found.power, found.complete, found.cpu.vcpus) == ("running", False, 1)
    assert _known(found.cpu.cpu_time_ns) > 0
    assert found.memory.current_kib == 32 * 1024
    assert found.memory.rss_kib is None
    assert (found.disks[0].name, found.disks[0].write_bytes) == ("root", None)
    assert found.disks[0].physical_bytes is not None


def _known(value: Any) -> int:
    assert isinstance(value, int)
    return value
