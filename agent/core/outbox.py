"""Publishes committed events in order, with confirms, and keeps them until the broker has them.

Events come from memory while the broker keeps up, and from the journal when it does not, so that memory stays
bounded however long the broker is away. Many are in flight at once; after a loss all unconfirmed ones are sent
again in order, so readers may see an event twice (same id) but never a later one without the earlier.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

import structlog

from agent.bus.base import Bus, Outgoing
from agent.core.waiting import happens
from agent.errors import ComputeError, Unavailable
from agent.messages import routing
from agent.messages.events import seal
from agent.store.base import SequencedEvent, Store

log = structlog.get_logger("outbox")

MEMORY_LIMIT = 4096
IN_FLIGHT_LIMIT = 512


class Outbox:
    """One task (`run`) that owns all publishing of sequenced events."""

    def __init__(self, bus: Bus, store: Store, *, epoch: str, retry_s: float = 0.5) -> None:
        self._bus = bus
        self._store = store
        self._epoch = epoch
        self._retry_s = retry_s
        self._waiting: deque[SequencedEvent] = deque()
        self._in_flight: deque[tuple[SequencedEvent, asyncio.Future[None]]] = deque()
        self._loaded = 0
        """Highest sequence that is or was in memory."""
        self._newest = 0
        self._failed = False
        self._wake = asyncio.Event()
        self._closing = False

    @property
    def waiting(self) -> int:
        """Events not yet confirmed by the broker."""
        behind = max(0, self._newest - self._loaded)
        return len(self._waiting) + len(self._in_flight) + behind

    def offer(self, events: Sequence[SequencedEvent]) -> None:
        """Take committed events. Those that do not fit in memory are read from the journal later."""
        # Not contiguous: some of what lies between is still in the journal only, such as an event whose commit was
        # given up by its waiter and applied all the same. Then these are read from there too, in their order.
        contiguous = self._loaded >= self._newest and events[0].sequence == self._loaded + 1
        self._newest = max(self._newest, events[-1].sequence)
        if contiguous and len(self._waiting) + len(events) <= MEMORY_LIMIT:
            self._waiting.extend(events)
            self._loaded = events[-1].sequence
        self._wake.set()

    async def start(self, last_sequence: int) -> None:
        """Begin with what a former process left unpublished: everything up to `last_sequence`."""
        self._newest = last_sequence
        self._loaded = 0

    async def run(self) -> None:
        """Publish until `close`; ends when all is confirmed, or at once where the broker is away."""
        self._bus.on_state(lambda _connected: self._wake.set())
        while True:
            await self._refill()
            self._settle()  # first: after a loss nothing later may go out before what is to be repeated
            if self._failed and not self._in_flight:
                await self._back_off()
                continue
            self._send()
            if self._closing and not (self._waiting and self._bus.connected) and not self._in_flight:
                return
            await self._wake.wait()  # no limit: woken by an offer, a confirm, the broker's state, or close
            self._wake.clear()

    def close(self) -> None:
        """Let `run` end once what it holds is confirmed."""
        self._closing = True
        self._wake.set()

    async def _refill(self) -> None:
        while not self._waiting and self._loaded < self._newest:
            newest = self._newest  # what is offered while we read may be missing from what we read
            try:
                rows = await self._store.backlog(self._loaded, MEMORY_LIMIT)
            except Unavailable as exc:
                log.warning("outbox.backlog_unreadable", error=exc.message)
                await asyncio.sleep(self._retry_s)
                continue
            self._waiting.extend(rows)
            last = rows[-1].sequence if rows else 0
            # What lies between the last row and the newest of then has been published by a former process.
            self._loaded = last if len(rows) == MEMORY_LIMIT else max(newest, last)

    def _send(self) -> None:
        if self._failed or not self._bus.connected:
            return
        while self._waiting and len(self._in_flight) < IN_FLIGHT_LIMIT:
            item = self._waiting.popleft()
            future = self._bus.publish_soon(self._outgoing(item))
            future.add_done_callback(self._confirmed)
            self._in_flight.append((item, future))

    def _confirmed(self, _future: asyncio.Future[None]) -> None:
        self._wake.set()

    def _settle(self) -> None:
        """Drop what is confirmed from the front; on a failure put everything unconfirmed back, in order."""
        done: list[int] = []
        while self._in_flight and self._in_flight[0][1].done():
            item, future = self._in_flight[0]
            error = None if future.cancelled() else future.exception()
            if future.cancelled() or error is not None:
                self._failed = True
                if isinstance(error, ComputeError):
                    log.info("outbox.publish_failed", sequence=item.sequence, code=error.code)
                elif error is not None:
                    log.error("outbox.publish_failed", sequence=item.sequence, exc_info=error)
                break
            self._in_flight.popleft()
            done.append(item.sequence)
        if self._failed and all(future.done() for _, future in self._in_flight):
            self._waiting.extendleft(item for item, _ in reversed(self._in_flight))
            self._in_flight.clear()
        if done:
            self._store.published(done)

    async def _back_off(self) -> None:
        """Wait until the broker is back, or a little where it is there and refused."""
        self._wake.clear()
        if self._bus.connected:
            await asyncio.sleep(self._retry_s)  # whatever is offered meanwhile would be refused as well
        elif self._closing:
            self._waiting.clear()
        else:
            await happens(self._wake, 30)
        self._failed = False

    def _outgoing(self, item: SequencedEvent) -> Outgoing:
        event = item.event
        return Outgoing(
            exchange=routing.EVENTS_EXCHANGE,
            routing_key=event.routing_key,
            body=seal(event.body, item.sequence, self._epoch),
            message_id=event.id,
            correlation_id=event.correlation_id,
            cc=event.cc,
        )
