"""The outbox: order, loss, repeats in order, bounded memory, nothing lost and nothing skipped."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.world import LIMIT_S, until

from agent.bus.base import Outgoing
from agent.core import outbox as outbox_module
from agent.core.journal import Journal
from agent.core.outbox import Outbox
from agent.errors import DeadlineExceeded, FailedPrecondition, Unavailable
from agent.messages.events import parse_event
from agent.store.base import Change, PendingEvent, SequencedEvent
from agent.store.memory import MemoryStore


class Line:
    """A bus whose confirms the test gives."""

    def __init__(self) -> None:
        self.connected = True
        self.sent: list[Outgoing] = []
        self.open: list[asyncio.Future[None]] = []
        self.automatic = True
        self.refuse_with: Exception | None = None
        self._callbacks: list[Callable[[bool], None]] = []

    def on_state(self, callback: Callable[[bool], None]) -> None:
        self._callbacks.append(callback)

    def publish_soon(self, message: Outgoing, *, timeout_s: float = 10.0) -> asyncio.Future[None]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.sent.append(message)
        if self.refuse_with is not None:
            future.set_exception(self.refuse_with)
        elif self.automatic:
            future.set_result(None)
        else:
            self.open.append(future)
        return future

    def switch(self, connected: bool) -> None:
        self.connected = connected
        for callback in self._callbacks:
            callback(connected)

    @property
    def ids(self) -> list[str]:
        return [message.message_id for message in self.sent]


class Bench:
    def __init__(self) -> None:
        self.store = MemoryStore()
        self.line = Line()
        self.journal = Journal(self.store, host="h")
        self.restart()

    def restart(self) -> None:
        self.outbox = Outbox(self.line, self.store, epoch="e", retry_s=0.001)  # type: ignore[arg-type]
        self.journal.on_events(self.outbox.offer)
        self.task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self.outbox.start(await self.store.last_sequence())
        self.task = asyncio.ensure_future(self.outbox.run())

    async def commit(self, *ids: str) -> None:
        await self.journal.commit(Change(events=[event(one) for one in ids]))

    async def settled(self) -> None:
        await until(lambda: not self.outbox.waiting)


def event(id: str) -> PendingEvent:
    body = (
        b'{"specversion":"1.0","id":"%s","source":"s","type":"compute.host.agent.v1","time":"2026-01-01T00:00:00Z",'
        b'"host":"h","data":{}}' % id.encode()
    )
    return PendingEvent(id, "host.agent.h", body)


@pytest.fixture
async def bench(no_blocking: object) -> AsyncIterator[Bench]:
    made = Bench()
    await made.start()
    yield made
    if made.task is not None:
        made.task.cancel()
        await asyncio.gather(made.task, return_exceptions=True)


async def test_in_order_with_sequence_and_epoch_and_then_forgotten(bench: Bench) -> None:
    for number in range(20):
        await bench.commit(f"{number}a", f"{number}b")
    await bench.settled()
    sent = [parse_event(message.body) for message in bench.line.sent]
    assert [item.sequence for item in sent] == list(range(1, 41))
    assert {item.epoch for item in sent} == {"e"}
    await until(lambda: not bench.store._outbox)


async def test_many_are_in_flight_at_once(bench: Bench) -> None:
    bench.line.automatic = False
    await bench.commit(*map(str, range(10)))
    await until(lambda: len(bench.line.open) == 10)
    assert bench.outbox.waiting == 10
    for future in bench.line.open:
        future.set_result(None)
    await bench.settled()


async def test_after_a_loss_all_unconfirmed_are_sent_again_in_order(bench: Bench) -> None:
    bench.line.automatic = False
    await bench.commit(*"abcde")
    await until(lambda: len(bench.line.open) == 5)
    bench.line.open[0].set_result(None)
    bench.line.open[3].set_result(None)
    bench.line.switch(False)
    for number in (1, 2, 4):
        bench.line.open[number].set_exception(Unavailable("lost"))
    await bench.commit("f")
    bench.line.automatic = True
    bench.line.switch(True)
    await bench.settled()
    assert bench.line.ids == [*"abcde", *"bcdef"]
    assert not bench.store._outbox


@pytest.mark.parametrize("error", [Unavailable("x"), DeadlineExceeded("x"), FailedPrecondition("x"), RuntimeError("x")])
async def test_a_broker_that_refuses_is_asked_again_without_spinning(
    bench: Bench, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses, sleep = 0, asyncio.sleep

    async def counted(delay: float, *more: Any) -> None:
        nonlocal pauses
        pauses += delay == bench.outbox._retry_s
        await sleep(delay, *more)

    monkeypatch.setattr(asyncio, "sleep", counted)
    bench.line.refuse_with = error
    await bench.commit("a")
    await until(lambda: bench.line.ids.count("a") >= 3)
    for _ in range(50):
        await bench.commit("x")
    # Being offered more does not make it try faster: before each further try there was a pause.
    assert bench.line.ids.count("a") <= pauses + 1
    bench.line.refuse_with = None
    await bench.settled()


async def test_closing_while_the_broker_refuses_does_not_hold_the_loop(bench: Bench) -> None:
    bench.line.refuse_with = FailedPrecondition("no exchange")
    await bench.commit("a")
    bench.outbox.close()
    async with asyncio.timeout(LIMIT_S):
        await asyncio.sleep(0.01)
    bench.line.refuse_with = None
    assert bench.task is not None
    async with asyncio.timeout(LIMIT_S):
        await bench.task


async def test_closing_ends_when_all_is_confirmed(bench: Bench) -> None:
    bench.line.automatic = False
    await bench.commit("a", "b")
    await until(lambda: len(bench.line.open) == 2)
    bench.outbox.close()
    await asyncio.sleep(0)
    assert bench.task is not None
    assert not bench.task.done()
    for future in bench.line.open:
        future.set_result(None)
    async with asyncio.timeout(LIMIT_S):
        await bench.task


async def test_closing_without_a_broker_ends_at_once_and_keeps_everything(bench: Bench) -> None:
    bench.line.switch(False)
    await bench.commit("a")
    bench.outbox.close()
    assert bench.task is not None
    async with asyncio.timeout(LIMIT_S):
        await bench.task
    assert len(bench.store._outbox) == 1


async def test_memory_is_bounded_and_the_journal_gives_the_rest(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "MEMORY_LIMIT", 10)
    bench.line.switch(False)
    for number in range(100):
        await bench.commit(str(number))
        assert len(bench.outbox._waiting) <= 10
    assert bench.outbox.waiting == 100
    bench.line.switch(True)
    await bench.settled()
    assert bench.line.ids == [str(number) for number in range(100)]


async def test_a_new_process_publishes_what_the_old_one_left(bench: Bench) -> None:
    bench.line.switch(False)
    await bench.commit("a", "b", "c")
    bench.store.published([2])
    assert bench.task is not None
    bench.task.cancel()
    bench.restart()
    await bench.commit("d")  # before `start`, as while the agent opens
    await bench.start()
    await bench.commit("e")
    bench.line.switch(True)
    await bench.settled()
    assert bench.line.ids == ["a", "c", "d", "e"]


async def test_a_commit_that_its_waiter_gave_up_is_not_skipped(bench: Bench) -> None:
    """Drain cancels work in the middle of a commit; the event is in the journal and must come before later ones."""
    await bench.commit("a")
    await bench.store.commit([Change(events=[event("given up")])])
    await bench.commit("b")
    await bench.settled()
    assert bench.line.ids == ["a", "given up", "b"]


async def test_offers_out_of_order_are_published_in_order(bench: Bench) -> None:
    results = [(await bench.store.commit([Change(events=[event(one)])]))[0].events for one in "abcd"]
    for number in (1, 0, 3, 2):
        bench.outbox.offer(results[number])
        await asyncio.sleep(0)
    await bench.settled()
    assert list(dict.fromkeys(bench.line.ids)) == list("abcd")


class SlowBacklog(MemoryStore):
    """Reads the journal and hands it over later, as a thread does."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.read = asyncio.Event()
        self.fails = 0

    async def backlog(self, after: int, limit: int) -> list[SequencedEvent]:
        if self.fails:
            self.fails -= 1
            raise Unavailable("I/O error", code="journal_error")
        rows = await super().backlog(after, limit)
        self.read.set()
        await self.gate.wait()
        return rows


