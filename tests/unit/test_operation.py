"""Durable operations: steps, undo, replay after a crash, cancel, and what may follow a final event."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from support.rig import INSTANCE, Rig
from support.world import Cut, spec, until

from agent.core import announcement, attempt
from agent.core.operation import Operation
from agent.drivers.base import CallContext
from agent.errors import (
    Cancelled,
    ComputeError,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from agent.messages.events import OperationSucceeded
from agent.store.base import Change, Committed, InstanceRecord
from agent.store.memory import MemoryStore

pytestmark = pytest.mark.usefixtures("impatient")


def three_steps(rig: Rig, *, fail_in: str = "", error: Exception | None = None, tail: str = "") -> None:
    """`instance.start` is served by the steps a, b, c, each with an undo."""

    async def handler(op: Operation, _data: Any) -> None:
        for name in "abc":

            async def do(name: str = name) -> dict[str, Any] | None:
                rig.log.append(name)
                if name == fail_in:
                    raise error or FailedPrecondition("no")
                return {"of": name}

            async def undo(name: str = name) -> None:
                rig.log.append(f"undo {name}")

            assert await op.step(name, do, undo=undo) == {"of": name}
        if tail:
            rig.log.append(tail)
            raise error or Unavailable("the tail fails", code="tail")

    rig.route("instance.start", handler)


# --- the straight way ---------------------------------------------------------------------------------------------


async def test_steps_run_in_order_and_cost_one_commit_each(rig: Rig) -> None:
    store = rig.journal.store = rig.store = Cut(MemoryStore())
    three_steps(rig)
    record = await rig.run()
    assert rig.log == ["a", "b", "c"]
    assert record.state == "succeeded"
    assert await rig.steps(record.id) == [("a", "done"), ("b", "done"), ("c", "done")]
    announced = rig.kinds(record.id).count("operation.accepted")
    assert store.count <= 1 + 3 + 1 + announced + rig.kinds(record.id).count("operation.progress") + 1


async def test_the_final_event_is_the_last_one_and_its_sequence_is_kept(rig: Rig) -> None:
    three_steps(rig)
    record = await rig.run()
    assert rig.kinds(record.id)[-1] == "operation.succeeded"
    assert record.final_sequence == rig.committed[-1].sequence


async def test_a_refusal_before_the_first_step_is_a_rejection(rig: Rig) -> None:
    async def handler(op: Operation, _data: Any) -> None:
        raise InvalidArgument("no", code="bad")

    rig.route("instance.start", handler)
    record = await rig.run()
    assert (record.state, record.error_code) == ("rejected", "bad")
    assert len(rig.finals(record.id)) == 1


async def test_an_unexpected_exception_is_internal_and_tells_no_text(rig: Rig) -> None:
    async def handler(op: Operation, _data: Any) -> None:
        raise RuntimeError("secret")

    rig.route("instance.start", handler)
    record = await rig.run()
    assert (record.state, record.error_code) == ("failed", "internal")
    assert "secret" not in str(rig.finals(record.id))


async def test_expired_while_waiting_for_its_turn(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    three_steps(rig)
    gate = asyncio.Event()

    async def slow(op: Operation, _data: Any) -> None:
        await gate.wait()

    rig.route("instance.stop", slow)
    first = await rig.submit("instance.stop")
    at = datetime.now(UTC) + timedelta(seconds=60)
    second = await rig.submit(expirytime=at.isoformat())
    monkeypatch.setattr(attempt, "now", lambda: at)
    gate.set()
    await rig.ended(first)
    record = await rig.ended(second)
    assert record.state == "expired"
    assert rig.log == []


# --- failure ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fail_in", "log"),
    [
        ("a", ["a", "undo a"]),
        ("b", ["a", "b", "undo b", "undo a"]),
        ("c", ["a", "b", "c", "undo c", "undo b", "undo a"]),
    ],
)
async def test_undo_runs_in_reverse_from_the_step_that_failed(rig: Rig, fail_in: str, log: list[str]) -> None:
    three_steps(rig, fail_in=fail_in)
    record = await rig.run()
    assert rig.log == log
    assert record.state == "failed"
    ((kind, data),) = rig.finals(record.id)
    assert kind == "operation.failed"
    assert data["undone"] is True
    assert {state for _, state in await rig.steps(record.id)} == {"undone"}


async def test_a_failure_after_the_last_step_undoes_all(rig: Rig) -> None:
    three_steps(rig, tail="tail")
    record = await rig.run()
    assert rig.log == ["a", "b", "c", "tail", "undo c", "undo b", "undo a"]
    assert record.state == "failed"


async def test_an_undo_is_tried_again(rig: Rig) -> None:
    tries: list[int] = []

    async def handler(op: Operation, _data: Any) -> None:
        async def do() -> None:
            raise FailedPrecondition("no")

        async def undo() -> None:
            tries.append(1)
            if len(tries) < 3:
                raise Unavailable("away")

        await op.step("a", do, undo=undo)

    rig.route("instance.start", handler)
    record = await rig.run()
    assert len(tries) == 3
    assert not record.undo_pending


async def test_an_undo_of_what_is_positively_gone_is_done(rig: Rig) -> None:
    async def handler(op: Operation, _data: Any) -> None:
        async def do() -> None:
            raise FailedPrecondition("no")

        async def undo() -> None:
            raise NotFound("the hypervisor has no such domain")

        await op.step("a", do, undo=undo)

    rig.route("instance.start", handler)
    assert not (await rig.run()).undo_pending


def stubborn_undo(rig: Rig) -> dict[str, bool]:
    """Steps a, b; b fails, and its undo fails until `stubborn` is false."""
    state = {"stubborn": True}

    async def handler(op: Operation, _data: Any) -> None:
        async def do_a() -> None:
            rig.log.append("a")

        async def undo_a() -> None:
            rig.log.append("undo a")

        async def do_b() -> None:
            raise FailedPrecondition("no")

        async def undo_b() -> None:
            if state["stubborn"]:
                raise Unavailable("cannot", code="busy")
            rig.log.append("undo b")

        await op.step("a", do_a, undo=undo_a)
        await op.step("b", do_b, undo=undo_b)

    rig.route("instance.start", handler)
    return state


async def test_what_cannot_be_undone_is_pending_and_keeps_what_lies_below_it(rig: Rig) -> None:
    """A disk is not removed from under a domain that could not be ended, nor a claim from what still exists."""
    state = stubborn_undo(rig)
    record = await rig.run()
    await rig.idle()
    assert record.undo_pending
    assert rig.log == ["a"]
    assert rig.finals(record.id)[0][1]["undone"] is False
    assert INSTANCE in rig.runner.open.busy_instances()

    state["stubborn"] = False
    kept = await rig.store.operation(record.id)
    assert kept is not None
    await rig.runner.resume([kept])
    await rig.idle()
    assert rig.log == ["a", "undo b", "undo a"]
    after = await rig.store.operation(record.id)
    assert after is not None
    assert not after.undo_pending
    assert after.final_sequence == record.final_sequence, "a duplicate still has to find its answer"
    assert len(rig.finals(record.id)) == 1
    assert INSTANCE not in rig.runner.open.busy_instances()


async def test_a_pending_undo_is_taken_up_after_a_restart(rig: Rig) -> None:
    state = stubborn_undo(rig)
    record = await rig.run()
    await rig.idle()
    state["stubborn"] = False
    again = await rig.reborn()
    await again.resume()
    await again.idle()
    assert rig.log == ["a", "undo b", "undo a"]
    assert not await again.store.operations(unfinished=True)
    assert len(again.finals(record.id)) == 1


async def test_a_pending_undo_of_an_operation_that_failed_after_its_last_step(rig: Rig) -> None:
    """Its handler must not run on into what comes after the steps: that would fail, or succeed."""
    state = {"stubborn": True}

    async def handler(op: Operation, _data: Any) -> None:
        async def do() -> None:
            rig.log.append("a")

        async def undo() -> None:
            if state["stubborn"]:
                raise Unavailable("cannot", code="busy")
            rig.log.append("undo a")

        await op.step("a", do, undo=undo)
        raise NotFound("the domain is gone")

    rig.route("instance.start", handler)
    record = await rig.run()
    await rig.idle()
    assert record.undo_pending
    state["stubborn"] = False
    again = await rig.reborn()
    await again.resume()
    await again.idle()
    assert rig.log == ["a", "undo a"]
    assert not await again.store.operations(unfinished=True)


@pytest.mark.parametrize("again", [False, True])
async def test_a_pending_undo_ends_with_its_instance_and_leaves_its_successor_alone(rig: Rig, again: bool) -> None:
    def made_at(when: datetime) -> InstanceRecord:
        return InstanceRecord(
            id=INSTANCE, spec=spec("vm"), generation=0, desired="stopped", observed="stopped", reason="created",
            created_by="another", created_at=when, updated_at=when,
        )  # fmt: skip

    async def handler(op: Operation, _data: Any) -> None:
        op.ctx.instances.get(op.instance_id)

        async def do() -> None:
            rig.log.append("a")

        async def undo() -> None:
            rig.log.append("undo a")
            raise Unavailable("cannot", code="busy")

        await op.step("a", do, undo=undo)
        raise FailedPrecondition("no")

    rig.ctx.instances.put(made_at(datetime.now(UTC) - timedelta(days=1)))
    rig.route("instance.start", handler)
    assert (await rig.run()).undo_pending
    await rig.idle()
    rig.log.clear()
    rig.ctx.instances.remove(INSTANCE)
    if again:
        rig.ctx.instances.put(made_at(datetime.now(UTC)))
    await rig.resume()
    await rig.idle()
    assert rig.log == []
    assert await rig.store.operations(unfinished=True) == []


async def test_a_step_that_leaves_something_and_has_no_undo_is_not_told_as_undone(rig: Rig) -> None:
    async def handler(op: Operation, _data: Any) -> None:
        async def do() -> None:
            raise DeadlineExceeded("the guest may have been started")

        await op.step("start", do)

    rig.route("instance.start", handler)
    record = await rig.run()
    assert rig.finals(record.id)[0][1]["undone"] is False


# --- the deadline of a driver call ---------------------------------------------------------------------------------


async def test_undo_waits_for_a_stuck_call_and_other_lanes_go_on(rig: Rig) -> None:
    release = threading.Event()

    def stuck() -> None:
        release.wait(20)
        rig.log.append("late effect")

    async def handler(op: Operation, _data: Any) -> None:
        async def do() -> None:
            await op.mutate(stuck)

        async def undo() -> None:
            rig.log.append("undo")

        await op.step("a", do, undo=undo)

    async def other(op: Operation, _data: Any) -> None:
        rig.log.append("other")

    rig.ctx.deadlines = type(rig.ctx.deadlines)(mutate_s=0.05, settle_s=0.02)
    rig.route("instance.start", handler)
    rig.route("instance.stop", other)
    record = await rig.run()
    assert (record.state, record.error_code, record.undo_pending) == ("failed", "deadline_exceeded", True)
    assert rig.log == []
    behind = await rig.submit("instance.stop")
    await rig.run("instance.stop", subject="99999999-2222-3333-4444-555555555555")
    assert rig.log == ["other"]
    assert rig.runner.find(behind) is not None
    release.set()
    await rig.ended(behind)
    assert rig.log == ["other", "late effect", "undo", "other"]
    kept = await rig.store.operation(record.id)
    assert kept is not None
    assert not kept.undo_pending


@pytest.mark.parametrize("code", ["unavailable", "hypervisor_unreachable"])
async def test_a_call_is_made_again_when_the_hypervisor_was_away(rig: Rig, code: str) -> None:
    calls: list[int] = []

    def flaky() -> int:
        calls.append(1)
        if len(calls) < 3:
            raise Unavailable("away", code=code)
        return len(calls)

    async def handler(op: Operation, _data: Any) -> None:
        async def do() -> dict[str, Any]:
            return {"calls": await op.mutate(flaky)}

        await op.step("a", do)

    rig.route("instance.start", handler)
    assert (await rig.run()).state == "succeeded"
    assert len(calls) == 3


# --- crash --------------------------------------------------------------------------------------------------------


async def crash_at(rig: Rig, commits: int, *, applied: bool) -> tuple[str, Rig]:
    """Run `instance.start`, die at a commit after acceptance, and give the next process."""
    cut = Cut(rig.store)
    rig.journal.store = rig.store = cut
    operation_id = await rig.submit()
    cut.after(commits, applied=applied)
    await cut.happened.wait()
    await rig.die()
    return operation_id, await rig.reborn()


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("commits", range(4))
async def test_crash_at_every_commit_then_resume(
    rig: Rig, commits: int, applied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(announcement, "SILENCE_S", 60)
    three_steps(rig)
    operation_id, again = await crash_at(rig, commits, applied=applied)
    await again.resume()
    if commits == 3 and applied:
        assert again.runner.find(operation_id) is None, "it was final"
    else:
        await again.ended(operation_id)
    # A step that was recorded as done does not run again.
    assert rig.log in (["a", "b", "c"], ["a", "a", "b", "c"], ["a", "b", "b", "c"], ["a", "b", "c", "c"])
    record = await again.store.operation(operation_id)
    assert record is not None
    assert record.state == "succeeded"
    sequenced = await again.store.backlog(0, 1000)
    finals = [e for e in sequenced if b"compute.operation.succeeded.v1" in e.event.body]
    assert len(finals) == 1


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("tail", ["", "tail"])
async def test_crash_while_undoing_finishes_the_undoing(
    rig: Rig, tail: str, applied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where every step was done and the failure came after them: it must not end as a success."""
    monkeypatch.setattr(announcement, "SILENCE_S", 60)
    three_steps(rig, fail_in="" if tail else "c", tail=tail)
    operation_id, again = await crash_at(rig, 4, applied=applied)  # three steps, undoing, [final]
    if applied:
        return
    rig.log.clear()
    three_steps(again)  # whatever failed would succeed now
    await again.resume()
    record = await again.ended(operation_id)
    assert record.state == "failed"
    assert again.log == ["undo c", "undo b", "undo a"]
    assert len(again.finals(operation_id)) == 1


