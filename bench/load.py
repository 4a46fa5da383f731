"""Closed-loop load: keep N requests in flight on one reply queue, and time each. The same client for both sides."""

from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import dataclass
from typing import Self

import aio_pika

from agent.controller.envelope import render_command
from agent.messages.commands import HostPing
from bench.servers import AGENT_HOST


@dataclass(frozen=True)
class Load:
    """What one round took: all requests, in seconds, and each one's latency."""

    seconds: float
    latencies_s: list[float]

    @property
    def per_second(self) -> float:
        """Requests per second."""
        return len(self.latencies_s) / self.seconds


class Client:
    """Publishes commands and awaits the first answer to each."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._waiting: dict[str, asyncio.Future[None]] = {}
        self._name = f"compute.reply.bench-{uuid.uuid4()}"

    async def __aenter__(self) -> Self:
        self._connection = await aio_pika.connect(self._url)
        self._channel = await self._connection.channel(publisher_confirms=False)
        replies = await self._connection.channel()
        await replies.set_qos(prefetch_count=1000)
        self._queue = await replies.declare_queue(self._name, exclusive=True)
        await self._queue.consume(self._answered, no_ack=True)
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self._connection.close()

    async def bind(self, exchange: str) -> None:
        """Let the reply queue take what is routed to its own name on an exchange."""
        await self._queue.bind(exchange, routing_key=self._name)

    async def _answered(self, message: aio_pika.abc.AbstractIncomingMessage) -> None:
        future = self._waiting.pop(message.correlation_id or "", None)
        if future is not None:
            future.set_result(None)

    async def run(self, exchange: str, routing_key: str, *, total: int, in_flight: int) -> Load:
        """Send `total` requests, `in_flight` at a time."""
        target = (
            await self._channel.get_exchange(exchange, ensure=False) if exchange else self._channel.default_exchange
        )
        latencies: list[float] = []
        left = iter(range(total))

        async def worker() -> None:
            for _ in left:
                command_id = str(uuid.uuid4())
                body = render_command(HostPing(echo="x" * 64), id=command_id, source="/bench", host=AGENT_HOST)
                message = aio_pika.Message(
                    body,
                    correlation_id=command_id,
                    reply_to=self._name,
                    message_id=command_id,
                    delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
                )
                future = self._waiting[command_id] = asyncio.get_running_loop().create_future()
                begun = time.perf_counter()
                await target.publish(message, routing_key=routing_key)
                async with asyncio.timeout(60):
                    await future
                latencies.append(time.perf_counter() - begun)

        begun = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(in_flight)))
        return Load(time.perf_counter() - begun, latencies)
