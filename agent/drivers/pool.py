"""The threads below `executor`: one queue per pool, replaceable daemons, and the state of one call.

A call is queued, running, late (its deadline passed while it ran) or done, or it was dropped before it began.
Who may run, drop or give it up is decided under the pool's lock, so a call has one end and is counted once.
Threads know the event loop only as the place where outcomes are handed over.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from contextvars import Context, copy_context
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from agent.errors import Internal, Unavailable

_QUEUED, _RUNNING, _LATE, _DONE, _DROPPED = range(5)


@dataclass(frozen=True, slots=True)
class PoolStats:
    """One pool at this moment. `calls`, `timeouts` and `refused` count from the start of the process.

    `threads` are alive now, the `stuck` ones included; `outstanding` calls run or wait for a thread.
    """

    size: int
    threads: int
    outstanding: int
    stuck: int
    calls: int
    timeouts: int
    refused: int


Outcome = Callable[["Call", Any, BaseException | None], None]
"""Takes a call with its result or its error, on the event loop's thread."""


class Call:
    """One call on its way. `state` belongs to the pool's lock; the rest to the loop's thread."""

    __slots__ = (
        "args", "context", "deadline_s", "fn", "future", "held", "key", "loop", "on_return", "pool",
        "returned", "state", "submitted", "timer",
    )  # fmt: skip

    def __init__(
        self, pool: Pool, fn: Callable[..., Any], args: tuple[Any, ...], *, deadline_s: float,
        key: str | None, loop: asyncio.AbstractEventLoop, returned: Outcome,
    ) -> None:  # fmt: skip
        self.on_return = returned
        self.pool = pool
        self.fn = fn
        self.args = args
        self.deadline_s = deadline_s
        self.key = key
        self.loop = loop
        self.context: Context = copy_context()
        self.future: asyncio.Future[Any] = loop.create_future()
        self.timer: asyncio.TimerHandle | None = None
        self.state = _QUEUED
        self.held = False
        self.returned = False
        self.submitted = time.monotonic()

    @property
    def name(self) -> str:
        """What is called, for messages."""
        function = getattr(self.fn, "func", self.fn)
        return str(getattr(function, "__name__", function.__class__.__name__))

    def cancel_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def run(self) -> tuple[Any, BaseException | None]:
        """Run it, in a thread of its pool."""
        try:
            return self.context.run(self.fn, *self.args), None
        except Exception as exc:
            # A future cannot carry StopIteration: it would look like the end of the waiting coroutine.
            return None, Internal(f"{self.name} raised {exc!r}") if isinstance(exc, StopIteration) else exc
        except BaseException as exc:
            # SystemExit in a worker must end neither the worker nor, through the future, the event loop.
            return None, Internal(f"{self.name} raised {exc!r}")

    def hand_over(self, result: Any, error: BaseException | None) -> None:
        """Give the outcome to the loop, from a thread of its pool."""
        # The loop may have been closed while the call hung: then nobody is left to take the outcome.
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.on_return, self, result, error)


class Pool:
    """Threads that take calls from one queue. Everything but `running` is guarded by `_lock`.

    At most `size` threads that are not stuck are alive, so that at most `size` calls are in hand; `max_stuck`
    bounds the rest.
    """

    def __init__(self, name: str, size: int, max_stuck: int) -> None:
        self.name = name
        self.size = size
        self.max_stuck = max_stuck
        self.stuck = 0
        self.running: set[Call] = set()
        """Calls submitted whose thread has not returned; touched on the loop's thread only."""
        self._lock = threading.Lock()
        self._queue: SimpleQueue[Call | None] = SimpleQueue()
        self._threads = 0
        self._outstanding = 0
        self._started = 0
        self._calls = self._timeouts = self._refused = 0
        self._ending = False

    def submit(self, call: Call) -> None:
        with self._lock:
            if self.stuck >= self.max_stuck:
                self._refused += 1
                raise Unavailable(
                    f"{self.stuck} hypervisor calls hang in pool {self.name}; none is begun until one returns",
                    code="driver_threads_stuck",
                    pool=self.name,
                    stuck=self.stuck,
                )
            self._outstanding += 1
            self._calls += 1
            try:
                self._staff()
            except RuntimeError as exc:
                # With a thread left the call only waits longer; without one nobody would ever run it.
                if self._threads == self.stuck:
                    self._outstanding -= 1
                    raise Unavailable(f"no thread could be started for pool {self.name}: {exc}") from exc
        self.running.add(call)
        self._queue.put(call)

    def expire(self, call: Call) -> bool | None:
        """Note that a call's deadline has come: true if it runs, false if now dropped, None if done."""
        with self._lock:
            if call.state == _RUNNING:
                call.state = _LATE
                self._timeouts += 1
                self._outstanding -= 1
                self.stuck += 1
                with contextlib.suppress(RuntimeError):
                    self._staff()
                return True
            if call.state != _QUEUED:
                return None
            self._timeouts += 1
            self._drop(call)
            return False

    def drop(self, call: Call) -> bool:
        """Keep a call from being run; false if it has begun."""
        with self._lock:
            if call.state != _QUEUED:
                return False
            self._drop(call)
            return True

    def drop_queued(self) -> list[Call]:
        """Keep all calls that have not begun from being run, and return them."""
        return [call for call in tuple(self.running) if self.drop(call)]

    def end(self) -> None:
        """End every thread once it is free."""
        with self._lock:
            self._ending = True
            for _ in range(self._threads):
                self._queue.put(None)

    def stats(self) -> PoolStats:
        with self._lock:
            return PoolStats(
                size=self.size, threads=self._threads, outstanding=self._outstanding, stuck=self.stuck,
                calls=self._calls, timeouts=self._timeouts, refused=self._refused,
            )  # fmt: skip

    def _drop(self, call: Call) -> None:
        call.state = _DROPPED
        self._outstanding -= 1
        self.running.discard(call)

    def _staff(self) -> None:
        """Start the thread that is short, if one is. Raises RuntimeError when the system gives none."""
        able = self._threads - self.stuck
        if able >= min(self._outstanding, self.size) or self.stuck > self.max_stuck or self._ending:
            return
        self._started += 1
        thread = threading.Thread(target=self._work, name=f"driver-{self.name}-{self._started}", daemon=True)
        thread.start()
        self._threads += 1

    def _work(self) -> None:
        while True:
            call = self._queue.get()  # without a limit: daemon, woken by `end`
            if call is None or not self._run(call):
                break
            del call  # an idle thread keeps nothing alive
        if call is None:
            with self._lock:
                self._threads -= 1

    def _run(self, call: Call) -> bool:
        """Run a call taken from the queue; false if this thread is surplus and has to end."""
        with self._lock:
            if call.state != _QUEUED:
                return True
            # The loop may be too busy to have dropped it at its deadline: then its timer does so soon.
            if time.monotonic() - call.submitted >= call.deadline_s:
                return True
            call.state = _RUNNING
        result, error = call.run()
        with self._lock:
            late = call.state == _LATE
            call.state = _DONE
            if late:
                self.stuck -= 1
            else:
                self._outstanding -= 1
            surplus = self._threads - self.stuck > self.size
            if surplus:
                self._threads -= 1
        call.hand_over(result, error)
        # The error's traceback leads back to this frame: without this they would keep each other alive.
        del call, result, error
        return not surplus
