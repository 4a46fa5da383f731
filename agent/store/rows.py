"""Records to table rows and back. Times are stored as seconds since the epoch, in UTC."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from agent.messages.life import ORDINARY, Life
from agent.messages.spec import InstanceSpec
from agent.store.base import InstanceRecord, OperationRecord, PendingEvent, SequencedEvent, StepRecord


def _seconds(at: datetime | None) -> float | None:
    return None if at is None else at.timestamp()


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def operation_row(record: OperationRecord) -> tuple[Any, ...]:
    """Row for an insert."""
    return (
        record.id,
        record.verb,
        record.instance_id,
        record.body,
        record.reply_to,
        record.correlation_id,
        record.state,
        record.accepted_at.timestamp(),
        record.attempt,
        _seconds(record.started_at),
        _seconds(record.finished_at),
        record.cancel_requested,
        record.undo_pending,
        record.error_code,
        record.final_body,
        record.final_sequence,
    )


def operation_update_row(record: OperationRecord) -> tuple[Any, ...]:
    """Row for an update of the state columns."""
    return (
        record.state,
        record.attempt,
        _seconds(record.started_at),
        _seconds(record.finished_at),
        record.cancel_requested,
        record.undo_pending,
        record.error_code,
        record.final_body,
        record.id,
        _seconds(record.finished_at),
    )


def operation_of(row: tuple[Any, ...]) -> OperationRecord:
    """Record of a row of `OPERATION_COLUMNS`."""
    return OperationRecord(
        id=row[0],
        verb=row[1],
        instance_id=row[2],
        body=row[3],
        reply_to=row[4],
        correlation_id=row[5],
        state=row[6],
        accepted_at=_time(row[7]),
        attempt=row[8],
        started_at=None if row[9] is None else _time(row[9]),
        finished_at=None if row[10] is None else _time(row[10]),
        cancel_requested=bool(row[11]),
        undo_pending=bool(row[12]),
        error_code=row[13],
        final_body=row[14],
        final_sequence=row[15],
    )


def step_row(step: StepRecord) -> tuple[Any, ...]:
    """Row of a step."""
    return (step.operation_id, step.index, step.name, step.state, step.output)


def step_of(row: tuple[Any, ...]) -> StepRecord:
    """Record of a step's row."""
    return StepRecord(*row)


def instance_row(record: InstanceRecord) -> tuple[Any, ...]:
    """Row of an instance."""
    return (
        record.id,
        record.spec.model_dump_json().encode(),
        record.generation,
        record.desired,
        record.observed,
        record.reason,
        record.created_by,
        record.created_at.timestamp(),
        record.updated_at.timestamp(),
        None if record.life == ORDINARY else record.life.model_dump_json(exclude_none=True).encode(),
    )


def instance_of(row: tuple[Any, ...]) -> InstanceRecord:
    """Record of an instance's row."""
    return InstanceRecord(
        id=row[0],
        spec=InstanceSpec.model_validate_json(row[1]),
        generation=row[2],
        desired=row[3],
        observed=row[4],
        reason=row[5],
        created_by=row[6],
        created_at=_time(row[7]),
        updated_at=_time(row[8]),
        life=ORDINARY if row[9] is None else Life.model_validate_json(row[9]),
    )


def event_row(event: PendingEvent) -> tuple[Any, ...]:
    """Row of a waiting event."""
    return (event.id, event.routing_key, event.body, " ".join(event.cc), event.correlation_id)


def event_of(row: tuple[Any, ...]) -> SequencedEvent:
    """Event of a row of `SELECT_EVENTS`."""
    return SequencedEvent(row[0], PendingEvent(row[1], row[2], row[3], tuple(row[4].split()), row[5]))
