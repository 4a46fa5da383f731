"""Runs a driver's blocking calls in threads, with a deadline for each.

A hypervisor call cannot be cancelled. At its deadline the waiter is released, the thread is counted as stuck
and another takes its place; when the call returns at last, its result is logged and the surplus thread ends.
A lane asks `is_settled` before it goes on, since a late call may still take effect. The threads are daemons
of our own: those of `concurrent.futures` hold up the exit of the process and are never replaced.

All methods run on one event loop's thread. The module knows nothing of drivers beyond "a function to call".
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final, Literal, TypeVar, TypeVarTuple

import structlog

from agent.drivers.pool import Call, Pool, PoolStats
from agent.errors import ComputeError, DeadlineExceeded, Unavailable

_log = structlog.get_logger(__name__)
_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")

PoolName = Literal["query", "mutate", "long"]
"""`query`: reads; `mutate`: changes of about a second; `long`: work of minutes, such as copying a disk."""

DEFAULT_SIZES: Final[Mapping[PoolName, int]] = MappingProxyType({"query": 4, "mutate": 8, "long": 4})


class DriverExecutor:
    """Named pools of threads for blocking calls.

    `sizes` is the number of threads of each pool (started when first needed), `max_stuck` that of stuck
    threads in one pool at which further calls are refused, so that a dead hypervisor cannot eat all memory.
    """

    def __init__(self, sizes: Mapping[PoolName, int] = DEFAULT_SIZES, *, max_stuck: int = 16) -> None:
        self._pools: dict[str, Pool] = {
            name: Pool(name, sizes.get(name, default), max_stuck) for name, default in DEFAULT_SIZES.items()
        }
        self._unsettled: dict[str, _Unsettled] = {}
        self._closed = False
        self._idle: asyncio.Future[None] | None = None

    async def call(
        self,
        pool: PoolName,
        fn: Callable[[*_Ts], _T],
        *args: *_Ts,
        deadline_s: float,
        key: str | None = None,
    ) -> _T:
        """Run `fn(*args)` in a thread of `pool`, with a copy of the caller's context variables.

        `deadline_s` counts from now, time in the queue included. Raises what `fn` raises; `DeadlineExceeded`
        when it has not returned in time (`details["begun"]` false: it was never run and has no effect; else
        read the state back, once `key` is settled, before a retry); `Unavailable` with code
        `driver_threads_stuck` while too many threads hang, or `shutting_down` after `close` (retry helps).

        When the caller is cancelled, a call that has not begun is never run; one that has goes on, and counts
        under `key` until it returns.
        """
        if self._closed:
            raise Unavailable("the agent is shutting down", code="shutting_down")
        loop = asyncio.get_running_loop()
        call = Call(self._pools[pool], fn, args, deadline_s=deadline_s, key=key, loop=loop, returned=self._returned)
        call.pool.submit(call)
        call.timer = loop.call_later(deadline_s, self._expire, call)
        try:
            result: _T = await call.future
        except asyncio.CancelledError:
            self._abandon(call)
            raise
        return result

    def is_settled(self, key: str) -> bool:
        """Tell whether no call given up by its waiter still runs under `key`."""
        return key not in self._unsettled

    async def wait_settled(self, key: str, timeout_s: float | None) -> bool:
        """Wait until no call given up by its waiter runs under `key`; false after `timeout_s` seconds.

        None waits as long as the thread hangs: for callers that are cancelled from outside.
        """
        unsettled = self._unsettled.get(key)
        if unsettled is None:
            return True
        await asyncio.wait({unsettled.future}, timeout=timeout_s)
        return unsettled.future.done()

    @property
    def stuck(self) -> int:
        """Threads whose call is past its deadline and has not returned."""
        return sum(pool.stuck for pool in self._pools.values())

    def stats(self) -> dict[str, PoolStats]:
        """Read the figures of every pool."""
        return {name: pool.stats() for name, pool in self._pools.items()}

    async def close(self, timeout_s: float) -> int:
        """Refuse new calls, wait at most `timeout_s` for those that run, and end the threads. Idempotent.

        Calls still in a queue are never run. Returns how many calls still run in their threads: these are
        left behind and do not hold up the end of the process. Waiters that are left get `Unavailable`.
        """
        self._closed = True
        for pool in self._pools.values():
            for call in pool.drop_queued():
                self._release(call, Unavailable("the agent is shutting down", code="shutting_down"))
        if any(pool.running for pool in self._pools.values()):
            self._idle = asyncio.get_running_loop().create_future()
            await asyncio.wait({self._idle}, timeout=timeout_s)
        left = 0
        for pool in self._pools.values():
            for call in tuple(pool.running):
                left += 1
                self._hold(call)
                what = f"{call.name} still runs while the agent ends"
                self._release(call, Unavailable(what, code="shutting_down"))
            pool.end()
        if left:
            _log.warning("driver.calls_left_behind", calls=left)
        return left

    # --- on the loop's thread, for one call -----------------------------------------------------------------

    def _expire(self, call: Call) -> None:
        """Its deadline has come."""
        begun = call.pool.expire(call)
        if begun is None:
            return
        if begun:
            self._hold(call)
            what = f"{call.name} has not returned within {call.deadline_s:g} s; its effect is not known yet"
        else:
            what = f"{call.name} found no free thread within {call.deadline_s:g} s and was not run"
        details: dict[str, Any] = {"call": call.name, "pool": call.pool.name, "begun": begun}
        self._release(call, DeadlineExceeded(what, deadline_s=call.deadline_s, **details))

    def _abandon(self, call: Call) -> None:
        """Its waiter was cancelled. The timer stays: at the deadline the thread counts as stuck like any."""
        if call.pool.drop(call):
            call.cancel_timer()
        elif not call.returned:
            self._hold(call)

    def _hold(self, call: Call) -> None:
        if call.key is None or call.held:
            return
        call.held = True
        unsettled = self._unsettled.get(call.key)
        if unsettled is None:
            unsettled = self._unsettled[call.key] = _Unsettled(call.loop.create_future())
        unsettled.calls += 1

    def _release(self, call: Call, error: BaseException) -> None:
        call.cancel_timer()
        if not call.future.done():
            call.future.set_exception(error)
            # Whoever was cancelled at the same moment will not fetch it.
            call.future.exception()

    def _returned(self, call: Call, result: Any, error: BaseException | None) -> None:
        """Its thread has returned; called through the loop, hence once and in order with `_expire`."""
        call.returned = True
        call.cancel_timer()
        call.pool.running.discard(call)
        if call.future.done():
            self._log_late(call, error)
        elif error is None:
            call.future.set_result(result)
        else:
            call.future.set_exception(error)
        if call.held and call.key is not None:
            unsettled = self._unsettled[call.key]
            unsettled.calls -= 1
            if not unsettled.calls:
                del self._unsettled[call.key]
                unsettled.future.set_result(None)
        # Else an error's traceback, which holds the call, and the future that holds the error form a cycle.
        del call.future
        if self._idle and not self._idle.done() and not any(pool.running for pool in self._pools.values()):
            self._idle.set_result(None)

    def _log_late(self, call: Call, error: BaseException | None) -> None:
        # The result itself may hold a guest's secrets (its seed), so only its outcome is told.
        fields: dict[str, Any] = {"call": call.name, "pool": call.pool.name, "key": call.key}
        fields["took_s"] = round(time.monotonic() - call.submitted, 3)
        if error is not None:
            fields["error"] = error.code if isinstance(error, ComputeError) else repr(error)
            fields["error_message"] = str(error)
        fields["outcome"] = "failed" if error else "succeeded"
        call.context.run(_log.warning, "driver.late_result", **fields)


class _Unsettled:
    """A key's calls that nobody waits for any more. `future` is done when the last of them has returned."""

    __slots__ = ("calls", "future")

    def __init__(self, future: asyncio.Future[None]) -> None:
        self.calls = 0
        self.future = future
