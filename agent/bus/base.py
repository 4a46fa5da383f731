"""What the agent and the controller's client ask of a message bus.

AMQP's model, without its library: topic exchanges, queues, bindings, deliveries that are acknowledged, publishes
that are confirmed. Everything runs on the event loop's thread. A delivery callback is plain and must return at
once: a coroutine run by the bus's library would be cancelled when a channel drops, while its work goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

Header = str | int | bool | None


@dataclass(frozen=True, slots=True)
class Exchange:
    """A durable topic exchange. `alternate` takes what no binding matches."""

    name: str
    alternate: str | None = None


@dataclass(frozen=True, slots=True)
class Queue:
    """A queue. `durable` ones are quorum queues on RabbitMQ and outlive everybody; others are exclusive to the
    connection and vanish with it (they are declared anew, with their bindings, when it returns).

    `single_active`: of several consumers only one is served. `dead_letter_exchange` takes rejected messages, and
    those delivered more than `delivery_limit` times.
    """

    name: str
    durable: bool = True
    single_active: bool = False
    dead_letter_exchange: str | None = None
    delivery_limit: int | None = None


@dataclass(frozen=True, slots=True)
class Binding:
    """Routes messages of `exchange` whose routing key matches the topic `pattern` to `queue`."""

    exchange: str
    pattern: str
    queue: str


@dataclass(frozen=True, slots=True)
class Topology:
    """Exchanges, queues and bindings to be declared together. Pure data."""

    exchanges: Sequence[Exchange] = ()
    queues: Sequence[Queue] = ()
    bindings: Sequence[Binding] = ()


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message to publish. `cc` are further routing keys on the same exchange (RabbitMQ's CC header).

    `exchange` "" is the default exchange: the routing key is a queue's name. `mandatory`: raise `Unroutable` if
    no queue takes it. `expiration_s` lets the broker drop it when it is that old (heartbeats).
    """

    exchange: str
    routing_key: str
    body: bytes
    message_id: str
    content_type: str = "application/cloudevents+json"
    correlation_id: str | None = None
    reply_to: str | None = None
    cc: Sequence[str] = ()
    headers: Mapping[str, Header] = field(default_factory=dict)
    persistent: bool = True
    mandatory: bool = False
    expiration_s: float | None = None


@runtime_checkable
class Delivery(Protocol):
    """One received message. Exactly one of `ack`, `reject` settles it; unsettled ones are delivered again.

    Settling a delivery whose channel is gone does nothing: the broker delivers it again.
    """

    @property
    def body(self) -> bytes: ...
    @property
    def exchange(self) -> str: ...
    @property
    def routing_key(self) -> str: ...
    @property
    def headers(self) -> Mapping[str, Any]: ...
    @property
    def message_id(self) -> str | None: ...
    @property
    def correlation_id(self) -> str | None: ...
    @property
    def reply_to(self) -> str | None: ...
    @property
    def redelivered(self) -> bool: ...

    def ack(self) -> None:
        """Settle this delivery; the bus may batch neighbouring acknowledgements."""

    def reject(self, *, requeue: bool) -> None:
        """Give it back: to the queue (its delivery count rises) or to the dead-letter exchange."""


DeliveryCallback = Callable[[Delivery], None]
StateCallback = Callable[[bool], None]


class Subscription(Protocol):
    """A consumer on one queue. It survives reconnects until it is cancelled."""

    @property
    def active(self) -> bool:
        """Whether the broker knows this consumer now (readiness asks this)."""

    async def cancel(self) -> None:
        """Stop deliveries. Those already delivered can still be settled. Idempotent."""


class Bus(Protocol):
    """A connection to a broker. Reconnects by itself, with jitter, for ever, until closed."""

    async def connect(self, *, timeout_s: float) -> None:
        """Connect for the first time. Raises `Unavailable` after `timeout_s`; `InvalidArgument` (code
        `bus_access_refused`) where the broker refuses the login, the certificate or the virtual host.
        """

    async def close(self) -> None:
        """End everything. Unsettled deliveries go back to their queues. Idempotent."""

    @property
    def connected(self) -> bool:
        """Whether both publishing and consuming are possible now."""

    def on_state(self, callback: StateCallback) -> None:
        """Call `callback(connected)` on the loop whenever `connected` changes."""

    async def declare(self, topology: Topology) -> None:
        """Declare; kept, and for non-durable queues repeated after each reconnect.

        Where the login lacks the right to configure, or a durable thing exists with other arguments, what exists
        is used as it is, provided that it exists: otherwise `FailedPrecondition` names it. `Unavailable` retries.
        """

    async def retract(self, topology: Topology) -> None:
        """Take back a topology that was declared with the same value: its non-durable queues go at once.

        Durable things stay; they belong to everybody. Idempotent; while disconnected there is nothing to do.
        """

    async def publish(self, message: Outgoing, *, timeout_s: float = 10.0) -> None:
        """Publish and await the broker's confirm.

        Raises `Unroutable` (mandatory only), `Unavailable` (not connected, nacked, or outcome unknown: publish
        again, readers drop repeats by id), `DeadlineExceeded`, and `FailedPrecondition` where the exchange does not
        exist or the login may not write to it (codes `bus_no_exchange`, `bus_write_refused`).
        """

    def publish_soon(self, message: Outgoing, *, timeout_s: float = 10.0) -> asyncio.Future[None]:
        """Publish without a task of one's own: the future ends with the confirm, or with what `publish` raises.

        Messages go out in the order of the calls. Many may be in flight.
        """
        ...

    async def consume(self, queue: str, on_delivery: DeliveryCallback, *, prefetch: int) -> Subscription:
        """Begin to consume; at most `prefetch` deliveries are unsettled at a time. Raises `Unavailable`."""

    async def queue_depth(self, queue: str) -> int | None:
        """Messages ready in a queue, asked afresh; None if it does not exist."""
