"""One connection from its login to its end. It never reconnects: `link` makes another."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import TypeVar, cast

import aio_pika
import aiormq
import structlog
from aio_pika.abc import AbstractChannel, UnderlayConnection
from aio_pika.tools import OneShotCallback
from aiormq import Channel
from yarl import URL

from agent.bus.amqp import faults
from agent.bus.amqp.settings import AmqpSettings
from agent.bus.amqp.transport import Tap, TapFactory
from agent.errors import Unavailable

log = structlog.get_logger("bus")
T = TypeVar("T")

_CLOSE_S = 5.0


class _Protocol(aiormq.Connection):
    # aiormq waits three heartbeats. Two are what RabbitMQ itself waits.
    HEARTBEAT_GRACE_MULTIPLIER = 2


class _Connection(aio_pika.Connection):
    """aio-pika's connection over a transport of ours. Not its robust one: `link` decides when to reconnect."""

    def __init__(self, url: URL, factory: TapFactory) -> None:
        super().__init__(url)
        self._protocol = _Protocol(url, transport_factory=factory)

    async def connect(self, timeout: float | None = None) -> None:  # noqa: ASYNC109 - aio-pika's signature
        """Connect and log in."""
        async with asyncio.timeout(timeout):
            await self._protocol.connect()
            await self._protocol.ready()
        closed = OneShotCallback(self._on_connection_close)
        self._protocol.closing.add_done_callback(closed)
        self.transport = UnderlayConnection(connection=self._protocol, close_callback=closed)
        await self._on_connected()

    def __del__(self) -> None:
        """Nothing: the session ends it. aio-pika would start a task that nobody owns."""

    @property
    def protocol(self) -> aiormq.Connection:
        """The AMQP connection below."""
        return self._protocol


class Session:
    """A connection that is open, until `lost` is set."""

    def __init__(self, connection: _Connection, tap: Tap, answer_timeout_s: float) -> None:
        self._connection = connection
        self.tap = tap
        self.answer_timeout_s = answer_timeout_s
        self._channels: dict[int, AbstractChannel] = {}
        connection.protocol.closing.add_done_callback(lambda _: tap.end())

    @classmethod
    async def open(cls, settings: AmqpSettings, name: str, timeout_s: float) -> Session:
        """Connect and log in.

        Raises `InvalidArgument` (`bus_tls`, `bus_access_refused`) where no retry helps before something is
        changed, `Unavailable` otherwise.
        """
        # Read anew each time: certificates are renewed while the agent runs.
        context = await asyncio.to_thread(settings.ssl_context) if settings.uses_tls else None
        factory = TapFactory(context)
        connection = _Connection(settings.connection_url(name), factory)
        try:
            await connection.connect(timeout_s)
        except (Exception, asyncio.CancelledError) as exc:
            tap = factory.tap
            if tap is not None:
                tap.abort()
            task = asyncio.current_task()
            if isinstance(exc, asyncio.CancelledError) and (task is None or task.cancelling()):
                raise
            close = tap.close_reason if tap is not None else None
            raise faults.connect_error(exc, close, settings.address) from exc
        if factory.tap is None:  # cannot be: the transport exists once connect() has returned
            raise Unavailable("The connection has no transport.", code="bus_unavailable")
        return cls(connection, factory.tap, settings.answer_timeout_s)

    @property
    def lost(self) -> asyncio.Event:
        return self.tap.lost

    @property
    def frame_max(self) -> int:
        """The largest frame in bytes, as agreed with the broker (0 there means no limit)."""
        return self._connection.protocol.connection_tune.frame_max or 131072

    async def ask(self, request: Awaitable[T]) -> T:
        """Await the broker's answer, with the usual limit; raises as `faults.answer` does."""
        return await faults.answer(request, self.answer_timeout_s)

    async def channel(self, *, confirms: bool = False) -> Channel:
        """Open a channel; the caller closes it. Raises `Unavailable`."""
        opened = self._connection.channel(publisher_confirms=confirms)
        await self.ask(opened.initialize())
        below = cast("Channel", await opened.get_underlay_channel())
        self._channels[below.number] = opened
        return below

    @asynccontextmanager
    async def throw_away(self) -> AsyncIterator[Channel]:
        """Lend a channel that a refusal may close."""
        channel = await self.channel()
        try:
            yield channel
        finally:
            await self.close_channel(channel)

    async def close_channel(self, channel: Channel) -> None:
        """Close a channel, in bounded time and whatever its state."""
        self.tap.sinks.pop(channel.number, None)
        opened = self._channels.pop(channel.number, None)
        if opened is not None and not channel.is_closed and not self.lost.is_set():
            with contextlib.suppress(Unavailable, Exception):
                await self.ask(opened.close())

    async def close(self) -> None:
        """Say goodbye to the broker, in bounded time; then cut. Idempotent."""
        try:
            if not self.lost.is_set():
                await faults.answer(self._connection.close(), _CLOSE_S)
        except Exception as exc:
            log.debug("bus.close_failed", error=str(exc))
        finally:
            self.tap.abort()
            self.tap.end()
