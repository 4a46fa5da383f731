"""The in-process broker: exchanges, bindings, routing, connections, and the switches that make it fail."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Protocol

from agent.bus.base import Binding, Exchange, Outgoing, Queue, Topology
from agent.bus.memory.queue import MemoryQueue, Message
from agent.errors import FailedPrecondition, Unavailable

_ROUTE_CACHE = 4096
"""Routing keys remembered until a binding changes; instances are not part of keys, so they are few."""


class Client(Protocol):
    """What the broker knows of a connection."""

    @property
    def name(self) -> str: ...
    def on_lost(self) -> None: ...
    def on_return(self) -> None: ...


@lru_cache(maxsize=65536)
def topic_matches(pattern: str, key: str) -> bool:
    """Whether a routing key matches a topic pattern: `*` is one word, `#` any number of words."""
    return _words_match(tuple(pattern.split(".")), tuple(key.split(".")))


def _words_match(pattern: tuple[str, ...], words: tuple[str, ...]) -> bool:
    if not pattern:
        return not words
    if pattern[0] == "#":
        return any(_words_match(pattern[1:], words[skip:]) for skip in range(len(words) + 1))
    return bool(words) and pattern[0] in ("*", words[0]) and _words_match(pattern[1:], words[1:])


class MemoryBroker:
    """A broker of topic exchanges and queues in this process, for the buses of one event loop.

    `reconnect_s` is how long a dropped bus stays away. `seed` fixes the order that `reorder` produces.
    """

    def __init__(self, *, reconnect_s: float = 0.0, seed: int = 0) -> None:
        self.reconnect_s = reconnect_s
        self.queues: dict[str, MemoryQueue] = {}
        self.exchanges: dict[str, Exchange] = {}
        self.bindings: dict[Binding, None] = {}
        self.refusing = False
        self.configurable = True
        """False: clients may not declare, as a broker user without the right to configure."""
        self.confirms_to_lose = 0
        self._duplicates = 0
        self._order_key: Callable[[Outgoing], Hashable] | None = None
        self._random = random.Random(seed)  # noqa: S311 (not for secrets)
        self._clients: dict[Client, None] = {}
        self._routes: dict[tuple[str, str], tuple[MemoryQueue, ...]] = {}

    # Faults.

    def drop_connections(self, *names: str) -> None:
        """Cut the connections of these names, or all; they come back after `reconnect_s`.

        Unsettled deliveries go back to their queues.
        """
        for client in tuple(self._clients):
            if names and client.name not in names:
                continue
            self.detach(client)
            client.on_lost()
            self._return_later(client)

    def refuse(self, refusing: bool) -> None:
        """Be down (True: connections cut, none accepted) or up again (False). Durable queues keep all."""
        self.refusing = refusing
        if refusing:
            self.drop_connections()

    def duplicate_next(self, count: int) -> None:
        """Store each of the next `count` messages twice, as when a publisher repeats after a lost confirm."""
        self._duplicates += count

    def lose_confirms(self, count: int) -> None:
        """Let the next `count` publishes take effect while their publisher sees `Unavailable`."""
        self.confirms_to_lose += count

    def reorder(self, key: Callable[[Outgoing], Hashable] | None) -> None:
        """From now on mix messages of different `key` (such as the instance); None ends it.

        Messages of one key keep their order: that is all that a broker with several consumers promises.
        """
        self._order_key = key

    def delete_queue(self, name: str) -> None:
        """Delete a queue under its consumers, as an operator can."""
        self._remove_queue(name)
        for client in tuple(self._clients):
            client.on_return()

    def retract(self, topology: Topology) -> None:
        """Delete the non-durable queues of a topology."""
        for queue in topology.queues:
            if not queue.durable and queue.name in self.queues:
                self._remove_queue(queue.name)

    def depth(self, queue: str) -> int | None:
        """Messages ready in a queue; None if it does not exist."""
        found = self.queues.get(queue)
        return None if found is None else len(found)

    # Connections.

    def attach(self, client: Client) -> None:
        if self.refusing:
            raise Unavailable("The in-process broker is down.", code="bus_unavailable")
        self._clients[client] = None

    def detach(self, client: Client) -> None:
        """Forget a connection and its exclusive queues."""
        self._clients.pop(client, None)
        for name in [name for name, queue in self.queues.items() if queue.owner is client]:
            self._remove_queue(name)

    def attached(self, client: Client) -> bool:
        return client in self._clients

    def _return_later(self, client: Client) -> None:
        asyncio.get_running_loop().call_later(self.reconnect_s, client.on_return)

    def _remove_queue(self, name: str) -> None:
        queue = self.queues.pop(name, None)
        if queue is None:
            return
        for consumer in queue.consumers:
            consumer.unsettled.clear()
        queue.consumers.clear()
        self.bindings = {binding: None for binding in self.bindings if binding.queue != name}
        self._routes.clear()

    # Topology.

    def declare(self, client: Client, topology: Topology) -> None:
        """Declare what is missing; what exists stays. Raises `FailedPrecondition` naming what is lacking."""
        for exchange in topology.exchanges:
            if exchange.name not in self.exchanges:
                self._must_configure(f"exchange {exchange.name}")
                self.exchanges[exchange.name] = exchange
        for queue in topology.queues:
            self._declare_queue(client, queue)
        for binding in topology.bindings:
            if self.configurable or binding in self.bindings:
                self._bind(binding)
        self._routes.clear()

    def _declare_queue(self, client: Client, spec: Queue) -> None:
        if (found := self.queues.get(spec.name)) is not None:
            if found.owner is not None and found.owner is not client:
                raise FailedPrecondition(
                    f"Queue {spec.name} belongs to another connection.", code="bus_topology", queue=spec.name
                )
            return
        if spec.durable:
            self._must_configure(f"queue {spec.name}")
        owner = None if spec.durable else client
        self.queues[spec.name] = MemoryQueue(spec, owner, self._dead_letter)

    def _must_configure(self, what: str) -> None:
        if not self.configurable:
            raise FailedPrecondition(f"The broker has no {what} and refuses to make it.", code="bus_topology")

    def _bind(self, binding: Binding) -> None:
        if binding.exchange not in self.exchanges:
            raise FailedPrecondition(f"The broker has no exchange {binding.exchange}.", code="bus_topology")
        if binding.queue not in self.queues:
            raise FailedPrecondition(f"The broker has no queue {binding.queue}.", code="bus_topology")
        self.bindings[binding] = None

    # Messages.

    def publish(self, out: Outgoing) -> bool:
        """Route a message; False when no queue took it. Raises `FailedPrecondition` without the exchange."""
        if out.exchange and out.exchange not in self.exchanges:
            raise FailedPrecondition(f"The broker has no exchange {out.exchange}.", code="bus_no_exchange")
        copies = 1
        if self._duplicates:
            self._duplicates -= 1
            copies = 2
        expires_at = None
        if out.expiration_s is not None:
            expires_at = asyncio.get_running_loop().time() + out.expiration_s
        queues = self._targets(out)
        for queue in queues:
            for _ in range(copies):
                self._store(queue, Message(out, expires_at))
        return bool(queues)

    def _targets(self, out: Outgoing) -> tuple[MemoryQueue, ...]:
        if not out.cc:
            return self._route(out.exchange, out.routing_key)
        found: dict[MemoryQueue, None] = {}
        for key in (out.routing_key, *out.cc):
            found |= dict.fromkeys(self._match(out.exchange, key))
        return tuple(found) or self._alternate(out.exchange, out.routing_key)

    def _route(self, exchange: str, key: str) -> tuple[MemoryQueue, ...]:
        found = self._routes.get((exchange, key))
        if found is None:
            found = self._match(exchange, key) or self._alternate(exchange, key)
            if len(self._routes) >= _ROUTE_CACHE:
                self._routes.clear()
            self._routes[exchange, key] = found
        return found

    def _match(self, exchange: str, key: str) -> tuple[MemoryQueue, ...]:
        if not exchange:
            return (self.queues[key],) if key in self.queues else ()
        names = {
            binding.queue: None
            for binding in self.bindings
            if binding.exchange == exchange and topic_matches(binding.pattern, key)
        }
        return tuple(self.queues[name] for name in names)

    def _alternate(self, exchange: str, key: str) -> tuple[MemoryQueue, ...]:
        alternate = self.exchanges[exchange].alternate if exchange in self.exchanges else None
        return self._route(alternate, key) if alternate in self.exchanges and alternate else ()

    def _store(self, queue: MemoryQueue, message: Message) -> None:
        if self._order_key is None or not queue.ready:
            queue.ready.append(message)
        else:
            key = self._order_key
            own = key(message.out)
            last = max((at for at, held in enumerate(queue.ready) if key(held.out) == own), default=-1)
            queue.ready.insert(self._random.randint(last + 1, len(queue.ready)), message)
        queue.pump_soon()

    def _dead_letter(self, message: Message, exchange: str) -> None:
        if exchange not in self.exchanges:
            return
        for queue in self._route(exchange, message.out.routing_key):
            copy = message.copy()
            copy.returns = 0
            copy.expires_at = None
            self._store(queue, copy)
