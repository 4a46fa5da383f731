"""Runs accepted operations in their lanes, to exactly one final result, and takes up interrupted ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

import structlog
from pydantic import BaseModel

from agent import metrics
from agent.core.adopted import check_adopted
from agent.core.context import Context, now
from agent.core.failpoints import failpoint
from agent.core.lanes import Lanes
from agent.core.operation import Operation, RollBack
from agent.core.outcome import final_event, problem_of, state_of
from agent.core.registry import Registry, Route
from agent.drivers.base import OPTIONAL_VERBS
from agent.errors import (
    Cancelled,
    ComputeError,
    DeadlineExceeded,
    Expired,
    FailedPrecondition,
    Internal,
    NotFound,
    Unsupported,
)
from agent.messages.codes import ERROR_CODES
from agent.messages.commands import Command, Refused, parse_command
from agent.messages.events import EventData, OperationAccepted, OperationStarted
from agent.store.base import Change, OperationRecord

log = structlog.get_logger("message")

BY_CODE = {row.code: row.error for row in ERROR_CODES}
"""Code of the contract → its class: whether a retry can help is known from the code alone."""

SILENCE_S = 0.2
"""Work that outlasts this reports that it was accepted and started, asked or not."""
TURN_S = 5.0
"""How long an empty lane may take to give whoever holds it his turn."""
OVERDUE = "operation_overdue"
MAX_ATTEMPTS = 5
"""An operation that was interrupted this often is rolled back: it may be what kills the agent."""


@dataclass(slots=True)
class Open:
    """An operation without final result."""

    record: OperationRecord
    command: Command[Any]
    operation: Operation | None = None
    announced: bool = False
    timer: asyncio.TimerHandle | None = None
    resumed: bool = False
    telling: set[asyncio.Task[None]] = field(default_factory=set)
    more_replies: list[str] = field(default_factory=list)
    """Where duplicates that came meanwhile want the answer too."""


class Runner:
    """Owns the operations that are accepted and not yet finished."""

    def __init__(self, ctx: Context, registry: Registry, lanes: Lanes) -> None:
        self._ctx = ctx
        self._registry = registry
        self._lanes = lanes
        self._open: dict[str, Open] = {}
        self._expected: set[str] = set()
        self._undo_pending: dict[str, str | None] = {}
        self._undo_queued: set[str] = set()
        self._watchers: dict[int, set[str]] = {}
        self.idle: Callable[[str], None] = lambda _instance_id: None
        """Told the id of an instance each time that an operation has let go of it."""
        self._held: set[str] = set()
        lanes.blocked = self._wait_settled

    @property
    def in_flight(self) -> int:
        """Operations without final result."""
        return len(self._open)

    def find(self, operation_id: str) -> Open | None:
        """An operation without final result, or None."""
        return self._open.get(operation_id)

    def operations_of(self, instance_id: str) -> list[str]:
        """Ids of the operations on an instance without final result, in their order; not of those that only read."""
        return [
            item.record.id
            for item in self._open.values()
            if item.record.instance_id == instance_id and self._registry[item.record.verb].lane == "instance"
        ]

    @property
    def at_work(self) -> bool:
        """Whether an operation runs that does not wait for a guest or an image."""
        return any(item.operation is not None and not item.operation.waits for item in self._open.values())

    def commands(self) -> list[tuple[str, Command[Any]]]:
        """Id and command of every operation without final result."""
        return [(item.record.id, item.command) for item in self._open.values()]

    def busy_instances(self) -> set[str]:
        """Instances that an operation acts on, now or soon, or left something of. Those that are only read are not."""
        open_now = {
            item.record.instance_id
            for item in self._open.values()
            if item.record.instance_id and self._registry[item.record.verb].lane == "instance"
        }
        undoing = {instance for instance in self._undo_pending.values() if instance}
        return open_now | self._expected | self._held | undoing

    def acting(self) -> list[OperationRecord]:
        """Operations under way, now or soon, that act on an instance."""
        return [
            item.record
            for item in self._open.values()
            if self._registry[item.record.verb].lane == "instance" and not item.record.final
        ]

    @asynccontextmanager
    async def holding(self, instance_id: str) -> AsyncIterator[bool]:
        """Keep every operation off an instance that nobody acts on; False where somebody does, without waiting.

        Commands that come meanwhile wait in its lane.
        """
        settled = self._ctx.executor.is_settled(instance_id)
        if not settled or instance_id in self.busy_instances() or self._lanes.is_busy(instance_id):
            yield False
            return
        ours, done = asyncio.Event(), asyncio.Event()

        async def hold() -> None:
            ours.set()
            await done.wait()  # no limit of its own: ended below, whatever happens

        self._held.add(instance_id)
        for touched in self._watchers.values():
            touched.add(instance_id)
        self._lanes.put(instance_id, "waiting", hold)
        try:
            yield await _within(ours, TURN_S)  # the lane was empty: its turn comes at once, unless the agent stops
        finally:
            self._held.discard(instance_id)
            done.set()

    @contextmanager
    def watching(self) -> Iterator[set[str]]:
        """Give a set that holds the busy instances and gains those that become busy meanwhile."""
        touched = self.busy_instances()
        self._watchers[id(touched)] = touched
        try:
            yield touched
        finally:
            del self._watchers[id(touched)]

    def submit(self, record: OperationRecord, command: Command[Any], *, resumed: bool = False) -> None:
        """Queue a journaled operation in its lane."""
        item = Open(record, command, announced=command.reportprogress, resumed=resumed)
        self._open[record.id] = item
        item.timer = asyncio.get_running_loop().call_later(SILENCE_S, self._announce, item)
        route = self._registry[record.verb]
        if route.lane == "instance" and record.instance_id:
            for touched in self._watchers.values():
                touched.add(record.instance_id)
        self._lanes.put(self._lane(record, route), route.work, lambda: self._run(item, route))

    def expect(self, records: Sequence[OperationRecord]) -> None:
        """Count the instances of interrupted operations as busy until `resume` takes these up."""
        self._expected = {record.instance_id for record in records if record.instance_id}

    async def resume(self, records: Sequence[OperationRecord]) -> int:
        """Take up what a former process left, in order of arrival. Returns how many there were."""
        for record in records:
            try:
                command = parse_command(record.body)
            except Refused as exc:
                await self._give_up(record, exc)
                continue
            if record.final:
                self.retry_undo(record, command)
            else:
                self.submit(record, command, resumed=True)
        self._expected -= {record.instance_id for record in records if record.instance_id}
        return len(records)

    def retry_undo(self, record: OperationRecord, command: Command[Any]) -> None:
        """Try again to take back what an ended operation left, unless that waits for its turn already."""
        if record.id in self._undo_queued:
            return
        self._undo_queued.add(record.id)
        self._undo_pending[record.id] = record.instance_id
        route = self._registry[record.verb]
        self._lanes.put(self._lane(record, route), route.work, lambda: self._finish_undo(record, command, route))

    async def cancel(self, operation_id: str) -> None:
        """Ask an operation to end: one that still waits for its turn ends here and now.

        Raises `NotFound` where it is unknown or ended, `FailedPrecondition` past its point of no return.
        """
        item = self._open.get(operation_id)
        if item is None:
            raise NotFound(f"no operation {operation_id} is waiting or running", code="unknown_operation")
        record = item.record
        if item.operation is not None and not item.operation.can_be_cancelled:
            raise FailedPrecondition(
                "the operation is past its point of no return and will finish", code="too_late_to_cancel"
            )
        record.cancel_requested = True
        if item.operation is None and record.attempt == 0:
            await self._end_waiting(item)
            return
        await self._ctx.journal.commit(Change(operation=replace(record)))
        if item.operation is not None:
            item.operation.cancel()

    async def end_overdue(self, at: datetime, limits_s: Mapping[str, float]) -> dict[str, str]:
        """Cancel operations that run longer than the limit of their class of work; 0: no limit.

        Returns a sentence for each that could not be ended yet, and for each that waits behind a stuck call.
        """
        stuck: dict[str, str] = {}
        for item in list(self._open.values()):
            record = item.record
            route = self._registry[record.verb]
            name = f"{record.verb} {record.id}"
            if item.operation is None:
                if route.lane == "instance" and record.instance_id and not self._settled(record.instance_id):
                    stuck[record.id] = f"{name} waits behind a hypervisor call that does not return"
                continue
            limit_s = limits_s.get(route.work, 0.0)
            if not limit_s or record.started_at is None or (at - record.started_at).total_seconds() <= limit_s:
                continue
            if record.error_code == OVERDUE or record.cancel_requested:
                stuck[record.id] = f"{name} is overdue and was cancelled; its present step has not ended yet"
            elif record.state == "undoing":
                stuck[record.id] = f"{name} is overdue; it is being undone"
            elif not item.operation.can_be_cancelled:
                stuck[record.id] = f"{name} is overdue, and past the point from which it can be taken back"
            else:
                log.warning("operation.overdue", verb=record.verb, operation=record.id, limit_s=limit_s)
                record.error_code = OVERDUE
                stuck[record.id] = f"{name} is overdue and was cancelled"
                with suppress(ComputeError):  # it ended, or passed its point of no return, just now
                    await self.cancel(record.id)
        return stuck

    def _settled(self, instance_id: str) -> bool:
        return self._ctx.executor.is_settled(instance_id)

    def stop(self) -> None:
        """Announce nothing more: what waits is taken up at the next start."""
        for item in self._open.values():
            self._hush(item)

    async def _end_waiting(self, item: Open) -> None:
        record, at = item.record, now()
        record.state, record.finished_at, record.error_code = "cancelled", at, Cancelled.default_code
        error = Cancelled("the operation was cancelled before it began")
        change = Change()
        await self._told(item)
        self._conclude(record, item.command, final_event(record, error, {}, at=at), change, item.more_replies)
        await self._ctx.journal.commit(change)
        self._close(item)
        self._log_done(record, error, at)

    def _close(self, item: Open) -> None:
        self._open.pop(item.record.id, None)
        self._hush(item)
        self._let_go(item.record.instance_id)

    def _let_go(self, instance_id: str | None) -> None:
        if instance_id is not None:
            self.idle(instance_id)

    def _hush(self, item: Open) -> None:
        item.announced = True
        if item.timer is not None:
            item.timer.cancel()

    async def _told(self, item: Open) -> None:
        """Announce nothing more, and wait for what is on its way: none of it may come after the final event."""
        self._hush(item)
        if item.telling:
            await asyncio.gather(*item.telling, return_exceptions=True)

    # --- inside -----------------------------------------------------------------------------------------------

    def _lane(self, record: OperationRecord, route: Route) -> str:
        if route.lane == "instance" and record.instance_id:
            return record.instance_id
        return route.lane if route.lane in ("host", "audit", "drain") else f"operation {record.id}"

    async def _wait_settled(self, key: str) -> None:
        if not self._ctx.executor.is_settled(key):
            log.warning("lane.blocked", lane=key)
            # No limit by design: a late call may still act on the instance, so nothing else may.
            await self._ctx.executor.wait_settled(key, None)

    async def _run(self, item: Open, route: Route) -> None:
        record = item.record
        if record.final:
            return  # cancelled while it waited
        try:
            past = (
                await self._ctx.journal.read(lambda: self._ctx.journal.store.steps(record.id)) if record.attempt else []
            )
            operation = Operation(self._ctx, record, item.command, past)
            item.operation = operation
            with structlog.contextvars.bound_contextvars(**_names(record, item.command)):
                error, result = await self._attempt(item, route, operation)
                await self._finish(item, operation, error, result)
        finally:
            if record.final:
                self._close(item)

    async def _attempt(
        self, item: Open, route: Route, operation: Operation
    ) -> tuple[BaseException | None, dict[str, Any]]:
        record = item.record
        try:
            self._check(record, item.command)
            record.attempt += 1
            if record.state != "undoing":
                record.state = "running"
                record.started_at = now()
            operation.mark_started()
            if item.resumed:
                # Also one that never came to its first commit must be found out if it is what kills the agent.
                await self._ctx.journal.commit(Change(operation=replace(record)))
            if item.announced:
                operation.speak_up()
                self._spawn(item, self._started(record))
            if record.state == "undoing" and not operation.begun:
                raise RollBack  # nothing was begun, so nothing of the handler is to be run
            if route.handler is None:
                raise Internal(f"{record.verb} has no handler")
            returned: BaseModel | None = await route.handler(operation, item.command.data)
            operation.mark_returned()
            if record.state == "undoing":
                return _error_of(record), {}
            return None, returned.model_dump(mode="json", exclude_none=True) if returned is not None else {}
        except RollBack:
            return _error_of(record), {}
        except Cancelled as exc:
            return (_overdue() if record.error_code == OVERDUE else exc), {}
        except ComputeError as exc:
            return exc, {}
        except Exception as exc:
            log.exception("operation.unexpected_error", verb=record.verb)
            return exc, {}

    def _check(self, record: OperationRecord, command: Command[Any]) -> None:
        if record.state == "undoing":
            return
        if record.cancel_requested:
            if record.attempt == 0:
                raise Cancelled("the operation was cancelled before it began")
            record.state = "undoing"
        elif record.attempt == 0 and command.is_expired(now()):
            raise Expired("the command's expirytime passed while it waited for its turn")
        elif record.attempt >= MAX_ATTEMPTS:
            log.error("operation.too_many_attempts", attempts=record.attempt)
            record.error_code = "too_many_attempts"
            record.state = "undoing"
        if record.attempt == 0 and record.instance_id is not None:
            check_adopted(record.verb, self._ctx.instances.find(record.instance_id))
        verb, known = record.verb, self._ctx.state.capabilities
        # Before the hypervisor was first asked nothing is known: the driver itself will refuse what it cannot do.
        if verb in OPTIONAL_VERBS and verb not in known.verbs and known.hypervisor_type != "unknown":
            raise Unsupported(
                f"driver {self._ctx.driver.name} cannot do {verb} on this host", code="verb_unsupported", verb=verb
            )

    async def _finish(
        self, item: Open, operation: Operation, error: BaseException | None, result: dict[str, Any]
    ) -> None:
        record = item.record
        undone = True
        if error is not None:
            record.error_code = problem_of(error).code
            undone = await operation.roll_back()
        else:
            record.error_code = None  # it ended well after all, if it was to be ended
        await operation.hush()
        await self._told(item)
        at = now()
        record.state = "succeeded" if error is None else state_of(error, begun=operation.begun)
        record.finished_at = at
        record.undo_pending = not undone
        whole = undone and not (error is not None and operation.lasting)
        event = final_event(record, error, result, at=at, undone=whole)
        change = operation.take_staged()
        self._conclude(item.record, item.command, event, change, item.more_replies)
        failpoint(f"{record.verb}:result:before")
        await self._ctx.journal.commit(change)
        failpoint(f"{record.verb}:result:after")
        self._log_done(record, error, at)
        if record.undo_pending:
            self.retry_undo(record, item.command)

    def _conclude(
        self, record: OperationRecord, command: Command[Any], event: EventData, change: Change, more: list[str]
    ) -> None:
        pending = self._ctx.journal.event(
            event,
            subject=record.instance_id,
            traceparent=command.traceparent,
            reply_to=record.reply_to,
            correlation_id=record.correlation_id,
        )
        pending = replace(pending, cc=tuple(dict.fromkeys((*pending.cc, *more))))
        record.final_body = pending.body
        change.operation = replace(record)
        change.events.append(pending)
        change.final_of = record.id

    def _log_done(self, record: OperationRecord, error: BaseException | None, at: Any) -> None:
        took_s = (at - record.accepted_at).total_seconds()
        waited_s = ((record.started_at or at) - record.accepted_at).total_seconds()
        metrics.COMMANDS.labels(record.verb, record.state).inc()
        metrics.COMMAND_SECONDS.labels(record.verb).observe(took_s)
        fields: dict[str, Any] = {
            "verb": record.verb,
            "operation": record.id,
            "instance": record.instance_id,
            "outcome": record.state,
            "attempt": record.attempt,
            "wait_ms": round(waited_s * 1000, 1),
            "run_ms": round((took_s - waited_s) * 1000, 1),
        }
        if error is not None:
            problem = problem_of(error)
            fields |= {"code": problem.code, "error": problem.message}
        log.info("message.done", **fields)

    async def _finish_undo(self, record: OperationRecord, command: Command[Any], route: Route) -> None:
        self._undo_queued.discard(record.id)
        past = await self._ctx.journal.read(lambda: self._ctx.journal.store.steps(record.id))
        replayed = replace(record, state="undoing")
        operation = Operation(self._ctx, replayed, command, past)
        try:
            if route.handler is not None:
                await route.handler(operation, command.data)
        except RollBack:
            pass
        except ComputeError as exc:
            log.warning("operation.undo_replay_failed", operation=record.id, code=exc.code)
            return
        undone = await operation.roll_back()
        change = operation.take_staged()
        record.undo_pending = not undone
        change.operation = replace(record)
        await self._ctx.journal.commit(change)
        if undone:
            self._undo_pending.pop(record.id, None)
            self._let_go(record.instance_id)
        log.info("operation.undo_finished" if undone else "operation.undo_still_pending", operation=record.id)

    async def _give_up(self, record: OperationRecord, exc: Refused) -> None:
        """End an operation whose command this version can no longer read."""
        log.error("operation.unreadable", operation=record.id, error=exc.message)
        if record.final:
            return  # it has had its final event; what it left stays noted in the journal
        record.state, record.finished_at, record.error_code = "failed", now(), exc.code
        event = final_event(record, exc, {}, at=now(), undone=False)
        pending = self._ctx.journal.event(
            event, subject=record.instance_id, reply_to=record.reply_to, correlation_id=record.correlation_id
        )
        record.final_body = pending.body
        await self._ctx.journal.commit(Change(operation=replace(record), events=[pending], final_of=record.id))

    # --- telling those who wait -------------------------------------------------------------------------------

    def accepted(self, record: OperationRecord) -> EventData:
        """The event that says so."""
        return OperationAccepted(operation_id=record.id, verb=record.verb, instance_id=record.instance_id)

    def _started(self, record: OperationRecord) -> EventData:
        return OperationStarted(
            operation_id=record.id, verb=record.verb, instance_id=record.instance_id, attempt=record.attempt
        )

    def _announce(self, item: Open) -> None:
        """The work outlasts the time a controller waits in silence."""
        if item.announced or item.record.final:
            return
        item.announced = True
        events = [self.accepted(item.record)]
        if item.operation is not None:
            events.append(self._started(item.record))
            item.operation.speak_up()
        self._spawn(item, *events)

    def _spawn(self, item: Open, *events: EventData) -> None:
        task = asyncio.get_running_loop().create_task(self._tell(item, events))
        item.telling.add(task)
        task.add_done_callback(item.telling.discard)
        task.add_done_callback(_log_untold)

    async def _tell(self, item: Open, events: Sequence[EventData]) -> None:
        record = item.record
        pending = [
            self._ctx.journal.event(
                event,
                subject=record.instance_id,
                traceparent=item.command.traceparent,
                reply_to=record.reply_to,
                correlation_id=record.correlation_id,
            )
            for event in events
        ]
        await self._ctx.journal.commit(Change(events=pending))


async def _within(event: asyncio.Event, limit_s: float) -> bool:
    try:
        async with asyncio.timeout(limit_s):
            await event.wait()
    except TimeoutError:
        return False
    return True


def _log_untold(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.info("operation.announcement_not_sent", error=str(error))


def _names(record: OperationRecord, command: Command[Any]) -> dict[str, str]:
    """What every log line of an operation carries, down to the driver's threads."""
    names = {"operation": record.id, "verb": record.verb}
    if record.instance_id is not None:
        names["instance"] = record.instance_id
    if command.traceparent is not None:
        names["trace_id"] = command.traceparent.split("-")[1]
    return names


def _overdue() -> ComputeError:
    return DeadlineExceeded(
        "the operation ran longer than this host allows for its kind of work (deadlines.operation_*_s), and was ended",
        code="operation_overdue",
    )


def _error_of(record: OperationRecord) -> ComputeError:
    """The error for an operation that a former process began to roll back."""
    if record.error_code == OVERDUE:
        return _overdue()
    if record.cancel_requested:
        return Cancelled("the operation was cancelled")
    known = BY_CODE.get(record.error_code or "")
    if known is not None and known is not Internal:
        return known(
            "the operation failed, the agent was restarted while it was undone, and the undoing was finished then",
            code=record.error_code,
        )
    return Internal(
        "the operation failed, the agent was restarted while it was undone, and the undoing was finished after that",
        code=record.error_code or "interrupted",
    )
