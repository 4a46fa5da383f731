"""The publishing channel: messages out in one write per turn of the loop, confirms back to futures.

No task, lock or timer per message. Confirms name delivery tags; a returned message carries no tag, only its id.
So of two mandatory messages with one id the second waits for the first: else the outcomes of both could be
swapped (as they are in aiormq).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from itertools import chain

import structlog
from aiormq import Channel

from agent.bus.amqp import wire
from agent.bus.amqp.session import Session
from agent.bus.base import Outgoing
from agent.errors import ComputeError, DeadlineExceeded, FailedPrecondition, Unavailable, Unroutable

log = structlog.get_logger("bus")

_NOT_FOUND = 404
_ACCESS_REFUSED = 403


class Pending:
    """A message on its way: its future, when to give up (loop time, seconds), and whether it came back."""

    __slots__ = ("deadline", "future", "message", "returned")

    def __init__(self, message: Outgoing, future: asyncio.Future[None], deadline: float) -> None:
        self.message = message
        self.future = future
        self.deadline = deadline
        self.returned = False


class Publisher:
    """Publishes on a channel with confirms. A `Part` of the publishing link, and the `Sink` of its channel."""

    required = True

    def __init__(self, *, on_broken: Callable[[], None]) -> None:
        self._on_broken = on_broken
        self._channel: Channel | None = None
        self._session: Session | None = None
        self._number = 0
        self._frame_max = 0
        self._tag = 0
        self._pending: dict[int, Pending] = {}
        self._parked: dict[str, deque[Pending]] = {}
        """Ids of mandatory messages in flight, each with those that wait for it."""
        self._out: list[bytes] = []
        self._flushing = False
        self._return: tuple[str, str] | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_open(self) -> bool:
        return self._session is not None

    def describe(self) -> str:
        return "publisher"

    @property
    def in_flight(self) -> int:
        """Messages that have not been confirmed yet."""
        return len(self._pending)

    async def open(self, session: Session) -> None:
        channel = await session.channel(confirms=True)
        self._channel = channel  # a strong reference: aiormq's may be weak
        self._number = channel.number
        self._frame_max = session.frame_max
        self._tag = 0
        session.tap.sinks[self._number] = self
        self._session = session

    def lost(self) -> None:
        self.on_closed(0, "connection lost")

    def send(self, message: Outgoing, timeout_s: float) -> asyncio.Future[None]:
        """Publish; the future ends with the confirm, or with the error that `Bus.publish` documents."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        if self._session is None:
            future.set_exception(Unavailable("The broker is not connected.", code="bus_unavailable"))
            return future
        pending = Pending(message, future, loop.time() + timeout_s)
        if message.mandatory:
            waiting = self._parked.get(message.message_id)
            if waiting is not None:
                waiting.append(pending)
                self._watch(loop, pending.deadline)
                return future
            self._parked[message.message_id] = deque()
        self._write(loop, pending)
        return future

    def _write(self, loop: asyncio.AbstractEventLoop, pending: Pending) -> None:
        try:
            data = wire.publish(self._number, pending.message, self._frame_max)
        except (ComputeError, TypeError, ValueError) as exc:
            pending.future.set_exception(exc)
            self._settled(pending)
            return
        self._tag += 1
        alone = not self._pending
        self._pending[self._tag] = pending
        self._watch(loop, pending.deadline)
        if alone and not self._out:
            # Nothing to gather with: a turn of the loop would be pure delay.
            self._transmit(data)
            return
        self._out.append(data)
        if not self._flushing:
            self._flushing = True
            loop.call_soon(self.flush)

    def flush(self) -> None:
        self._flushing = False
        if self._out:
            data = b"".join(self._out)
            self._out.clear()
            self._transmit(data)

    def _transmit(self, data: bytes) -> None:
        if self._session is not None:
            self._session.tap.write(data)

    # What the broker says.

    def on_method(self, index: int, payload: bytes) -> None:
        if index in (wire.ACK, wire.NACK):
            tag, multiple = wire.confirm_tag(payload)
            self._confirm(tag, multiple=multiple, taken=index == wire.ACK)
        elif index == wire.RETURN:
            self._return = wire.returned_to(payload)

    def on_header(self, payload: bytes) -> None:
        if self._return is None:
            return
        self._return = None
        message_id = wire.properties(payload).message_id
        for pending in self._pending.values():
            if pending.message.mandatory and pending.message.message_id == message_id:
                pending.returned = True
                return

    def on_body(self, payload: bytes) -> None:
        """Ignore the body of a returned message: we sent it."""

    def on_cancelled(self) -> None:
        """Cannot be: nothing is consumed here."""

    def on_closed(self, code: int, text: str) -> None:
        if self._session is None:
            return
        self._session = None
        self._channel = None
        self._out.clear()
        pending = self._all()
        self._pending.clear()
        self._parked.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if code:
            log.warning("bus.publisher_closed", code=code, reason=text)
        for one in pending:
            if not one.future.done():
                one.future.set_exception(_closed_error(one.message, code, text))
        self._on_broken()

    def _confirm(self, tag: int, *, multiple: bool, taken: bool) -> None:
        if not multiple:
            pending = self._pending.pop(tag, None)
            if pending is not None:
                self._conclude(pending, taken=taken)
            return
        covered = []
        for each in self._pending:  # in the order of tags
            if each > tag:
                break
            covered.append(each)
        for each in covered:
            self._conclude(self._pending.pop(each), taken=taken)

    def _conclude(self, pending: Pending, *, taken: bool) -> None:
        if not pending.future.done():
            message = pending.message
            if pending.returned:
                pending.future.set_exception(_unroutable(message))
            elif taken:
                pending.future.set_result(None)
            else:
                pending.future.set_exception(Unavailable("The broker could not store the message.", code="bus_nacked"))
        self._settled(pending)

    def _settled(self, pending: Pending) -> None:
        """Let the next message with this id go, if one waits."""
        if not pending.message.mandatory:
            return
        message_id = pending.message.message_id
        waiting = self._parked.get(message_id)
        if waiting is None:
            return
        while waiting and waiting[0].future.done():
            waiting.popleft()
        if waiting:
            self._write(asyncio.get_running_loop(), waiting.popleft())
        else:
            del self._parked[message_id]

    def _all(self) -> list[Pending]:
        """All that await an outcome: in flight, and waiting for another of the same id."""
        return [*self._pending.values(), *chain.from_iterable(self._parked.values())]

    # Deadlines: one timer, for the earliest of all.

    def _watch(self, loop: asyncio.AbstractEventLoop, deadline: float) -> None:
        if self._timer is None or deadline < self._timer.when():
            if self._timer is not None:
                self._timer.cancel()
            self._timer = loop.call_at(deadline, self._expire)

    def _expire(self) -> None:
        self._timer = None
        loop = asyncio.get_running_loop()
        now = loop.time()
        blocked = self._session is not None and self._session.tap.blocked
        earliest: float | None = None
        for pending in self._all():
            if pending.future.done():
                continue
            if pending.deadline <= now:
                pending.future.set_exception(_late(blocked=blocked))
            elif earliest is None or pending.deadline < earliest:
                earliest = pending.deadline
        if earliest is not None:
            self._watch(loop, earliest)


