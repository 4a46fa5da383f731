"""From delivery to journal: repeats, conflicts, fences, refusals, dead letters, order, poison."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from support.world import HOST, World, command, new_id, until

from agent.bus.base import Delivery, Outgoing
from agent.core.journal import Journal
from agent.errors import Internal, Unavailable
from agent.messages import routing
from agent.messages.commands import (
    HostPing,
    InstanceCreate,
    InstanceDelete,
    InstancePause,
    InstanceResume,
    InstanceShow,
    InstanceStart,
    InstanceStop,
    OperationCancel,
)
from agent.messages.events import Event
from agent.store.base import Change


async def answered(heard: list[Event], count: int = 1) -> list[Event]:
    await until(lambda: len(heard) >= count)
    return heard


# --- the same id again --------------------------------------------------------------------------------------------


async def test_a_repeat_gets_the_recorded_answer_and_has_no_effect(world: World) -> None:
    heard = await world.listen("compute.reply.test-1")
    other = await world.listen("compute.reply.test-2")
    instance_id = await world.create(start=False)
    body = command("instance.start", subject=instance_id, id="once")
    world.put(body, reply_to="compute.reply.test-1", correlation_id="c1")
    (first,) = await answered(heard)
    await world.do(InstanceStop(force=True), instance_id=instance_id)
    world.put(body, reply_to="compute.reply.test-2", correlation_id="c2")
    (second,) = await answered(other)
    assert (second.id, second.sequence, second.data) == (first.id, first.sequence, first.data)
    await world.quiet()
    assert await world.power(instance_id) == "stopped"
    assert len(world.finals("once")) == 1
    world.check_sequence()


async def test_a_repeat_may_differ_in_what_is_no_part_of_the_command(world: World) -> None:
    heard = await world.listen("compute.reply.test")
    for time in ("2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"):
        world.put(command("host.ping", id="once", time=time), reply_to="compute.reply.test")
    first, second = await answered(heard, 2)
    assert first.id == second.id


async def test_a_repeat_while_it_runs_gets_the_one_answer_too(world: World) -> None:
    heard = [await world.listen(f"compute.reply.test-{n}") for n in range(3)]
    instance_id = await world.create(labels={"fake.guest-shutdown-s": "never"})
    body = command("instance.stop", {"timeout_s": 60}, subject=instance_id, id="once")
    world.put(body, reply_to="compute.reply.test-0")
    runner = world.agent._runner
    await until(lambda: runner.find("once"))
    for _ in range(3):
        world.put(body, reply_to="compute.reply.test-1")
        world.put(body, reply_to="compute.reply.test-2")
    item = runner.find("once")
    assert item is not None
    await until(lambda: len(item.more_replies) == 2 and not world.broker.depth(routing.host_queue(HOST)))
    await asyncio.sleep(0.01)
    assert item.more_replies == ["compute.reply.test-1", "compute.reply.test-2"], "each address once"
    await world.ask(world.driver.simulate_guest_shutdown, instance_id)
    finals = [[event for event in (await answered(part)) if event.kind == "operation.succeeded"] for part in heard]
    assert {event.id for part in finals for event in part} == {world.finals("once")[0].id}


async def test_addresses_of_repeats_are_bounded(world: World) -> None:
    instance_id = await world.create(labels={"fake.guest-shutdown-s": "never"})
    body = command("instance.stop", {"timeout_s": 60}, subject=instance_id, id="once")
    for number in range(200):
        world.put(body, reply_to=f"reply-{number}")
    await until(lambda: world.agent._runner.find("once") and not world.broker.depth(routing.host_queue(HOST)))
    await asyncio.sleep(0.01)
    item = world.agent._runner.find("once")
    assert item is not None
    assert len(item.more_replies) <= 16
    await world.ask(world.driver.simulate_guest_shutdown, instance_id)
    await world.final("once")


async def test_a_repeat_that_comes_while_the_result_is_committed_is_answered(world: World, monkeypatch: Any) -> None:
    """The final event is rendered already, the record is not readable yet: neither must lose the answer."""
    heard = await world.listen("compute.reply.late")
    instance_id = await world.create(start=False)
    body = command("instance.start", subject=instance_id, id="once")
    gate, held = asyncio.Event(), asyncio.Event()
    inner = world.cut.inner.commit

    async def slow(changes: Any) -> Any:
        if any(change.final_of == "once" for change in changes):
            held.set()
            await gate.wait()
        return await inner(changes)

    monkeypatch.setattr(world.cut.inner, "commit", slow)
    world.put(body)
    await held.wait()
    world.put(body, reply_to="compute.reply.late")
    await until(lambda: not world.broker.depth(routing.host_queue(HOST)))
    for _ in range(20):
        await asyncio.sleep(0)
    gate.set()
    (answer,) = await answered(heard)
    assert answer.id == world.finals("once")[0].id


async def test_the_same_id_with_another_body_is_a_conflict_told_to_its_sender_only(world: World) -> None:
    heard = await world.listen("compute.reply.test")
    await world.do(HostPing(echo="a"), id="once")
    world.put(command("host.ping", {"echo": "b"}, id="once"), reply_to="compute.reply.test", correlation_id="x")
    (answer,) = await answered(heard)
    assert (answer.kind, answer.data["error"]["code"]) == ("operation.rejected", "conflict")
    assert answer.sequence is None
    await world.quiet()
    assert [event.kind for event in world.finals("once") if event.sequence] == ["operation.succeeded"]
    await until(lambda: world.dead)
    assert world.dead[0].headers["compute-code"] == "conflict"


async def test_a_bad_body_with_the_id_of_another_command_is_no_final_event_of_that(world: World) -> None:
    heard = await world.listen("compute.reply.test")
    instance_id = await world.create(labels={"fake.guest-shutdown-s": "never"})
    world.put(command("instance.stop", {"timeout_s": 60}, subject=instance_id, id="once"))
    world.put(command("instance.stop", {"bogus": 1}, subject=instance_id, id="once"), reply_to="compute.reply.test")
    (answer,) = await answered(heard)
    assert answer.data["error"]["code"] == "unknown_field"
    assert world.finals("once") == []
    await world.ask(world.driver.simulate_guest_shutdown, instance_id)
    assert (await world.final("once")).kind == "operation.succeeded"
    await world.quiet()
    assert len(world.finals("once")) == 1


async def test_a_conflict_or_repeat_does_not_raise_the_generation(world: World) -> None:
    instance_id = await world.create(start=False)
    await world.do(InstanceStart(), instance_id=instance_id, id="once", generation=1)
    world.put(command("instance.start", {}, subject=instance_id, id="once", generation=999))
    done = await world.do(InstanceStop(force=True), instance_id=instance_id, generation=2)
    assert done.kind == "operation.succeeded", done.data
    record = world.agent.ctx.instances.get(instance_id)
    assert record.generation == 2


async def test_of_two_different_commands_with_one_id_in_one_batch_the_first_counts(world: World) -> None:
    instance_id = await world.create(start=False)
    for generation in (1, 999):
        world.put(command("instance.start", {}, subject=instance_id, id="once", generation=generation))
    await world.final("once")
    await world.quiet()
    assert world.agent.ctx.instances.get(instance_id).generation == 1


async def test_a_repeat_of_a_command_that_an_older_version_accepted(world: World) -> None:
    await world.do(HostPing(), id="once")
    world.cut.inner._operations["once"].body = b'{"old": "format"}'
    heard = await world.listen("compute.reply.test")
    world.put(command("host.ping", id="once"), reply_to="compute.reply.test")
    (answer,) = await answered(heard)
    assert answer.data["error"]["code"] == "conflict"
    assert (await world.do(HostPing())).kind == "operation.succeeded"


# --- fences -------------------------------------------------------------------------------------------------------


async def test_a_stale_generation_does_nothing_and_is_told_the_current_one(world: World) -> None:
    instance_id = await world.create()
    assert (await world.do(InstancePause(), instance_id=instance_id, generation=7)).kind == "operation.succeeded"
    done = await world.do(InstanceResume(), instance_id=instance_id, generation=6)
    assert (done.kind, done.data["error"]["code"]) == ("operation.rejected", "stale_generation")
    assert done.data["error"]["details"] == {"generation": 7}
    assert await world.power(instance_id) == "paused"
    again = await world.do(InstanceResume(), instance_id=instance_id, generation=7)
    assert again.kind == "operation.succeeded"


async def test_a_newer_generation_fences_those_behind_it_in_the_same_batch(world: World) -> None:
    instance_id = await world.create()
    ids = [world.send(InstanceShow(), instance_id=instance_id, generation=generation) for generation in (5, 4, 6)]
    kinds = [(await world.final(one)).kind for one in ids]
    assert kinds == ["operation.succeeded", "operation.rejected", "operation.succeeded"]


async def test_a_generation_outlives_a_restart(world: World) -> None:
    instance_id = await world.create()
    await world.do(InstanceShow(), instance_id=instance_id, generation=5)
    await world.crash()
    await world.start()
    done = await world.do(InstancePause(), instance_id=instance_id, generation=4)
    assert done.data["error"]["code"] == "stale_generation"


async def test_expired_on_arrival(world: World) -> None:
    instance_id = await world.create(start=False)
    past = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
    world.put(command("instance.start", subject=instance_id, id="old", expirytime=past))
    done = await world.final("old")
    assert (done.kind, done.data["error"]["code"]) == ("operation.expired", "expired")
    assert await world.power(instance_id) == "stopped"


async def test_expired_in_its_lane(world: World) -> None:
    instance_id = await world.create(labels={"fake.guest-shutdown-s": "never"})
    world.send(InstanceStop(timeout_s=60), instance_id=instance_id)
    soon = datetime.now(UTC) + timedelta(seconds=0.1)
    world.put(command("instance.start", subject=instance_id, id="compute.reply.late", expirytime=soon.isoformat()))
    # A slow machine looks at it when its time is over already.
    await until(lambda: world.agent._runner.find("compute.reply.late") or world.finals("compute.reply.late"))
    await until(lambda: datetime.now(UTC) > soon)
    await world.ask(world.driver.simulate_guest_shutdown, instance_id)
    assert (await world.final("compute.reply.late")).kind == "operation.expired"
    assert await world.power(instance_id) == "stopped"


async def test_the_wrong_host(world: World) -> None:
    world.put(command("host.ping", id="lost", host="elsewhere"))
    done = await world.final("lost")
    assert (done.kind, done.data["error"]["code"]) == ("operation.rejected", "wrong_host")


async def test_a_broadcast_is_for_us(world: World) -> None:
    world.put(command("host.ping", id="all"), key=routing.command_key("host.ping", "all"))
    assert (await world.final("all")).data["result"]["host"] == HOST


# --- what is no command -------------------------------------------------------------------------------------------


async def test_poison_is_kept_with_its_reason_and_answered(world: World) -> None:
    heard = await world.listen("compute.reply.test")
    world.put(b"not json", reply_to="compute.reply.test", correlation_id="c", message_id="m1", key=f"host.ping.{HOST}")
    (answer,) = await answered(heard)
    assert (answer.kind, answer.data["error"]["code"]) == ("operation.rejected", "bad_json")
    assert answer.data["operation_id"] == "m1"
    await until(lambda: world.dead)
    (dead,) = world.dead
    assert dead.body == b"not json"
    assert dead.correlation_id == "c"
    assert dead.headers["compute-code"] == "bad_json"
    assert dead.headers["compute-host"] == HOST
    assert "JSON" in dead.headers["compute-reason"]
    assert (await world.do(HostPing())).kind == "operation.succeeded"
    world.check_sequence()


class FixedDelivery:
    """A delivery as a bus may hand it over, with whatever in its properties."""

    def __init__(self, body: bytes, **properties: Any) -> None:
        self.body = body
        self.exchange, self.routing_key, self.headers, self.redelivered = "x", "k", {}, False
        self.message_id = self.correlation_id = self.reply_to = None
        self.settled: list[str] = []
        self.__dict__.update(properties)

    def ack(self) -> None:
        self.settled.append("ack")

    def reject(self, *, requeue: bool) -> None:
        self.settled.append(f"reject {requeue}")


class Undecodable(FixedDelivery):
    @property
    def correlation_id(self) -> str:
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")

    @correlation_id.setter
    def correlation_id(self, value: Any) -> None:
        return


def handed(world: World, delivery: FixedDelivery) -> FixedDelivery:
    typed: Delivery = delivery  # type: ignore[assignment]
    world.agent._dispatcher.on_delivery(typed)
    return delivery


@pytest.mark.parametrize("text", ["\ud800", "x" * 300, "ü" * 200])
@pytest.mark.parametrize("body", [b"no json", command("host.ping")])
async def test_properties_that_nothing_can_carry_are_dropped(world: World, text: str, body: bytes) -> None:
    delivery = handed(world, FixedDelivery(body, message_id=text, correlation_id=text, reply_to=text))
    await until(lambda: delivery.settled)
    assert delivery.settled == ["ack"]
    await world.quiet()
    assert (await world.do(HostPing())).kind == "operation.succeeded"


async def test_a_message_whose_properties_cannot_be_read_goes_to_the_dead_letters(world: World) -> None:
    delivery = handed(world, Undecodable(command("host.ping")))
    await until(lambda: delivery.settled)
    assert delivery.settled == ["reject False"]
    assert (await world.do(HostPing())).kind == "operation.succeeded"


async def test_one_that_cannot_be_stored_does_not_keep_its_neighbours_out(world: World, monkeypatch: Any) -> None:
    inner = world.cut.inner.commit

    async def picky(changes: Any) -> Any:
        if any(change.claim is not None and change.claim.id == "bad" for change in changes):
            raise Internal("cannot be stored", code="journal_rejected")
        return await inner(changes)

    monkeypatch.setattr(world.cut.inner, "commit", picky)
    bodies = {name: handed(world, FixedDelivery(command("host.ping", id=name))) for name in ("one", "bad", "two")}
    await until(lambda: all(delivery.settled for delivery in bodies.values()))
    assert {name: delivery.settled for name, delivery in bodies.items()} == {
        "one": ["ack"],
        "bad": ["reject False"],
        "two": ["ack"],
    }
    assert (await world.final("two")).kind == "operation.succeeded"


async def test_bad_messages_are_buried_together_and_not_one_after_the_other(world: World, monkeypatch: Any) -> None:
    """A broker that confirms slowly must not make a hundred bad messages hold up a good one for long."""
    confirms: list[asyncio.Future[None]] = []

    def slow(message: Outgoing, *, timeout_s: float = 10.0) -> asyncio.Future[None]:
        confirms.append(asyncio.get_running_loop().create_future())
        return confirms[-1]

    with monkeypatch.context() as patch:
        patch.setattr(world.agent._dispatcher, "_bus", type("Bus", (), {"publish_soon": staticmethod(slow)})())
        bad = [handed(world, FixedDelivery(b"bad")) for _ in range(100)]
        good = handed(world, FixedDelivery(command("host.ping")))
        await until(lambda: len(confirms) == 100)
        confirms[0].set_exception(Unavailable("nack"))
        for confirm in confirms[1:]:
            confirm.set_result(None)
        await until(lambda: good.settled and all(delivery.settled for delivery in bad))
    assert bad[0].settled == ["reject False"], "not confirmed: the broker is to keep it"
    assert {tuple(delivery.settled) for delivery in bad[1:]} == {("ack",)}


async def test_a_defect_in_an_inline_handler_is_a_failure_of_its_command_only(world: World, monkeypatch: Any) -> None:
    route = world.agent._registry["host.ping"]

    def broken(_ctx: Any, _command: Any) -> None:
        raise RuntimeError("secret")

    monkeypatch.setitem(world.agent._registry._routes, "host.ping", type(route)("host.ping", "query", inline=broken))
    done = await world.do(HostPing())
    assert (done.kind, done.data["error"]["code"]) == ("operation.failed", "internal")
    assert "secret" not in str(done.data)


# --- accepted means durable ---------------------------------------------------------------------------------------


async def test_no_ack_before_the_commit_and_none_while_the_disk_is_full(world: World) -> None:
    store = world.cut.inner
    store.fail_with = Unavailable("no space is left", code="journal_full")
    delivery = handed(world, FixedDelivery(command("host.ping", id="waits")))
    await until(lambda: world.agent.ctx.journal.problem)
    assert delivery.settled == []
    assert "journal" in world.agent.not_ready()
    assert world.agent.ctx.state.conditions["journal"]
    store.fail_with = None
    await until(lambda: delivery.settled)
    assert (await world.final("waits")).kind == "operation.succeeded"
    assert world.agent.ctx.journal.problem is None
    assert world.agent.not_ready() == {}


@pytest.mark.parametrize("applied", [False, True])
async def test_a_crash_around_the_acceptance(world: World, applied: bool) -> None:
    instance_id = await world.create(start=False)
    world.cut.after(0, applied=applied)
    world.send(InstanceStart(), instance_id=instance_id, id="once")
    await world.cut.happened.wait()
    await world.crash()
    assert world.broker.depth(routing.host_queue(HOST)) == 1, "not acknowledged: the broker still has it"
    await world.start()
    assert (await world.final("once")).kind == "operation.succeeded"
    await world.quiet()
    assert len(world.finals("once")) == 1
    world.check_sequence()


# --- order --------------------------------------------------------------------------------------------------------


async def test_order_per_instance_over_many_batches(world: World) -> None:
    instances = [await world.create() for _ in range(4)]
    sent: dict[str, list[str]] = {instance_id: [] for instance_id in instances}
    for number in range(40):
        instance_id = instances[number % 4]
        verb = InstancePause() if (number // 4) % 2 == 0 else InstanceResume()
        sent[instance_id].append(world.send(verb, instance_id=instance_id))
    for ids in sent.values():
        for one in ids:
            assert (await world.final(one)).data["result"]["changed"] is True, "out of order it would have been no change"
    order = [event.data["operation_id"] for event in world.events if event.kind == "operation.succeeded"]
    for ids in sent.values():
        assert [one for one in order if one in ids] == ids
    world.check_sequence()


async def test_a_create_and_what_follows_it_at_once(world: World) -> None:
    instance_id = new_id()
    from support.world import spec  # noqa: PLC0415

    ids = [
        world.send(InstanceCreate(spec=spec()), instance_id=instance_id),
        world.send(InstancePause(), instance_id=instance_id),
        world.send(InstanceDelete(), instance_id=instance_id),
        world.send(InstanceDelete(), instance_id=instance_id),
    ]
    finals = [await world.final(one) for one in ids]
    assert [event.kind for event in finals] == ["operation.succeeded"] * 3 + ["operation.rejected"]
    assert finals[3].data["error"]["code"] == "unknown_instance"
    await world.quiet()
    assert world.owned_files() == []


async def test_cancel_overtakes_a_busy_lane(world: World) -> None:
    instance_id = await world.create(labels={"fake.guest-shutdown-s": "never"})
    stop = world.send(InstanceStop(timeout_s=600), instance_id=instance_id)
    waiting = world.send(InstancePause(), instance_id=instance_id)
    await until(lambda: world.agent._runner.find(waiting) and world.agent._runner.find(stop))
    assert (await world.do(OperationCancel(operation_id=waiting))).kind == "operation.succeeded"
    assert (await world.final(waiting)).kind == "operation.cancelled"
    item = world.agent._runner.find(stop)
    assert item is not None
    await until(lambda: item.operation is not None and item.operation._finished is not None)
    assert (await world.do(OperationCancel(operation_id=stop))).kind == "operation.succeeded"
    assert (await world.final(stop)).kind == "operation.cancelled"
    assert await world.power(instance_id) == "running"
    done = await world.do(OperationCancel(operation_id=stop))
    assert done.data["error"]["code"] == "unknown_operation"


# --- the journal's own retries ------------------------------------------------------------------------------------


async def test_a_commit_that_had_to_wait_carries_what_is_true_then(world: World, monkeypatch: Any) -> None:
    """Two commits wait for the disk and come through in any order: the older must not overwrite the newer."""
    instance_id = await world.create()
    ctx, store = world.agent.ctx, world.cut.inner
    store.fail_with = Unavailable("no space is left", code="journal_full")
    older = ctx.instances.update(instance_id, desired="paused")
    first = asyncio.ensure_future(ctx.journal.commit(Change(instances=[older])))
    await asyncio.sleep(0)
    newer = ctx.instances.update(instance_id, desired="stopped")
    store.fail_with = None
    await ctx.journal.commit(Change(instances=[newer]))
    await first
    (kept,) = await store.instances()
    assert kept.desired == "stopped"


async def test_a_closing_journal_lets_waiters_go(no_blocking: object) -> None:
    from agent.store.memory import MemoryStore  # noqa: PLC0415

    store = MemoryStore()
    journal = Journal(store, host="h")
    store.fail_with = Unavailable("no space is left", code="journal_full")
    waiting = [asyncio.ensure_future(journal.commit(Change())) for _ in range(3)]
    await asyncio.sleep(0)
    journal.close()
    for result in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(result, Unavailable)
