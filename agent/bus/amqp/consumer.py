"""Consuming: one channel per consumer, deliveries straight to the callback, settlements in batches.

Acknowledgements of one turn of the loop leave together: one frame for all up to the oldest unsettled
delivery, one for each beyond it. A settlement never waits longer than that turn.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping
from typing import Any

import structlog
from aiormq import Channel

from agent.bus.amqp import wire
from agent.bus.amqp.session import Session
from agent.bus.base import DeliveryCallback
from agent.errors import Unavailable

log = structlog.get_logger("bus")


class AmqpDelivery:
    """One delivery; see `agent.bus.base.Delivery`. Decodes only what is asked for."""

    __slots__ = ("_channel", "_header", "_method", "_names", "_names_at", "_properties", "body",
                 "redelivered", "tag")  # fmt: skip

    def __init__(self, channel: ConsumerChannel, method: bytes, header: bytes, body: bytes) -> None:
        self.tag, self.redelivered, self._names_at = wire.deliver_tag(method)
        self.body = body
        self._channel = channel
        self._method = method
        self._header = header
        self._names: tuple[str, str] | None = None
        self._properties: wire.Properties | None = None

    @property
    def exchange(self) -> str:
        return self._named()[0]

    @property
    def routing_key(self) -> str:
        return self._named()[1]

    @property
    def headers(self) -> Mapping[str, Any]:
        return self._decoded().headers

    @property
    def message_id(self) -> str | None:
        return self._decoded().message_id

    @property
    def correlation_id(self) -> str | None:
        return self._decoded().correlation_id

    @property
    def reply_to(self) -> str | None:
        return self._decoded().reply_to

    def ack(self) -> None:
        self._channel.ack(self.tag)

    def reject(self, *, requeue: bool) -> None:
        self._channel.reject(self.tag, requeue=requeue)

    def _named(self) -> tuple[str, str]:
        if self._names is None:
            self._names = wire.two_strings(self._method, self._names_at)
        return self._names

    def _decoded(self) -> wire.Properties:
        if self._properties is None:
            self._properties = wire.properties(self._header)
        return self._properties


class ConsumerChannel:
    """The message side of a consumer's channel: assembles deliveries, gathers settlements. A `Sink`."""

    def __init__(
        self,
        session: Session,
        number: int,
        callback: DeliveryCallback,
        *,
        on_gone: Callable[[ConsumerChannel, str], None],
        on_idle: Callable[[ConsumerChannel], None],
    ) -> None:
        self._session = session
        self._number = number
        self._callback = callback
        self._on_gone = on_gone
        self._on_idle = on_idle
        self._method = b""
        self._header = b""
        self._missing = 0
        self._chunks: list[bytes] = []
        self.unsettled: dict[int, None] = {}
        self._last_tag = 0
        self._acked: list[int] = []
        self._out: list[bytes] = []
        self._flushing = False
        self.alive = True

    def ack(self, tag: int) -> None:
        if self._settle(tag):
            self._acked.append(tag)

    def reject(self, tag: int, *, requeue: bool) -> None:
        if self._settle(tag):
            self._out.append(wire.reject(self._number, tag, requeue=requeue))

    def _settle(self, tag: int) -> bool:
        """Strike a delivery off; False if it is settled already or its channel is gone."""
        if not self.alive or tag not in self.unsettled:
            return False
        del self.unsettled[tag]
        if not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_soon(self.flush)
        return True

    def flush(self) -> None:
        """Send what was settled. Rejections first: a group acknowledgement must not cover them."""
        self._flushing = False
        if not self.alive:
            return
        out, acked = self._out, self._acked
        if acked:
            oldest = next(iter(self.unsettled), self._last_tag + 1)
            group = 0
            for tag in acked:
                if tag > oldest:
                    out.append(wire.ack(self._number, tag, multiple=False))
                elif tag > group:
                    group = tag
            if group:
                out.append(wire.ack(self._number, group, multiple=True))
            acked.clear()
        if out:
            data = b"".join(out)
            out.clear()
            self._session.tap.write(data)
        if not self.unsettled:
            self._on_idle(self)

    # What the broker says.

    def on_method(self, index: int, payload: bytes) -> None:
        if index == wire.DELIVER:
            self._method = payload

    def on_header(self, payload: bytes) -> None:
        self._header = payload
        self._missing = wire.content_size(payload)
        self._chunks.clear()
        if not self._missing:
            self._deliver(b"")

    def on_body(self, payload: bytes) -> None:
        self._missing -= len(payload)
        if self._missing > 0:
            self._chunks.append(payload)
        elif self._chunks:
            self._chunks.append(payload)
            self._deliver(b"".join(self._chunks))
            self._chunks.clear()
        else:
            self._deliver(payload)

    def _deliver(self, body: bytes) -> None:
        if not self.alive:
            return
        delivery = AmqpDelivery(self, self._method, self._header, body)
        self._last_tag = delivery.tag
        self.unsettled[delivery.tag] = None
        try:
            self._callback(delivery)
        except Exception:
            # A defect of the callback must neither use up the prefetch nor spin on one message.
            log.exception("bus.callback_failed", exchange=delivery.exchange, key=delivery.routing_key)
            delivery.reject(requeue=False)

    def on_cancelled(self) -> None:
        self._on_gone(self, "cancelled by the broker")

    def on_closed(self, code: int, text: str) -> None:
        self.alive = False
        self.unsettled.clear()
        self._on_gone(self, f"{code} {text}" if code else text)