def _late(*, blocked: bool) -> DeadlineExceeded:
    why = " It is short of memory or disk and takes no messages now." if blocked else ""
    return DeadlineExceeded(f"The broker did not confirm the message in time.{why}", code="bus_timeout")


def _unroutable(message: Outgoing) -> Unroutable:
    return Unroutable(
        f"No queue takes {message.routing_key!r} of exchange {message.exchange!r}.",
        exchange=message.exchange,
        routing_key=message.routing_key,
    )


def _closed_error(message: Outgoing, code: int, text: str) -> ComputeError:
    """Tell the message that made the broker close the channel from those that were merely on it."""
    about_us = f"exchange '{message.exchange or 'amq.default'}'" in text
    if about_us and code == _NOT_FOUND:
        return FailedPrecondition(f"The broker has no exchange {message.exchange}.", code="bus_no_exchange")
    if about_us and code == _ACCESS_REFUSED:
        keys = (message.routing_key, *message.cc)
        if "topic '" not in text or any(f"'{key}'" in text for key in keys):
            return FailedPrecondition(
                f"The broker does not let this login publish {message.routing_key!r} to exchange {message.exchange}.",
                code="bus_write_refused",
            )
    return Unavailable("The channel was lost before the confirm came.", code="bus_outcome_unknown")