async def test_what_is_committed_while_the_backlog_is_read_is_not_skipped(bench: Bench) -> None:
    bench.line.switch(False)
    await bench.commit("a")
    assert bench.task is not None
    bench.task.cancel()
    slow = SlowBacklog()
    slow.__dict__.update(bench.store.__dict__)
    bench.store = bench.journal.store = slow  # type: ignore[assignment]
    bench.restart()
    bench.line.switch(True)
    await bench.start()
    await slow.read.wait()
    await bench.commit("b")
    await bench.commit("c")
    slow.gate.set()
    await bench.settled()
    await bench.commit("d")
    await bench.settled()
    assert bench.line.ids == ["a", "b", "c", "d"]


async def test_a_journal_that_cannot_be_read_for_a_while_does_not_end_the_outbox(bench: Bench) -> None:
    slow = SlowBacklog()
    slow.gate.set()
    slow.fails = 3
    bench.outbox._store = bench.store = bench.journal.store = slow  # type: ignore[assignment]
    await slow.commit([Change(events=[event("a")])])
    await bench.commit("b")
    await bench.settled()
    assert bench.line.ids == ["a", "b"]


STEP = st.one_of(
    st.tuples(st.just("commit"), st.integers(1, 4)),
    st.tuples(st.just("give up"), st.integers(1, 2)),
    st.tuples(st.sampled_from(["confirm", "fail", "lose", "return", "restart", "turn"]), st.integers(0, 3)),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(STEP, max_size=40))
