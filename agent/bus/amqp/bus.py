"""The bus on RabbitMQ: two connections, because an alarm of the broker blocks those that publish.

Runs on the event loop's thread alone. See `agent.bus.base.Bus` for what each method promises.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any

import structlog
from aiormq import Channel
from aiormq.exceptions import ChannelClosed, ChannelNotFoundEntity

from agent.bus.amqp import topology as topologies
from agent.bus.amqp.consumer import AmqpSubscription
from agent.bus.amqp.link import Link
from agent.bus.amqp.publisher import Publisher
from agent.bus.amqp.session import Session
from agent.bus.amqp.settings import AmqpSettings
from agent.bus.base import DeliveryCallback, Outgoing, StateCallback, Topology
from agent.errors import FailedPrecondition, Unavailable

log = structlog.get_logger("bus")


class AmqpBus:
    """A bus on RabbitMQ 3.10 or later. `name` shows in the broker's list of connections."""

    def __init__(self, settings: AmqpSettings, *, name: str) -> None:
        self._name = name
        self._callbacks: list[StateCallback] = []
        self._announced = False
        self._closed = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._publishing = Link(settings, name=f"{name}.publish", on_change=self._on_change)
        self._consuming = Link(settings, name=f"{name}.consume", on_change=self._on_change)
        self._publisher = Publisher(on_broken=self._publishing.check)
        self._publishing.parts.append(self._publisher)
        self._declarations = topologies.Declarations()
        self._consuming.parts.append(self._declarations)

    # Figures for metrics.

    @property
    def reconnects(self) -> int:
        """How often a connection came back."""
        return self._publishing.reconnects + self._consuming.reconnects

    @property
    def blocked(self) -> bool:
        """Whether the broker takes no messages now, being short of memory or disk."""
        return self._publishing.blocked

    @property
    def blocked_count(self) -> int:
        """How often the broker has blocked publishing."""
        session = self._publishing.session
        return self._publishing.blocked_count + (session.tap.blocked_count if session is not None else 0)

    @property
    def in_flight(self) -> int:
        """Published messages that are not confirmed yet."""
        return self._publisher.in_flight

    # The bus.

    @property
    def connected(self) -> bool:
        return not self._closed and self._publishing.up and self._consuming.up

    def on_state(self, callback: StateCallback) -> None:
        self._callbacks.append(callback)

    async def connect(self, *, timeout_s: float) -> None:
        """Connect for the first time.

        Raises `Unavailable` after `timeout_s`; `InvalidArgument` with code `bus_access_refused` (login,
        virtual host) or `bus_tls` (certificates), where a retry helps only after a change.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        try:
            await self._publishing.connect(timeout_s)
            await self._consuming.connect(max(deadline - loop.time(), 0.1))
        except BaseException:
            await self._publishing.close()
            await self._consuming.close()
            raise

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._on_change()
        self._consuming.flush()
        await self._consuming.close()
        await self._publishing.close()
        for task in tuple(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=5.0)

    async def declare(self, topology: Topology) -> None:
        await topologies.declare(self._consuming.live_session(), topology)
        self._declarations.keep(topology)

    async def retract(self, topology: Topology) -> None:
        self._declarations.forget(topology)
        if self._consuming.up:
            with contextlib.suppress(Unavailable):
                await topologies.retract(self._consuming.live_session(), topology)

    async def publish(self, message: Outgoing, *, timeout_s: float = 10.0) -> None:
        await self._publisher.send(message, timeout_s)

    def publish_soon(self, message: Outgoing, *, timeout_s: float = 10.0) -> asyncio.Future[None]:
        return self._publisher.send(message, timeout_s)

    async def consume(self, queue: str, on_delivery: DeliveryCallback, *, prefetch: int) -> AmqpSubscription:
        """Begin to consume.

        Raises `Unavailable`, also (code `bus_no_queue`) where there is no such queue, and `FailedPrecondition`
        where the login may not read it.
        """
        subscription = AmqpSubscription(
            queue, on_delivery, prefetch, on_broken=self._on_broken, on_drained=self._drained
        )
        try:
            await self._consuming.add(subscription)
        except ChannelNotFoundEntity as exc:
            raise Unavailable(f"The broker has no queue {queue}.", code="bus_no_queue") from exc
        except ChannelClosed as exc:
            raise FailedPrecondition(
                f"The broker does not let this login consume from {queue}: {exc}", code="bus_read_refused"
            ) from exc
        return subscription

    async def queue_depth(self, queue: str) -> int | None:
        return await topologies.queue_depth(self._consuming.live_session(), queue)

    # Inside.

    def _on_broken(self, subscription: AmqpSubscription, by_broker: bool) -> None:
        if not by_broker:
            self._consuming.remove(subscription)
            return
        # Its queue may have been deleted: look to the topology first, which stands before it among the parts.
        self._declarations.lost()
        self._consuming.check()

    def _drained(self, session: Session, channel: Channel) -> None:
        self._own(session.close_channel(channel))

    def _own(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name=f"bus-{self._name}-channel")
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("bus.task_failed", task=task.get_name(), exc_info=error)

    def _on_change(self) -> None:
        connected = self.connected
        if connected == self._announced:
            return
        self._announced = connected
        for callback in tuple(self._callbacks):
            try:
                callback(connected)
            except Exception:
                log.exception("bus.state_callback_failed", bus=self._name)
