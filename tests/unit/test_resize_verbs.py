"""Resize, the balloon's target and limits, on the simulated hypervisor: what is done, refused, taken back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from support.world import World, until

from agent.core.context import now
from agent.drivers.fake.settings import Fault
from agent.handlers.due import issue_due
from agent.messages.commands import (
    InstanceDelete,
    InstancePause,
    InstanceShow,
    InstanceStart,
    InstanceStop,
    OperationCancel,
)
from agent.messages.events import Event
from agent.messages.spec import BridgeNic, RootDisk, UserNic
from agent.messages.spec_limits import CpuLimits, DiskLimits, NicLimits
from agent.messages.spec_machine import Cpu, NumaNode, Topology
from agent.messages.verb import CommandData
from agent.messages.verbs_resize import (
    InstanceConfirmResize,
    InstanceResize,
    InstanceRevertResize,
    InstanceSetLimits,
    InstanceSetMemoryTarget,
    NicLimitsChange,
)
from agent.store.base import InstanceRecord

ROOM: dict[str, Any] = {"max_vcpus": 4, "max_memory_mib": 1024}


@pytest.fixture
async def small(tmp_path: Path, no_blocking: object) -> AsyncIterator[World]:
    """A host with little room."""
    made = await World(tmp_path, driver={"cpus": 1, "memory_mib": 1536, "disk_mib": 4096}).open()
    await made.start()
    yield made
    await made.stop()
    await made.close()


async def ok(world: World, data: CommandData, instance_id: str) -> dict[str, Any]:
    done = await world.do(data, instance_id=instance_id)
    assert done.kind == "operation.succeeded", done.data
    result: dict[str, Any] = done.data["result"]
    return result


async def refused(world: World, data: CommandData, instance_id: str) -> str:
    done = await world.do(data, instance_id=instance_id)
    assert done.kind == "operation.rejected", done.data
    return str(done.data["error"]["code"])


async def failed(world: World, data: CommandData, instance_id: str) -> Event:
    done = await world.do(data, instance_id=instance_id)
    assert done.kind == "operation.failed", done.data
    return done


def record(world: World, instance_id: str) -> InstanceRecord:
    return world.agent.ctx.instances.get(instance_id)


async def sizes(world: World, instance_id: str) -> tuple[int, int, int]:
    """vCPUs, memory and root disk, which the journal, the definition and the hypervisor agree about."""
    spec = record(world, instance_id).spec
    info = await world.ask(world.driver.get, instance_id)
    assert info.spec == spec
    assert info.life == record(world, instance_id).life
    assert (await world.ask(world.driver.disk_sizes, instance_id, spec))["root"] == spec.root_disk.size_mib
    if info.power == "running":
        guest = await world.ask(world.driver.guest_sizes, instance_id)
        assert (guest.vcpus, guest.memory_mib) == (spec.vcpus, spec.memory_mib)
    return spec.vcpus, spec.memory_mib, spec.root_disk.size_mib


async def test_a_cold_resize_is_confirmed(world: World) -> None:
    vm = await world.create()
    done = await ok(world, InstanceResize(vcpus=2, memory_mib=512, disks_mib={"root": 2048}), vm)
    assert (done["vcpus"], done["memory_mib"], done["disks_mib"]) == (2, 512, {"root": 2048})
    assert done["pending"]
    assert done["observed"] == "running"
    assert await sizes(world, vm) == (2, 512, 2048)
    shown = await ok(world, InstanceShow(), vm)
    assert shown["life"]["resize"]["old"] == {"vcpus": 1, "memory_mib": 256, "disks_mib": {"root": 1024}}
    assert await refused(world, InstanceResize(vcpus=3), vm) == "resize_pending"
    assert await refused(world, InstanceResize(vcpus=3, mode="live"), vm) == "resize_pending"
    done = await ok(world, InstanceConfirmResize(), vm)
    assert not done["pending"]
    assert record(world, vm).life.resize is None
    assert await sizes(world, vm) == (2, 512, 2048)
    for verb in (InstanceConfirmResize(), InstanceRevertResize()):
        assert await refused(world, verb, vm) == "no_resize_pending"


@pytest.mark.parametrize("running", [True, False])
async def test_a_cold_resize_is_reverted_but_for_its_disks(world: World, running: bool) -> None:
    vm = await world.create(start=running, max_vcpus=2)
    await ok(world, InstanceResize(vcpus=4, memory_mib=128, disks_mib={"root": 2048}), vm)
    assert record(world, vm).spec.max_vcpus == 4
    done = await ok(world, InstanceRevertResize(), vm)
    assert done["observed"] == ("running" if running else "stopped")
    assert await sizes(world, vm) == (1, 256, 2048)
    assert record(world, vm).spec.max_vcpus == 2
    assert record(world, vm).life.resize is None


async def test_start_stop_delete_work_while_it_waits(world: World) -> None:
    vm = await world.create()
    await ok(world, InstanceResize(vcpus=2), vm)
    await ok(world, InstanceStop(), vm)
    await ok(world, InstanceStart(), vm)
    await ok(world, InstanceDelete(), vm)


async def test_confirmed_at_once_or_never(world: World) -> None:
    vm = await world.create(start=False)
    assert not (await ok(world, InstanceResize(vcpus=2, confirm_within_s=0), vm))["pending"]
    assert await sizes(world, vm) == (2, 256, 1024)
    done = await ok(world, InstanceResize(vcpus=3, confirm_within_s="never"), vm)
    assert done["pending"]
    assert "confirm_by" not in done
    await issue_due(world.agent.ctx, world.agent._runner, now() + timedelta(days=3650))
    await world.quiet()
    assert record(world, vm).life.resize is not None


async def test_it_confirms_itself(world: World) -> None:
    vm = await world.create(start=False)
    await ok(world, InstanceResize(vcpus=2, confirm_within_s=60), vm)
    deadline = record(world, vm).life.resize
    assert deadline is not None
    assert deadline.confirm_by is not None
    ctx, runner = world.agent.ctx, world.agent._runner
    await issue_due(ctx, runner, deadline.confirm_by - timedelta(seconds=1))
    await world.quiet()
    assert record(world, vm).life.resize is not None
    # A failure is not the end: the next attempt has another id.
    world.driver.inject(Fault(call="define", error="internal", times=1))
    await issue_due(ctx, runner, deadline.confirm_by)
    await world.quiet()
    assert record(world, vm).life.resize is not None
    await issue_due(ctx, runner, deadline.confirm_by + timedelta(seconds=1))
    await world.quiet()
    assert record(world, vm).life.resize is not None
    await issue_due(ctx, runner, deadline.confirm_by + timedelta(seconds=601))
    await world.quiet()
    assert record(world, vm).life.resize is None
    assert await sizes(world, vm) == (2, 256, 1024)


async def test_a_late_confirmation_means_its_own_resize(world: World) -> None:
    vm = await world.create(start=False)
    await ok(world, InstanceResize(vcpus=2, confirm_within_s=60), vm)
    pending = record(world, vm).life.resize
    assert pending is not None
    await ok(world, InstanceRevertResize(), vm)
    await ok(world, InstanceResize(vcpus=3, confirm_within_s=60), vm)
    assert await refused(world, InstanceConfirmResize(confirm_by=pending.confirm_by), vm) == "no_resize_pending"


@pytest.mark.parametrize("call", ["grow_disk", "define", "start"])
async def test_a_failed_cold_resize_is_taken_back(world: World, call: str) -> None:
    vm = await world.create()
    world.driver.inject(Fault(call=call, error="internal", times=1))
    done = await failed(world, InstanceResize(vcpus=2, memory_mib=512, disks_mib={"root": 2048}), vm)
    grown = call != "grow_disk"
    # A disk that has grown is not made smaller, and the spec says so.
    assert await sizes(world, vm) == (1, 256, 2048 if grown else 1024)
    assert not done.data["undone"]
    assert record(world, vm).life.resize is None
    assert await world.power(vm) == "running"
    assert record(world, vm).desired == "running"


async def test_a_guest_that_does_not_shut_down_is_ended(world: World) -> None:
    vm = await world.create(labels={"fake.guest-shutdown-s": "never"})
    assert (await ok(world, InstanceResize(vcpus=2, timeout_s=0), vm))["forced"]
    assert await sizes(world, vm) == (2, 256, 1024)


async def test_cancelled_while_the_guest_shuts_down(world: World) -> None:
    vm = await world.create(labels={"fake.guest-shutdown-s": "never"})
    operation = world.send(InstanceResize(vcpus=2, timeout_s=600), instance_id=vm)
    await until(lambda: (item := world.agent._runner.find(operation)) and item.operation and item.operation.waits)
    await world.do(OperationCancel(operation_id=operation))
    assert (await world.final(operation)).kind == "operation.cancelled"
    assert await sizes(world, vm) == (1, 256, 1024)
    assert await world.power(vm) == "running"


async def test_refusals_change_nothing(world: World) -> None:
    vm = await world.create(**ROOM)
    assert await refused(world, InstanceResize(disks_mib={"root": 512}), vm) == "disk_cannot_shrink"
    assert await refused(world, InstanceResize(disks_mib={"data": 512}), vm) == "unknown_disk"
    assert await refused(world, InstanceResize(mode="live", vcpus=5), vm) == "above_maximum"
    assert await refused(world, InstanceResize(mode="live", memory_mib=2048), vm) == "above_maximum"
    assert not (await ok(world, InstanceResize(vcpus=1), vm))["changed"]
    await ok(world, InstancePause(), vm)
    assert await refused(world, InstanceResize(vcpus=2), vm) == "instance_paused"
    assert await refused(world, InstanceResize(mode="live", vcpus=2), vm) == "instance_paused"
    await ok(world, InstanceStop(force=True), vm)
    assert await refused(world, InstanceResize(mode="live", vcpus=2), vm) == "instance_not_running"
    assert await refused(world, InstanceSetMemoryTarget(memory_mib=128), vm) == "instance_not_running"
    fixed = await world.create(vcpus=2, start=False, cpu=Cpu(topology=Topology(cores=2)))
    assert await refused(world, InstanceResize(vcpus=4), fixed) == "size_fixed"
    cells = await world.create(start=False, numa=[NumaNode(vcpus=[0], memory_mib=256)])
    assert await refused(world, InstanceResize(memory_mib=512), cells) == "size_fixed"
    await ok(world, InstanceResize(disks_mib={"root": 2048}), cells)


async def test_no_room_on_the_host(small: World) -> None:
    vm = await small.create(**ROOM)
    assert await refused(small, InstanceResize(memory_mib=1500), vm) == "does_not_fit"
    assert await refused(small, InstanceResize(vcpus=5), vm) == "does_not_fit"
    assert await refused(small, InstanceResize(disks_mib={"root": 8192}), vm) == "does_not_fit"
    other = await small.create(memory_mib=512)
    assert await refused(small, InstanceResize(mode="live", memory_mib=768), vm) == "does_not_fit"
    await ok(small, InstanceDelete(), other)
    await ok(small, InstanceResize(mode="live", memory_mib=768), vm)
    # What a resize claims, nobody else gets.
    done = await small.do(InstanceResize(memory_mib=900), instance_id=vm)
    assert done.kind == "operation.succeeded"


async def test_a_live_resize_up_and_down(world: World) -> None:
    vm = await world.create(**ROOM)
    done = await ok(world, InstanceResize(mode="live", vcpus=4, memory_mib=1024, disks_mib={"root": 2048}), vm)
    assert not done["pending"]
    assert await sizes(world, vm) == (4, 1024, 2048)
    await ok(world, InstanceResize(mode="live", vcpus=2, memory_mib=512), vm)
    assert await sizes(world, vm) == (2, 512, 2048)
    done = await failed(world, InstanceResize(mode="live", memory_mib=128), vm)
    assert done.data["error"]["code"] == "below_boot_memory"
    done = await failed(world, InstanceResize(mode="live", memory_mib=301), vm)
    assert done.data["error"]["code"] == "memory_step"
    assert done.data["undone"]
    assert await sizes(world, vm) == (2, 512, 2048)


async def test_a_guest_that_gives_nothing_back(world: World) -> None:
    vm = await world.create(**ROOM, labels={"fake.refuses-unplug": "yes"})
    await ok(world, InstanceResize(mode="live", vcpus=3, memory_mib=512), vm)
    done = await failed(world, InstanceResize(mode="live", vcpus=2, timeout_s=0), vm)
    assert done.data["error"]["code"] == "guest_refused"
    assert done.data["error"]["details"] == {"resource": "vcpus", "asked": 2, "read_back": 3}
    assert await sizes(world, vm) == (3, 512, 1024)
    # What was plugged for it and does not come back is in the spec: guest and definition agree.
    done = await failed(world, InstanceResize(mode="live", vcpus=4, memory_mib=256, timeout_s=0), vm)
    assert done.data["error"]["details"] == {"resource": "memory_mib", "asked": 256, "read_back": 512}
    assert await sizes(world, vm) == (4, 512, 1024)
    done = await failed(world, InstanceSetMemoryTarget(memory_mib=400, timeout_s=0), vm)
    assert done.data["error"]["code"] == "guest_refused"


async def test_memory_target(world: World) -> None:
    vm = await world.create(**ROOM)
    done = await ok(world, InstanceSetMemoryTarget(memory_mib=128), vm)
    assert (done["memory_mib"], done["actual_mib"]) == (128, 128)
    assert await refused(world, InstanceSetMemoryTarget(memory_mib=257), vm) == "above_maximum"
    assert await sizes(world, vm) == (1, 256, 1024)
    none = await world.create(balloon=False)
    done_ = await failed(world, InstanceSetMemoryTarget(memory_mib=128), none)
    assert done_.data["error"]["code"] == "failed_precondition"


async def test_limits_that_were_taken_back_are_not_in_the_record(world: World) -> None:
    vm = await world.create()
    await world.quiet()  # what reads the new guest's state would take the fault
    before = record(world, vm)
    world.driver.inject(Fault(call="get", error="internal", times=1))
    done = await failed(world, InstanceSetLimits(cpu=CpuLimits(shares=100)), vm)
    assert done.data["undone"] is True
    assert record(world, vm).spec == before.spec
    assert [one.spec for one in await world.cut.instances()] == [before.spec]
    assert (await world.ask(world.driver.get, vm)).spec == before.spec


async def test_limits_are_set_and_lifted(world: World) -> None:
    nics = [BridgeNic(type="bridge", bridge="br0"), UserNic(type="user")]
    disk = RootDisk(size_mib=1024, limits=DiskLimits(total_iops=100))
    vm = await world.create(nics=nics, root_disk=disk)
    fast = NicLimits(inbound_kib_s=1000)
    data = InstanceSetLimits(
        cpu=CpuLimits(shares=512, quota_percent=50),
        disks={"root": DiskLimits(read_bytes_s=2**20)},
        nics=[NicLimitsChange(nic=0, limits=fast)],
    )
    done = await ok(world, data, vm)
    assert done["live"]
    assert done["disks"] == {"root": {"read_bytes_s": 2**20}}
    spec = record(world, vm).spec
    assert spec.root_disk.limits == DiskLimits(read_bytes_s=2**20)
    assert spec.nics[0].limits == fast
    assert not (await ok(world, data, vm))["changed"]
    await ok(world, InstanceSetLimits(cpu=CpuLimits(), disks={"root": None}, nics=[NicLimitsChange(nic=0)]), vm)
    spec = record(world, vm).spec
    assert (spec.cpu_limits, spec.root_disk.limits, spec.nics[0].limits) == (CpuLimits(), None, None)
    done_ = await failed(world, InstanceSetLimits(nics=[NicLimitsChange(nic=1, limits=fast)]), vm)
    assert done_.data["error"]["code"] == "nic_limits_unsupported"
    assert record(world, vm).spec == spec
    assert await refused(world, InstanceSetLimits(nics=[NicLimitsChange(nic=2)]), vm) == "unknown_nic"
    assert await refused(world, InstanceSetLimits(disks={"data": None}), vm) == "unknown_disk"


async def test_limits_that_cannot_be_are_refused_at_create_in_the_same_words(world: World) -> None:
    with pytest.raises(AssertionError, match="nic_limits_unsupported"):
        await world.create(nics=[UserNic(type="user", limits=NicLimits(outbound_kib_s=1))])
    assert world.owned_files() == []
