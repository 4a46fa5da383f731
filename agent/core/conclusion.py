"""The end of an operation: its one final event, and what the log and the metrics say of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import structlog

from agent import metrics
from agent.core.context import now
from agent.core.journal import Journal
from agent.core.outcome import final_event, problem_of
from agent.messages.commands import Command
from agent.store.base import Change, OperationRecord

log = structlog.get_logger("message")


def conclude(
    journal: Journal,
    record: OperationRecord,
    command: Command[Any] | None,
    change: Change,
    *,
    error: BaseException | None = None,
    result: dict[str, Any] | None = None,
    undone: bool = True,
    also_to: Sequence[str] = (),
) -> None:
    """Add the final event to the change that ends the operation; its `state` must be final already.

    `undone`: nothing is left of a failed operation. `also_to`: who wants the answer besides the sender.
    """
    record.finished_at = now()
    event = final_event(record, error, result or {}, at=record.finished_at, undone=undone)
    pending = journal.event_of(record, command, event)
    pending = replace(pending, cc=tuple(dict.fromkeys((*pending.cc, *also_to))))
    record.final_body = pending.body
    change.events.append(pending)
    change.final_of = record.id


def log_done(record: OperationRecord, error: BaseException | None) -> None:
    """Log and count an operation that has ended after it waited for its turn."""
    at = record.finished_at or now()
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
