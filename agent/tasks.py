"""The tasks that run as long as the agent does. One that fails ends the agent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

log = structlog.get_logger("agent")


class Tasks:
    """Owns tasks by name. `failed` is called when one has raised; `failure` is what the first one raised."""

    def __init__(self, *, failed: Callable[[], None]) -> None:
        self._failed = failed
        self._running: set[asyncio.Task[None]] = set()
        self.failure: BaseException | None = None

    def own(self, name: str, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run it as a task of this name, beside others of that name if there are."""
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self._running.add(task)
        task.add_done_callback(self._ended)

    def running(self, name: str | None = None) -> list[asyncio.Task[None]]:
        """Those of a name, or all."""
        return [task for task in self._running if name is None or task.get_name() == name]

    async def wait(self, name: str) -> None:
        """Wait for the end of those of a name, however they end."""
        for task in self.running(name):
            await asyncio.wait({task})

    async def cancel(self, name: str) -> None:
        """Cancel those of a name, and wait for their end."""
        await _cancelled(self.running(name))

    async def end(self) -> None:
        """Cancel all, and wait for their end."""
        await _cancelled(self.running())

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        log.error("agent.task_failed", task=task.get_name(), exc_info=error)
        self.failure = self.failure or error
        self._failed()


async def _cancelled(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
