"""Audit, drain, adoption and overdue operations on the simulated hypervisor, in a whole agent."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from support.world import ROUNDS, World, new_id, spec, until

from agent.core.adopted import ADOPTED_VERBS, check_adopted
from agent.drivers.fake.settings import Fault
from agent.errors import FailedPrecondition
from agent.exports.service import claim_of
from agent.handlers.audit import PeriodicAudit
from agent.messages.commands import (
    COMMANDS,
    HostSetEnabled,
    HostShow,
    InstanceCreate,
    InstanceDelete,
    InstanceList,
    InstancePause,
    InstanceStart,
    InstanceStop,
    OperationCancel,
)
from agent.messages.spec_policy import Policy
from agent.messages.verbs_host import HostAudit, HostDrain, InstanceAdopt
from agent.messages.verbs_memory import InstanceSetPolicy
from agent.messages.verbs_rebuild import InstanceRestore
from agent.periodic import Chores

RECORD = '{"size_mib": 64, "image_sha256": null}'


@pytest.fixture
async def world(tmp_path: Path, no_blocking: object, unannounced: None) -> AsyncIterator[World]:
    made = await World(tmp_path, audit={"leftover_age_s": 60}).open()
    await made.start()
    yield made
    await made.stop()
    await made.close()


def instances_dir(world: World) -> Path:
    return world.folder / "state" / "fake" / "instances"


def plant(world: World, name: str, *, proven: bool) -> Path:
    folder = instances_dir(world) / name
    folder.mkdir(parents=True)
    (folder / "data").write_text("x")
    if proven:
        (folder / "root.qcow2").write_text(RECORD)
    return folder


def partial(world: World, *, age_s: float) -> Path:
    path = world.folder / "state" / "images" / f".partial-{age_s:g}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x")
    os.utime(path, (time.time() - age_s,) * 2)
    return path


async def audit(world: World, *, repair: bool = False) -> dict[str, Any]:
    done = await world.do(HostAudit(repair=repair))
    assert done.kind == "operation.succeeded", done.data
    return dict(done.data["result"])


def told(result: dict[str, Any]) -> set[tuple[str, str, str]]:
    return {(item["finding"], item["kind"], item["name"]) for item in result["items"]}


async def test_nothing_is_found_where_all_is_well(world: World) -> None:
    one = await world.create("one")
    await world.create("two", start=False)
    assert (await audit(world))["items"] == []
    await world.do(InstanceDelete(), instance_id=one)
    assert (await audit(world, repair=True)) == {"items": [], "more": 0, "busy": [], "removed": 0}


async def test_only_what_is_proven_and_nobodys_is_removed(world: World) -> None:
    kept = await world.create("kept")
    ours = await world.ask(lambda: plant(world, new_id(), proven=True))
    strange = await world.ask(lambda: plant(world, new_id(), proven=False))
    named = await world.ask(lambda: plant(world, "notes", proven=True))
    old, fresh = partial(world, age_s=3600), partial(world, age_s=1)
    wanted = {
        ("unowned", "folder", str(ours)),
        ("unproven", "folder", str(strange)),
        ("unproven", "folder", str(named)),
        ("unowned", "partial-download", str(old)),
    }
    assert told(await audit(world)) == wanted
    assert ours.exists()
    assert old.exists(), "without repair nothing is removed"
    result = await audit(world, repair=True)
    assert told(result) == wanted
    assert result["removed"] == 2
    assert {item["name"]: item.get("action") for item in result["items"]} == {
        str(ours): "removed", str(old): "removed", str(strange): None, str(named): None,
    }  # fmt: skip
    assert [path.exists() for path in (ours, old, strange, named, fresh)] == [False, False, True, True, True]
    assert {item["finding"] for item in (await audit(world, repair=True))["items"]} == {"unproven"}
    assert await world.power(kept) == "running"


async def test_what_is_missing_is_told(world: World) -> None:
    lost = await world.create("lost")
    await world.ask(world.driver.simulate_crash, lost)
    await world.ask(world.driver.undefine, lost)
    await world.ask(world.driver.delete_storage, lost)
    result = await audit(world, repair=True)
    assert {(i["finding"], i["kind"], i["instance_id"]) for i in result["items"]} == {
        ("missing", "domain", lost), ("missing", "disk", lost),
    }  # fmt: skip
    assert (await world.do(InstanceDelete(), instance_id=lost)).kind == "operation.succeeded"
    assert (await audit(world))["items"] == []


async def test_a_busy_instance_is_left_out(world: World) -> None:
    world.driver.inject(Fault(call="define", hang_s=30, times=1))
    instance_id = new_id()
    create = world.send(InstanceCreate(spec=spec("busy")), instance_id=instance_id)
    await until((instances_dir(world) / instance_id).exists)
    result = await audit(world, repair=True)
    assert (result["items"], result["busy"]) == ([], [instance_id])
    world.driver.clear_faults()
    assert (await world.final(create)).kind == "operation.succeeded"
    assert (await audit(world))["busy"] == []


async def test_a_create_that_comes_while_its_leftover_is_removed_waits(world: World) -> None:
    """The folder of a create is never removed under it: the create has its turn after the removal."""
    instance_id = new_id()
    await world.ask(lambda: plant(world, instance_id, proven=True))
    world.driver.inject(Fault(call="remove_artifact", hang_s=30, times=1))
    repair = world.send(HostAudit(repair=True))
    await until(lambda: instance_id in world.agent._runner.open._held)
    create = world.send(InstanceCreate(spec=spec("late")), instance_id=instance_id)
    await until(lambda: world.agent._runner.find(create))
    world.driver.clear_faults()
    assert (await world.final(repair)).data["result"]["removed"] == 1
    assert (await world.final(create)).kind == "operation.succeeded"
    assert world.owned_files() == [f"domains/{instance_id}.json", f"instances/{instance_id}"]


async def test_memory_dumps_are_leftovers_only_where_an_age_is_set(world: World) -> None:
    dumps = world.folder / "state" / "dumps"
    dumps.mkdir()
    for name in ("old", "old.part", "new.part"):
        (dumps / name).write_text("x")
        os.utime(dumps / name, (time.time() - (3600 if "old" in name else 0),) * 2)
    assert told(await audit(world)) == {("unowned", "memory-dump", str(dumps / "old.part"))}
    await world.stop()
    world.settings.audit.__dict__["memory_dump_age_s"] = 1800.0
    await world.start()
    assert (await audit(world, repair=True))["removed"] == 2
    assert [path.name for path in dumps.iterdir()] == ["new.part"]


async def test_staging_is_removed_when_its_operation_has_ended(world: World) -> None:
    ended = world.send(HostSetEnabled(enabled=True))
    await world.final(ended)
    open_one = await world.create("stuck", labels={"fake.guest-shutdown-s": "never"})
    under_way = world.send(InstanceStop(timeout_s=600), instance_id=open_one)
    await until(lambda: world.agent._runner.find(under_way))
    exports = world.folder / "state" / "exports"
    names = {"ended": claim_of(ended), "open": claim_of(under_way), "unknown": "0" * 16, "notes": "notes"}
    for name in names.values():
        (exports / name / "deep").mkdir(parents=True)
    result = await audit(world, repair=True)
    assert told(result) == {
        ("unowned", "staging", str(exports / names["ended"])),
        ("unproven", "staging", str(exports / names["unknown"])),
        ("unproven", "staging", str(exports / names["notes"])),
    }
    assert sorted(path.name for path in exports.iterdir()) == sorted([names["open"], names["unknown"], "notes"])
    await world.ask(world.driver.simulate_guest_shutdown, open_one)


@pytest.mark.parametrize("applied", [False, True])
async def test_a_repair_dies_at_every_commit(world: World, applied: bool) -> None:
    for commits in range(ROUNDS):
        folders = [await world.ask(lambda: plant(world, new_id(), proven=True)) for _ in range(2)]
        world.cut.after(commits, applied=applied)
        operation = world.send(HostAudit(repair=True))
        died = await world.cut_or_final(operation)
        await world.crash()
        await world.start()
        done = await world.final(operation)
        assert done.data["result"]["removed"] == 2
        assert not any(folder.exists() for folder in folders)
        await world.quiet()
        assert len(world.finals(operation)) == 1
        if not died:
            return
    raise AssertionError("there were more commits than this test has rounds")


@pytest.mark.parametrize("applied", [False, True])
async def test_a_drain_dies_at_every_commit(world: World, applied: bool) -> None:
    for commits in range(ROUNDS):
        guest = await world.create(f"guest-{commits}")
        await world.quiet()
        world.cut.after(commits, applied=applied)
        operation = world.send(HostDrain(stop_instances=True, stop_timeout_s=0.01))
        died = await world.cut_or_final(operation)
        await world.crash()
        await world.start()
        done = await world.final(operation)
        assert done.kind == "operation.succeeded", done.data
        await world.quiet()
        assert len(world.finals(operation)) == 1
        assert await world.power(guest) == "stopped"
        assert world.agent.ctx.state.disabled_reason == "drained: drained for maintenance"
        await world.do(HostSetEnabled(enabled=True))
        await world.do(InstanceDelete(), instance_id=guest)
        if not died:
            return
    raise AssertionError("there were more commits than this test has rounds")


async def test_the_periodic_audit_tells_each_finding_once_and_repairs_where_it_may(world: World) -> None:
    folder = await world.ask(lambda: plant(world, new_id(), proven=True))
    agent = world.agent
    chore = PeriodicAudit(agent.ctx, agent._runner, agent._leftovers, repair=False)
    await chore.run()
    await chore.run()
    await world.quiet()
    found = [event for event in world.events if event.kind == "host.leftover"]
    assert [(event.data["finding"], event.data["name"]) for event in found] == [("unowned", str(folder))]
    assert folder.exists()
    repairing = PeriodicAudit(agent.ctx, agent._runner, agent._leftovers, repair=True)
    await repairing.run()
    await world.quiet()
    assert not folder.exists()
    world.check_sequence()


# --- drain -----------------------------------------------------------------------------------------------------------


async def beat(world: World) -> dict[str, Any]:
    return dict((await world.do(HostShow())).data["result"]["heartbeat"])


async def test_drain_waits_for_what_is_under_way(world: World) -> None:
    stuck = await world.create("stuck", labels={"fake.guest-shutdown-s": "never"})
    stop = world.send(InstanceStop(timeout_s=600), instance_id=stuck)
    await until(lambda: world.agent._runner.find(stop))
    drain = world.send(HostDrain(reason="new kernel"))
    await until(lambda: not world.agent.ctx.state.enabled)
    shown = await beat(world)
    assert (shown["enabled"], shown["disabled_reason"]) == (False, "draining: new kernel")
    refused = await world.do(InstanceCreate(spec=spec()), instance_id=new_id())
    assert refused.data["error"]["code"] == "host_disabled"
    assert not world.finals(drain)
    await world.ask(world.driver.simulate_guest_shutdown, stuck)
    done = await world.final(drain)
    assert done.data["result"]["running"] == []
    assert (await beat(world))["disabled_reason"] == "drained: new kernel"
    await world.do(HostSetEnabled(enabled=True))
    assert (await beat(world))["enabled"]


async def test_drain_stops_the_guests_a_few_at_a_time(world: World) -> None:
    guests = [await world.create(f"guest-{number}") for number in range(5)]
    most = 0
    drain = world.send(HostDrain(stop_instances=True, stop_timeout_s=0.1, at_once=2), reply_to=None)

    def look() -> bool:
        nonlocal most
        most = max(most, len(world.agent._runner.open.acting()))
        return bool(world.finals(drain))

    await until(look)
    done = world.finals(drain)[0]
    assert done.kind == "operation.succeeded", done.data
    assert sorted(done.data["result"]["stopped"]) == sorted(guests)
    assert done.data["result"]["running"] == []
    assert 1 <= most <= 2
    assert {await world.power(guest) for guest in guests} == {"stopped"}


async def test_drain_survives_restarts(world: World) -> None:
    stuck = await world.create("stuck", labels={"fake.guest-shutdown-s": "never"})
    drain = world.send(HostDrain(stop_instances=True, stop_timeout_s=600))
    await until(world.agent._runner.open.acting)
    for _ in range(2):
        await world.crash()
        await world.start()
        assert not world.agent.ctx.state.enabled
    await until(world.agent._runner.open.acting)
    assert not world.finals(drain)
    await world.ask(world.driver.simulate_guest_shutdown, stuck)
    done = await world.final(drain)
    assert done.data["result"]["stopped"] == [stuck]
    await world.quiet()
    stops = {e.data["operation_id"] for e in world.events if e.kind == "operation.succeeded" and e.data["verb"] == "instance.stop"}
    assert len(stops) == 1, "the guest was told once, however often the agent died"


async def test_a_drain_ends_by_its_time_by_a_cancel_and_by_enabling(world: World) -> None:
    stuck = await world.create("stuck", labels={"fake.guest-shutdown-s": "never"})
    stop = world.send(InstanceStop(timeout_s=600), instance_id=stuck)
    await until(lambda: world.agent._runner.find(stop))
    late = await world.do(HostDrain(timeout_s=0.1))
    assert (late.data["error"]["code"], late.data["error"]["retryable"]) == ("drain_timeout", True)
    assert late.data["error"]["details"]["operations"] == stop
    assert not world.agent.ctx.state.enabled

    drain = world.send(HostDrain())
    await until(lambda: world.agent._runner.find(drain) and world.agent._runner.find(drain).operation)
    await world.do(OperationCancel(operation_id=drain))
    assert (await world.final(drain)).kind == "operation.cancelled"

    drain = world.send(HostDrain())
    await until(lambda: (world.agent.ctx.state.disabled_reason or "").startswith("draining"))
    assert (await world.do(HostSetEnabled(enabled=True))).kind == "operation.succeeded"
    assert (await world.final(drain)).data["error"]["code"] == "drain_ended"
    assert world.agent.ctx.state.enabled
    await world.ask(world.driver.simulate_guest_shutdown, stuck)


# --- adoption --------------------------------------------------------------------------------------------------------


async def foreign(world: World, name: str = "legacy") -> str:
    one = str(await world.ask(world.driver.add_foreign, name))
    await until(lambda: one in world.agent.ctx.state.foreign)
    await world.quiet()
    return one


async def test_a_foreign_domain_is_adopted_and_lives_on_as_an_instance(world: World) -> None:
    domain = await foreign(world)
    refused = await world.do(InstancePause(), instance_id=domain)
    assert refused.data["error"]["code"] == "unknown_instance"
    done = await world.do(InstanceAdopt(), instance_id=domain)
    view = done.data["result"]
    assert (view["observed"], view["desired"], view["name"]) == ("running", "running", "legacy")
    assert view["life"]["adopted"]["own_disks"] is False
    await world.quiet()
    listed = (await world.do(InstanceList(include_foreign=True))).data["result"]
    assert ([one["id"] for one in listed["instances"]], listed["foreign"]) == ([domain], [])
    assert (await audit(world))["items"] == []
    for data, power in ((InstancePause(), "paused"), (InstanceStop(force=True), "stopped"), (InstanceStart(), "running")):
        await world.do(data, instance_id=domain)
        assert await world.power(domain) == power
    await world.crash()
    await world.start()
    assert world.agent.ctx.instances.get(domain).life.adopted is not None
    again = await world.do(InstanceAdopt(), instance_id=domain)
    assert again.data["error"]["code"] == "instance_exists"
    await world.do(InstanceDelete(), instance_id=domain)
    assert await world.power(domain) == "gone"
    world.check_sequence()


async def test_what_adoption_refuses(world: World) -> None:
    domain = await foreign(world)
    nobody = await world.do(InstanceAdopt(), instance_id=new_id())
    assert (nobody.kind, nobody.data["error"]["code"]) == ("operation.rejected", "not_found")
    other = await world.do(InstanceAdopt(spec=spec("legacy", vcpus=3, memory_mib=512)), instance_id=domain)
    assert (other.kind, other.data["error"]["code"]) == ("operation.rejected", "adopt_differs")
    assert "vcpus is 1, not 3" in other.data["error"]["message"]
    given = spec("legacy", memory_mib=512, labels={"owner": "me"}, policy=Policy(on_crash="restart"))
    done = await world.do(InstanceAdopt(spec=given), instance_id=domain)
    assert done.data["result"]["spec"]["labels"] == {"owner": "me"}


async def test_the_policy_of_an_adopted_instance_can_be_set_and_is_followed(world: World) -> None:
    domain = await foreign(world)
    await world.do(InstanceAdopt(), instance_id=domain)
    done = await world.do(InstanceSetPolicy(on_stop="restart"), instance_id=domain)
    assert done.kind == "operation.succeeded", done.data
    assert done.data["result"]["spec"]["policy"]["on_stop"] == "restart"
    assert done.data["result"]["life"]["adopted"] is not None
    await world.crash()
    await world.start()
    await world.ask(world.driver.simulate_guest_shutdown, domain)
    await until(lambda: any(e.kind == "instance.policy" and e.data["cause"] == "on-stop" for e in world.events))
    await until(lambda: world.agent.ctx.instances.get(domain).observed == "running")
    await world.quiet()
    assert (instances_dir(world) / domain).exists(), "its console's log is the agent's"
    assert (await audit(world))["items"] == []


async def test_an_adopted_instance_can_be_soft_deleted_and_restored(world: World) -> None:
    domain = await foreign(world)
    adopted = (await world.do(InstanceAdopt(), instance_id=domain)).data["result"]["life"]
    gone = await world.do(InstanceDelete(restore_within_s=600, timeout_s=1), instance_id=domain)
    assert gone.kind == "operation.succeeded", gone.data
    back = await world.do(InstanceRestore(), instance_id=domain)
    assert back.kind == "operation.succeeded", back.data
    assert (back.data["result"]["observed"], back.data["result"]["life"]) == ("running", adopted)


async def test_an_adopted_instance_refuses_by_name_what_would_redefine_it(world: World) -> None:
    domain = await foreign(world)
    await world.do(InstanceAdopt(), instance_id=domain)
    record = world.agent.ctx.instances.get(domain)
    for command in COMMANDS:
        if command.subject_required and command.verb not in ADOPTED_VERBS and command.verb != "instance.create":
            with pytest.raises(FailedPrecondition) as caught:
                check_adopted(command.verb, record)
            assert caught.value.code == "instance_adopted"
    with pytest.raises(FailedPrecondition) as caught:
        changed = record.spec.model_copy(update={"vcpus": 4})
        await world.ask(lambda: world.driver.define(domain, changed, generation=2, life=record.life))
    assert caught.value.code == "instance_adopted"


@pytest.mark.parametrize("applied", [False, True])
async def test_adoption_dies_at_every_commit(world: World, applied: bool) -> None:
    for commits in range(ROUNDS):
        domain = await foreign(world, f"legacy-{commits}")
        world.cut.after(commits, applied=applied)
        operation = world.send(InstanceAdopt(), instance_id=domain)
        died = await world.cut_or_final(operation)
        await world.crash()
        await world.start()
        assert (await world.final(operation)).kind == "operation.succeeded"
        await world.quiet()
        assert len(world.finals(operation)) == 1
        assert world.agent.ctx.instances.get(domain).life.adopted is not None
        assert domain not in world.agent.ctx.state.foreign
        assert not [e for e in world.events if e.kind == "host.drift" and e.data["difference"] == "foreign-domain-gone"]
        await world.do(InstanceDelete(), instance_id=domain)
        if not died:
            return
    raise AssertionError("there were more commits than this test has rounds")


async def test_a_failed_adoption_leaves_the_domain_foreign(world: World) -> None:
    domain = await foreign(world)
    world.driver.inject(Fault(call="adopt", error="internal", times=1, crash_after=True))
    failed = await world.do(InstanceAdopt(), instance_id=domain)
    assert (failed.kind, failed.data["undone"]) == ("operation.failed", True)
    await world.quiet()
    assert not (await world.ask(world.driver.get, domain)).owned
    assert world.agent.ctx.instances.all() == []
    assert domain in world.agent.ctx.state.foreign


# --- overdue ---------------------------------------------------------------------------------------------------------


async def overdue(world: World) -> None:
    agent = world.agent
    limits = {"build": 0.01, "power": 0.01}
    await Chores(agent.ctx, agent._runner, agent._outbox, agent._lanes, keep_operations_s=1, operations_s=limits).overdue()


async def test_an_overdue_operation_is_rolled_back_and_says_so(world: World) -> None:
    instance_id = new_id()
    world.driver.inject(Fault(call="create_storage", hang_s=30, times=1))
    create = world.send(InstanceCreate(spec=spec("slow")), instance_id=instance_id)
    await until(lambda: world.agent._runner.find(create) and world.agent._runner.find(create).record.started_at)
    await asyncio.sleep(0.02)
    await overdue(world)
    failed = await world.final(create)
    assert (failed.kind, failed.data["error"]["code"]) == ("operation.failed", "operation_overdue")
    assert (failed.data["undone"], failed.data["error"]["retryable"]) == (True, True)
    await world.quiet()
    assert world.owned_files() == []
    await overdue(world)
    assert (await beat(world))["conditions"] == {}


async def test_overdue_past_the_point_of_no_return_is_a_condition(world: World) -> None:
    guest = await world.create("guest")
    world.driver.inject(Fault(call="destroy", hang_s=30, times=1))
    delete = world.send(InstanceDelete(), instance_id=guest)
    start = world.send(InstanceStart(), instance_id=guest)
    await until(lambda: all(armed.left == 0 for armed in world.driver._plan._armed))
    await asyncio.sleep(0.02)
    await overdue(world)
    shown = await beat(world)
    assert "past the point" in shown["conditions"]["operations"]
    assert not shown["healthy"]
    world.driver.clear_faults()
    assert (await world.final(delete)).kind == "operation.succeeded"
    await world.final(start)
    await world.quiet()
    await overdue(world)
    assert (await beat(world))["conditions"] == {}


async def test_an_overdue_operation_that_is_killed_while_it_is_undone_keeps_its_word(world: World) -> None:
    instance_id = new_id()
    world.driver.inject(Fault(call="create_storage", hang_s=30, times=1))
    create = world.send(InstanceCreate(spec=spec("slow")), instance_id=instance_id)
    await until(lambda: world.agent._runner.find(create) and world.agent._runner.find(create).record.started_at)
    await asyncio.sleep(0.02)
    world.cut.after(1, applied=True)
    await overdue(world)
    await until(world.cut.happened.is_set)
    await world.crash()
    await world.start()
    failed = await world.final(create)
    assert (failed.data["error"]["code"], failed.data["error"]["retryable"]) == ("operation_overdue", True)
    await world.quiet()
    assert world.owned_files() == []


async def test_a_restart_in_the_middle_of_an_undo_does_not_take_the_hope_of_a_retry(world: World) -> None:
    for commits in range(ROUNDS):
        instance_id = new_id()
        world.driver.inject(Fault(call="define", error="resource_exhausted", times=1))
        world.cut.after(commits, applied=True)
        create = world.send(InstanceCreate(spec=spec("vm")), instance_id=instance_id)
        died = await world.cut_or_final(create)
        await world.crash()
        undoing = [record for record in [await world._memory.operation(create)] if record and record.state == "undoing"]
        await world.start()
        final = await world.final(create)
        if undoing:
            assert (final.data["error"]["code"], final.data["error"]["retryable"]) == ("resource_exhausted", True)
            return
        assert died
        await world.quiet()
        if final.kind == "operation.succeeded":
            await world.do(InstanceDelete(), instance_id=instance_id)
    raise AssertionError("no crash came in the middle of the undo")


async def test_what_was_made_and_not_started_is_no_longer_being_made(world: World) -> None:
    made = await world.create("made", start=False)
    assert world.agent.ctx.instances.get(made).reason == "created"
    domain = await foreign(world)
    await world.ask(world.driver.simulate_guest_shutdown, domain)
    await world.quiet()
    view = (await world.do(InstanceAdopt(), instance_id=domain)).data["result"]
    assert (view["observed"], view["desired"], view["reason"]) == ("stopped", "stopped", "adopted")
