"""The worlds of the bus contract, the in-process broker and a private RabbitMQ node, and what its tests share."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable
from typing import Any, Protocol

from agent.bus.amqp import AmqpBus, AmqpSettings
from agent.bus.base import Binding, Bus, Delivery, Exchange, Outgoing, Queue, Topology
from agent.bus.memory import MemoryBroker, MemoryBus
from devstack.rabbitmq import PrivateBroker

WAIT_S = 60.0
_numbers = itertools.count(1)


class World(Protocol):
    kind: str

    async def bus(self, name: str = "agent", *, user: str | None = None) -> Bus: ...
    def unconnected(self, name: str) -> Bus: ...
    async def drop(self, bus: Bus) -> None: ...
    async def down(self) -> None: ...
    async def up(self) -> None: ...
    async def delete_queue(self, name: str) -> None: ...
    async def restricted_user(self) -> str: ...
    async def close(self) -> None: ...


class MemoryWorld:
    kind = "memory"

    def __init__(self) -> None:
        self.broker = MemoryBroker(reconnect_s=0.01)
        self._buses: list[Bus] = []

    async def bus(self, name: str = "agent", *, user: str | None = None) -> Bus:
        if user is not None:
            self.broker.configurable = False
        bus = self.unconnected(name)
        await bus.connect(timeout_s=WAIT_S)
        self._buses.append(bus)
        return bus

    def unconnected(self, name: str) -> Bus:
        return MemoryBus(self.broker, name=f"{name}-{next(_numbers)}")

    async def drop(self, bus: Bus) -> None:
        assert isinstance(bus, MemoryBus)
        self.broker.drop_connections(bus.name)

    async def down(self) -> None:
        self.broker.refuse(True)

    async def up(self) -> None:
        self.broker.refuse(False)

    async def delete_queue(self, name: str) -> None:
        self.broker.delete_queue(name)

    async def restricted_user(self) -> str:
        return "restricted"

    async def close(self) -> None:
        for bus in self._buses:
            await bus.close()


class RabbitWorld:
    kind = "rabbitmq"

    def __init__(self, broker: PrivateBroker) -> None:
        self.broker = broker
        self._buses: list[AmqpBus] = []

    async def bus(self, name: str = "agent", *, user: str | None = None) -> Bus:
        bus = self.unconnected(name, user)
        await bus.connect(timeout_s=WAIT_S)
        self._buses.append(bus)
        return bus

    def unconnected(self, name: str, user: str | None = None) -> AmqpBus:
        url = self.broker.url if user is None else self.broker.url.replace("guest:guest", f"{user}:secret")
        settings = AmqpSettings(url=url, reconnect_min_s=0.05, reconnect_max_s=0.1)
        return AmqpBus(settings, name=f"{name}-{next(_numbers)}")

    async def drop(self, bus: Bus) -> None:
        assert isinstance(bus, AmqpBus)
        for link in (bus._publishing, bus._consuming):
            assert link.session is not None
            link.session.tap.abort()

    async def down(self) -> None:
        await asyncio.to_thread(self.broker.stop)

    async def up(self) -> None:
        await asyncio.to_thread(self.broker.start)

    async def delete_queue(self, name: str) -> None:
        await asyncio.to_thread(self.broker.ctl, "delete_queue", name)

    async def restricted_user(self) -> str:
        """A user who may read and write, and declare nothing."""
        name = f"restricted{next(_numbers)}"
        await asyncio.to_thread(self.broker.ctl, "add_user", name, "secret")
        await asyncio.to_thread(self.broker.ctl, "set_permissions", name, "^$", ".*", ".*")
        return name

    async def close(self) -> None:
        for bus in self._buses:
            await bus.close()


class Names:
    """Names of one test: all tests of a run share one broker."""

    def __init__(self) -> None:
        number = next(_numbers)
        self.exchange = f"t{number}.commands"
        self.unroutable = f"t{number}.unroutable"
        self.dead = f"t{number}.dead"
        self.queue = f"t{number}.agent.host-1.example.org"
        self.host = f"t{number}.host-1.example.org"
        self.reply = f"t{number}.reply"

    def topology(self, *, limit: int | None = None, single_active: bool = False) -> Topology:
        """The shape of the wire contract: commands with an alternate exchange, one host queue, dead letters."""
        return Topology(
            exchanges=(
                Exchange(self.unroutable),
                Exchange(self.dead),
                Exchange(self.exchange, alternate=self.unroutable),
            ),
            queues=(
                Queue(self.unroutable),
                Queue(self.dead),
                Queue(
                    self.queue,
                    single_active=single_active,
                    dead_letter_exchange=self.dead,
                    delivery_limit=limit,
                ),
            ),
            bindings=(
                Binding(self.unroutable, "#", self.unroutable),
                Binding(self.dead, "#", self.dead),
                Binding(self.exchange, f"*.*.{self.host}", self.queue),
                Binding(self.exchange, "*.*.all", self.queue),
            ),
        )

    def command(self, body: bytes = b"{}", **changes: Any) -> Outgoing:
        known: dict[str, Any] = {
            "exchange": self.exchange,
            "routing_key": f"instance.start.{self.host}",
            "body": body,
            "message_id": f"id-{next(_numbers)}",
        }
        return Outgoing(**(known | changes))


class Inbox:
    """Collects deliveries; `settle` is applied to each as it comes."""

    def __init__(self, settle: Callable[[Delivery], None] | None = None) -> None:
        self.all: list[Delivery] = []
        self._settle = settle
        self._changed = asyncio.Event()

    def __call__(self, delivery: Delivery) -> None:
        self.all.append(delivery)
        self._changed.set()
        if self._settle is not None:
            self._settle(delivery)

    @property
    def bodies(self) -> list[bytes]:
        return [delivery.body for delivery in self.all]

    async def until(self, enough: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not enough():
                self._changed.clear()
                await self._changed.wait()

    async def count(self, count: int) -> list[Delivery]:
        await self.until(lambda: len(self.all) >= count)
        return self.all

    async def one(self) -> Delivery:
        return (await self.count(1))[0]


class States:
    """What a bus reported of its connection."""

    def __init__(self, bus: Bus) -> None:
        self.seen: list[bool] = []
        self._changed = asyncio.Event()
        bus.on_state(self._on_state)

    def _on_state(self, connected: bool) -> None:
        self.seen.append(connected)
        self._changed.set()

    async def until(self, *expected: bool) -> None:
        async with asyncio.timeout(WAIT_S):
            while self.seen[: len(expected)] != list(expected):
                self._changed.clear()
                await self._changed.wait()


def ack(delivery: Delivery) -> None:
    delivery.ack()


async def depth_becomes(bus: Bus, queue: str, depth: int | None) -> None:
    """Poll: a broker announces no depths."""
    found: int | None = -1
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(WAIT_S):
            while (found := await bus.queue_depth(queue)) != depth:
                await asyncio.sleep(0.01)
    assert found == depth
