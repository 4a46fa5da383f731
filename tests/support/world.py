"""A whole agent on the in-process broker and the simulated hypervisor, that can crash and come back.

`World` owns what outlives an agent (broker, journal, hypervisor's files) and what watches it (a client, and every
event that was published). `Cut` is a store that stops at a chosen commit, as a power cut would.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import threading
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from agent.app import Agent
from agent.bus.base import Binding, Delivery, Outgoing, Queue, Topology
from agent.bus.memory import MemoryBroker, MemoryBus
from agent.bus.topology import shared_topology
from agent.config import Settings
from agent.controller.client import ComputeClient
from agent.controller.envelope import render_command
from agent.drivers.fake import FakeDriver
from agent.errors import ComputeError, NotFound
from agent.messages import routing
from agent.messages.commands import InstanceCreate
from agent.messages.events import FINAL_STATES, Event, OperationSucceeded, parse_event
from agent.messages.spec import InstanceSpec, RootDisk
from agent.messages.verb import CommandData
from agent.store.base import Change, Committed, Store
from agent.store.memory import MemoryStore
from agent.store.sqlite import SqliteStore

HOST = "node-1.example"
LIMIT_S = 60.0
"""How long a test waits for what must come. It only ends what hangs: no test depends on the machine's speed."""
ROUNDS = 100
"""More than any command has commits: a test that dies at each of them ends with the last one."""
FINAL_KINDS = frozenset(f"operation.{state}" for state in FINAL_STATES)


def new_id() -> str:
    """A fresh instance or command id."""
    return str(uuid.uuid4())


def spec(name: str = "", **changes: Any) -> InstanceSpec:
    """A small valid spec."""
    fields: dict[str, Any] = {
        "name": name or f"vm-{uuid.uuid4().hex[:8]}",
        "vcpus": 1,
        "memory_mib": 256,
        "root_disk": RootDisk(size_mib=1024),
    }
    return InstanceSpec(**(fields | changes))


async def until(condition: Callable[[], object], limit_s: float = LIMIT_S, missing: Callable[[], object] | None = None) -> None:
    """Give the loop and the threads their turns until `condition` holds; `missing` says what is still not so."""
    loop = asyncio.get_running_loop()
    end = loop.time() + limit_s
    while not condition():
        if loop.time() > end:
            # A last look: all of the limit may have gone by in one stall of the machine.
            await asyncio.sleep(0.1)
            if condition():
                return
            raise TimeoutError(f"not within {limit_s:g} s: {missing() if missing else _source(condition)}")
        await asyncio.sleep(0.0005)


def _source(condition: Callable[[], object]) -> str:
    """The lines of a condition, and the values that it looks at."""
    try:
        text = " ".join(inspect.getsource(condition).split())
    except (OSError, TypeError):
        text = repr(condition)
    with suppress(TypeError):
        seen = inspect.getclosurevars(condition).nonlocals
        text += "".join(f"; {name} = {str(value)[:300]}" for name, value in seen.items())
    return text


