"""A connection to the in-process broker; behaves as `agent.bus.amqp.AmqpBus` does on RabbitMQ."""

from __future__ import annotations

import asyncio

import structlog

from agent.bus.base import DeliveryCallback, Outgoing, StateCallback, Topology
from agent.bus.memory.broker import MemoryBroker
from agent.bus.memory.queue import Consumer
from agent.errors import ComputeError, FailedPrecondition, InvalidArgument, Unavailable, Unroutable

log = structlog.get_logger("bus")

_NAME_MAX = 255
"""What AMQP can carry."""


class MemorySubscription:
    """A consumer that its bus renews after each reconnect; see `agent.bus.base.Subscription`."""

    def __init__(self, broker: MemoryBroker, queue: str, on_delivery: DeliveryCallback, prefetch: int) -> None:
        self._broker = broker
        self._queue = queue
        self._on_delivery = on_delivery
        self._prefetch = prefetch
        self._consumer: Consumer | None = None
        self._past: list[Consumer] = []
        self.cancelled = False

    @property
    def active(self) -> bool:
        return self._consumer is not None and self._consumer in self._consumer.queue.consumers

    async def cancel(self) -> None:
        self.cancelled = True
        if self._consumer is not None:
            self._leave(self._consumer)
            self._past.append(self._consumer)
            self._consumer = None

    def attach(self) -> None:
        """Consume, unless it does. Raises `Unavailable` where the queue does not exist."""
        if self.cancelled or self.active:
            return
        queue = self._broker.queues.get(self._queue)
        if queue is None:
            raise Unavailable(f"The broker has no queue {self._queue}.", code="bus_no_queue")
        self._consumer = Consumer(queue, self._on_delivery, self._prefetch)
        queue.consumers.append(self._consumer)
        queue.pump_soon()

    def lose(self) -> None:
        """The connection is gone: give back what was not settled."""
        consumers = [*self._past, *([self._consumer] if self._consumer is not None else [])]
        self._past.clear()
        self._consumer = None
        for consumer in consumers:
            self._leave(consumer)
            consumer.lose()

    def _leave(self, consumer: Consumer) -> None:
        if consumer in consumer.queue.consumers:
            consumer.queue.consumers.remove(consumer)
            consumer.queue.pump_soon()


class MemoryBus:
    """A bus on a `MemoryBroker`; see `agent.bus.base.Bus`. Any number of them share a broker."""

    def __init__(self, broker: MemoryBroker, *, name: str) -> None:
        self._broker = broker
        self.name = name
        self._topologies: list[Topology] = []
        self._subscriptions: list[MemorySubscription] = []
        self._callbacks: list[StateCallback] = []
        self._opened = False

    @property
    def connected(self) -> bool:
        return self._broker.attached(self)

    async def connect(self, *, timeout_s: float) -> None:
        """Connect; while the broker is down, try again until `timeout_s` is over."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while not self.connected:
            try:
                self._broker.attach(self)
            except Unavailable:
                if loop.time() >= deadline:
                    raise
                await asyncio.sleep(min(0.01, timeout_s))
            else:
                self._opened = True
                self._announce()

    async def close(self) -> None:
        was_connected = self.connected
        self._opened = False
        self._drop()
        self._broker.detach(self)
        if was_connected:
            self._announce()

    def on_state(self, callback: StateCallback) -> None:
        self._callbacks.append(callback)

    async def declare(self, topology: Topology) -> None:
        self._must_be_connected()
        self._broker.declare(self, topology)
        self._topologies.append(topology)

    async def retract(self, topology: Topology) -> None:
        if topology in self._topologies:
            self._topologies.remove(topology)
        if self.connected:
            self._broker.retract(topology)

    async def publish(self, message: Outgoing, *, timeout_s: float = 10.0) -> None:  # noqa: ARG002 (never slow)
        self._publish(message)
        # A confirm takes a turn of the loop on every bus: code that relies on none is found out here.
        await asyncio.sleep(0)

    def publish_soon(self, message: Outgoing, *, timeout_s: float = 10.0) -> asyncio.Future[None]:  # noqa: ARG002
        loop = asyncio.get_running_loop()
        confirm: asyncio.Future[None] = loop.create_future()
        try:
            self._publish(message)
        except ComputeError as error:
            confirm.set_exception(error)
        else:
            loop.call_soon(_confirm, confirm)
        return confirm

    async def consume(self, queue: str, on_delivery: DeliveryCallback, *, prefetch: int) -> MemorySubscription:
        self._must_be_connected()
        subscription = MemorySubscription(self._broker, queue, on_delivery, prefetch)
        subscription.attach()
        self._subscriptions = [old for old in self._subscriptions if not old.cancelled]
        self._subscriptions.append(subscription)
        return subscription

    async def queue_depth(self, queue: str) -> int | None:
        self._must_be_connected()
        return self._broker.depth(queue)

    # Called by the broker.

    def on_lost(self) -> None:
        """The broker has cut this connection."""
        self._drop()
        self._announce()

    def on_return(self) -> None:
        """Reconnect if need be, and bring back whatever is missing."""
        if not self._opened or self._broker.refusing:
            if self._opened:
                loop = asyncio.get_running_loop()
                loop.call_later(max(self._broker.reconnect_s, 0.001), self.on_return)
            return
        was_connected = self.connected
        if not was_connected:
            self._broker.attach(self)
        self._restore()
        if not was_connected:
            self._announce()

    # Inside.

    def _restore(self) -> None:
        for topology in self._topologies:
            try:
                self._broker.declare(self, topology)
            except FailedPrecondition as error:
                log.warning("bus.declare_failed", bus=self.name, error=error.message)
        for subscription in self._subscriptions:
            try:
                subscription.attach()
            except Unavailable as error:
                log.warning("bus.consume_failed", bus=self.name, error=error.message)

    def _drop(self) -> None:
        for subscription in self._subscriptions:
            subscription.lose()

    def _announce(self) -> None:
        for callback in self._callbacks:
            try:
                callback(self.connected)
            except Exception:
                log.exception("bus.state_callback_failed", bus=self.name)

    def _must_be_connected(self) -> None:
        if not self.connected:
            raise Unavailable("The in-process broker is not connected.", code="bus_unavailable")

    def _publish(self, message: Outgoing) -> None:
        self._must_be_connected()
        for text in (message.routing_key, message.message_id, message.correlation_id, message.reply_to):
            if text is not None and len(text) > _NAME_MAX:
                raise InvalidArgument(
                    f"A routing key, id or name for the broker has {len(text)} bytes; at most 255 are possible.",
                    code="bus_name_too_long",
                )
        routed = self._broker.publish(message)
        if self._broker.confirms_to_lose:
            self._broker.confirms_to_lose -= 1
            raise Unavailable("The connection was lost before the confirm came.", code="bus_outcome_unknown")
        if message.mandatory and not routed:
            raise Unroutable(
                f"No queue takes {message.routing_key!r} of exchange {message.exchange!r}.",
                exchange=message.exchange,
                routing_key=message.routing_key,
            )


def _confirm(confirm: asyncio.Future[None]) -> None:
    if not confirm.done():
        confirm.set_result(None)
