"""A command on its way: what the client knows between sending it and its final event."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from agent.controller.failures import FINAL_KINDS
from agent.controller.stream import Recent
from agent.errors import ComputeError
from agent.messages.events import Event

EventCallback = Callable[[Event], None]

MAX_RESEND_S = 120.0
_FIRST_RETRY_S = 0.2
_MAX_RETRY_S = 5.0


@dataclass(slots=True, eq=False)
class Pending:
    """One awaited command. The reply callback feeds it; the call that owns it waits on `changed`."""

    on_event: EventCallback | None
    resend_after_s: float
    answer: Event | None = None
    failure: BaseException | None = None
    trouble: ComputeError | None = None
    published: bool = False
    heard_at: float = 0.0
    retry_s: float = _FIRST_RETRY_S
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    recent: Recent = field(default_factory=Recent)

    def take(self, event: Event, now: float) -> None:
        """Take one event of this operation. What the caller's callback raises ends the call."""
        self.heard_at = now
        if self.recent.is_repeat(event.id):
            return
        if self.on_event is not None:
            try:
                self.on_event(event)
            except Exception as exc:
                self.end(exc)
        if event.kind in FINAL_KINDS:
            self.answer = event
            self.changed.set()

    def end(self, failure: BaseException) -> None:
        """End the call with an error of this side, unless it has ended."""
        if not self.ended:
            self.failure = failure
        self.changed.set()

    @property
    def ended(self) -> bool:
        """Whether the call has what it waits for."""
        return self.answer is not None or self.failure is not None

    def sent(self, now: float) -> None:
        """Note that the broker has the command."""
        self.published = True
        self.trouble = None
        self.retry_s = _FIRST_RETRY_S
        self.heard_at = now

    def not_sent(self, trouble: ComputeError) -> float:
        """Note that sending failed; return for how many seconds to wait before the next try."""
        self.trouble = trouble
        wait_s, self.retry_s = self.retry_s, min(self.retry_s * 2, _MAX_RETRY_S)
        return wait_s

    def silence_left(self, now: float) -> float:
        """Seconds of silence after which the command is sent again; a sign of life starts them anew."""
        return self.heard_at + self.resend_after_s - now

    def resent(self) -> None:
        """Double the patience: a host that is down for long shall not find its queue full of repeats."""
        self.resend_after_s = min(self.resend_after_s * 2, MAX_RESEND_S)
