"""One lane per instance: work for one instance runs one at a time in order of arrival, other lanes beside it.

Work of one class (`WorkClass`) shares a limit, so that a hundred image downloads do not take the threads that a
stop needs. A lane's slot of its class is taken only while its work runs: a lane that is blocked by a stuck thread
holds no slot.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Literal

import structlog

log = structlog.get_logger("lanes")

WorkClass = Literal["query", "power", "build", "waiting"]
"""`waiting`: work that does nothing but wait, for hours perhaps, and takes no slot."""
Work = Callable[[], Awaitable[None]]

CANCEL_S = 5.0
"""How long cancelled work may take to end."""


class Lanes:
    """Runs work by key. Every task it makes is owned here and awaited by `drain`."""

    def __init__(self, limits: dict[WorkClass, int]) -> None:
        self._slots = {work_class: asyncio.Semaphore(limit) for work_class, limit in limits.items()}
        self._queues: dict[str, deque[tuple[WorkClass, Work]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopped = False
        self.moved = 0
        """Pieces of work done so far: the watchdog sees by it that lanes move."""
        self.blocked: Callable[[str], Awaitable[None]] = _never_blocked
        """Awaited before each piece of work, without a slot: ends when no stuck call holds the key."""

    @property
    def busy(self) -> int:
        """Lanes with work, running or waiting."""
        return len(self._queues)

    def is_busy(self, key: str) -> bool:
        """Tell whether this lane has work, running or waiting."""
        return key in self._queues

    def put(self, key: str, work_class: WorkClass, work: Work) -> None:
        """Append work to a lane. `work` translates its own errors; one that escapes is logged."""
        waiting = self._queues.get(key)
        if waiting is not None:
            waiting.append((work_class, work))
            return
        self._queues[key] = deque([(work_class, work)])
        self._idle.clear()
        task = asyncio.get_running_loop().create_task(self._run(key), name=f"lane {key}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, key: str) -> None:
        waiting = self._queues[key]
        try:
            while waiting and not self._stopped:
                await self.blocked(key)
                work_class, work = waiting[0]
                async with self._slots.get(work_class) or contextlib.nullcontext():
                    if self._stopped:
                        return
                    try:
                        await work()
                    except Exception:
                        log.exception("lane.work_escaped", lane=key)
                self.moved += 1
                waiting.popleft()
        finally:
            del self._queues[key]
            if not self._queues:
                self._idle.set()

    async def drain(self, timeout_s: float) -> bool:
        """Start nothing new, wait for what runs, cancel what is left after `timeout_s`. True if all ended.

        What was waiting or is cancelled stays in the journal and is taken up at the next start.
        """
        self._stopped = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
            return True
        except TimeoutError:
            left = list(self._tasks)
            for task in left:
                task.cancel()
            if left:
                # With a limit too: work that holds out against its cancelling must not hold up the end.
                _, pending = await asyncio.wait(left, timeout=CANCEL_S)
                for task in pending:
                    log.error("lane.left_behind", lane=task.get_name())  # noqa: TRY400 - nothing was raised
            return False


async def _never_blocked(_key: str) -> None:
    return