def test_whatever_happens_the_sequence_is_whole_and_in_order(steps: Sequence[tuple[str, int]]) -> None:
    asyncio.run(_play(steps))


async def _play(steps: Sequence[tuple[str, int]]) -> None:
    bench = Bench()
    bench.line.automatic = False
    await bench.start()
    number = 0

    def ids(count: int) -> list[str]:
        nonlocal number
        number += count
        return [str(n) for n in range(number - count, number)]

    def end(future: asyncio.Future[None], error: Exception | None) -> None:
        if not future.done():
            future.set_exception(error) if error else future.set_result(None)

    for what, count in steps:
        open_now = [future for future in bench.line.open if not future.done()]
        if what == "commit":
            await bench.commit(*ids(count))
        elif what == "give up":
            await bench.store.commit([Change(events=[event(one) for one in ids(count)])])
        elif what in ("confirm", "fail"):
            for future in open_now[: count + 1]:
                end(future, Unavailable("no") if what == "fail" else None)
        elif what == "lose":
            bench.line.switch(False)
            for future in open_now:
                end(future, Unavailable("lost"))
        elif what == "return":
            bench.line.switch(True)
        elif what == "restart":
            assert bench.task is not None
            bench.task.cancel()
            await asyncio.gather(bench.task, return_exceptions=True)
            bench.line._callbacks.clear()
            bench.restart()
            await bench.start()
        for _ in range(count):
            await asyncio.sleep(0)
    bench.line.switch(True)
    bench.line.automatic = True
    await bench.commit(*ids(1))

    def confirm_all() -> bool:
        for future in bench.line.open:
            end(future, None)
        return not bench.outbox.waiting

    await until(confirm_all)
    seen: dict[int, Any] = {}
    for message in bench.line.sent:
        found = parse_event(message.body)
        assert found.sequence is not None
        if found.sequence not in seen:
            assert found.sequence == len(seen) + 1, "a later one came before an earlier one"
        seen[found.sequence] = found.id
    assert [seen[n + 1] for n in range(number)] == [str(n) for n in range(number)]
    assert bench.task is not None
    bench.task.cancel()
    await asyncio.gather(bench.task, return_exceptions=True)
