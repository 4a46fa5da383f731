"""Progress reports of one run of an operation: few, never piled up, and none after the final event."""

from __future__ import annotations

import asyncio
from typing import Any

import structlog

from agent.core.journal import Journal
from agent.messages.commands import Command
from agent.messages.events import OperationProgress
from agent.store.base import Change, OperationRecord

log = structlog.get_logger("operation")

PROGRESS_INTERVAL_S = 0.5


class ProgressReports:
    """Silent until somebody wants to know: the command asks for reports, or `speak_up` is called."""

    def __init__(self, journal: Journal, record: OperationRecord, command: Command[Any]) -> None:
        self._journal = journal
        self._record = record
        self._command = command
        self._wanted = command.reportprogress
        self._ended = False
        self._phase = "waiting"
        self._last = 0.0
        self._sending: asyncio.Task[None] | None = None

    def speak_up(self) -> None:
        """Send reports from now on: the work outlasts what a controller waits in silence."""
        self._wanted = True

    def enter(self, phase: str) -> None:
        """Report that a step begins."""
        self._phase = phase
        self._send()

    def advance(self, percent: float | None, *, done_bytes: int | None, total_bytes: int | None) -> None:
        """Report how far the step is, unless the last such report was less than `PROGRESS_INTERVAL_S` ago."""
        at = asyncio.get_running_loop().time()
        if at - self._last < PROGRESS_INTERVAL_S:
            return
        self._last = at
        if percent is None and total_bytes:
            percent = round(100 * (done_bytes or 0) / total_bytes, 1)
        self._send(percent=percent, done_bytes=done_bytes, total_bytes=total_bytes)

    async def end(self) -> None:
        """Send no more, and wait for the last report: none may come after the final event."""
        self._ended = True
        if self._sending is not None:
            await asyncio.gather(self._sending, return_exceptions=True)

    def _send(
        self, percent: float | None = None, done_bytes: int | None = None, total_bytes: int | None = None
    ) -> None:
        """Send a report unless the last one is still on its way: a slow disk must not pile them up."""
        if not self._wanted or self._ended or (self._sending is not None and not self._sending.done()):
            return
        record = self._record
        event = OperationProgress(
            operation_id=record.id,
            verb=record.verb,
            instance_id=record.instance_id,
            phase=self._phase,
            percent=percent,
            done_bytes=done_bytes,
            total_bytes=total_bytes,
        )
        self._sending = asyncio.get_running_loop().create_task(self._commit(event))
        self._sending.add_done_callback(_log_unsent)

    async def _commit(self, event: OperationProgress) -> None:
        await self._journal.commit(Change(events=[self._journal.event_of(self._record, self._command, event)]))


def _log_unsent(report: asyncio.Task[None]) -> None:
    if not report.cancelled() and (error := report.exception()) is not None:
        log.info("operation.progress_not_sent", error=str(error))
