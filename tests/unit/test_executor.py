"""DriverExecutor: deadlines, stuck threads and their replacement, settling, cancellation, closing.

Functions are held by events, so nothing sleeps; where a deadline has to pass, it is a few milliseconds.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import structlog

from agent.drivers.executor import DriverExecutor
from agent.errors import DeadlineExceeded, Internal, NotFound, Unavailable

LONG_S = 60.0
"""A limit that a passing test never reaches."""
SHORT_S = 0.02
"""A deadline that is meant to pass."""


class Gate:
    """A function that reports that it began, then waits until it is opened."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.open = threading.Event()
        self.runs = 0

    def __call__(self, result: object = "through") -> object:
        self.runs += 1
        self.begun.set()
        if not self.open.wait(LONG_S):
            raise TimeoutError
        if isinstance(result, BaseException):
            raise result
        return result

    async def wait_begun(self) -> None:
        assert await asyncio.to_thread(self.begun.wait, LONG_S)


async def outlast(executor: DriverExecutor, pool: str, call: Any, *args: Any, **options: Any) -> DeadlineExceeded:
    """A call that has begun and is not back by its deadline; once more where a slow machine had not even begun it."""
    while True:
        with pytest.raises(DeadlineExceeded) as caught:
            await executor.call(pool, call, *args, deadline_s=SHORT_S, **options)
        if caught.value.details["begun"]:
            return caught.value


@pytest.fixture
def gates() -> Iterator[list[Gate]]:
    made: list[Gate] = []
    yield made
    for gate in made:
        gate.open.set()


@pytest.fixture
def gate(gates: list[Gate]) -> Gate:
    gates.append(Gate())
    return gates[0]


@pytest.fixture
async def executor(gates: list[Gate]) -> AsyncIterator[DriverExecutor]:
    made = DriverExecutor({"query": 2, "mutate": 1, "long": 1}, max_stuck=2)
    yield made
    for gate in gates:
        gate.open.set()
    assert await made.close(LONG_S) == 0


async def test_result_error_and_arguments(executor: DriverExecutor) -> None:
    assert await executor.call("query", lambda a, b: a + b, 1, 2, deadline_s=LONG_S) == 3

    def missing() -> None:
        raise NotFound("no such domain")

    with pytest.raises(NotFound, match="no such domain"):
        await executor.call("query", missing, deadline_s=LONG_S)


async def test_context_variables_are_copied(executor: DriverExecutor) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")
    variable.set("outer")

    def inside() -> str:
        seen = variable.get()
        variable.set("inner")
        return seen

    assert await executor.call("query", inside, deadline_s=LONG_S) == "outer"
    assert variable.get() == "outer"


@pytest.mark.parametrize("error", [StopIteration("x"), SystemExit(3), KeyboardInterrupt()], ids=repr)
async def test_errors_that_would_break_the_loop_become_internal(executor: DriverExecutor, error: BaseException) -> None:
    def bad() -> None:
        raise error

    with pytest.raises(Internal, match="bad raised"):
        await executor.call("mutate", bad, deadline_s=LONG_S)
    assert await executor.call("mutate", lambda: "alive", deadline_s=LONG_S) == "alive"


async def test_deadline_releases_the_waiter_and_keeps_the_capacity(executor: DriverExecutor, gate: Gate) -> None:
    with structlog.testing.capture_logs() as logs:
        late = await outlast(executor, "mutate", gate, key="vm")
        assert "Gate has not returned within" in late.message
        assert late.code == "deadline_exceeded"
        assert late.details == {"call": "Gate", "pool": "mutate", "begun": True, "deadline_s": SHORT_S}
        assert executor.stuck == 1
        assert not executor.is_settled("vm")
        # The pool has one thread: only its replacement can run this.
        assert await executor.call("mutate", lambda: "replaced", deadline_s=LONG_S) == "replaced"
        assert executor.stats()["mutate"].threads == 2
        gate.open.set()
        assert await executor.wait_settled("vm", LONG_S)
    assert executor.is_settled("vm")
    assert executor.stuck == 0
    assert executor.stats()["mutate"].threads == 1
    (line,) = [entry for entry in logs if entry["event"] == "driver.late_result"]
    assert line["outcome"] == "succeeded"
    assert line["call"] == "Gate"
    assert line["key"] == "vm"


