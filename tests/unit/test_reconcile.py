"""The journal against the hypervisor, events against operations, loss and return of the connection."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from support.world import LIMIT_S, World, new_id, spec, until

from agent.core.reconcile import reconcile
from agent.drivers.base import PowerChanged
from agent.drivers.fake.settings import Fault
from agent.messages.commands import (
    InstanceCreate,
    InstanceDelete,
    InstanceList,
    InstancePause,
    InstanceShow,
    InstanceStart,
    InstanceStop,
)
from agent.messages.events import Event


def drifts(world: World) -> list[str]:
    return [event.data["difference"] for event in world.events if event.kind == "host.drift"]


def states(world: World, instance_id: str) -> list[Event]:
    return [event for event in world.events if event.kind == "instance.state" and event.subject == instance_id]


def observed(world: World, instance_id: str) -> list[str]:
    """Observed states in order; a change of the desired state alone is not counted."""
    found = [event.data["observed"] for event in states(world, instance_id)]
    return [power for power, before in zip(found, [None, *found], strict=False) if power != before]


async def check(world: World) -> bool:
    return await reconcile(world.agent.ctx, world.agent._runner, resync=False)


async def lose(world: World) -> None:
    await world.ask(world.driver.disconnect)
    await until(lambda: not world.agent.ctx.state.connected.is_set())


async def regain(world: World, *, operations: int = 0) -> None:
    await world.ask(world.driver.reconnect)
    await until(world.agent.ctx.state.connected.is_set)
    await until(lambda: not world.agent._events._tasks)
    await world.quiet(operations=operations)


class Held:
    """A driver call that is held in its thread after it has read, until the test lets it go."""

    def __init__(self, world: World, name: str) -> None:
        self.entered, self._go = threading.Event(), threading.Event()
        self.calls = 0
        inner: Callable[..., Any] = getattr(world.driver, name)

        def held(*args: Any) -> Any:
            result = inner(*args)
            self.calls += 1
            self.entered.set()
            self._go.wait(LIMIT_S)
            return result

        setattr(world.driver, name, held)
        self.undo = lambda: setattr(world.driver, name, inner)

    async def begun(self) -> None:
        await until(self.entered.is_set)

    def release(self) -> None:
        self.undo()
        self._go.set()


@pytest.fixture
async def held(world: World) -> AsyncIterator[Callable[[str], Held]]:
    made: list[Held] = []

    def hold(name: str) -> Held:
        made.append(Held(world, name))
        return made[-1]

    yield hold
    for one in made:
        one.release()


# --- what differs -------------------------------------------------------------------------------------------------


async def test_nothing_differs_nothing_is_said(world: World) -> None:
    await world.create()
    await world.quiet()
    before = len(world.events)
    assert await check(world)
    await world.quiet()
    assert len(world.events) == before


async def test_a_domain_that_is_gone_is_reported_once_and_its_record_kept(world: World) -> None:
    instance_id = await world.create()
    domain = world.driver._hypervisor.domains.get(instance_id)
    assert domain is not None
    await world.ask(world.driver._hypervisor.domains.remove, domain)
    for _ in range(2):
        assert await check(world)
    await world.quiet()
    assert drifts(world) == ["missing-domain"]
    record = world.agent.ctx.instances.get(instance_id)
    assert (record.observed, record.reason) == ("stopped", "missing")
    assert world.owned_files() == [f"instances/{instance_id}"], "absence destroys nothing"
    await world.ask(world.driver._hypervisor.domains.put, domain)
    await check(world)
    await world.quiet()
    assert drifts(world) == ["missing-domain", "returned"]
    assert world.agent.ctx.instances.get(instance_id).observed == "running"


async def test_an_instance_whose_domain_is_missing_can_be_deleted(world: World) -> None:
    instance_id = await world.create()
    await world.ask(world.driver._hypervisor.domains.remove, world.driver._hypervisor.domains.get(instance_id))
    await check(world)
    assert (await world.do(InstanceDelete(), instance_id=instance_id)).kind == "operation.succeeded"
    assert world.owned_files() == []


async def test_a_foreign_domain_is_reported_once_and_never_touched(world: World) -> None:
    foreign = await world.ask(world.driver.add_foreign, "theirs")
    await until(lambda: foreign in world.agent.ctx.state.foreign)
    await check(world)
    await world.quiet()
    assert drifts(world) == ["foreign-domain"]
    for data in (InstanceDelete(), InstanceStop(force=True), InstanceStart(), InstanceShow()):
        done = await world.do(data, instance_id=foreign)
        assert done.data["error"]["code"] == "unknown_instance"
    assert await world.power(foreign) == "running"
    listed = await world.do(InstanceList(include_foreign=True))
    assert [domain["id"] for domain in listed.data["result"]["foreign"]] == [foreign]
    await world.ask(world.driver._hypervisor.domains.remove, world.driver._hypervisor.domains.get(foreign))
    await check(world)
    await world.quiet()
    assert drifts(world) == ["foreign-domain", "foreign-domain-gone"]


async def test_a_create_under_a_foreign_id_or_name_is_refused_and_leaves_it_alone(world: World) -> None:
    foreign = await world.ask(world.driver.add_foreign, "theirs")
    await until(lambda: foreign in world.agent.ctx.state.foreign)
    done = await world.do(InstanceCreate(spec=spec()), instance_id=foreign)
    assert (done.kind, done.data["error"]["code"]) == ("operation.rejected", "instance_exists")
    done = await world.do(InstanceCreate(spec=spec("theirs")), instance_id=new_id())
    assert (done.kind, done.data["error"]["code"]) == ("operation.rejected", "name_taken")
    assert await world.power(foreign) == "running"


async def test_a_foreign_domain_that_appears_under_the_id_of_a_create_is_not_undone(world: World) -> None:
    """It came after the check: define refuses it, and the undo must not stumble over it for ever."""
    foreign = await world.ask(world.driver.add_foreign, "theirs")
    await until(lambda: foreign in world.agent.ctx.state.foreign)
    world.agent.ctx.state.foreign.clear()
    done = await world.do(InstanceCreate(spec=spec()), instance_id=foreign)
    assert (done.kind, done.data["undone"]) == ("operation.failed", True)
    assert await world.power(foreign) == "running"
    assert world.agent.ctx.instances.find(foreign) is None
    await world.quiet()
    assert await world.cut.operations(unfinished=True) == []


async def test_a_lost_journal_is_rebuilt_from_the_hypervisor(world: World) -> None:
    instance_id = await world.create("keeper", vcpus=3)
    await world.do(InstancePause(), instance_id=instance_id)
    await world.stop()
    world._memory.__init__()  # type: ignore[misc]
    (world.folder / "state" / "compute_id").unlink()
    await world.start()
    record = world.agent.ctx.instances.get(instance_id)
    assert (record.name, record.spec.vcpus, record.observed) == ("keeper", 3, "paused")
    await world.quiet()
    assert drifts(world) == ["adopted"]
    assert await world.cut.instances() == [record]


# --- operations under way -----------------------------------------------------------------------------------------


async def test_an_instance_that_is_being_created_is_not_adopted_and_not_missing(world: World) -> None:
    for call in ("create_storage", "define", "start"):
        world.driver.inject(Fault(call=call, hang_s=30, times=1))
        instance_id = new_id()
        operation_id = world.send(InstanceCreate(spec=spec()), instance_id=instance_id)
        await until(lambda instance_id=instance_id: world.agent.ctx.instances.find(instance_id))
        for _ in range(3):
            assert await check(world)
        world.driver.clear_faults()
        assert (await world.final(operation_id)).kind == "operation.succeeded"
    await world.quiet()
    assert drifts(world) == []


async def test_an_instance_deleted_while_everything_was_read_is_not_adopted(
    world: World, held: Callable[[str], Held]
) -> None:
    instance_id = await world.create()
    recover = held("recover")
    checking = asyncio.ensure_future(check(world))
    await recover.begun()
    assert (await world.do(InstanceDelete(), instance_id=instance_id)).kind == "operation.succeeded"
    recover.release()
    assert await checking
    await world.quiet()
    assert world.agent.ctx.instances.all() == []
    assert drifts(world) == []


async def test_an_instance_created_while_everything_was_read_is_not_missing(
    world: World, held: Callable[[str], Held]
) -> None:
    recover = held("recover")
    checking = asyncio.ensure_future(check(world))
    await recover.begun()
    instance_id = await world.create()
    recover.release()
    assert await checking
    await world.quiet()
    assert drifts(world) == []
    assert world.agent.ctx.instances.get(instance_id).observed == "running"


async def test_one_created_and_deleted_while_everything_was_read(world: World, held: Callable[[str], Held]) -> None:
    infos = world.driver._hypervisor.infos
    instance_id = await world.create()
    stale = await world.ask(infos)
    assert (await world.do(InstanceDelete(), instance_id=instance_id)).kind == "operation.succeeded"
    world.driver._hypervisor.infos = lambda: stale  # type: ignore[method-assign]
    recover = held("recover")
    checking = asyncio.ensure_future(check(world))
    await recover.begun()
    again = await world.do(InstanceCreate(spec=spec()), instance_id=instance_id)
    assert again.kind == "operation.succeeded"
    assert (await world.do(InstanceDelete(), instance_id=instance_id)).kind == "operation.succeeded"
    recover.release()
    await checking
    world.driver._hypervisor.infos = infos  # type: ignore[method-assign]
    assert world.agent.ctx.instances.all() == []


async def test_news_that_came_while_everything_was_read_are_not_overwritten(
    world: World, held: Callable[[str], Held]
) -> None:
    instance_id = await world.create()
    await world.quiet()
    recover = held("recover")
    checking = asyncio.ensure_future(check(world))
    await recover.begun()
    await world.ask(world.driver.simulate_crash, instance_id)
    await until(lambda: world.agent.ctx.instances.get(instance_id).observed == "crashed")
    recover.release()
    assert await checking
    await world.quiet()
    assert observed(world, instance_id) == ["running", "crashed"]


async def test_two_reconciliations_at_once_take_turns(world: World, held: Callable[[str], Held]) -> None:
    await world.create()
    recover = held("recover")
    both = [asyncio.ensure_future(check(world)) for _ in range(2)]
    await recover.begun()
    await asyncio.sleep(0)
    assert recover.calls == 1
    recover.release()
    assert await asyncio.gather(*both) == [True, True]


async def test_many_new_foreign_domains_cost_few_readings(world: World) -> None:
    calls: list[int] = []
    inner = world.driver.recover

    def counted() -> Any:
        calls.append(1)
        return inner()

    world.driver.recover = counted  # type: ignore[method-assign]
    for number in range(20):
        await world.ask(world.driver.add_foreign, f"f{number}")
    await until(lambda: len(world.agent.ctx.state.foreign) == 20)
    await world.quiet()
    assert drifts(world).count("foreign-domain") == 20
    before = len(calls)
    instance_id = await world.create()
    await world.do(InstanceDelete(), instance_id=instance_id)
    await world.quiet()
    assert len(calls) == before, "the last words of a domain of ours are no reason to read everything"
    for foreign in list(world.agent.ctx.state.foreign):
        await world.ask(world.driver._hypervisor.domains.remove, world.driver._hypervisor.domains.get(foreign))
    for foreign in list(world.agent.ctx.state.foreign):
        world.driver.emit(PowerChanged(foreign, "unknown", "undefined"))
    await until(lambda: not world.agent.ctx.state.foreign)
    await world.quiet()
    assert drifts(world).count("foreign-domain-gone") == 20
    assert len(calls) <= before + 2, "all that are gone are found at once"


async def test_a_read_in_flight_does_not_make_an_instance_busy(world: World, held: Callable[[str], Held]) -> None:
    instance_id = await world.create()
    details = held("details")
    shown = world.send(InstanceShow(), instance_id=instance_id)
    await details.begun()
    assert world.agent._runner.open.busy_instances() == set()
    details.release()
    await world.final(shown)


async def test_a_show_does_not_overwrite_what_became_known_meanwhile(world: World, held: Callable[[str], Held]) -> None:
    instance_id = await world.create()
    await world.quiet()
    details = held("details")
    shown = world.send(InstanceShow(), instance_id=instance_id)
    await details.begun()
    assert (await world.do(InstancePause(), instance_id=instance_id)).kind == "operation.succeeded"
    details.release()
    done = await world.final(shown)
    await world.quiet()
    assert done.data["result"]["observed"] == "paused"
    assert world.agent.ctx.instances.get(instance_id).observed == "paused"
    assert observed(world, instance_id) == ["running", "paused"]


# --- events -------------------------------------------------------------------------------------------------------


async def test_a_guest_that_stops_by_itself(world: World) -> None:
    for simulate, power, reason in (
        (world.driver.simulate_crash, "crashed", "crashed"),
        (world.driver.simulate_guest_shutdown, "stopped", "shutdown"),
    ):
        instance_id = await world.create()
        await world.ask(simulate, instance_id)
        await until(lambda i=instance_id, p=power: world.agent.ctx.instances.get(i).observed == p)
        await world.quiet()
        last = states(world, instance_id)[-1].data
        assert (last["observed"], last["previous"], last["reason"], last["desired"]) == (power, "running", reason, "running")
        (kept,) = [record for record in await world.cut.instances() if record.id == instance_id]
        assert kept.observed == power


async def test_a_definition_says_nothing_about_power(world: World) -> None:
    instance_id = await world.create(start=False)
    await world.do(InstanceDelete(), instance_id=instance_id)
    await world.quiet()
    assert "unknown" not in observed(world, instance_id)


async def test_a_crash_that_a_restart_followed_at_once_is_seen_as_both(world: World, held: Callable[[str], Held]) -> None:
    instance_id = await world.create()
    await world.quiet()
    get = held("get")
    await world.ask(world.driver.simulate_crash, instance_id)
    await get.begun()
    get.release()
    await world.ask(world.driver._hypervisor.start, instance_id)
    await until(lambda: world.agent.ctx.instances.get(instance_id).observed == "running" and not world.agent._events._hints)
    await world.quiet()
    assert observed(world, instance_id)[:3] == ["running", "crashed", "running"]


async def test_a_hint_that_an_operation_has_overtaken_is_not_published(world: World, held: Callable[[str], Held]) -> None:
    instance_id = await world.create()
    await world.quiet()
    get = held("get")
    world.driver.emit(PowerChanged(instance_id, "paused", "paused"))
    await get.begun()
    get.undo()
    assert (await world.do(InstanceStop(force=True), instance_id=instance_id)).kind == "operation.succeeded"
    get.release()
    await world.quiet()
    assert observed(world, instance_id) == ["running", "stopped"]


async def test_hints_leave_nothing_behind(world: World) -> None:
    for _ in range(20):
        world.driver.emit(PowerChanged(new_id(), "running", "booted"))
    await until(lambda: not world.agent._events._hints and not world.agent._events._arrived)
    await world.quiet()
    assert not world.agent._events._hints
    instances = world.agent.ctx.instances
    assert not instances._waiters
    assert not instances._signals


# --- the connection -----------------------------------------------------------------------------------------------


async def test_while_the_hypervisor_is_away_instances_are_unknown_and_then_read_again(world: World) -> None:
    one, two = await world.create(), await world.create()
    await lose(world)
    await world.quiet()
    assert [observed(world, i)[-1] for i in (one, two)] == ["unknown", "unknown"]
    shown = await world.do(InstanceShow(), instance_id=one)
    assert shown.data["result"]["observed"] == "unknown"
    await world.ask(world.driver.simulate_crash, two)
    await regain(world)
    assert [observed(world, i)[-1] for i in (one, two)] == ["running", "crashed"]
    assert all(states(world, i)[-1].data["resync"] for i in (one, two))
    assert [e.data["connected"] for e in world.events if e.kind == "host.hypervisor"] == [True, False, True]
    assert drifts(world) == []
    world.check_sequence()


async def test_a_reading_that_was_under_way_at_the_loss_is_not_believed(world: World, held: Callable[[str], Held]) -> None:
    instance_id = await world.create()
    await world.quiet()
    get = held("get")
    world.driver.emit(PowerChanged(instance_id, "unknown", "defined"))
    await get.begun()
    recover = held("recover")
    checking = asyncio.ensure_future(check(world))
    await recover.begun()
    await lose(world)
    get.release()
    recover.release()
    assert not await checking
    await world.quiet()
    assert world.agent.ctx.instances.get(instance_id).observed == "unknown"


async def test_a_loss_is_seen_while_everything_is_still_being_read(world: World, held: Callable[[str], Held]) -> None:
    instance_id = await world.create()
    await lose(world)
    recover = held("recover")
    await world.ask(world.driver.reconnect)
    await recover.begun()
    await lose(world)
    recover.release()
    await world.quiet()
    assert world.agent.ctx.instances.get(instance_id).observed == "unknown"
    await regain(world)
    assert world.agent.ctx.instances.get(instance_id).observed == "running"
    said = [e.data["connected"] for e in world.events if e.kind == "host.hypervisor"]
    assert said == [True, False, True, False, True]


@pytest.mark.parametrize("call", ["create_storage", "define", "start", "get"])
async def test_the_hypervisor_goes_away_in_each_phase_of_a_create(world: World, call: str) -> None:
    world.driver.inject(Fault(call=call, hang_s=30, times=1))
    instance_id = new_id()
    operation_id = world.send(InstanceCreate(spec=spec()), instance_id=instance_id)
    await until(lambda: all(armed.left == 0 for armed in world.driver._plan._armed))
    await lose(world)
    world.driver.clear_faults()
    if call != "get":  # which may have hung a reading that no operation waits for
        assert world.finals(operation_id) == []
    await regain(world)
    assert (await world.final(operation_id)).kind == "operation.succeeded"
    await world.quiet()
    assert world.agent.ctx.instances.get(instance_id).observed == "running"
    assert len(world.finals(operation_id)) == 1


async def test_an_instance_that_was_busy_at_the_return_does_not_stay_unknown(world: World) -> None:
    instance_id = await world.create(labels={"fake.guest-shutdown-s": "never"})
    stop = world.send(InstanceStop(timeout_s=600), instance_id=instance_id)
    await until(lambda: world.agent._runner.find(stop))
    await lose(world)
    await regain(world, operations=1)
    assert world.agent.ctx.instances.get(instance_id).observed == "running"
    await world.ask(world.driver.simulate_guest_shutdown, instance_id)
    assert (await world.final(stop)).kind == "operation.succeeded"


async def test_an_agent_that_starts_without_a_hypervisor(tmp_path: Path, no_blocking: object) -> None:
    world = await World(tmp_path).open()
    world.settings.driver.settings["faults"] = [{"call": "connect", "error": "unavailable", "times": 1}]
    import agent.app as app_module  # noqa: PLC0415

    retry, app_module.RETRY_S = app_module.RETRY_S, 0.01
    try:
        await world.start()
        await until(world.agent.ctx.state.connected.is_set)
        await until(lambda: world.agent.ctx.capacity.host)
        await world.create()
    finally:
        app_module.RETRY_S = retry
        await world.stop()
        await world.close()


# --- after a restart ----------------------------------------------------------------------------------------------


async def test_half_made_instances_are_no_drift_at_a_restart(world: World) -> None:
    world.driver.inject(Fault(call="define", instance="half-made", hang_s=30))
    created = world.send(InstanceCreate(spec=spec("half-made")), instance_id=new_id())
    other = await world.create()
    await until(lambda: world.agent._runner.find(created))
    world.driver.inject(Fault(call="delete_storage", instance=other, hang_s=30))
    deleted = world.send(InstanceDelete(), instance_id=other)
    await until(lambda: world.agent._runner.find(deleted))
    await world.crash()
    await world.start()
    assert (await world.final(created)).kind == "operation.succeeded"
    assert (await world.final(deleted)).kind == "operation.succeeded"
    await world.quiet()
    assert drifts(world) == []
    world.check_sequence()


async def test_a_failed_create_whose_undo_is_pending_is_neither_adopted_nor_missing(world: World, monkeypatch: Any) -> None:
    from agent.core import operation  # noqa: PLC0415

    monkeypatch.setattr(operation, "UNDO_PAUSE_S", 0.0)
    world.driver.inject(Fault(call="start", error="failed_precondition", times=1))
    world.driver.inject(Fault(call="undefine", error="internal"))
    instance_id = new_id()
    done = await world.do(InstanceCreate(spec=spec()), instance_id=instance_id)
    assert (done.kind, done.data["undone"]) == ("operation.failed", False)
    await until(lambda: not world.agent._lanes.busy)
    await check(world)
    await world.quiet()
    assert drifts(world) == []
    assert [path for path in world.owned_files() if path.startswith("instances")], "the disk stays below its domain"
    assert world.agent.ctx.instances.find(instance_id) is not None, "the claim outlives what it claims"
    # The connection comes back: what could not be taken back is taken up.
    world.driver.clear_faults()
    await lose(world)
    await regain(world)
    await until(lambda: world.agent.ctx.instances.find(instance_id) is None)
    await world.quiet()
    assert world.owned_files() == []
    assert await world.cut.operations(unfinished=True) == []
    assert len(world.finals(done.data["operation_id"])) == 1


async def test_a_hint_that_says_nothing_about_power_is_no_failure(world: World, logs: io.StringIO) -> None:
    instance_id = await world.create()
    world.driver.emit(PowerChanged(instance_id, "unknown", "defined"))
    await world.quiet()
    assert world.agent.ctx.instances.get(instance_id).observed == "running"
    assert "reader_failed" not in logs.getvalue()


async def test_a_start_from_outside_is_told_as_a_boot(world: World) -> None:
    """libvirt says resumed, then started, within one turn."""
    instance_id = await world.create(start=False)
    await world.ask(world.driver.start, instance_id)
    world.driver.emit(PowerChanged(instance_id, "running", "resumed"))
    world.driver.emit(PowerChanged(instance_id, "running", "booted"))
    await until(lambda: world.agent.ctx.instances.get(instance_id).observed == "running")
    assert world.agent.ctx.instances.get(instance_id).reason == "booted"
