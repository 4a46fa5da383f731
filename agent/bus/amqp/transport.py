"""Sits between the socket and aiormq: takes the per-message frames out, leaves aiormq all others.

aiormq accepts a transport factory, so nothing of it is patched. A channel that registered a `Sink` gets its
content frames within `data_received`, without queue, task or copy in between, and learns of its end at once;
aiormq sees the control frames of that channel as ever.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import Any, Protocol

import structlog
from aiormq.connection import TransportFactory
from yarl import URL

from agent.bus.amqp import wire

log = structlog.get_logger("bus")

_TAKEN = frozenset((wire.DELIVER, wire.RETURN, wire.ACK, wire.NACK))
_KINDS = frozenset((wire.METHOD, wire.HEADER, wire.BODY, 8))
_HEARTBEAT_EVERY_S = 1.0
_TLS_GOODBYE_S = 2.0


class Sink(Protocol):
    """The owner of a channel's message frames. Called within `data_received`; must not block or raise."""

    def on_method(self, index: int, payload: bytes) -> None:
        """A deliver, return, ack or nack; `payload` is what follows the method index."""

    def on_header(self, payload: bytes) -> None: ...
    def on_body(self, payload: bytes) -> None: ...

    def flush(self) -> None:
        """Send now what waits for the end of this turn of the loop."""

    def on_cancelled(self) -> None:
        """The broker has cancelled the consumer: its queue is gone."""

    def on_closed(self, code: int, text: str) -> None:
        """The broker closes the channel (code above 0) or the connection is lost (code 0). Last call."""


class Tap(asyncio.StreamReaderProtocol):
    """The protocol of one connection: aiormq's stream reader, minus what the sinks take."""

    def __init__(self, reader: asyncio.StreamReader, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(reader, loop=loop)
        self.sinks: dict[int, Sink] = {}
        self.close_reason: tuple[int, str] | None = None
        self.blocked = False
        self.blocked_count = 0
        self.lost = asyncio.Event()
        self._clock = loop.time
        self._fed_at = loop.time()
        self._rest = b""
        self._foreign = False
        self._wire: asyncio.Transport | None = None

    def write(self, data: bytes) -> None:
        """Send whole frames. They may stand between any two writes of aiormq: those are whole frames too."""
        if self._wire is not None and not self._wire.is_closing():
            self._wire.write(data)

    def abort(self) -> None:
        """Cut the connection without a word. Idempotent."""
        if self._wire is not None:
            self._wire.abort()

    def connection_made(self, transport: Any) -> None:
        self._wire = transport
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.end()

    def end(self) -> None:
        """Tell the sinks that this connection carries nothing any more. Idempotent."""
        self.lost.set()
        sinks, self.sinks = self.sinks, {}
        code, text = 0, self.close_reason[1] if self.close_reason else "connection lost"
        for sink in sinks.values():
            sink.on_closed(code, text)

    def data_received(self, data: bytes) -> None:
        if self._foreign:
            super().data_received(data)
            return
        buffer = self._rest + data if self._rest else data
        try:
            used, passed = self._split(buffer)
        except Exception:
            # A frame that cannot be understood leaves no way to find the next one.
            log.exception("bus.bad_frame")
            self._rest = b""
            self.abort()
            return
        self._rest = buffer[used:]
        self._feed(passed)

    def _split(self, buffer: bytes) -> tuple[int, list[bytes]]:
        """Hand message frames to their sinks; return the bytes that were whole frames, and those for aiormq."""
        passed: list[bytes] = []
        at, size = 0, len(buffer)
        head = wire.FRAME_HEAD.unpack_from
        while size - at >= wire.OVERHEAD:
            kind, channel, length = head(buffer, at)
            if kind not in _KINDS:
                # No AMQP 0-9-1, such as the greeting of another version: aiormq words the error.
                self._foreign = True
                return size, [*passed, buffer[at:]]
            end = at + length + wire.OVERHEAD
            if end > size:
                break
            if buffer[end - 1] != wire.END_BYTE:
                raise ValueError("a frame does not end with its end mark")
            sink = self.sinks.get(channel)
            if sink is None:
                if channel == 0 and kind == wire.METHOD:
                    self._observe(buffer[at + 7 : end - 1])
                passed.append(buffer[at:end])
            elif kind == wire.METHOD:
                if not self._method(channel, sink, buffer[at + 7 : end - 1]):
                    passed.append(buffer[at:end])
            elif kind == wire.HEADER:
                sink.on_header(buffer[at + 7 : end - 1])
            else:
                sink.on_body(buffer[at + 7 : end - 1])
            at = end
        return at, passed

    def _method(self, channel: int, sink: Sink, payload: bytes) -> bool:
        """Handle a method on a sink's channel; True if aiormq need not see it."""
        index = wire.METHOD_INDEX.unpack_from(payload)[0]
        if index in _TAKEN:
            sink.on_method(index, payload[4:])
            return True
        if index == wire.CHANNEL_CLOSE:
            # At once, not when aiormq has come round to it: what is published after aiormq's Close-Ok would
            # make the broker close the whole connection.
            self.sinks.pop(channel, None)
            sink.on_closed(*wire.close_reason(payload[4:]))
        elif index == wire.CANCEL:
            sink.on_cancelled()
        return False

    def _observe(self, payload: bytes) -> None:
        """Note what aiormq does not tell its user."""
        index = wire.METHOD_INDEX.unpack_from(payload)[0]
        if index == wire.CONNECTION_CLOSE:
            self.close_reason = wire.close_reason(payload[4:])
            self.end()
        elif index == wire.CONNECTION_BLOCKED:
            self.blocked = True
            self.blocked_count += 1
            log.warning("bus.blocked", reason=wire.blocked_reason(payload[4:]))
        elif index == wire.CONNECTION_UNBLOCKED:
            self.blocked = False
            log.info("bus.unblocked")

    def _feed(self, passed: list[bytes]) -> None:
        now = self._clock()
        if passed:
            self._fed_at = now
            super().data_received(b"".join(passed))
        elif now - self._fed_at > _HEARTBEAT_EVERY_S:
            # A busy broker sends no heartbeats. aiormq, which sees none of the traffic, would give it up.
            self._fed_at = now
            super().data_received(wire.HEARTBEAT)


class TapFactory(TransportFactory):
    """Makes the transport of one aiormq connection, with a `Tap` in it."""

    def __init__(self, context: ssl.SSLContext | None) -> None:
        self._context = context
        self.tap: Tap | None = None

    async def create(
        self,
        url: URL,
        **_kwargs: Any,
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect; the caller limits the time. Errors stay as they are: `faults` knows them."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(loop=loop)
        # A peer that does not answer the TLS goodbye must not hold up the next attempt.
        goodbye_s = _TLS_GOODBYE_S if self._context is not None else None
        transport, tap = await loop.create_connection(
            lambda: Tap(reader, loop),
            url.host or "",
            url.port or 0,
            ssl=self._context,
            ssl_shutdown_timeout=goodbye_s,
        )
        self.tap = tap
        return reader, asyncio.StreamWriter(transport, tap, reader, loop)