async def test_late_error_is_logged_with_its_code(executor: DriverExecutor, gate: Gate) -> None:
    with structlog.testing.capture_logs() as logs:
        await outlast(executor, "query", gate, Unavailable("gone"), key="vm")
        gate.open.set()
        assert await executor.wait_settled("vm", LONG_S)
    assert [(entry["outcome"], entry["error"]) for entry in logs] == [("failed", "unavailable")]


async def test_too_many_stuck_threads_refuse_further_calls(executor: DriverExecutor, gates: list[Gate]) -> None:
    gates += [Gate(), Gate()]
    for number, gate in enumerate(gates):
        await outlast(executor, "mutate", gate, key=f"vm-{number}")
    with pytest.raises(Unavailable) as caught:
        await executor.call("mutate", gates[0], deadline_s=LONG_S)
    assert caught.value.code == "driver_threads_stuck"
    assert caught.value.retryable
    assert executor.stats()["mutate"].refused == 1
    assert await executor.call("query", lambda: "other pools go on", deadline_s=LONG_S)
    gates[0].open.set()
    assert await executor.wait_settled("vm-0", LONG_S)
    assert await executor.call("mutate", lambda: "again", deadline_s=LONG_S) == "again"


async def test_call_whose_deadline_passes_in_the_queue_never_runs(executor: DriverExecutor, gates: list[Gate]) -> None:
    gates += [Gate(), Gate()]
    first = asyncio.create_task(executor.call("mutate", gates[0], deadline_s=LONG_S))
    await gates[0].wait_begun()
    with pytest.raises(DeadlineExceeded, match="was not run") as caught:
        await executor.call("mutate", gates[1], deadline_s=SHORT_S, key="vm")
    assert caught.value.details["begun"] is False
    assert executor.is_settled("vm")
    assert executor.stuck == 0
    gates[0].open.set()
    assert await first == "through"
    assert await executor.call("mutate", lambda: "next", deadline_s=LONG_S) == "next"
    assert gates[1].runs == 0


async def test_cancelled_call_that_runs_counts_until_it_returns(executor: DriverExecutor, gate: Gate) -> None:
    task = asyncio.create_task(executor.call("mutate", gate, deadline_s=LONG_S, key="vm"))
    await gate.wait_begun()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not executor.is_settled("vm")
    assert not await executor.wait_settled("vm", SHORT_S)
    gate.open.set()
    assert await executor.wait_settled("vm", None)


