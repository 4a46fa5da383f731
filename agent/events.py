"""Hypervisor events: from the driver's threads to the bus.

A change of power is a hint: the state is read again before it is believed, so that what is published last is what
is true. Hints that were overtaken are published too, in order, so that a crash which was followed by a restart is
seen as both. One slow domain never holds up another: each instance has a reader task of its own.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from agent import metrics
from agent.core.context import Context
from agent.core.reconcile import reconcile
from agent.core.runner import Runner
from agent.drivers.base import ConnectionChanged, DomainInfo, DriverEvent, PowerChanged, Reported
from agent.errors import ComputeError, NotFound
from agent.messages.events import EventData, HypervisorConnection, PowerState
from agent.store.base import Change, InstanceRecord, PendingEvent

log = structlog.get_logger("events")


class HypervisorEvents:
    """`sink` takes events from any thread; `run` is the task that works them."""

    def __init__(self, ctx: Context, runner: Runner, loop: asyncio.AbstractEventLoop) -> None:
        self._ctx = ctx
        self._runner = runner
        self._loop = loop
        self._arrived: deque[DriverEvent] = deque()
        self._wake = asyncio.Event()
        self._hints: dict[str, list[PowerChanged]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.on_connection: Callable[[bool], None] = lambda _connected: None

    def sink(self, event: DriverEvent) -> None:
        """Take an event from a driver's thread."""
        try:
            self._loop.call_soon_threadsafe(self._take, event)
        except RuntimeError:
            return  # the loop is closed: the agent has stopped, and re-reads everything when it starts

    def _take(self, event: DriverEvent) -> None:
        self._arrived.append(event)
        self._wake.set()

    async def run(self) -> None:
        """Work events in order until cancelled."""
        while True:
            await self._wake.wait()  # no limit: woken by the next event
            self._wake.clear()
            change = Change()
            while self._arrived:
                event = self._arrived.popleft()
                if isinstance(event, ConnectionChanged):
                    await self._flush(change)
                    change = Change()
                    await self._connection(event)
                elif isinstance(event, PowerChanged):
                    metrics.DRIVER_EVENTS.labels(f"power-{event.power}").inc()
                    self._hint(event)
                else:
                    self._reported(event, change)
            await self._flush(change)

    async def close(self) -> None:
        """End the readers."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _flush(self, change: Change) -> None:
        if change.events or change.instances:
            await self._ctx.journal.commit(change)

    def _reported(self, event: Reported, change: Change) -> None:
        data = event.event
        metrics.DRIVER_EVENTS.labels(data.kind).inc()
        if self._ctx.instances.find(data.instance_id) is None:
            return  # a foreign domain's affair
        self._ctx.instances.signal(data.instance_id, data.kind)
        change.events.append(self._ctx.journal.event(data, subject=data.instance_id))

    # --- power ------------------------------------------------------------------------------------------------

    def _hint(self, event: PowerChanged) -> None:
        if event.instance_id in self._hints:
            self._hints[event.instance_id].append(event)
            return
        self._hints[event.instance_id] = [event]
        self._own(self._read(event.instance_id))

    async def _read(self, instance_id: str) -> None:
        try:
            while hints := self._hints[instance_id]:
                self._hints[instance_id] = []
                await self._believe(instance_id, hints)
        finally:
            del self._hints[instance_id]

    async def _believe(self, instance_id: str, hints: list[PowerChanged]) -> None:
        if self._ctx.instances.find(instance_id) is None:
            if instance_id not in self._ctx.state.foreign and instance_id not in self._runner.busy_instances():
                await reconcile(self._ctx, self._runner, resync=False)
            return
        info: DomainInfo | None = None
        try:
            info = await self._ctx.executor.call(
                "query", self._ctx.driver.get, instance_id, deadline_s=self._ctx.deadlines.query_s
            )
        except NotFound:
            if instance_id not in self._runner.busy_instances():
                await reconcile(self._ctx, self._runner, resync=False)
                return
        except ComputeError as exc:
            log.info("events.read_failed", instance=instance_id, code=exc.code)
            if not self._ctx.state.connected.is_set():
                return  # unknown now; everything is read again when the hypervisor is back
        change = Change()
        for hint in hints:
            if hint.power == "unknown":
                continue  # defined or undefined: says nothing about power, only that it is worth reading again
            self._observe(change, instance_id, hint.power, hint.reason)
        if info is not None:
            self._observe(change, instance_id, info.power, info.reason)
        await self._flush(change)

    def _observe(self, change: Change, instance_id: str, power: PowerState, reason: str) -> None:
        before = self._ctx.instances.find(instance_id)
        if before is None or before.observed == power:
            return
        record = self._ctx.instances.update(instance_id, observed=power, reason=reason)
        self._state(change, record, before)

    def _state(self, change: Change, record: InstanceRecord, before: InstanceRecord) -> None:
        change.instances.append(record)
        event = self._ctx.instances.state_event(record, previous=before.observed)
        change.events.append(self._ctx.journal.event(event, subject=record.id))
        self._ctx.heartbeat_now()

    # --- connection -------------------------------------------------------------------------------------------

    async def _connection(self, event: ConnectionChanged) -> None:
        log.log(20 if event.connected else 40, "hypervisor.connection", connected=event.connected, detail=event.detail)
        state = self._ctx.state
        if event.connected == state.connected.is_set():
            return
        if event.connected:
            await self.connected(event.detail)
            return
        state.connected.clear()
        metrics.HYPERVISOR_CONNECTED.set(0)
        state.conditions["hypervisor"] = event.detail
        change = Change(events=[self._event(HypervisorConnection(connected=False, detail=event.detail))])
        for record in self._ctx.instances.all():
            if record.observed != "unknown":
                update = self._ctx.instances.update(record.id, observed="unknown", reason="hypervisor-away")
                self._state(change, update, record)
        await self._ctx.journal.commit(change)
        self.on_connection(False)
        self._ctx.heartbeat_now()

    async def connected(self, detail: str) -> None:
        """The hypervisor can be asked: say so, then read everything again."""
        state = self._ctx.state
        state.connected.set()
        metrics.HYPERVISOR_CONNECTED.set(1)
        state.conditions.pop("hypervisor", None)
        try:
            deadline_s, driver = self._ctx.deadlines.query_s, self._ctx.driver
            state.capabilities = await self._ctx.executor.call("query", driver.capabilities, deadline_s=deadline_s)
            self._ctx.capacity.host = await self._ctx.executor.call("query", driver.capacity, deadline_s=deadline_s)
        except ComputeError as exc:
            log.warning("hypervisor.description_failed", code=exc.code, error=exc.message)
        await self._ctx.journal.commit(
            Change(events=[self._event(HypervisorConnection(connected=True, detail=detail))])
        )
        await reconcile(self._ctx, self._runner, resync=True)
        self.on_connection(True)
        self._ctx.heartbeat_now()

    def _event(self, data: EventData) -> PendingEvent:
        return self._ctx.journal.event(data)

    def _own(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("events.reader_failed", exc_info=error)