async def test_an_operation_that_kills_the_agent_before_its_first_step_is_given_up(rig: Rig) -> None:
    """Attempts are counted although such an operation never commits anything."""

    async def deadly(op: Operation, _data: Any) -> None:
        rig.log.append("run")
        await asyncio.Event().wait()

    rig.route("instance.start", deadly)
    operation_id = await rig.submit()
    current = rig
    for _ in range(attempt.MAX_ATTEMPTS + 3):
        if current.runner.find(operation_id) is None:
            break
        count = len(rig.log)
        await until(lambda count=count, current=current: len(rig.log) > count or not len(current.runner.open))
        if not len(current.runner.open):
            break
        await current.die()
        current = await current.reborn()
        await current.resume()
    record = await current.ended(operation_id)
    assert record.state == "failed"
    assert record.error_code == "too_many_attempts"
    assert len(rig.log) <= attempt.MAX_ATTEMPTS + 1


async def test_resume_keeps_the_order_of_arrival(rig: Rig) -> None:
    gate = asyncio.Event()

    async def handler(op: Operation, _data: Any) -> None:
        await gate.wait()
        rig.log.append(op.id)

    rig.route("instance.start", handler)
    ids = [await rig.submit() for _ in range(5)]
    await rig.die()
    again = await rig.reborn()
    gate.set()
    await again.resume()
    await again.idle()
    assert rig.log == ids


