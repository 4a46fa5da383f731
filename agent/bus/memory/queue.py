"""One queue of the in-process broker: what is ready, who consumes, what is out, and where rejects go.

Follows RabbitMQ's quorum queues: what comes back is served first, and counts its deliveries.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import structlog

from agent.bus.base import DeliveryCallback, Outgoing, Queue

log = structlog.get_logger("bus")

DeadLetter = Callable[["Message", str], None]


@dataclass(slots=True)
class Message:
    """A message as one queue holds it. `expires_at`: loop time, seconds; `returns`: times it came back."""

    out: Outgoing
    expires_at: float | None = None
    returns: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    def copy(self) -> Message:
        return Message(self.out, self.expires_at, self.returns, dict(self.extra))


class MemoryDelivery:
    """A delivery of the in-process broker; see `agent.bus.base.Delivery`."""

    __slots__ = ("_consumer", "_headers", "_returns", "message", "redelivered", "tag")

    def __init__(self, consumer: Consumer, tag: int, message: Message) -> None:
        self.message = message
        self.tag = tag
        self.redelivered = message.returns > 0
        self._returns = message.returns
        self._consumer = consumer
        self._headers: Mapping[str, Any] | None = None

    @property
    def body(self) -> bytes:
        return self.message.out.body

    @property
    def exchange(self) -> str:
        return self.message.out.exchange

    @property
    def routing_key(self) -> str:
        return self.message.out.routing_key

    @property
    def headers(self) -> Mapping[str, Any]:
        if self._headers is None:
            out = self.message.out
            self._headers = {**out.headers, **self.message.extra}
            if out.cc:
                self._headers["CC"] = list(out.cc)
            if self._returns:
                self._headers["x-delivery-count"] = self._returns
        return self._headers

    @property
    def message_id(self) -> str | None:
        return self.message.out.message_id

    @property
    def correlation_id(self) -> str | None:
        return self.message.out.correlation_id

    @property
    def reply_to(self) -> str | None:
        return self.message.out.reply_to

    def ack(self) -> None:
        self._consumer.settle(self.tag)

    def reject(self, *, requeue: bool) -> None:
        if self._consumer.settle(self.tag):
            queue = self._consumer.queue
            if requeue:
                queue.give_back(self.message)
            else:
                queue.dead_letter(self.message, "rejected")


class Consumer:
    """A consumer on a queue: its callback and its unsettled deliveries."""

    __slots__ = ("callback", "prefetch", "queue", "tags", "unsettled")

    def __init__(self, queue: MemoryQueue, callback: DeliveryCallback, prefetch: int) -> None:
        self.queue = queue
        self.callback = callback
        self.prefetch = prefetch
        self.unsettled: dict[int, Message] = {}
        self.tags = itertools.count(1)

    def settle(self, tag: int) -> bool:
        """Forget an unsettled delivery; False when it was settled before or its connection is gone."""
        if self.unsettled.pop(tag, None) is None:
            return False
        self.queue.pump_soon()
        return True

    def deliver(self, message: Message) -> None:
        tag = next(self.tags)
        self.unsettled[tag] = message
        delivery = MemoryDelivery(self, tag, message)
        try:
            self.callback(delivery)
        except Exception:
            # As on the real bus: a defect of the callback must neither stall the queue nor spin on it.
            log.exception("bus.callback_failed", queue=self.queue.spec.name)
            delivery.reject(requeue=False)

    def lose(self) -> None:
        """The connection is gone: what was unsettled goes back, in the order of its delivery."""
        lost = list(self.unsettled.values())
        self.unsettled.clear()
        for message in lost:
            self.queue.give_back(message)


class MemoryQueue:
    """A queue with its ready messages and consumers. Delivers from the loop, never within a publish."""

    def __init__(self, spec: Queue, owner: object | None, dead_letter: DeadLetter) -> None:
        self.spec = spec
        self.owner = owner
        self.ready: deque[Message] = deque()
        self.returned: deque[Message] = deque()
        self.consumers: deque[Consumer] = deque()
        self._dead_letter = dead_letter
        self._pumping = False

    def __len__(self) -> int:
        self._expire()
        return len(self.ready) + len(self.returned)

    def give_back(self, message: Message) -> None:
        """Take a message back, or send it to the dead letters once it came back too often."""
        message.returns += 1
        limit = self.spec.delivery_limit
        if limit is not None and message.returns > limit:
            self.dead_letter(message, "delivery_limit")
            return
        self.returned.append(message)
        self.pump_soon()

    def dead_letter(self, message: Message, reason: str) -> None:
        if self.spec.dead_letter_exchange is not None:
            dead = message.copy()
            self._write_history(dead, reason)
            self._dead_letter(dead, self.spec.dead_letter_exchange)

    def _write_history(self, message: Message, reason: str) -> None:
        """Tell in the headers where and why the message died, as RabbitMQ does."""
        out = message.out
        death = {
            "queue": self.spec.name,
            "reason": reason,
            "count": 1,
            "exchange": out.exchange,
            "routing-keys": [out.routing_key, *out.cc],
        }
        message.extra["x-death"] = [death, *message.extra.get("x-death", ())]
        message.extra.setdefault("x-first-death-queue", self.spec.name)
        message.extra.setdefault("x-first-death-reason", reason)
        message.extra.setdefault("x-first-death-exchange", out.exchange)

    def pump_soon(self) -> None:
        """Deliver in the next turn of the loop."""
        if not self._pumping and self.consumers and (self.ready or self.returned):
            self._pumping = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._pumping = False
        self._expire()
        while self.ready or self.returned:
            consumer = self._next_consumer()
            if consumer is None:
                return
            consumer.deliver((self.returned or self.ready).popleft())

    def _next_consumer(self) -> Consumer | None:
        """The one to serve next: the first under single active consumer, else whoever has room, in turn."""
        if self.spec.single_active:
            if self.consumers and len(self.consumers[0].unsettled) < self.consumers[0].prefetch:
                return self.consumers[0]
            return None
        for _ in range(len(self.consumers)):
            consumer = self.consumers[0]
            self.consumers.rotate(-1)
            if len(consumer.unsettled) < consumer.prefetch:
                return consumer
        return None

    def _expire(self) -> None:
        """Drop what is too old from the heads, which is where RabbitMQ looks."""
        for messages in (self.returned, self.ready):
            while messages and (deadline := messages[0].expires_at) is not None:
                if deadline > asyncio.get_running_loop().time():
                    break
                self.dead_letter(messages.popleft(), "expired")