class Cut:
    """A store in front of another that hangs for ever from its n-th commit on, before or after it is applied."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.happened = asyncio.Event()
        self.struck = False
        """Whether a commit hangs, or is about to once it is applied."""
        self._left: int | None = None
        self._applied = False
        self.count = 0

    def after(self, commits: int, *, applied: bool) -> None:
        """Let `commits` more commits through, then cut at the next one."""
        self._left, self._applied = commits, applied

    async def commit(self, changes: Sequence[Change]) -> list[Committed]:
        self.count += 1
        if self._left is not None:
            if self._left <= 0:
                self.struck = True
                if self._applied:
                    self._applied = False
                    await self.inner.commit(changes)
                self.happened.set()
                await asyncio.Event().wait()
            self._left -= 1
        return await self.inner.commit(changes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class World:
    """See the module. `store`: `sqlite` or `memory`."""

    def __init__(self, folder: Path, *, store: str = "memory", driver: dict[str, Any] | None = None, **sections: Any):
        self.folder = folder
        self.store_kind = store
        self.broker = MemoryBroker()
        self.events: list[Event] = []
        self.dead: list[Delivery] = []
        self.replies: dict[str, list[Event]] = {}
        self._memory = MemoryStore()
        self._watcher = MemoryBus(self.broker, name="watcher")
        self._starts = 0
        # As long as the tests wait: a stall of the machine is no failure of the hypervisor.
        limits = dict.fromkeys(("query_s", "mutate_s", "long_s", "settle_s", "reconnect_s"), LIMIT_S)
        sections = {"deadlines": limits} | sections
        self.settings = Settings.model_validate(
            {
                "agent": {"host": HOST, "state_dir": folder / "state", "drain_timeout_s": LIMIT_S},
                "bus": {"url": "amqp://unused/"},
                "driver": {"name": "fake", "settings": {"persist": True, **(driver or {})}},
                "images": {"file_roots": [str(folder)]},
                "health": {"listen": ""},
                **sections,
            }
        )
        self.agent: Agent
        self.bus: MemoryBus
        self.cut: Cut

    # --- life -------------------------------------------------------------------------------------------------

    async def open(self) -> World:
        """Begin to watch; no agent yet."""
        await self._watcher.connect(timeout_s=LIMIT_S)
        await self._watcher.declare(shared_topology())
        await self._watcher.declare(
            Topology(
                queues=(Queue("watch", durable=False),), bindings=(Binding(routing.EVENTS_EXCHANGE, "#", "watch"),)
            )
        )
        await self._watcher.consume("watch", self._on_event, prefetch=10_000)
        await self._watcher.consume(routing.DEAD_QUEUE, self._on_dead, prefetch=10_000)
        return self

    async def start(self, *, wait: bool = True) -> Agent:
        """Start an agent on what there is."""
        self._starts += 1
        self.bus = MemoryBus(self.broker, name=f"agent-{self._starts}")
        inner: Store = self._memory
        if self.store_kind == "sqlite":
            inner = SqliteStore(self.folder / "state" / "journal.sqlite")
        self.cut = Cut(inner)
        self.agent = Agent(self.settings, self.bus, store=self.cut)
        await self.agent.start()
        if wait:
            await self.agent.wait_ready(LIMIT_S)
        return self.agent

    async def crash(self) -> None:
        """Lose the agent as kill -9 does. Calls that were in the hypervisor's hands are ended there."""
        agent = self.agent
        agent._policies._begun = False
        tasks = [
            *agent._tasks.running(),
            *agent._lanes._tasks,
            *agent._events._tasks,
            *agent._policies._tasks,
            *(task for task in asyncio.all_tasks() if "Announcement._commit" in repr(task) or "ProgressReports._commit" in repr(task)),
        ]
        agent._runner.stop()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.bus.close()
        self.driver.clear_faults()
        await agent.ctx.executor.close(LIMIT_S)
        await asyncio.to_thread(self.driver.close)
        await self.cut.close()
        # What the store handed over in its last moment belongs to nobody.
        await asyncio.sleep(0)

    async def stop(self) -> None:
        """Stop the agent in order."""
        await self.agent.stop()

    async def close(self) -> None:
        """End watching."""
        await self._watcher.close()

    # --- looking ----------------------------------------------------------------------------------------------

    @property
    def driver(self) -> FakeDriver:
        driver = self.agent.ctx.driver
        assert isinstance(driver, FakeDriver)
        return driver

    def _on_event(self, delivery: Delivery) -> None:
        delivery.ack()
        self.events.append(parse_event(delivery.body))

    def _on_dead(self, delivery: Delivery) -> None:
        delivery.ack()
        self.dead.append(delivery)

    def of(self, operation_id: str) -> list[Event]:
        """Events of one operation, repeats dropped, in order of their arrival.

        Without those that were told to one sender only: they have no place in the host's sequence.
        """
        found: dict[str, Event] = {}
        for event in self.events:
            if event.sequence is None or not event.kind.startswith("operation."):
                continue
            if event.data.get("operation_id") == operation_id:
                found.setdefault(event.id, event)
        return list(found.values())

    def finals(self, operation_id: str) -> list[Event]:
        """Final events of one operation, repeats dropped."""
        return [event for event in self.of(operation_id) if event.kind in FINAL_KINDS]

    def kinds(self) -> Counter[str]:
        """How many events of each kind came, repeats dropped."""
        return Counter(event.kind for event in {event.id: event for event in self.events}.values())

    async def final(self, operation_id: str, limit_s: float = LIMIT_S) -> Event:
        """Wait for the final event of an operation."""
        await until(lambda: self.finals(operation_id), limit_s, lambda: self._without_final(operation_id))
        return self.finals(operation_id)[0]

    def _without_final(self, *operation_ids: str) -> str:
        """What is known of operations that should have ended."""
        told = {one: [event.kind for event in self.of(one)] for one in operation_ids if not self.finals(one)}
        return f"no final event, but {told}; cut: {self.cut.struck}; still at work: {self._busy()}"

    async def cut_or_final(self, *operation_ids: str) -> bool:
        """Wait until the store was cut, or all these operations have ended without that. Returns whether it was cut."""

        def ended() -> bool:
            return not self.cut.struck and all(self.finals(operation_id) for operation_id in operation_ids)

        await until(
            lambda: self.cut.happened.is_set() or ended(), missing=lambda: self._without_final(*operation_ids)
        )
        return self.cut.happened.is_set()

    async def quiet(self, *, operations: int = 0) -> None:
        """Wait until the agent has nothing in hand, but so many operations, and everything is published."""
        # The hypervisor hands its events over one after the other: behind this one there are none of before.
        delivered = threading.Event()
        self.driver._hypervisor.timers.post(delivered.set)
        await until(lambda: delivered.is_set() or not self.driver._open, missing=lambda: "the hypervisor's own events")
        await asyncio.sleep(0)
        await until(lambda: not self._busy(operations), missing=lambda: f"still at work: {self._busy(operations)}")
        # Events that were published in the last turn are delivered in the next.
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    def _busy(self, operations: int = 0) -> dict[str, object]:
        """What the agent has in hand beside so many operations."""
        agent = self.agent
        work: dict[str, object] = {
            "operations": max(0, len(agent._runner.open) - operations),
            "lanes": max(0, agent._lanes.busy - operations),
            "outbox": agent._outbox.waiting,
            "event tasks": agent._events._tasks,
            "events": agent._events._arrived,
            "commands": agent._dispatcher._arrived,
            "queue": self.broker.depth(routing.host_queue(HOST)),
        }
        return {name: left for name, left in work.items() if left}

    def sequences(self) -> list[int]:
        """Sequence numbers in order of arrival, repeats dropped."""
        seen = dict.fromkeys(event.sequence for event in self.events if event.sequence is not None)
        return list(seen)

    def check_sequence(self) -> None:
        """Nothing lost, nothing skipped, no later one before an earlier one."""
        numbers = self.sequences()
        assert numbers == list(range(1, len(numbers) + 1)), numbers

    async def ask(self, call: Callable[..., Any], *args: Any) -> Any:
        """Call the simulated hypervisor from a thread, since its calls block."""
        return await asyncio.to_thread(call, *args)

    async def power(self, instance_id: str) -> str:
        """What the hypervisor says about a domain's power; `gone` if it has none."""
        try:
            return str((await self.ask(self.driver.get, instance_id)).power)
        except NotFound:
            return "gone"

    def owned_files(self) -> list[str]:
        """Domains and instance folders in the hypervisor's files."""
        fake = self.folder / "state" / "fake"
        return sorted(str(path.relative_to(fake)) for part in ("domains", "instances") for path in (fake / part).glob("*"))

    # --- doing ------------------------------------------------------------------------------------------------

    def put(
        self,
        body: bytes,
        *,
        key: str = "",
        reply_to: str | None = None,
        correlation_id: str | None = None,
        message_id: str = "",
    ) -> None:
        """Publish bytes to the agent's queue."""
        confirm = self._watcher.publish_soon(
            Outgoing(
                exchange=routing.COMMANDS_EXCHANGE,
                routing_key=key or routing.command_key("host.ping", HOST),
                body=body,
                message_id=message_id,
                reply_to=reply_to,
                correlation_id=correlation_id,
            )
        )
        confirm.add_done_callback(lambda done: done.exception())

    def send(self, data: CommandData, *, id: str = "", reply_to: str | None = None, **options: Any) -> str:
        """Send a command without waiting."""
        one = id or new_id()
        body = render_command(data, id=one, source="/test", host=HOST, **options)
        self.put(body, key=routing.command_key(data.verb, HOST), reply_to=reply_to, correlation_id=one, message_id=one)
        return one

    async def listen(self, name: str) -> list[Event]:
        """Open a reply queue and return the list of what comes to it."""
        heard: list[Event] = []
        self.replies[name] = heard

        def take(delivery: Delivery) -> None:
            delivery.ack()
            heard.append(parse_event(delivery.body))

        await self._watcher.declare(
            Topology(queues=(Queue(name, durable=False),), bindings=(Binding(routing.EVENTS_EXCHANGE, name, name),))
        )
        await self._watcher.consume(name, take, prefetch=1000)
        return heard

    async def do(self, data: CommandData, **options: Any) -> Event:
        """Send a command and wait for its final event."""
        return await self.final(self.send(data, **options))

    async def create(self, name: str = "", *, start: bool = True, **changes: Any) -> str:
        """Make an instance; returns its id."""
        instance_id = new_id()
        done = await self.do(InstanceCreate(spec=spec(name, **changes), start=start), instance_id=instance_id)
        assert done.kind == "operation.succeeded", done.data
        return instance_id

    def client(self) -> ComputeClient:
        """A controller's client on this broker."""
        return ComputeClient(MemoryBus(self.broker, name="controller"), source="/test")


async def refusal(work: Awaitable[OperationSucceeded]) -> ComputeError:
    """The error that a call ends with."""
    with suppress(ComputeError):
        result = await work
        raise AssertionError(f"it succeeded: {result}")
    raise AssertionError("unreachable")


def command(verb: str, data: dict[str, Any] | None = None, /, **changes: Any) -> bytes:
    """A command's body, with anything in it."""
    envelope: dict[str, Any] = {
        "specversion": "1.0",
        "id": new_id(),
        "source": "/test",
        "type": f"compute.{verb}.v1",
        "data": {} if data is None else data,
    }
    return json.dumps({key: value for key, value in (envelope | changes).items() if value is not ...}).encode()
