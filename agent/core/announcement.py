"""Telling whoever waits for an operation that it was accepted and has started."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import structlog

from agent.core.journal import Journal
from agent.core.operation import Operation
from agent.messages.commands import Command
from agent.messages.events import EventData, OperationAccepted, OperationStarted
from agent.store.base import Change, OperationRecord

log = structlog.get_logger("message")

SILENCE_S = 0.2
"""Work that outlasts this reports that it was accepted and started, asked or not."""


def accepted(record: OperationRecord) -> EventData:
    """The event that says that a command was accepted."""
    return OperationAccepted(operation_id=record.id, verb=record.verb, instance_id=record.instance_id)


class Announcement:
    """Of one operation: sent where the command asks for progress, or once the work outlasts `SILENCE_S`.

    Where the command asks for it, whoever accepts it commits `accepted` together with it.
    """

    def __init__(self, journal: Journal, record: OperationRecord, command: Command[Any]) -> None:
        self._journal = journal
        self._record = record
        self._command = command
        self._accepted_told = command.reportprogress
        self._running: Operation | None = None
        self._telling: set[asyncio.Task[None]] = set()
        self._timer = asyncio.get_running_loop().call_later(SILENCE_S, self._break_silence)

    def started(self, operation: Operation) -> None:
        """The operation runs now."""
        self._running = operation
        if self._accepted_told:
            operation.speak_up()
            self._tell(_started(self._record))

    def hush(self) -> None:
        """Announce nothing of oneself any more."""
        self._timer.cancel()

    async def end(self) -> None:
        """Announce nothing more, and wait for what is on its way: none of it may come after the final event."""
        self.hush()
        if self._telling:
            await asyncio.gather(*self._telling, return_exceptions=True)

    def _break_silence(self) -> None:
        if self._accepted_told or self._record.final:
            return
        self._accepted_told = True
        events = [accepted(self._record)]
        if self._running is not None:
            events.append(_started(self._record))
            self._running.speak_up()
        self._tell(*events)

    def _tell(self, *events: EventData) -> None:
        task = asyncio.get_running_loop().create_task(self._commit(events))
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)
        task.add_done_callback(_log_untold)

    async def _commit(self, events: Sequence[EventData]) -> None:
        pending = [self._journal.event_of(self._record, self._command, event) for event in events]
        await self._journal.commit(Change(events=pending))


def _started(record: OperationRecord) -> EventData:
    return OperationStarted(
        operation_id=record.id, verb=record.verb, instance_id=record.instance_id, attempt=record.attempt
    )


def _log_untold(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.info("operation.announcement_not_sent", error=str(error))
