"""Ended operations that left something: it is taken back later, in the lane that they ran in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import structlog

from agent.core.context import Context
from agent.core.lanes import Lanes
from agent.core.open_operations import OpenOperations
from agent.core.operation import Operation, RollBack
from agent.core.registry import Route
from agent.errors import ComputeError, NotFound
from agent.messages.commands import Command
from agent.store.base import Change, OperationRecord

log = structlog.get_logger("message")


class Undoing:
    """Tries again what could not be undone when the operation ended. Their instances are busy until it is done."""

    def __init__(
        self, ctx: Context, lanes: Lanes, open_operations: OpenOperations, done: Callable[[str | None], None]
    ) -> None:
        """`done` is told the instance id (or None) of each operation of which nothing is left."""
        self._ctx = ctx
        self._lanes = lanes
        self._open = open_operations
        self._done = done
        self._queued: set[str] = set()

    def queue(self, record: OperationRecord, command: Command[Any], route: Route) -> None:
        """Try again once it is this operation's turn, unless it waits for that already."""
        if record.id in self._queued:
            return
        self._queued.add(record.id)
        self._open.leave(record)
        self._lanes.put(route.lane_of(record), route.work, lambda: self._undo(record, command, route))

    async def _undo(self, record: OperationRecord, command: Command[Any], route: Route) -> None:
        self._queued.discard(record.id)
        if self._outlived(record):
            await self._end(record, "operation.undo_obsolete")
            return
        past = await self._ctx.journal.read(lambda: self._ctx.journal.store.steps(record.id))
        replayed = replace(record, state="undoing")
        operation = Operation(self._ctx, replayed, command, past)
        try:
            if route.handler is not None:
                await route.handler(operation, command.data)
        except RollBack:
            pass
        except ComputeError as exc:
            if isinstance(exc, NotFound) and self._is_gone(record):
                await self._end(record, "operation.undo_obsolete")
                return
            log.warning("operation.undo_replay_failed", operation=record.id, code=exc.code)
            return
        undone = await operation.roll_back()
        change = operation.take_staged()
        record.undo_pending = not undone
        change.operation = replace(record)
        await self._ctx.journal.commit(change)
        if undone:
            self._open.left_nothing(record)
            self._done(record.instance_id)
        log.info("operation.undo_finished" if undone else "operation.undo_still_pending", operation=record.id)

    def _is_gone(self, record: OperationRecord) -> bool:
        """Whether its instance was deleted since, with all that the operation left of it."""
        return record.instance_id is not None and self._ctx.instances.find(record.instance_id) is None

    def _outlived(self, record: OperationRecord) -> bool:
        """Whether another instance has its instance's id since, which an undo must not touch."""
        known = None if record.instance_id is None else self._ctx.instances.find(record.instance_id)
        return known is not None and known.created_by != record.id and known.created_at > record.accepted_at

    async def _end(self, record: OperationRecord, why: str) -> None:
        record.undo_pending = False
        await self._ctx.journal.commit(Change(operation=replace(record)))
        self._open.left_nothing(record)
        self._done(record.instance_id)
        log.info(why, operation=record.id)
