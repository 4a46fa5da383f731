"""Everything the agent does by the clock: heartbeats, reconciliation, pruning, requests from the journal tool.

Each task runs by itself, so a slow one delays no other, and one that fails is logged and runs again.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime, timedelta

import structlog

from agent import metrics
from agent.bus.base import Bus, Outgoing
from agent.core.context import Context, now
from agent.core.lanes import Lanes
from agent.core.outbox import Outbox
from agent.core.overdue import end_overdue
from agent.core.reconcile import reconcile
from agent.core.runner import Runner
from agent.drivers.base import HostCapacity
from agent.errors import ComputeError
from agent.messages.events import HostHeartbeat, render_event
from agent.messages.routing import EVENTS_EXCHANGE, event_key

log = structlog.get_logger("periodic")

COALESCE_S = 0.25
"""Changes within this time share one heartbeat."""


async def every(name: str, interval_s: float, work: Callable[[], Awaitable[object]]) -> None:
    """Run `work` every `interval_s` (jittered by a tenth) until cancelled. A failure is logged, not fatal."""
    while True:
        await asyncio.sleep(interval_s * random.uniform(0.9, 1.1))  # noqa: S311 - jitter
        try:
            await work()
        except ComputeError as exc:
            log.warning("periodic.failed", task=name, code=exc.code, error=exc.message)
        except Exception:
            log.exception("periodic.failed", task=name)


class Heartbeat:
    """Builds and publishes heartbeats: every `interval_s`, and soon after something changed."""

    def __init__(self, ctx: Context, bus: Bus, runner: Runner, outbox: Outbox, *, interval_s: float) -> None:
        self._ctx = ctx
        self._bus = bus
        self._runner = runner
        self._outbox = outbox
        self._interval_s = interval_s
        self._started_at: datetime = now()
        self._asked = asyncio.Event()
        self._reading: asyncio.Task[HostCapacity] | None = None

    def ask(self) -> None:
        """Ask for a heartbeat soon; many askings become one."""
        self._asked.set()

    async def run(self) -> None:
        """Publish until cancelled. Neither a slow hypervisor nor an absent broker stops it."""
        while True:
            try:
                await self._publish()
            except ComputeError as exc:
                metrics.HEARTBEATS.labels("no").inc()
                log.info("heartbeat.not_sent", code=exc.code)
            except Exception:
                log.exception("heartbeat.failed")
            try:
                async with asyncio.timeout(self._interval_s * random.uniform(0.9, 1.1)):  # noqa: S311 - jitter
                    await self._asked.wait()
                await asyncio.sleep(COALESCE_S)
            except TimeoutError:
                pass
            self._asked.clear()

    async def _publish(self) -> None:
        body, event_id = render_event(await self.build(), host=self._ctx.host)
        await self._bus.publish(
            Outgoing(
                exchange=EVENTS_EXCHANGE,
                routing_key=event_key(HostHeartbeat.kind, self._ctx.host),
                body=body,
                message_id=event_id,
                persistent=False,
                expiration_s=self._interval_s * 3,
            ),
            timeout_s=self._interval_s,
        )
        metrics.HEARTBEATS.labels("yes").inc()

    async def build(self) -> HostHeartbeat:
        """Read the capacity (old figures where the hypervisor does not answer at once) and describe the host."""
        await self._read_capacity()
        ctx, state = self._ctx, self._ctx.state
        records, foreign, host = ctx.instances.all(), list(state.foreign.values()), ctx.capacity.host
        conditions = dict(state.conditions)
        if ctx.executor.stuck:
            conditions["driver-threads"] = f"{ctx.executor.stuck} hypervisor calls are past their deadline"
        return HostHeartbeat(
            agent_version=ctx.version,
            compute_id=ctx.compute_id,
            started_at=self._started_at,
            uptime_s=round((now() - self._started_at).total_seconds(), 1),
            enabled=state.enabled,
            disabled_reason=state.disabled_reason,
            hypervisor_connected=state.connected.is_set(),
            hypervisor_type=state.capabilities.hypervisor_type,
            hypervisor_version=state.capabilities.hypervisor_version,
            driver=ctx.driver.name,
            capabilities=sorted(state.capabilities.verbs),
            healthy=not conditions and state.connected.is_set(),
            conditions=conditions,
            instances=ctx.instances.counts(),
            foreign_domains=len(foreign),
            operations_in_flight=len(self._runner.open),
            outbox_waiting=self._outbox.waiting,
            stuck_threads=ctx.executor.stuck,
            last_sequence=ctx.journal.last_sequence,
            interval_s=self._interval_s,
            inventory=ctx.capacity.inventory(records, foreign),
            traits=sorted(state.capabilities.traits),
            numa_cells=list(host.numa_cells) if host else [],
            cpu_model=host.cpu_model if host else "unknown",
            architecture=host.architecture if host else "unknown",
        )

    async def _read_capacity(self) -> None:
        """Wait for fresh figures only briefly: a hypervisor that hangs must not hold up the heartbeat."""
        if not self._ctx.state.connected.is_set():
            return
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(
                self._ctx.executor.call("query", self._ctx.driver.capacity, deadline_s=self._ctx.deadlines.query_s)
            )
            self._reading.add_done_callback(_retrieve)
        try:
            async with asyncio.timeout(min(2.0, self._interval_s / 2)):
                self._ctx.capacity.host = await asyncio.shield(self._reading)
            self._ctx.state.conditions.pop("capacity", None)
        except (TimeoutError, ComputeError) as exc:
            self._ctx.state.conditions["capacity"] = "the hypervisor did not tell its capacity; the figures are old"
            log.info("heartbeat.capacity_old", error=str(exc))


def _retrieve(reading: asyncio.Task[HostCapacity]) -> None:
    """Mark an error as seen: the heartbeat that asked may have gone out without waiting for it."""
    if not reading.cancelled():
        reading.exception()


class Chores:
    """The other periodic tasks."""

    def __init__(
        self,
        ctx: Context,
        runner: Runner,
        outbox: Outbox,
        lanes: Lanes,
        *,
        keep_operations_s: float,
        operations_s: Mapping[str, float] | None = None,
    ) -> None:
        self._ctx = ctx
        self._lanes = lanes
        self._runner = runner
        self._outbox = outbox
        self._keep = timedelta(seconds=keep_operations_s)
        self._operations_s = operations_s or {}

    async def reconcile(self) -> None:
        """Compare journal and hypervisor; events should have told everything already."""
        if self._ctx.state.connected.is_set():
            await reconcile(self._ctx, self._runner, resync=False)

    async def prune(self) -> None:
        """Forget operations that ended long ago, a few at a time so that no commit takes long."""
        limit = forgotten = 500
        while forgotten == limit:
            forgotten = await self._ctx.journal.store.prune(now() - self._keep, limit)

    async def images(self) -> None:
        """Let unused images go; say so where an image in use is damaged."""
        damaged = await self._ctx.images.tidy()
        if damaged:
            self._ctx.state.conditions["images"] = (
                f"{len(damaged)} cached images in use are damaged, one of them {damaged[0]}; see `image.list`"
            )
        else:
            self._ctx.state.conditions.pop("images", None)

    async def requests(self) -> None:
        """Carry out what an administrator asked for with `compute-agent journal retry`."""
        for operation_id in await self._ctx.journal.store.take_requests():
            record = await self._ctx.journal.store.operation(operation_id)
            if record is not None and record.undo_pending:
                await self._runner.resume([record])

    async def overdue(self) -> None:
        """End operations that run too long; what cannot be ended, or waits behind a stuck call, is in the heartbeat."""
        stuck = await end_overdue(self._ctx, self._runner, now(), self._operations_s)
        conditions = self._ctx.state.conditions
        before = conditions.pop("operations", None)
        if stuck:
            more = f" (and {len(stuck) - 3} more)" if len(stuck) > 3 else ""
            conditions["operations"] = "; ".join(list(stuck.values())[:3]) + more
        if before != conditions.get("operations"):
            self._ctx.heartbeat_now()

    async def gauges(self) -> None:
        """Set the gauges that nobody sets where things happen."""
        metrics.OUTBOX_WAITING.set(self._outbox.waiting)
        metrics.LANES_BUSY.set(self._lanes.busy)
        metrics.STUCK_THREADS.set(self._ctx.executor.stuck)
        counts = self._ctx.instances.counts()
        for state in ("running", "paused", "suspended", "stopped", "crashed", "unknown"):
            metrics.INSTANCES.labels(state).set(counts.get(state, 0))