class AmqpSubscription:
    """A consumer that comes back until it is cancelled; see `agent.bus.base.Subscription`.

    A `Part` of the consuming link.
    """

    required = False

    def __init__(
        self,
        queue: str,
        callback: DeliveryCallback,
        prefetch: int,
        *,
        on_broken: Callable[[AmqpSubscription, bool], None],
        on_drained: Callable[[Session, Channel], None],
    ) -> None:
        self._queue = queue
        self._callback = callback
        self._prefetch = prefetch
        self._on_broken = on_broken
        self._on_drained = on_drained
        self._tag = f"{queue}.{secrets.token_hex(4)}"
        self._session: Session | None = None
        self._channel: Channel | None = None
        self._sink: ConsumerChannel | None = None
        self._consuming = False
        self._cancelled = False
        self._cancelling: asyncio.Lock = asyncio.Lock()

    @property
    def active(self) -> bool:
        return self._consuming

    @property
    def is_open(self) -> bool:
        return self._consuming or self._cancelled

    def describe(self) -> str:
        return f"consumer of {self._queue}"

    async def open(self, session: Session) -> None:
        """Consume. Raises `Unavailable`, and aiormq's channel errors (404: no such queue, 403: no right)."""
        channel = await session.channel()
        sink = ConsumerChannel(session, channel.number, self._callback, on_gone=self._gone, on_idle=self._idle)
        # In place before the broker may send: its first delivery can share a packet with Consume-Ok.
        session.tap.sinks[channel.number] = sink
        self._session, self._channel, self._sink = session, channel, sink
        try:
            await session.ask(channel.basic_qos(prefetch_count=self._prefetch))
            await session.ask(channel.basic_consume(self._queue, _unused, consumer_tag=self._tag))
        except BaseException:
            sink.alive = False
            await session.close_channel(channel)
            raise
        self._consuming = sink.alive
        if self._cancelled:
            await self._stop(session, channel)

    def lost(self) -> None:
        self._consuming = False
        if self._sink is not None:
            self._sink.alive = False
        self._session = self._channel = self._sink = None

    async def cancel(self) -> None:
        self._cancelled = True
        async with self._cancelling:
            if self._session is not None and self._channel is not None and self._consuming:
                await self._stop(self._session, self._channel)
        self._on_broken(self, False)

    async def _stop(self, session: Session, channel: Channel) -> None:
        try:
            await session.ask(channel.basic_cancel(self._tag))
        except Unavailable as exc:
            log.info("bus.cancel_failed", queue=self._queue, error=exc.message)
        self._consuming = False
        if self._sink is not None:
            self._sink.flush()

    def _gone(self, sink: ConsumerChannel, why: str) -> None:
        """The channel or the consumer has ended without our doing."""
        if sink is not self._sink:
            return
        was_consuming, self._consuming = self._consuming, False
        if was_consuming and not self._cancelled:
            log.warning("bus.consumer_lost", queue=self._queue, reason=why)
        if not sink.alive:
            self._sink = None
        elif self._session is not None and self._channel is not None:
            # Cancelled by the broker, the channel still stands: give up what is on it, open a new one.
            sink.alive = False
            self._on_drained(self._session, self._channel)
        self._on_broken(self, True)

    def _idle(self, sink: ConsumerChannel) -> None:
        """All is settled. After a cancel the channel has no further use."""
        if self._cancelled and not self._consuming and sink is self._sink:
            self._sink = None
            if self._session is not None and self._channel is not None:
                self._on_drained(self._session, self._channel)


async def _unused(_message: object) -> None:
    """Be the callback that aiormq wants; the sink takes every delivery before it."""
