"""A live stream of events: repeats dropped, gaps marked.

A stream has an exclusive queue of its own on the events exchange. It shows what is published while it is
open; there is no history. What a reader may have missed is never hidden: it is told by a `Gap` among the
events.
"""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, Self

import structlog
from pydantic import TypeAdapter, ValidationError

from agent.bus.base import Binding, Bus, Delivery, Queue, Subscription, Topology
from agent.errors import InvalidArgument
from agent.messages import routing
from agent.messages.events import Event, parse_event
from agent.messages.types import HostName

_log = structlog.get_logger("controller")
_KIND = re.compile(r"(\*|[a-z][a-z0-9-]*)\.(\*|[a-z][a-z0-9-]*)")
_HOST: TypeAdapter[str] = TypeAdapter(HostName)

PREFETCH = 256
"""Events held for a slow reader; the broker keeps the rest."""

REMEMBERED_IDS = 10_000
"""Repeats come within one outbox flush of each other; this covers several."""


@dataclass(frozen=True, slots=True)
class Gap:
    """Events may be missing here: re-read the state of what you watch.

    `sequence`: numbers `first` to `last` of `host` never came. `epoch`: the host's journal is new.
    `disconnected`: the connection was away, and with it the stream's queue.
    """

    reason: Literal["sequence", "epoch", "disconnected"]
    host: str | None = None
    epoch: str | None = None
    first: int | None = None
    last: int | None = None

    @property
    def sentence(self) -> str:
        """Say it to a person."""
        if self.reason == "disconnected":
            return "the connection was lost for a while; events may be missing here"
        if self.reason == "epoch":
            return f"host {self.host} began a new epoch {self.epoch}; events may be missing here"
        return f"events {self.first} to {self.last} of host {self.host} are missing here"


class Recent:
    """Remembers the latest ids, a bounded number of them."""

    def __init__(self, limit: int = REMEMBERED_IDS) -> None:
        self._limit = limit
        self._ids: OrderedDict[str, None] = OrderedDict()

    def is_repeat(self, id: str) -> bool:
        """Tell whether this id came before, and remember it."""
        if id in self._ids:
            return True
        self._ids[id] = None
        if len(self._ids) > self._limit:
            self._ids.popitem(last=False)
        return False


def binding_patterns(kinds: Sequence[str], host: str | None) -> tuple[str, ...]:
    """Turn kinds (`instance.state`, `instance.*`, `instance`) and a host into topic patterns; none means all.

    Raises `InvalidArgument` on what is no kind or host: an AMQP wildcard stands for whole words only.
    """
    if host is not None:
        try:
            _HOST.validate_python(host)
        except ValidationError:
            raise InvalidArgument(f"{host!r} is no host name") from None
    found = []
    for kind in kinds or ("*.*",):
        full = kind if "." in kind else f"{kind}.*"
        if not _KIND.fullmatch(full):
            raise InvalidArgument(f"{kind!r} is no kind of event; write e.g. instance.state, instance.* or instance")
        found.append(f"{full}.{host or '#'}")
    return tuple(found)


class EventStream:
    """Events as they are published: an async context manager and an async iterator of `Event` and `Gap`.

    Made by `ComputeClient.events`. On entry the queue is bound, so that nothing published afterwards is
    missed. Gaps in the sequence are seen only without `kinds`, as a filtered stream has them by nature.
    """

    def __init__(self, bus: Bus, name: str, *, kinds: Sequence[str], host: str | None, instance_id: str | None) -> None:
        self._bus = bus
        self._name = name
        bindings = (Binding(routing.EVENTS_EXCHANGE, pattern, name) for pattern in binding_patterns(kinds, host))
        self._topology = Topology(queues=(Queue(name, durable=False),), bindings=tuple(bindings))
        self._complete = not kinds
        self._instance_id = instance_id
        self._arrived: asyncio.Queue[Delivery | Gap | None] = asyncio.Queue()
        self._recent = Recent()
        self._last: dict[str, tuple[str, int]] = {}
        self._held: Event | None = None
        self._subscription: Subscription | None = None
        self._ended = False

    async def __aenter__(self) -> Self:
        """Bind and consume. Raises `Unavailable` (retry) and `FailedPrecondition` (no exchange or right)."""
        await self._bus.declare(self._topology)
        self._subscription = await self._bus.consume(self._name, self._arrived.put_nowait, prefetch=PREFETCH)
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop, and delete the queue; a waiting reader sees the end. Idempotent."""
        if not self._ended:
            self._ended = True
            self._arrived.put_nowait(None)
        if self._subscription is not None:
            subscription, self._subscription = self._subscription, None
            await subscription.cancel()
            await self._bus.retract(self._topology)

    @property
    def ended(self) -> bool:
        """Whether the stream was closed."""
        return self._ended

    def connection_returned(self) -> None:
        """Mark the place in the stream where the connection was away."""
        self._arrived.put_nowait(Gap("disconnected"))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event | Gap:
        """Wait for the next event, without limit: hosts may be silent for as long as they like."""
        if self._held is not None:
            held, self._held = self._held, None
            return held
        while not self._ended:
            item = await self._arrived.get()
            if item is None:
                break
            if isinstance(item, Gap):
                return item
            event = self._take(item)
            if event is None:
                continue
            gap = self._gap_before(event)
            wanted = self._instance_id is None or self._instance_id in (
                event.subject,
                event.data.get("instance_id"),
            )
            if gap is not None:
                self._held = event if wanted else None
                return gap
            if wanted:
                return event
        raise StopAsyncIteration

    async def next(self, timeout_s: float) -> Event | Gap | None:
        """Wait for the next event, at most `timeout_s`; None if none came or the stream was closed."""
        with suppress(TimeoutError, StopAsyncIteration):
            async with asyncio.timeout(max(timeout_s, 0.0)):
                return await self.__anext__()
        return None

    def _take(self, delivery: Delivery) -> Event | None:
        """Settle a delivery and read it; None for a repeat and for what is no event."""
        delivery.ack()
        if delivery.routing_key.startswith(routing.REPLY_PREFIX):
            return None  # an answer to one controller alone, which a pattern for all events matches too
        try:
            event = parse_event(delivery.body)
        except ValidationError as exc:
            _log.warning("controller.bad_event", routing_key=delivery.routing_key, error=str(exc))
            return None
        return None if self._recent.is_repeat(event.id) else event

    def _gap_before(self, event: Event) -> Gap | None:
        """Compare an event's number with its host's last. Heartbeats have none: they overtake the outbox."""
        if not self._complete or event.sequence is None or event.epoch is None:
            return None
        epoch, last = self._last.get(event.host, (event.epoch, event.sequence - 1))
        if epoch != event.epoch:
            self._last[event.host] = (event.epoch, event.sequence)
            return Gap("epoch", host=event.host, epoch=event.epoch)
        self._last[event.host] = (epoch, max(last, event.sequence))
        if event.sequence > last + 1:
            return Gap("sequence", host=event.host, epoch=epoch, first=last + 1, last=event.sequence - 1)
        return None