async def test_cancelled_call_gets_stuck_at_its_deadline(executor: DriverExecutor, gate: Gate) -> None:
    begun = False
    while not begun:  # once more where a slow machine has not begun it by its deadline
        task = asyncio.create_task(executor.call("mutate", gate, deadline_s=0.1, key="vm"))
        while not task.done() and not begun:
            begun = await asyncio.to_thread(gate.begun.wait, 0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    # Waits in the queue of a one-thread pool until the hanging thread is replaced.
    assert await executor.call("mutate", lambda: "replaced", deadline_s=LONG_S) == "replaced"
    assert executor.stuck == 1
    gate.open.set()
    assert await executor.wait_settled("vm", LONG_S)
    assert executor.stuck == 0


async def test_cancelled_call_in_the_queue_never_runs(executor: DriverExecutor, gates: list[Gate]) -> None:
    gates += [Gate(), Gate()]
    first = asyncio.create_task(executor.call("mutate", gates[0], deadline_s=LONG_S))
    await gates[0].wait_begun()
    second = asyncio.create_task(executor.call("mutate", gates[1], deadline_s=LONG_S, key="vm"))
    await asyncio.sleep(0)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    assert executor.is_settled("vm")
    gates[0].open.set()
    await first
    assert await executor.call("mutate", lambda: "next", deadline_s=LONG_S) == "next"
    assert gates[1].runs == 0


async def test_two_late_calls_of_one_key_settle_together(executor: DriverExecutor, gates: list[Gate]) -> None:
    gates += [Gate(), Gate()]
    for gate in gates:
        await outlast(executor, "query", gate, key="vm")
    gates[0].open.set()
    assert not await executor.wait_settled("vm", SHORT_S)
    gates[1].open.set()
    assert await executor.wait_settled("vm", LONG_S)


async def test_unknown_key_is_settled(executor: DriverExecutor) -> None:
    assert executor.is_settled("nobody")
    assert await executor.wait_settled("nobody", 0.0)


async def test_threads_are_bounded_and_reused(executor: DriverExecutor) -> None:
    lock = threading.Lock()
    names: set[str] = set()
    active = peak = 0

    def work() -> None:
        nonlocal active, peak
        with lock:
            active += 1
            peak = max(peak, active)
            names.add(threading.current_thread().name)
        with lock:
            active -= 1

    await asyncio.gather(*(executor.call("query", work, deadline_s=LONG_S) for _ in range(200)))
    assert peak <= 2
    assert names <= {"driver-query-1", "driver-query-2"}
    stats = executor.stats()["query"]
    assert (stats.calls, stats.outstanding, stats.timeouts) == (200, 0, 0)


async def test_name_of_a_partial_is_that_of_its_function(executor: DriverExecutor, gate: Gate) -> None:
    def named(gate: Gate) -> object:
        return gate()

    late = await outlast(executor, "query", functools.partial(named, gate))
    assert late.message.startswith("named has not returned")


async def test_close_waits_then_leaves_behind_what_hangs(gate: Gate) -> None:
    executor = DriverExecutor({"mutate": 1})
    running = asyncio.create_task(executor.call("mutate", gate, deadline_s=LONG_S, key="vm"))
    await gate.wait_begun()
    queued = asyncio.create_task(executor.call("mutate", lambda: "never", deadline_s=LONG_S))
    await asyncio.sleep(0)
    assert await executor.close(SHORT_S) == 1
    for task in (running, queued):
        with pytest.raises(Unavailable) as caught:
            await task
        assert caught.value.code == "shutting_down"
    with pytest.raises(Unavailable):
        await executor.call("query", lambda: None, deadline_s=LONG_S)
    assert not executor.is_settled("vm")
    gate.open.set()
    assert await executor.wait_settled("vm", LONG_S)
    assert await executor.close(LONG_S) == 0


async def test_close_lets_a_running_call_finish(gate: Gate) -> None:
    executor = DriverExecutor()
    running = asyncio.create_task(executor.call("mutate", gate, "done", deadline_s=LONG_S))
    await gate.wait_begun()
    closing = asyncio.create_task(executor.close(LONG_S))
    await asyncio.sleep(0)
    gate.open.set()
    assert await closing == 0
    assert await running == "done"


async def test_closed_executor_ends_its_threads() -> None:
    executor = DriverExecutor()
    thread = await executor.call("query", threading.current_thread, deadline_s=LONG_S)
    assert thread.daemon
    await executor.close(LONG_S)
    await asyncio.to_thread(thread.join, LONG_S)
    assert not thread.is_alive()
    assert executor.stats()["query"].threads == 0


def test_result_after_the_end_of_the_loop_is_dropped(gate: Gate) -> None:
    threads: list[threading.Thread] = []

    def late() -> None:
        threads.append(threading.current_thread())
        gate()

    async def main() -> None:
        executor = DriverExecutor()
        await outlast(executor, "query", late)
        await executor.close(0.0)

    asyncio.run(main())
    gate.open.set()
    threads[0].join(LONG_S)
    assert not threads[0].is_alive()


async def test_a_failed_call_keeps_nothing_alive(executor: DriverExecutor) -> None:
    class Argument:
        pass

    def fails(_argument: Argument) -> None:
        raise NotFound("gone")

    argument = Argument()
    alive = weakref.ref(argument)
    gc.disable()
    try:
        with pytest.raises(NotFound):
            await executor.call("query", fails, argument, deadline_s=LONG_S)
        del argument
        # The thread drops its own reference after it has handed over; the next call of both threads proves it.
        barrier = threading.Barrier(2, timeout=LONG_S)
        await asyncio.gather(*(executor.call("query", barrier.wait, deadline_s=LONG_S) for _ in range(2)))
        assert alive() is None
    finally:
        gc.enable()
