"""Hypervisor events: from the driver's threads to the bus.

A change of power is a hint: the state is read again before it is believed, so that what is published last is what
is true. Hints that were overtaken are published too, in order, so that a crash which was followed by a restart is
seen as both. One slow domain never holds up another: each instance has a reader task of its own.
"""

from __future__ import annotations

import asyncio
import itertools
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
READS = 3
"""How often a state is read again because something changed it while it was read."""
_Hint = tuple[PowerChanged, InstanceRecord | None]
"""A hint, and what was known when it came."""


class HypervisorEvents:
    """`sink` takes events from any thread; `run` is the task that works them."""

    def __init__(self, ctx: Context, runner: Runner, loop: asyncio.AbstractEventLoop) -> None:
        self._ctx = ctx
        self._runner = runner
        self._loop = loop
        self._arrived: deque[DriverEvent] = deque()
        self._wake = asyncio.Event()
        self._hints: dict[str, list[_Hint]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._era = 0
        """Counts losses and returns of the connection: work of a former era must not report on the present one."""
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
        hint = (event, self._ctx.instances.find(event.instance_id))
        if event.instance_id in self._hints:
            self._hints[event.instance_id].append(hint)
            return
        self._hints[event.instance_id] = [hint]
        self._own(self._read(event.instance_id))

    async def _read(self, instance_id: str) -> None:
        try:
            while hints := self._hints[instance_id]:
                self._hints[instance_id] = []
                await self._believe(instance_id, hints)
        finally:
            del self._hints[instance_id]

    async def _believe(self, instance_id: str, hints: list[_Hint]) -> None:
        if instance_id in self._ctx.state.foreign:
            await self._foreign(instance_id)
            return
        info: DomainInfo | None = None
        for _ in range(READS):
            before = self._ctx.instances.find(instance_id)
            if before is None and self._is_explained(instance_id):
                return
            try:
                info = await self._ctx.executor.call(
                    "query", self._ctx.driver.get, instance_id, deadline_s=self._ctx.deadlines.query_s
                )
            except NotFound:
                info = None
                if before is None:
                    return  # the last words of a domain that is gone
                unchanged = self._ctx.instances.find(instance_id) is before
                if unchanged and instance_id not in self._runner.open.busy_instances():
                    await reconcile(self._ctx, self._runner, resync=False)
                    return
            except ComputeError as exc:
                info = None
                log.info("events.read_failed", instance=instance_id, code=exc.code)
            if not self._ctx.state.connected.is_set():
                return  # unknown now; everything is read again when the hypervisor is back
            if self._ctx.instances.find(instance_id) is before:
                break
        if before is None:
            await reconcile(self._ctx, self._runner, resync=False, needed=lambda: not self._is_explained(instance_id))
            return
        change = Change()
        # What was learned since a hint came is newer. `unknown`: it says nothing about power, such as a definition.
        told = [hint for hint, known in hints if known is before and hint.power != "unknown"]
        for hint, following in itertools.zip_longest(told, told[1:]):
            if following is None or following.power != hint.power:  # libvirt says resumed, then started: it booted
                self._observe(change, instance_id, hint.power, hint.reason)
        if info is not None:
            self._observe(change, instance_id, info.power, info.reason)
        await self._flush(change)

    async def _foreign(self, instance_id: str) -> None:
        """Keep what a foreign domain takes of the host up to date; that it is gone is told at once."""
        try:
            info = await self._ctx.executor.call(
                "query", self._ctx.driver.get, instance_id, deadline_s=self._ctx.deadlines.query_s
            )
        except NotFound:
            state = self._ctx.state
            await reconcile(self._ctx, self._runner, resync=False, needed=lambda: instance_id in state.foreign)
        except ComputeError as exc:
            log.info("events.read_failed", instance=instance_id, code=exc.code)
        else:
            if instance_id in self._ctx.state.foreign and not info.owned:
                self._ctx.state.foreign[instance_id] = info
                self._ctx.heartbeat_now()

    def _is_explained(self, instance_id: str) -> bool:
        """Whether a domain's events are no news: it is ours, foreign, or in the hands of an operation."""
        return (
            self._ctx.instances.find(instance_id) is not None
            or instance_id in self._ctx.state.foreign
            or instance_id in self._runner.open.busy_instances()
        )

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
            state.connected.set()
            # Not waited for: reading everything may take long, and the next loss must be seen at once.
            self._own(self.connected(event.detail))
            return
        self._era += 1
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
        self._era += 1
        era = self._era
        metrics.HYPERVISOR_CONNECTED.set(1)
        state.conditions.pop("hypervisor", None)
        try:
            deadline_s, driver = self._ctx.deadlines.query_s, self._ctx.driver
            state.capabilities = await self._ctx.executor.call("query", driver.capabilities, deadline_s=deadline_s)
            self._ctx.capacity.host = await self._ctx.executor.call("query", driver.capacity, deadline_s=deadline_s)
        except ComputeError as exc:
            log.warning("hypervisor.description_failed", code=exc.code, error=exc.message)
        if era != self._era:
            return
        await self._ctx.journal.commit(
            Change(events=[self._event(HypervisorConnection(connected=True, detail=detail))])
        )
        await reconcile(self._ctx, self._runner, resync=True)
        if era != self._era:
            return
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
