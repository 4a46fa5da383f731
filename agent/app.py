"""The composition root: the only place that knows concrete classes, and the order of starting and stopping.

Start: store → hypervisor, recovery → consume → ready; heartbeats begin as soon as there is something to tell and
wait for none of it. Stop: no new commands → running work ends → outbox empties → everything closes. Guests are
never touched.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import structlog

from agent import __version__, metrics
from agent.bus.base import Bus, Subscription
from agent.bus.topology import host_topology, shared_topology
from agent.config import Settings
from agent.core.capacity import Capacity
from agent.core.context import Context, HostState, now
from agent.core.dispatch import Dispatcher
from agent.core.instances import Instances
from agent.core.journal import Journal
from agent.core.lanes import Lanes
from agent.core.leftovers import Leftovers, Place
from agent.core.outbox import Outbox
from agent.core.registry import Registry
from agent.core.runner import Runner
from agent.drivers.base import Driver, DriverContext
from agent.drivers.executor import DriverExecutor
from agent.drivers.registry import load_driver
from agent.errors import ComputeError, DeadlineExceeded, Unavailable
from agent.events import HypervisorEvents
from agent.exports.service import Exports
from agent.handlers import audit, drain, host, operation
from agent.handlers.due import issue_due
from agent.handlers.images import Usage
from agent.handlers.routes import ROUTES
from agent.handlers.states import guarded
from agent.health import HealthServer, Watchdog
from agent.identity import compute_id
from agent.images.cache import ImageCache
from agent.images.entry import PARTIAL_PREFIX
from agent.messages.events import AgentLifecycle
from agent.messages.routing import host_queue
from agent.notify import notify, watchdog_interval_s
from agent.periodic import Chores, Heartbeat, every
from agent.policy import BOOT_KEY, Policies
from agent.store.base import Change, Store
from agent.store.sqlite import SqliteStore
from agent.tasks import Tasks

log = structlog.get_logger("agent")
T = TypeVar("T")

PREFETCH = 500
"""Deliveries in hand: enough that acknowledgements, which wait for a commit, never starve the intake."""
RETRY_S = 2.0
FIRST_CONNECT_S = 5.0
"""After this long without a broker the log says so, and again each time."""


class Agent:
    """One agent. `start`, then `wait`, then `stop`."""

    def __init__(self, settings: Settings, bus: Bus, *, store: Store | None = None) -> None:
        self.settings = settings
        self.bus = bus
        self.state_dir = settings.agent.state_dir
        self._journal_path = self.state_dir / "journal.sqlite"
        self._store = store or SqliteStore(self._journal_path)
        self._tasks = Tasks(failed=self.ask_to_stop)
        self._subscription: Subscription | None = None
        self._stopping = asyncio.Event()
        self._ready = asyncio.Event()
        self._recovered = 0

    # --- life -------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start everything that can be; what cannot yet (broker, hypervisor) is tried on and on.

        Raises `InvalidArgument` or `FailedPrecondition` for what only a person can put right.
        """
        await self._open()
        settings = self.settings
        self._health = HealthServer(settings.health.listen, self.not_ready)
        self.health_port = await self._health.start()
        log.info("health.listening", port=self.health_port)
        self._tasks.own("events", self._events.run())
        self._tasks.own("dispatch", self._dispatcher.run())
        self._start_chores()
        self._tasks.own("start", self._come_up())

    async def _open(self) -> None:
        """Open the journal, put the parts together, and let them know what the journal has."""
        await asyncio.to_thread(_make_directory, self.state_dir)
        self.compute_id = await asyncio.to_thread(compute_id, self.state_dir, self._journal_path)
        identity = await self._store.open(compute_id=self.compute_id, host=self.settings.agent.host)
        journal = Journal(self._store, host=self.settings.agent.host)
        journal.epoch = identity.epoch
        journal.last_sequence = await self._store.last_sequence()
        self._make_context(journal)
        self._make_core()
        self._make_edges()
        await self._outbox.start(journal.last_sequence)
        self.ctx.instances.load(await self._store.instances())
        kept = await self._store.settings()
        self.ctx.state.enabled = kept.get(host.ENABLED_KEY, "1") == "1"
        self.ctx.state.disabled_reason = kept.get(host.REASON_KEY) or None
        await self._images.clean_partials()

    def _make_context(self, journal: Journal) -> None:
        """Make what every handler works with."""
        settings = self.settings
        executor = DriverExecutor(
            {"query": settings.threads.query, "mutate": settings.threads.mutate, "long": settings.threads.long},
            max_stuck=settings.threads.max_stuck,
        )
        self._images = ImageCache(self.state_dir / "images", settings.images)
        self.ctx = Context(
            host=settings.agent.host,
            compute_id=self.compute_id,
            version=__version__,
            # The events' sink is made later.
            driver=_make_driver(settings, self.state_dir, lambda event: self._events.sink(event)),  # noqa: PLW0108
            executor=executor,
            journal=journal,
            instances=Instances(),
            capacity=Capacity(settings.capacity.build()),
            images=self._images,
            exports=Exports(settings.exports, self.state_dir / "exports"),
            max_snapshots=settings.snapshots.max_per_instance,
            deadlines=settings.deadlines.build(),
            state=HostState(),
        )
        journal.on_problem = self._journal_problem
        journal.resolve_instances(self.ctx.instances.find)

    def _make_core(self) -> None:
        """Make what runs operations."""
        settings, lanes = self.settings, self.settings.lanes
        self._lanes = Lanes({"query": lanes.query, "power": lanes.power, "build": lanes.build})
        self._registry = Registry(
            (
                *map(guarded, ROUTES),
                *host.routes(lambda: self._heartbeat.build()),  # noqa: PLW0108 - made after the routes
                *operation.routes(lambda: self._runner),
                *audit.routes(lambda: self._runner, lambda: self._leftovers),
                *drain.routes(lambda: self._runner),
            )
        )
        self._runner = Runner(self.ctx, self._registry, self._lanes)
        self._leftovers = Leftovers(_places(settings, self.state_dir), older_than_s=settings.audit.leftover_age_s)

    def _make_edges(self) -> None:
        """Make what speaks with the bus and listens to the hypervisor."""
        self._outbox = Outbox(self.bus, self._store, epoch=self.ctx.journal.epoch)
        self.ctx.journal.on_events(self._outbox.offer)
        self._events = HypervisorEvents(self.ctx, self._runner, asyncio.get_running_loop())
        self._events.on_connection = self._hypervisor_state
        self._policies = Policies(self.ctx, self._runner)
        self._dispatcher = Dispatcher(self.ctx, self.bus, self._registry, self._runner)
        self._heartbeat = Heartbeat(
            self.ctx, self.bus, self._runner, self._outbox, interval_s=self.settings.periodic.heartbeat_s
        )
        self.ctx.heartbeat_now = self._heartbeat.ask
        self.bus.on_state(self._bus_state)

    def _start_chores(self) -> None:
        periodic = self.settings.periodic
        chores = Chores(
            self.ctx,
            self._runner,
            self._outbox,
            self._lanes,
            keep_operations_s=periodic.keep_operations_s,
            operations_s=self.settings.deadlines.operations_s,
        )
        auditor = audit.PeriodicAudit(self.ctx, self._runner, self._leftovers, repair=self.settings.audit.repair)
        self._tasks.own("audit", every("audit", periodic.audit_s, auditor.run))
        self._tasks.own("overdue", every("overdue", periodic.due_s, chores.overdue))
        self._tasks.own("reconcile", every("reconcile", periodic.reconcile_s, chores.reconcile))
        self._tasks.own("due", every("due", periodic.due_s, lambda: issue_due(self.ctx, self._runner, now())))
        self._tasks.own("prune", every("prune", periodic.prune_s, chores.prune))
        self._tasks.own("images", every("images", periodic.images_s, chores.images))
        self._tasks.own("requests", every("requests", periodic.requests_s, chores.requests))
        self._tasks.own("gauges", every("gauges", periodic.heartbeat_s, chores.gauges))
        interval_s = watchdog_interval_s()
        if interval_s is not None:
            self._tasks.own("watchdog", Watchdog(interval_s, self._moving()).run())

    async def _come_up(self) -> None:
        """Bring up hypervisor and broker side by side; consume when the past is in its lanes."""
        broker = asyncio.create_task(self._connect_bus())
        try:
            interrupted = await self._store.operations(unfinished=True)
            self._runner.open.expect(interrupted)  # half-made instances are no drift
            await self._connect_driver()
            self._recovered = await self._runner.resume(interrupted)
            self._images.who_uses = Usage(self.ctx, self._runner)  # not before: an interrupted command uses its image
            # Without the broker too: guests come back after a boot of the host whoever else is still away.
            await self._policies.begin((await self._store.settings()).get(BOOT_KEY))
            await broker
        finally:
            broker.cancel()
        self._subscription = await self._tried(
            lambda: self.bus.consume(host_queue(self.ctx.host), self._dispatcher.on_delivery, prefetch=PREFETCH)
        )
        self.ctx.state.ready = True
        self._ready.set()
        await self._tell(AgentLifecycle(state="ready", version=__version__, recovered_operations=self._recovered))
        self._heartbeat.ask()
        log.info("agent.ready", host=self.ctx.host, recovered=self._recovered, instances=len(self.ctx.instances))
        notify("READY=1", f"STATUS=serving {self.ctx.host}")

    async def _connect_bus(self) -> None:
        """Connect and declare; only then is there an exchange for heartbeats and waiting events."""
        await self._tried(lambda: self.bus.connect(timeout_s=FIRST_CONNECT_S))
        await self._tried(lambda: self.bus.declare(shared_topology()))
        await self._tried(lambda: self.bus.declare(host_topology(self.ctx.host)))
        self._tasks.own("outbox", self._outbox.run())
        self._tasks.own("heartbeat", self._heartbeat.run())

    async def _tried(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Ask the broker until it answers; what only a person can put right is raised."""
        while True:
            try:
                return await ask()
            except (Unavailable, DeadlineExceeded) as exc:
                log.warning("broker.unreachable", error=exc.message)
            await asyncio.sleep(RETRY_S)

    async def _connect_driver(self) -> None:
        """Open the hypervisor; without one the agent comes up all the same and says so."""
        deadlines = self.ctx.deadlines
        try:
            await self.ctx.executor.call("mutate", self.ctx.driver.connect, deadline_s=deadlines.mutate_s)
        except ComputeError as exc:
            if not exc.retryable:
                raise
            log.error("hypervisor.unreachable", error=exc.message)  # noqa: TRY400 - the sentence says it all
            self.ctx.state.conditions["hypervisor"] = exc.message
            self._tasks.own("driver", self._keep_connecting())
            return
        if not self.ctx.state.connected.is_set():
            await self._events.connected("connected")

    async def _keep_connecting(self) -> None:
        while not self.ctx.state.connected.is_set():
            await asyncio.sleep(RETRY_S)
            try:
                await self.ctx.executor.call("mutate", self.ctx.driver.connect, deadline_s=self.ctx.deadlines.mutate_s)
            except ComputeError as exc:
                log.info("hypervisor.unreachable", error=exc.message)
                continue
            if not self.ctx.state.connected.is_set():
                await self._events.connected("connected")

    async def wait(self) -> None:
        """Wait until `ask_to_stop` or until a task fails. Raises what a task failed with."""
        await self._stopping.wait()
        if self._tasks.failure is not None:
            raise self._tasks.failure

    async def wait_ready(self, timeout_s: float) -> None:
        """Wait until the agent serves commands. Raises `Unavailable` after `timeout_s` or when a task failed."""
        ready, ended = asyncio.ensure_future(self._ready.wait()), asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait({ready, ended}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ready.cancel()
            ended.cancel()
        if not self._ready.is_set():
            raise Unavailable("the agent did not become ready in time") from self._tasks.failure

    def ask_to_stop(self) -> None:
        """Make `wait` return. Safe to call from a signal handler on the loop."""
        self._stopping.set()

    async def stop(self) -> None:
        """Drain within `drain_timeout_s`, publish what there is to tell, close. Unfinished work stays journaled."""
        notify("STOPPING=1")
        limit_s = self.settings.agent.drain_timeout_s
        log.info("agent.stopping", operations=len(self._runner.open), limit_s=limit_s)
        self.ctx.state.ready = False
        await self._tasks.cancel("start")  # it could begin to consume while we drain
        if self._subscription is not None:
            await self._quietly("cancel consumer", self._subscription.cancel(), 5.0)
        await self._policies.end()
        drained = await self._lanes.drain(limit_s)
        self._runner.stop()
        await self._quietly("last event", self._tell(AgentLifecycle(state="stopping", version=__version__)), 2.0)
        self._outbox.close()
        await self._quietly("outbox", self._tasks.wait("outbox"), 5.0)
        self.ctx.journal.close()
        await self._tasks.end()
        await self._events.close()
        await self._quietly("bus", self.bus.close(), 10.0)
        await self._quietly("driver", asyncio.to_thread(self.ctx.driver.close), 10.0)
        await self.ctx.executor.close(2.0)
        await self._health.stop()
        await self._quietly("journal", self._store.close(), 30.0)
        log.info("agent.stopped", drained=drained)

    # --- health -----------------------------------------------------------------------------------------------

    def not_ready(self) -> dict[str, str]:
        """What keeps the agent from being ready; empty when it is."""
        missing: dict[str, str] = {}
        if not self.bus.connected:
            missing["broker"] = "the broker is not connected"
        elif self._subscription is None or not self._subscription.active:
            missing["consumer"] = "the broker does not serve our consumer"
        if not self.ctx.state.connected.is_set():
            missing["hypervisor"] = self.ctx.state.conditions.get("hypervisor", "the hypervisor is not connected")
        if self.ctx.journal.problem is not None:
            missing["journal"] = self.ctx.journal.problem
        if not self.ctx.state.ready:
            missing.setdefault("start", "the agent is starting or stopping")
        return missing

    def _moving(self) -> Callable[[], bool]:
        """Make a check for the watchdog: work moved since the last look, or waits for what a restart does not bring."""
        last = [self._lanes.moved, 0]

        def moving() -> bool:
            stands = self._runner.open.at_work and self._lanes.moved == last[0]
            # What stands because of the hypervisor or the disk would stand after a restart too.
            away = not self.ctx.state.connected.is_set() or self.ctx.journal.problem is not None
            excused = self.ctx.executor.stuck > 0 or away
            last[1] = last[1] + 1 if stands and not excused else 0
            last[0] = self._lanes.moved
            return last[1] * (watchdog_interval_s() or 0) < self.ctx.deadlines.long_s

        return moving

    def _bus_state(self, connected: bool) -> None:
        metrics.BROKER_CONNECTED.set(int(connected))
        log.info("broker.connection", connected=connected)
        if connected:
            self._heartbeat.ask()

    def _journal_problem(self, problem: str | None) -> None:
        if problem is None:
            self.ctx.state.conditions.pop("journal", None)
        else:
            self.ctx.state.conditions["journal"] = problem
        self._heartbeat.ask()

    # --- inside -----------------------------------------------------------------------------------------------

    async def _tell(self, event: AgentLifecycle) -> None:
        await self.ctx.journal.commit(Change(events=[self.ctx.journal.event(event)]))

    def _hypervisor_state(self, connected: bool) -> None:
        if connected:
            self._resume_undo()
            self._policies.connected()

    def _resume_undo(self) -> None:
        """The hypervisor is back: take up what could not be taken back while it was away."""
        self._tasks.own("undo", self._retry_undo())

    async def _retry_undo(self) -> None:
        unfinished = await self.ctx.journal.read(lambda: self._store.operations(unfinished=True))
        await self._runner.resume([record for record in unfinished if record.undo_pending])

    async def _quietly(self, what: str, work: Coroutine[Any, Any, object], limit_s: float) -> None:
        """Do one part of stopping within a limit; its failure must not keep the rest from stopping."""
        try:
            async with asyncio.timeout(limit_s):
                await work
        except (TimeoutError, ComputeError) as exc:
            log.warning("agent.stop_incomplete", part=what, error=str(exc) or "time limit")


def _places(settings: Settings, state_dir: Path) -> list[Place]:
    """Where the agent leaves things that an audit knows by name."""
    dumps = Path(settings.driver.settings.get("dumps_dir") or state_dir / "dumps")
    kept_s = settings.audit.memory_dump_age_s
    places = [
        Place(state_dir / "images", "partial-download", (f"{PARTIAL_PREFIX}*",)),
        Place(settings.exports.staging_dir or state_dir / "exports", "staging"),
        Place(dumps, "memory-dump", ("*.part",)),
    ]
    return places if kept_s is None else [*places, Place(dumps, "memory-dump", ("*",), older_than_s=kept_s)]


def _make_directory(path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True, mode=0o755)


def _make_driver(settings: Settings, state_dir: Path, emit: Callable[..., None]) -> Driver:
    driver_class = load_driver(settings.driver.name)
    return driver_class(
        DriverContext(host=settings.agent.host, state_dir=state_dir, settings=settings.driver.settings, emit=emit)
    )