async def test_a_resumed_operation_says_once_that_it_started(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its silence ends while the commit of the new attempt is on its way."""
    gate = asyncio.Event()

    async def handler(op: Operation, _data: Any) -> None:
        await gate.wait()

    rig.route("instance.start", handler)
    operation_id = await rig.submit()
    await rig.die()
    again = await rig.reborn()
    begun = len(again.committed)
    commit = again.journal.commit

    async def slow(*changes: Change) -> Any:
        if any(change.operation is not None for change in changes):
            await asyncio.sleep(0.05)
        return await commit(*changes)

    monkeypatch.setattr(again.journal, "commit", slow)
    await again.resume()
    await until(lambda: "operation.started" in again.kinds(operation_id)[begun:])
    await asyncio.sleep(0.05)
    gate.set()
    await again.ended(operation_id)
    assert again.kinds(operation_id)[begun:] == ["operation.accepted", "operation.started", "operation.succeeded"]


async def test_a_command_that_this_version_cannot_read_ends_once(rig: Rig) -> None:
    three_steps(rig, fail_in="a")
    operation_id = await rig.submit()
    await rig.die()
    records = await rig.store.operations(unfinished=True)
    for record in records:
        record.body = b"{}"
    again = await rig.reborn()
    await again.runner.resume(records)
    assert len(again.finals(operation_id)) == 1
    # The same for one that has had its final event and left something behind.
    ended = await again.store.operation(operation_id)
    assert ended is not None
    ended.undo_pending, ended.body = True, b"{}"
    await again.runner.resume([ended])
    assert len(again.finals(operation_id)) == 1


# --- cancel -------------------------------------------------------------------------------------------------------


async def test_cancel_before_the_next_step(rig: Rig) -> None:
    gate = asyncio.Event()

    async def handler(op: Operation, _data: Any) -> None:
        async def do() -> None:
            rig.log.append("a")
            await gate.wait()

        async def undo() -> None:
            rig.log.append("undo a")

        async def never() -> None:
            rig.log.append("b")

        await op.step("a", do, undo=undo)
        await op.step("b", never)

    rig.route("instance.start", handler)
    operation_id = await rig.submit()
    await until(lambda: rig.log)
    await rig.runner.cancel(operation_id)
    gate.set()
    record = await rig.ended(operation_id)
    assert (record.state, record.cancel_requested) == ("cancelled", True)
    assert rig.log == ["a", "undo a"]


async def test_cancel_ends_the_wait_of_a_driver_call_at_once(rig: Rig) -> None:
    waiting = threading.Event()

    def call(context: CallContext) -> None:
        woken = threading.Event()
        with context.waking(woken):
            waiting.set()
            assert woken.wait(60)
        assert context.cancelled()
        raise Cancelled("as asked")

    async def handler(op: Operation, _data: Any) -> None:
        async def do() -> None:
            await op.long(call)

        await op.step("a", do)

    rig.route("instance.start", handler)
    operation_id = await rig.submit()
    await until(waiting.is_set)
    await rig.runner.cancel(operation_id)
    assert (await rig.ended(operation_id)).state == "cancelled"


async def test_cancel_in_a_cancellable_step_ends_it_at_once(rig: Rig) -> None:
    async def handler(op: Operation, _data: Any) -> None:
        async def do() -> None:
            rig.log.append("a")
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                rig.log.append("stopped")
                raise

        await op.step("a", do, cancellable=True)

    rig.route("instance.start", handler)
    operation_id = await rig.submit()
    await until(lambda: rig.log)
    await rig.runner.cancel(operation_id)
    record = await rig.ended(operation_id)
    assert record.state == "cancelled"
    assert rig.log == ["a", "stopped"]


async def test_cancel_while_it_waits_for_its_turn(rig: Rig) -> None:
    gate = asyncio.Event()

    async def handler(op: Operation, _data: Any) -> None:
        rig.log.append(op.id)
        await gate.wait()

    rig.route("instance.start", handler)
    first = await rig.submit()
    second = await rig.submit()
    await until(lambda: rig.log)
    # The announcement that it was accepted is on its way: it must not come after the final event.
    await rig.runner.cancel(second)
    record = await rig.ended(second)
    assert record.state == "cancelled"
    gate.set()
    await rig.ended(first)
    await rig.idle()
    assert rig.log == [first]
    assert rig.kinds(second)[-1] == "operation.cancelled"
    with pytest.raises(NotFound):
        await rig.runner.cancel(second)


async def test_two_cancels_at_once_of_what_waits_for_its_turn_end_it_once(rig: Rig) -> None:
    gate = asyncio.Event()

    async def handler(op: Operation, _data: Any) -> None:
        rig.log.append(op.id)
        await gate.wait()

    rig.route("instance.start", handler)
    first = await rig.submit()
    second = await rig.submit()
    await until(lambda: rig.log)
    commit, go, held = rig.store.commit, asyncio.Event(), []

    async def slow(changes: Sequence[Change]) -> list[Committed]:
        held.append(changes)
        await go.wait()
        return await commit(changes)

    rig.store.commit = slow  # type: ignore[method-assign]
    cancels = [asyncio.ensure_future(rig.runner.cancel(second)) for _ in range(2)]
    await until(lambda: held)
    assert not any(one.done() for one in cancels)
    go.set()
    await asyncio.gather(*cancels)
    gate.set()
    await rig.ended(first)
    assert (await rig.ended(second)).state == "cancelled"
    assert len(rig.finals(second)) == 1


async def test_cancel_past_the_point_of_no_return_is_refused(rig: Rig) -> None:
    gate = asyncio.Event()

    async def handler(op: Operation, _data: Any) -> None:
        op.point_of_no_return()

        async def do() -> None:
            rig.log.append("a")
            await gate.wait()

        await op.step("a", do)

    rig.route("instance.start", handler)
    operation_id = await rig.submit()
    await until(lambda: rig.log)
    with pytest.raises(FailedPrecondition) as refused:
        await rig.runner.cancel(operation_id)
    assert refused.value.code == "too_late_to_cancel"
    gate.set()
    assert (await rig.ended(operation_id)).state == "succeeded"


async def test_an_undo_is_not_told_of_the_cancel_that_it_answers(rig: Rig) -> None:
    gate, told = asyncio.Event(), []

    def remove(context: CallContext) -> None:
        told.append(context.cancelled())

    async def handler(op: Operation, _data: Any) -> None:
        async def do() -> None:
            rig.log.append("a")
            await gate.wait()

        await op.step("a", do, undo=lambda: op.long(remove))

    async def more(op: Operation, data: Any) -> None:
        await handler(op, data)
        await op.step("b", gate.wait)  # type: ignore[arg-type]

    rig.route("instance.start", more)
    operation_id = await rig.submit()
    await until(lambda: rig.log)
    await rig.runner.cancel(operation_id)
    gate.set()
    record = await rig.ended(operation_id)
    assert (record.state, record.undo_pending) == ("cancelled", False)
    assert told == [False]


async def test_a_cancel_before_the_first_step_is_undone_also_by_a_later_run(rig: Rig) -> None:
    gate, away = asyncio.Event(), [True]

    async def handler(op: Operation, _data: Any) -> None:
        if not op.begun:
            rig.log.append("claimed")
            await gate.wait()

        async def do() -> None:
            rig.log.append("a")

        async def undo() -> None:
            if away[0]:
                raise DeadlineExceeded("away")
            rig.log.append("undo a")

        await op.step("a", do, undo=undo)

    rig.route("instance.start", handler)
    operation_id = await rig.submit()
    await until(lambda: rig.log)
    await rig.runner.cancel(operation_id)
    gate.set()
    assert (await rig.ended(operation_id)).undo_pending
    assert await rig.steps(operation_id) == [("a", "started")]
    await rig.idle()
    away[0] = False
    again = await rig.reborn()
    await again.resume()
    await again.idle()
    assert rig.log == ["claimed", "undo a"]
    assert await again.store.operations(unfinished=True) == []


async def test_a_promised_cancel_holds_at_the_point_of_no_return(rig: Rig) -> None:
    gate = asyncio.Event()

    async def handler(op: Operation, _data: Any) -> None:
        async def do() -> None:
            rig.log.append("a")
            await gate.wait()

        async def undo() -> None:
            rig.log.append("undo a")

        async def remove() -> None:
            rig.log.append("removed")

        await op.step("a", do, undo=undo)
        op.point_of_no_return()
        await op.step("remove", remove)

    rig.route("instance.start", handler)
    operation_id = await rig.submit()
    await until(lambda: rig.log)
    await rig.runner.cancel(operation_id)
    gate.set()
    assert (await rig.ended(operation_id)).state == "cancelled"
    assert rig.log == ["a", "undo a"]


async def test_a_cancel_while_what_is_past_its_return_is_taken_up_changes_nothing(rig: Rig) -> None:
    gate, looking = asyncio.Event(), asyncio.Event()

    async def handler(op: Operation, _data: Any) -> None:
        async def do() -> None:
            rig.log.append("a")

        async def undo() -> None:
            rig.log.append("undo a")

        async def remove() -> None:
            rig.log.append("remove")
            await gate.wait()

        if op.begun:
            rig.log.append("taken up")
            await looking.wait()
        await op.step("a", do, undo=undo)
        op.point_of_no_return()
        await op.step("remove", remove)

    rig.route("instance.start", handler)
    operation_id = await rig.submit()
    await until(lambda: "remove" in rig.log)
    await rig.die()
    again = await rig.reborn()
    await again.resume()
    await until(lambda: "taken up" in rig.log)
    await again.runner.cancel(operation_id)
    gate.set()
    looking.set()
    assert (await again.ended(operation_id)).state == "succeeded"
    assert rig.log == ["a", "remove", "taken up", "remove"]


async def test_failure_past_the_point_of_no_return_undoes_nothing_and_says_so(rig: Rig) -> None:
    async def handler(op: Operation, _data: Any) -> None:
        async def do() -> None:
            rig.log.append("a")

        async def undo() -> None:
            rig.log.append("undo a")

        await op.step("a", do, undo=undo)
        op.point_of_no_return()
        raise Unavailable("away")

    rig.route("instance.start", handler)
    record = await rig.run()
    assert rig.log == ["a"]
    assert rig.finals(record.id)[0][1]["undone"] is False
    assert not record.undo_pending


async def test_a_cancel_that_was_journaled_holds_after_a_crash(rig: Rig) -> None:
    gate = asyncio.Event()

    async def handler(op: Operation, _data: Any) -> None:
        async def do() -> None:
            rig.log.append("a")
            await gate.wait()

        async def undo() -> None:
            rig.log.append("undo a")

        await op.step("a", do, undo=undo)

    rig.route("instance.start", handler)
    operation_id = await rig.submit()
    await until(lambda: rig.log)
    await rig.runner.cancel(operation_id)
    await rig.die()
    again = await rig.reborn()
    await again.resume()
    record = await again.ended(operation_id)
    assert record.state == "cancelled"
    assert rig.log == ["a", "undo a"]


async def test_waiting_for_a_state_ends_with_a_cancel(rig: Rig) -> None:
    async def handler(op: Operation, _data: Any) -> None:
        rig.log.append("waits")
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        try:
            await op.unless_cancelled(future)
        finally:
            future.cancel()

    rig.route("instance.start", handler)
    operation_id = await rig.submit()
    await until(lambda: rig.log)
    await rig.runner.cancel(operation_id)
    assert (await rig.ended(operation_id)).state == "cancelled"


# --- nothing follows a final event --------------------------------------------------------------------------------


async def test_no_progress_of_a_late_thread_follows_the_final_event(rig: Rig) -> None:
    kept: list[Operation] = []

    async def handler(op: Operation, _data: Any) -> None:
        kept.append(op)

        async def do() -> None:
            raise DeadlineExceeded("late")

        await op.step("a", do)

    rig.route("instance.start", handler)
    operation_id = await rig.submit(reportprogress=True)
    await rig.ended(operation_id)
    kept[0]._reports._last = -1e9
    kept[0].progress(50)
    for _ in range(5):
        await asyncio.sleep(0)
    assert rig.kinds(operation_id)[-1] == "operation.failed"


class SlowAnnouncements(MemoryStore):
    """Holds up commits that carry only events of an operation that is not final, as a busy disk may."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.held = 0

    async def commit(self, changes: Any) -> Any:
        only_events = all(c.claim is None and c.operation is None and not c.steps and c.final_of is None for c in changes)
        if only_events:
            self.held += 1
            await self.gate.wait()
        return await super().commit(changes)


@pytest.mark.parametrize("how", ["end", "cancel"])
async def test_accepted_and_started_never_follow_the_final_event(no_blocking: object, how: str) -> None:
    store = SlowAnnouncements()
    rig = Rig(store)
    go = asyncio.Event()

    async def handler(op: Operation, _data: Any) -> None:
        await go.wait()

    rig.route("instance.start", handler)
    first = await rig.submit()
    second = await rig.submit()
    await until(lambda: store.held >= 2)
    task = None
    if how == "cancel":
        task = asyncio.ensure_future(rig.runner.cancel(second))
    go.set()
    for _ in range(10):
        await asyncio.sleep(0)
    store.gate.set()
    if task is not None:
        await task
    for operation_id in (first, second):
        await rig.ended(operation_id)
        kinds = rig.kinds(operation_id)
        assert kinds[-1] in ("operation.succeeded", "operation.cancelled"), kinds
        assert "operation.accepted" in kinds


async def test_unknown_capabilities_refuse_nothing_by_name(rig: Rig) -> None:
    """After a start without hypervisor nothing is known yet: the verb may well be there."""
    rig.ctx.state = type(rig.ctx.state)()

    async def handler(op: Operation, _data: Any) -> None:
        rig.log.append("run")

    rig.route("instance.pause", handler)
    assert (await rig.run("instance.pause")).state == "succeeded"


async def test_a_lacking_verb_is_refused_by_name(rig: Rig) -> None:
    rig.ctx.state.capabilities = type(rig.ctx.state.capabilities)("fake", "1", frozenset())
    rig.route("instance.pause", lambda op, data: asyncio.sleep(0))
    record = await rig.run("instance.pause")
    assert (record.state, record.error_code) == ("rejected", "verb_unsupported")


def test_cancelled_is_no_failure() -> None:
    assert issubclass(Cancelled, ComputeError)
    assert OperationSucceeded.kind == "operation.succeeded"
