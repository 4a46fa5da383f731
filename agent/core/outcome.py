"""How a command ends: from errors to final states, events, and back from what the journal has of them."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from agent.errors import (
    AlreadyExists,
    Cancelled,
    ComputeError,
    Conflict,
    DeadlineExceeded,
    Expired,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    StaleGeneration,
    Unsupported,
)
from agent.messages.codes import ERROR_CODES
from agent.messages.events import (
    OperationCancelled,
    OperationEvent,
    OperationExpired,
    OperationFailed,
    OperationRejected,
    OperationState,
    OperationSucceeded,
    Problem,
)
from agent.store.base import OperationRecord

OVERDUE = "operation_overdue"
"""Code of an operation that was ended because it ran too long."""
_ERROR_OF_CODE = {row.code: row.error for row in ERROR_CODES}
"""Code of the contract → its class: whether a retry can help is known from the code alone."""

REFUSALS = (
    InvalidArgument,
    NotFound,
    AlreadyExists,
    Conflict,
    StaleGeneration,
    FailedPrecondition,
    Unsupported,
    ResourceExhausted,
)
"""Errors that, before any step has begun, mean that the command was refused and nothing happened."""


def problem_of(error: BaseException) -> Problem:
    """Describe an error for the wire. What is not ours is `internal`, without its text: it may hold secrets."""
    if not isinstance(error, ComputeError):
        error = Internal(f"an unexpected {type(error).__name__} ended the operation; see the agent's log")
    return Problem(code=error.code, message=error.message, retryable=error.retryable, details=dict(error.details))


def state_of(error: BaseException, *, begun: bool) -> OperationState:
    """Which final state an error means. `begun`: a step of the operation had been started."""
    if isinstance(error, Cancelled):
        return "cancelled"
    if isinstance(error, Expired):
        return "expired"
    if isinstance(error, REFUSALS) and not begun:
        return "rejected"
    return "failed"


def final_event(
    record: OperationRecord, error: BaseException | None, result: dict[str, Any], *, at: datetime, undone: bool = True
) -> OperationEvent:
    """Build the final event of an operation whose `state` is already final."""
    common: dict[str, Any] = {
        "operation_id": record.id,
        "verb": record.verb,
        "instance_id": record.instance_id,
        "duration_ms": round((at - record.accepted_at).total_seconds() * 1000, 3),
    }
    if error is None:
        return OperationSucceeded(result=result, **common)
    problem = problem_of(error)
    match record.state:
        case "rejected":
            return OperationRejected(error=problem, **common)
        case "cancelled":
            return OperationCancelled(error=problem, **common)
        case "expired":
            return OperationExpired(error=problem, **common)
        case _:
            return OperationFailed(error=problem, undone=undone, **common)


def overdue_error() -> ComputeError:
    """The error of an operation that was ended because it ran too long."""
    return DeadlineExceeded(
        "the operation ran longer than this host allows for its kind of work (deadlines.operation_*_s), and was ended",
        code=OVERDUE,
    )


def error_of_interrupted(record: OperationRecord) -> ComputeError:
    """The error of an operation that a former process began to roll back: of it, only the code is left."""
    if record.error_code == OVERDUE:
        return overdue_error()
    if record.cancel_requested:
        return Cancelled("the operation was cancelled")
    known = _ERROR_OF_CODE.get(record.error_code or "")
    if known is not None and known is not Internal:
        return known(
            "the operation failed, the agent was restarted while it was undone, and the undoing was finished then",
            code=record.error_code,
        )
    return Internal(
        "the operation failed, the agent was restarted while it was undone, and the undoing was finished after that",
        code=record.error_code or "interrupted",
    )
