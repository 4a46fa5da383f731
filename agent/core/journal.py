"""The agent's way to its store: commits that outlast a full disk, and events handed on once they are durable."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import structlog

from agent.core.waiting import happens
from agent.errors import Unavailable
from agent.messages.commands import Command
from agent.messages.events import EventData, render_event
from agent.messages.routing import event_key
from agent.store.base import Change, Committed, InstanceRecord, OperationRecord, PendingEvent, SequencedEvent, Store

log = structlog.get_logger("journal")
T = TypeVar("T")
EventsCallback = Callable[[Sequence[SequencedEvent]], None]


class Journal:
    """Wraps a `Store`. `problem` is a sentence while the store refuses, else None."""

    def __init__(self, store: Store, *, host: str) -> None:
        self.store = store
        self.host = host
        self.epoch = ""
        self.last_sequence = 0
        self.problem: str | None = None
        self.on_problem: Callable[[str | None], None] = lambda _problem: None
        self._on_events: EventsCallback = lambda _events: None
        self._closing = asyncio.Event()
        self._current: Callable[[str], InstanceRecord | None] | None = None

    def on_events(self, callback: EventsCallback) -> None:
        """Call with each commit's events, in the order of their sequence."""
        self._on_events = callback

    def resolve_instances(self, current: Callable[[str], InstanceRecord | None]) -> None:
        """Commit instances as they are then, not as they were when the change was made: it may wait for the disk."""
        self._current = current

    def close(self) -> None:
        """Let waiting commits give up: what they carry was not acknowledged, or is taken up at the next start."""
        self._closing.set()

    async def commit(self, *changes: Change) -> list[Committed]:
        """Commit. While the disk is full this waits and tries again: what waits here is not acknowledged yet.

        Raises `Unavailable` only while the agent closes.
        """
        delay_s = 0.1
        while True:
            self._refresh(changes)
            try:
                done = await self.store.commit(changes)
                break
            except Unavailable as exc:
                self._set_problem(exc.message)
                if self._closing.is_set():
                    raise
            # No limit on the whole: the alternative to waiting is to forget an accepted command.
            await happens(self._closing, delay_s * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
            delay_s = min(delay_s * 2, 5.0)
        self._set_problem(None)
        events = [event for result in done for event in result.events]
        if events:
            self.last_sequence = max(self.last_sequence, events[-1].sequence)
            self._on_events(events)
        return done

    async def read(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Read from the store; while it cannot be read, wait and try again. Raises as `commit`."""
        delay_s = 0.1
        while True:
            try:
                return await ask()
            except Unavailable as exc:
                log.warning("journal.read_failed", error=exc.message)
                if self._closing.is_set():
                    raise
            # No limit on the whole, as for commits.
            await happens(self._closing, delay_s * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
            delay_s = min(delay_s * 2, 5.0)

    def _refresh(self, changes: Sequence[Change]) -> None:
        if self._current is None:
            return
        for change in changes:
            if change.instances:
                ids = dict.fromkeys(record.id for record in change.instances)
                change.instances = [record for record in map(self._current, ids) if record is not None]

    def event(
        self,
        data: EventData,
        *,
        subject: str | None = None,
        traceparent: str | None = None,
        reply_to: str | None = None,
        correlation_id: str | None = None,
    ) -> PendingEvent:
        """Render an event for a change."""
        body, event_id = render_event(data, host=self.host, subject=subject, traceparent=traceparent)
        return PendingEvent(
            id=event_id,
            routing_key=event_key(data.kind, self.host),
            body=body,
            cc=(reply_to,) if reply_to else (),
            correlation_id=correlation_id,
        )

    def event_of(self, record: OperationRecord, command: Command[Any] | None, data: EventData) -> PendingEvent:
        """Render an event of an operation, for its sender too. `command`: None where it cannot be read."""
        return self.event(
            data,
            subject=record.instance_id,
            traceparent=command.traceparent if command is not None else None,
            reply_to=record.reply_to,
            correlation_id=record.correlation_id,
        )

    def _set_problem(self, problem: str | None) -> None:
        if problem != self.problem:
            self.problem = problem
            self.on_problem(problem)
            if problem:
                log.error("journal.refuses", problem=problem)
            else:
                log.info("journal.works_again")
