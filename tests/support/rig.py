"""The core without an agent: runner, lanes and journal on the memory store, with handlers made by the test."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from agent.core.capacity import Capacity, Reservations
from agent.core.context import Context, Deadlines, HostState, now
from agent.core.instances import Instances
from agent.core.journal import Journal
from agent.core.lanes import Lanes
from agent.core.operation import Operation
from agent.core.registry import Route
from agent.core.runner import Runner
from agent.drivers.base import OPTIONAL_VERBS, Capabilities, DriverContext
from agent.drivers.executor import DriverExecutor
from agent.drivers.fake import FakeDriver
from agent.messages.commands import parse_command
from agent.messages.events import FINAL_STATES
from agent.store.base import Change, OperationRecord, SequencedEvent, Store
from agent.store.memory import MemoryStore
from support.world import HOST, LIMIT_S, command, until

INSTANCE = "11111111-2222-3333-4444-555555555555"
Handler = Callable[[Operation, Any], Awaitable[Any]]


class Rig:
    """A runner whose routes the test fills. `log` is for handlers to write to."""

    def __init__(self, store: Store | None = None, *, limit: int = 4, **deadlines: float) -> None:
        self.store = store or MemoryStore()
        self.journal = Journal(self.store, host=HOST)
        self.journal.epoch = "e"
        self.committed: list[SequencedEvent] = []
        self.journal.on_events(self.committed.extend)
        self.log: list[str] = []
        state = HostState()
        state.connected.set()
        state.capabilities = Capabilities("fake", "1", OPTIONAL_VERBS)
        self.driver = FakeDriver(
            DriverContext(host=HOST, state_dir=Path("/nonexistent"), settings={}, emit=lambda _event: None)
        )
        self.ctx = Context(
            host=HOST,
            compute_id="c",
            version="1",
            driver=self.driver,
            executor=DriverExecutor(),
            journal=self.journal,
            instances=Instances(),
            capacity=Capacity(Reservations()),
            images=None,  # type: ignore[arg-type]
            deadlines=Deadlines(**(dict.fromkeys(("settle_s", "query_s", "mutate_s", "long_s"), LIMIT_S) | deadlines)),
            state=state,
        )
        self.journal.resolve_instances(self.ctx.instances.find)
        self.lanes = Lanes({"query": limit, "power": limit, "build": limit})
        self.routes: dict[str, Route] = {}
        self.runner = Runner(self.ctx, self.routes, self.lanes)  # type: ignore[arg-type]

    def route(self, verb: str, handler: Handler, **options: Any) -> None:
        """Serve a verb."""
        self.routes[verb] = Route(verb, "power", handler, **options)

    async def submit(self, verb: str = "instance.start", data: dict[str, Any] | None = None, **envelope: Any) -> str:
        """Accept a command as the dispatcher does."""
        envelope = {"subject": INSTANCE, **envelope}
        body = command(verb, data, **envelope)
        parsed = parse_command(body)
        record = OperationRecord(
            id=parsed.id,
            verb=verb,
            instance_id=parsed.subject,
            body=body,
            reply_to=None,
            correlation_id=None,
            state="accepted",
            accepted_at=now(),
        )
        await self.journal.commit(Change(claim=OperationRecord(**{f: getattr(record, f) for f in record.__slots__})))
        self.runner.submit(record, parsed)
        return parsed.id

    async def run(self, verb: str = "instance.start", **envelope: Any) -> OperationRecord:
        """Accept a command and wait for its end."""
        return await self.ended(await self.submit(verb, **envelope))

    async def ended(self, operation_id: str) -> OperationRecord:
        """Wait until an operation is final in the journal; return it as the journal has it."""
        await until(lambda: self.runner.find(operation_id) is None)
        record = await self.store.operation(operation_id)
        assert record is not None
        assert record.final, record.state
        return record

    async def idle(self) -> None:
        """Wait until no lane has work."""
        await until(lambda: not self.lanes.busy)

    def events(self, operation_id: str | None = None) -> list[tuple[str, dict[str, Any]]]:
        """Committed events as (kind, data), in order of their sequence."""
        found = []
        for item in sorted(self.committed, key=lambda item: item.sequence):
            event = from_json(item.event.body)
            kind = event["type"].removeprefix("compute.").removesuffix(".v1")
            if operation_id is None or event["data"].get("operation_id") == operation_id:
                found.append((kind, event["data"]))
        return found

    def kinds(self, operation_id: str | None = None) -> list[str]:
        """Kinds of committed events, in order."""
        return [kind for kind, _ in self.events(operation_id)]

    def finals(self, operation_id: str) -> list[tuple[str, dict[str, Any]]]:
        """Final events of one operation."""
        return [(k, d) for k, d in self.events(operation_id) if k.removeprefix("operation.") in FINAL_STATES]

    async def steps(self, operation_id: str) -> list[tuple[str, str]]:
        """Name and state of each step."""
        return [(step.name, step.state) for step in await self.store.steps(operation_id)]

    async def die(self) -> None:
        """Cancel everything, as the end of the process does."""
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        self.runner.stop()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def reborn(self) -> Rig:
        """A new process on the same journal; routes are to be filled before `resume`."""
        store = getattr(self.store, "inner", self.store)
        rig = Rig(store)
        rig.log = self.log
        rig.committed = self.committed
        rig.journal.on_events(rig.committed.extend)
        rig.routes.update(self.routes)
        rig.ctx.instances.load(await store.instances())
        return rig

    async def resume(self) -> None:
        """Take up what the journal has."""
        await self.runner.resume(await self.store.operations(unfinished=True))
