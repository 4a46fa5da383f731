"""The whole agent dies at every commit and in every driver call of each verb, and comes back.

At a commit it dies before it is applied or after; in a driver call the hypervisor finishes what it was asked.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from support.crash import agrees, same_everywhere
from support.world import ROUNDS, World, new_id, spec, until

from agent.drivers.fake.settings import Fault
from agent.errors import Unavailable
from agent.exports.files import Slot
from agent.messages.commands import (
    InstanceCreate,
    InstanceDelete,
    InstancePause,
    InstanceReboot,
    InstanceResume,
    InstanceStart,
    InstanceStop,
    OperationCancel,
)
from agent.messages.spec_disks import DataDisk, EphemeralDisk, SwapDisk
from agent.messages.spec_limits import CpuLimits
from agent.messages.verb import CommandData
from agent.messages.verbs_memory import (
    InstanceMemoryDump,
    InstanceReset,
    InstanceSetPolicy,
    InstanceSuspend,
    InstanceTriggerCrashDump,
)
from agent.messages.verbs_resize import (
    InstanceConfirmResize,
    InstanceResize,
    InstanceRevertResize,
    InstanceSetLimits,
    InstanceSetMemoryTarget,
)
from agent.messages.verbs_snapshot import (
    ExportTarget,
    InstanceBackup,
    InstanceExport,
    SnapshotCreate,
    SnapshotDelete,
    SnapshotRevert,
)

DISKS = [
    DataDisk(kind="data", name="data", size_mib=8),
    EphemeralDisk(kind="ephemeral", name="scratch", size_mib=8),
    SwapDisk(kind="swap", name="swap", size_mib=8),
]

VERBS: dict[str, tuple[CommandData, str]] = {
    "create": (InstanceCreate(spec=spec("vm")), "running"),
    "create-disks": (InstanceCreate(spec=spec("vm", disks=DISKS)), "running"),
    "delete": (InstanceDelete(), "gone"),
    "start": (InstanceStart(), "running"),
    "stop": (InstanceStop(timeout_s=30), "stopped"),
    "force": (InstanceStop(force=True), "stopped"),
    "pause": (InstancePause(), "paused"),
    "reboot": (InstanceReboot(mode="hard"), "running"),
    "export": (InstanceExport(target=ExportTarget(store="main", name="copy")), "running"),
    "backup": (InstanceBackup(series="daily", keep=1, store="main"), "running"),
    "snapshot": (SnapshotCreate(name="new"), "running"),
    "revert": (SnapshotRevert(name="old"), "running"),
    "drop": (SnapshotDelete(name="old"), "running"),
    "suspend": (InstanceSuspend(), "suspended"),
    "resume-suspended": (InstanceResume(), "running"),
    "start-suspended": (InstanceStart(), "running"),
    "discard-suspended": (InstanceStart(discard_saved=True), "running"),
    "reset": (InstanceReset(), "running"),
    "trigger-crash-dump": (InstanceTriggerCrashDump(), "running"),
    "memory-dump": (InstanceMemoryDump(), "running"),
    "set-policy": (InstanceSetPolicy(on_stop="restart"), "running"),
    "resize": (InstanceResize(vcpus=2, memory_mib=384, disks_mib={"root": 2048}, timeout_s=30), "running"),
    "resize-stopped": (InstanceResize(vcpus=2), "stopped"),
    "confirm": (InstanceConfirmResize(), "running"),
    "revert-resize": (InstanceRevertResize(timeout_s=30), "running"),
    "live": (InstanceResize(mode="live", vcpus=2, memory_mib=384, disks_mib={"root": 2048}), "running"),
    "balloon": (InstanceSetMemoryTarget(memory_mib=192), "running"),
    "limits": (InstanceSetLimits(cpu=CpuLimits(shares=512), disks={"root": None}), "running"),
}
STORED = {"export": 2, "backup": 3}
"""How many files the verb leaves in the export store."""


@pytest.fixture(params=["memory", "sqlite"])
async def world(request: pytest.FixtureRequest, tmp_path: Path, no_blocking: object, unannounced: None) -> AsyncIterator[World]:
    (tmp_path / "store").mkdir()
    made = await World(
        tmp_path, store=request.param, exports={"stores": {"main": str(tmp_path / "store")}}
    ).open()
    await made.start()
    yield made
    await made.stop()
    await made.close()


async def prepared(world: World, verb: str) -> str:
    if verb.startswith("create"):
        return new_id()
    started = verb not in ("start", "resize-stopped")
    instance_id = await world.create("vm", start=started, max_vcpus=4, max_memory_mib=512)
    if verb in ("confirm", "revert-resize"):
        await world.do(InstanceResize(vcpus=2, memory_mib=384), instance_id=instance_id)
    if verb in ("revert", "drop"):
        await world.do(SnapshotCreate(name="old"), instance_id=instance_id)
    if verb == "backup":
        await world.do(VERBS["backup"][0], instance_id=instance_id)
    if verb.endswith("-suspended"):
        await world.do(InstanceSuspend(), instance_id=instance_id)
    await world.quiet()
    return instance_id


def check_exports(world: World, verb: str) -> None:
    """Only what the verb is to leave is in the store, and nothing where exports are made."""
    store = world.folder / "store"
    names = [path.name for path in store.iterdir()]
    assert len(names) == STORED.get(verb, 0), names
    assert not any(name.startswith(".") for name in names)
    staging = world.folder / "state" / "exports"
    assert not staging.exists() or not list(staging.iterdir())
    for name in names:
        (store / name).unlink()


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("verb", VERBS)
async def test_dies_at_every_commit(world: World, verb: str, applied: bool) -> None:
    data, power = VERBS[verb]
    for commits in range(ROUNDS):
        instance_id = await prepared(world, verb)
        world.cut.after(commits, applied=applied)
        operation_id = world.send(data, instance_id=instance_id)
        died = await world.cut_or_final(operation_id)
        await world.crash()
        await world.start()
        await world.final(operation_id)
        await agrees(world, operation_id, instance_id, power)
        check_exports(world, verb)
        if verb != "delete":
            await world.do(InstanceDelete(), instance_id=instance_id)
            await world.quiet()
        if not died:
            return
    raise AssertionError("there were more commits than this test has rounds")


CALLS = {
    "create": ["create_storage", "define", "start", "get"],
    "delete": ["destroy", "undefine", "delete_storage"],
    "start": ["start"],
    "stop": ["shutdown"],
    "force": ["destroy"],
    "pause": ["pause"],
    "reboot": ["destroy", "start"],
    "export": ["abort_export", "export_disks"],
    "backup": ["export_disks"],
    "snapshot": ["create_snapshot"],
    "revert": ["revert_snapshot", "define"],
    "drop": ["delete_snapshot"],
    "suspend": ["suspend"],
    "resume-suspended": ["restore"],
    "start-suspended": ["restore"],
    "discard-suspended": ["discard_saved", "start"],
    "reset": ["reset"],
    "trigger-crash-dump": ["inject_nmi"],
    "memory-dump": ["memory_dump"],
    "set-policy": ["define"],
    "resize": ["get", "shutdown", "grow_disk", "define", "start"],
    "confirm": ["define"],
    "revert-resize": ["shutdown", "define", "start"],
    "live": ["grow_disk", "request_vcpus", "request_memory", "guest_sizes", "define"],
    "balloon": ["request_memory_target"],
    "limits": ["apply_limits", "define"],
}


@pytest.mark.parametrize(("verb", "call"), [(verb, call) for verb, calls in CALLS.items() for call in calls])
async def test_dies_in_every_driver_call(world: World, verb: str, call: str) -> None:
    data, power = VERBS[verb]
    instance_id = await prepared(world, verb)
    world.driver.inject(Fault(call=call, hang_s=30, times=1))
    operation_id = world.send(data, instance_id=instance_id)
    plan = world.driver._plan
    await until(lambda: all(armed.left == 0 for armed in plan._armed) or world.finals(operation_id))
    await world.crash()
    await world.start()
    await world.final(operation_id)
    await agrees(world, operation_id, instance_id, power)
    check_exports(world, verb)


async def test_dies_again_and_again(world: World) -> None:
    """At one more commit of the same create each time, without ever letting it end in between."""
    operation_id, instance_id = new_id(), new_id()
    for attempt in range(4):
        world.cut.after(1 + attempt, applied=attempt % 2 == 0)
        if attempt == 0:
            world.send(InstanceCreate(spec=spec()), id=operation_id, instance_id=instance_id)
        await world.cut_or_final(operation_id)
        await world.crash()
        await world.start(wait=False)
    await world.agent.wait_ready(10)
    await world.final(operation_id)
    await agrees(world, operation_id, instance_id, "running")


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("fault", ["define", "start", "get"])
async def test_dies_at_every_commit_of_a_failing_create(world: World, fault: str, applied: bool) -> None:
    """Whether it is then finished or rolled back, one final event comes and nothing is left that is nobody's."""
    for commits in range(1, ROUNDS):
        operation_id, instance_id = new_id(), new_id()
        # `get` fails long enough to fail the operation, and not the undoing.
        world.driver.inject(Fault(call=fault, error="internal", times=1))
        world.cut.after(commits, applied=applied)
        world.send(InstanceCreate(spec=spec("vm")), id=operation_id, instance_id=instance_id)
        died = await world.cut_or_final(operation_id)
        await world.crash()
        await world.start()
        final = await world.final(operation_id)
        await world.quiet()
        assert len(world.finals(operation_id)) == 1
        if final.kind == "operation.succeeded":
            assert await world.power(instance_id) == "running"
            assert [record.id for record in await world.cut.instances()] == [instance_id]
            await world.do(InstanceDelete(), instance_id=instance_id)
            await world.quiet()
        else:
            assert final.data["undone"] is True
        assert await world.power(instance_id) == "gone"
        assert world.owned_files() == []
        assert await world.cut.instances() == world.agent.ctx.instances.all() == []
        assert await world.cut.operations(unfinished=True) == []
        world.check_sequence()
        if not died:
            return
    raise AssertionError("there were more commits than this test has rounds")


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize(
    ("verb", "fault"), [("resize", "start"), ("revert", "define"), ("live", "define"), ("limits", "define"), ("balloon", "guest_sizes")]
)
async def test_dies_at_every_commit_of_a_failing_resize(world: World, verb: str, fault: str, applied: bool) -> None:
    """Finished or taken back, and journal, definition and guest agree in any case."""
    data, power = VERBS[verb]
    for commits in range(ROUNDS):
        instance_id = await prepared(world, verb)
        world.driver.inject(Fault(call=fault, error="internal", times=1))
        world.cut.after(commits, applied=applied)
        operation_id = world.send(data, instance_id=instance_id)
        died = await world.cut_or_final(operation_id)
        await world.crash()
        await world.start()
        await world.final(operation_id)
        await world.quiet()
        assert len(world.finals(operation_id)) == 1
        assert await world.power(instance_id) == power
        (kept,) = await world.cut.instances()
        assert kept == world.agent.ctx.instances.get(instance_id)
        await same_everywhere(world, kept)
        assert await world.cut.operations(unfinished=True) == []
        world.check_sequence()
        await world.do(InstanceDelete(), instance_id=instance_id)
        await world.quiet()
        if not died:
            return
    raise AssertionError("there were more commits than this test has rounds")


