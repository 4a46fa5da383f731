"""Runs accepted operations in their lanes, to exactly one final result, and takes up interrupted ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import structlog

from agent.core.announcement import Announcement
from agent.core.attempt import attempt
from agent.core.conclusion import conclude, log_done
from agent.core.context import Context
from agent.core.failpoints import failpoint
from agent.core.lanes import Lanes
from agent.core.open_operations import OpenOperation, OpenOperations
from agent.core.operation import Operation
from agent.core.outcome import problem_of, state_of
from agent.core.registry import Registry
from agent.core.undoing import Undoing
from agent.errors import Cancelled, FailedPrecondition, NotFound
from agent.messages.commands import Command, Refused, parse_command
from agent.store.base import Change, OperationRecord

log = structlog.get_logger("message")


class Runner:
    """Owns the operations that are accepted and not yet finished. `open` is for whoever asks what is under way."""

    def __init__(self, ctx: Context, registry: Registry, lanes: Lanes) -> None:
        self._ctx = ctx
        self._registry = registry
        self._lanes = lanes
        self.open = OpenOperations(lanes, ctx.executor)
        self._undoing = Undoing(ctx, lanes, self.open, self._let_go)
        self.idle: Callable[[str], None] = lambda _instance_id: None
        """Told the id of an instance each time that an operation has let go of it."""
        lanes.blocked = self._wait_settled

    def find(self, operation_id: str) -> OpenOperation | None:
        """An operation without final result, or None."""
        return self.open.find(operation_id)

    def submit(self, record: OperationRecord, command: Command[Any], *, resumed: bool = False) -> None:
        """Queue a journaled operation in its lane."""
        route = self._registry[record.verb]
        announcement = Announcement(self._ctx.journal, record, command)
        item = OpenOperation(record, command, route, announcement, resumed=resumed)
        self.open.add(item)
        self._lanes.put(route.lane_of(record), route.work, lambda: self._run(item))

    async def resume(self, records: Sequence[OperationRecord]) -> int:
        """Take up what a former process left, in order of arrival. Returns how many there were."""
        for record in records:
            try:
                command = parse_command(record.body)
            except Refused as exc:
                await self._give_up(record, exc)
                continue
            if record.final:
                self._undoing.queue(record, command, self._registry[record.verb])
            else:
                self.submit(record, command, resumed=True)
        self.open.expected_no_more(records)
        return len(records)

    async def cancel(self, operation_id: str) -> None:
        """Ask an operation to end: one that still waits for its turn ends here and now.

        Raises `NotFound` where it is unknown or ended, `FailedPrecondition` past its point of no return.
        """
        item = self.open.find(operation_id)
        if item is None:
            raise NotFound(f"no operation {operation_id} is waiting or running", code="unknown_operation")
        record = item.record
        if item.operation is None and record.final:
            await item.ended.wait()  # another cancel is about to end it, and answers are given for what is journaled
            return
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

    def stop(self) -> None:
        """Announce nothing more: what waits is taken up at the next start."""
        for item in self.open:
            item.announcement.hush()

    # --- inside -----------------------------------------------------------------------------------------------

    async def _wait_settled(self, key: str) -> None:
        if not self._ctx.executor.is_settled(key):
            log.warning("lane.blocked", lane=key)
            # No limit by design: a late call may still act on the instance, so nothing else may.
            await self._ctx.executor.wait_settled(key, None)

    async def _run(self, item: OpenOperation) -> None:
        record, journal = item.record, self._ctx.journal
        if record.final:
            return  # cancelled while it waited
        try:
            past = await journal.read(lambda: journal.store.steps(record.id)) if record.attempt else []
            operation = Operation(self._ctx, record, item.command, past)
            item.operation = operation
            with structlog.contextvars.bound_contextvars(**_names(record, item.command)):
                error, result = await attempt(self._ctx, item, operation)
                await self._finish(item, operation, error, result)
        finally:
            if record.final:
                self._close(item)

    async def _finish(
        self, item: OpenOperation, operation: Operation, error: BaseException | None, result: dict[str, Any]
    ) -> None:
        record = item.record
        undone = True
        if error is not None:
            record.error_code = problem_of(error).code
            undone = await operation.roll_back()
        else:
            record.error_code = None  # it ended well after all, if it was to be ended
        await operation.hush()
        await item.announcement.end()
        record.state = "succeeded" if error is None else state_of(error, begun=operation.begun)
        record.undo_pending = not undone
        whole = undone and not (error is not None and operation.lasting)
        change = operation.take_staged()
        conclude(
            self._ctx.journal,
            record,
            item.command,
            change,
            error=error,
            result=result,
            undone=whole,
            also_to=item.more_replies,
        )
        change.operation = replace(record)
        failpoint(f"{record.verb}:result:before")
        await self._ctx.journal.commit(change)
        failpoint(f"{record.verb}:result:after")
        log_done(record, error)
        if record.undo_pending:
            self._undoing.queue(record, item.command, item.route)

    async def _end_waiting(self, item: OpenOperation) -> None:
        """End an operation that never ran, because it was cancelled."""
        error = Cancelled("the operation was cancelled before it began")
        item.record.state, item.record.error_code = "cancelled", error.code
        await item.announcement.end()
        change = Change()
        conclude(self._ctx.journal, item.record, item.command, change, error=error, also_to=item.more_replies)
        change.operation = replace(item.record)
        await self._ctx.journal.commit(change)
        item.ended.set()
        self._close(item)
        log_done(item.record, error)

    async def _give_up(self, record: OperationRecord, exc: Refused) -> None:
        """End an operation whose command this version can no longer read."""
        log.error("operation.unreadable", operation=record.id, error=exc.message)
        if record.final:
            return  # it has had its final event; what it left stays noted in the journal
        record.state, record.error_code = "failed", exc.code
        change = Change()
        conclude(self._ctx.journal, record, None, change, error=exc, undone=False)
        change.operation = replace(record)
        await self._ctx.journal.commit(change)

    def _close(self, item: OpenOperation) -> None:
        self.open.remove(item.record.id)
        item.announcement.hush()
        self._let_go(item.record.instance_id)

    def _let_go(self, instance_id: str | None) -> None:
        if instance_id is not None:
            self.idle(instance_id)


def _names(record: OperationRecord, command: Command[Any]) -> dict[str, str]:
    """What every log line of an operation carries, down to the driver's threads."""
    names = {"operation": record.id, "verb": record.verb}
    if record.instance_id is not None:
        names["instance"] = record.instance_id
    if command.traceparent is not None:
        names["trace_id"] = command.traceparent.split("-")[1]
    return names
