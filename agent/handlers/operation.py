"""Verbs about operations: show, cancel."""

from __future__ import annotations

from collections.abc import Callable

from pydantic_core import from_json

from agent.core.operation import Operation
from agent.core.registry import Route
from agent.core.runner import Runner
from agent.errors import NotFound
from agent.messages.commands import OperationCancel, OperationShow
from agent.messages.events import Problem
from agent.messages.results import CancelResult, OperationView, StepView
from agent.store.base import OperationRecord, StepRecord


def operation_view(record: OperationRecord, steps: list[StepRecord]) -> OperationView:
    """Show an operation as the journal has it."""
    error = None
    if record.final_body is not None and record.error_code is not None:
        data = from_json(record.final_body).get("data", {})
        error = Problem.model_validate(data["error"]) if "error" in data else None
    return OperationView(
        id=record.id,
        verb=record.verb,
        instance_id=record.instance_id,
        state=record.state,
        attempt=record.attempt,
        accepted_at=record.accepted_at,
        started_at=record.started_at,
        finished_at=record.finished_at,
        cancel_requested=record.cancel_requested,
        undo_pending=record.undo_pending,
        error=error,
        steps=[StepView(index=step.index, name=step.name, state=step.state) for step in steps],
    )


async def show(op: Operation, data: OperationShow) -> OperationView:
    """Show one operation with its steps."""
    record = await op.ctx.journal.store.operation(data.operation_id)
    if record is None:
        raise NotFound(f"the journal has no operation {data.operation_id}", code="unknown_operation")
    return operation_view(record, await op.ctx.journal.store.steps(record.id))


def routes(runner: Callable[[], Runner]) -> tuple[Route, ...]:
    """Routes of this family; the runner is asked for when a command comes, since it is made after the routes."""

    async def cancel(_op: Operation, data: OperationCancel) -> CancelResult:
        await runner().cancel(data.operation_id)
        return CancelResult(operation_id=data.operation_id)

    return (
        Route("operation.show", "query", show, lane="none"),
        Route("operation.cancel", "query", cancel, lane="none"),
    )