async def test_dies_after_a_cancel(world: World) -> None:
    for commits in range(ROUNDS):
        operation_id, instance_id = new_id(), new_id()
        world.driver.inject(Fault(call="create_storage", hang_s=30, times=1))
        world.send(InstanceCreate(spec=spec("vm")), id=operation_id, instance_id=instance_id)
        await until(lambda i=instance_id: world.agent.ctx.instances.find(i))
        world.cut.after(commits, applied=commits % 2 == 0)
        cancel = world.send(OperationCancel(operation_id=operation_id))
        died = await world.cut_or_final(operation_id, cancel)
        await world.crash()
        await world.start()
        final = await world.final(operation_id)
        await world.final(cancel)
        await world.quiet()
        assert len(world.finals(operation_id)) == len(world.finals(cancel)) == 1
        if final.kind == "operation.succeeded":
            await world.do(InstanceDelete(), instance_id=instance_id)
        await world.quiet()
        assert world.owned_files() == []
        assert await world.cut.instances() == []
        if not died:
            return


async def test_a_drain_with_work_under_way_and_a_new_start(world: World) -> None:
    world.settings.agent.__dict__["drain_timeout_s"] = 0.05
    stuck = await world.create("stuck", labels={"fake.guest-shutdown-s": "never"})
    stop = world.send(InstanceStop(timeout_s=600), instance_id=stuck)
    behind = world.send(InstanceStart(), instance_id=stuck)
    await until(lambda: world.agent._runner.find(stop) and world.agent._runner.find(behind))
    await world.stop()
    assert world.finals(stop) == world.finals(behind) == []
    assert await world.ask((world.folder / "state" / "fake" / "domains" / f"{stuck}.json").exists)
    await world.start()
    assert await world.power(stuck) == "running", "guests are never touched by the agent's own stop"
    # What was interrupted comes before what is new.
    new = world.send(InstancePause(), instance_id=stuck)
    await until(lambda: world.agent._runner.find(new))
    await world.ask(world.driver.simulate_guest_shutdown, stuck)
    for one in (stop, behind, new):
        assert (await world.final(one)).kind == "operation.succeeded"
    order = [event.data["operation_id"] for event in world.events if event.kind == "operation.succeeded"]
    assert [one for one in order if one in (stop, behind, new)] == [stop, behind, new]
    assert await world.power(stuck) == "paused"
    world.check_sequence()


@pytest.mark.parametrize("applied", [False, True])
async def test_dies_at_every_commit_of_a_failing_export(
    world: World, applied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was published, staged, half or wholly, is withdrawn, also by a life that only finds it."""
    publish = Slot.publish

    def fails(self: Slot, *args: Any) -> None:
        publish(self, *args)
        raise Unavailable("the store went away at the last moment", code="export_unavailable")

    monkeypatch.setattr(Slot, "publish", fails)
    instance_id = await world.create("vm")
    for commits in range(1, ROUNDS):
        world.cut.after(commits, applied=applied)
        operation_id = world.send(VERBS["export"][0], instance_id=instance_id)
        died = await world.cut_or_final(operation_id)
        await world.crash()
        await world.start()
        final = await world.final(operation_id)
        await world.quiet()
        assert (final.kind, final.data["undone"]) == ("operation.failed", True)
        assert len(world.finals(operation_id)) == 1
        check_exports(world, "")
        if not died:
            return
    raise AssertionError("there were more commits than this test has rounds")
