"""One attempt at an operation: may it start, what does its handler say, and how is that told apart from a failure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import structlog
from pydantic import BaseModel

from agent.core.adopted import check_adopted
from agent.core.context import Context, now
from agent.core.open_operations import OpenOperation
from agent.core.operation import Operation, RollBack
from agent.core.outcome import OVERDUE, error_of_interrupted, overdue_error
from agent.drivers.base import OPTIONAL_VERBS
from agent.errors import Cancelled, ComputeError, Expired, Internal, Unsupported
from agent.messages.commands import Command
from agent.store.base import Change, OperationRecord

log = structlog.get_logger("message")

MAX_ATTEMPTS = 5
"""An operation that was interrupted this often is rolled back: it may be what kills the agent."""


async def attempt(
    ctx: Context, item: OpenOperation, operation: Operation
) -> tuple[BaseException | None, dict[str, Any]]:
    """Run the handler once. Returns what it failed of, or None, and its result; never raises, but when cancelled.

    What was begun and failed is not undone yet: that is `operation.roll_back`.
    """
    record = item.record
    try:
        _check(ctx, record, item.command)
        record.attempt += 1
        if record.state != "undoing":
            record.state = "running"
            record.started_at = now()
        operation.mark_started()
        if item.resumed:
            # Also one that never came to its first commit must be found out if it is what kills the agent.
            await ctx.journal.commit(Change(operation=replace(record)))
        item.announcement.started(operation)
        if record.state == "undoing" and not operation.begun:
            raise RollBack  # nothing was begun, so nothing of the handler is to be run
        if item.route.handler is None:
            raise Internal(f"{record.verb} has no handler")
        returned: BaseModel | None = await item.route.handler(operation, item.command.data)
        operation.mark_returned()
        if record.state == "undoing":
            return error_of_interrupted(record), {}
        return None, returned.model_dump(mode="json", exclude_none=True) if returned is not None else {}
    except RollBack:
        return error_of_interrupted(record), {}
    except Cancelled as exc:
        return (overdue_error() if record.error_code == OVERDUE else exc), {}
    except ComputeError as exc:
        return exc, {}
    except Exception as exc:
        log.exception("operation.unexpected_error", verb=record.verb)
        return exc, {}


def _check(ctx: Context, record: OperationRecord, command: Command[Any]) -> None:
    """Refuse an operation that must not run, any more or at all; mark one that is only to be undone."""
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
        check_adopted(record.verb, ctx.instances.find(record.instance_id))
    verb, known = record.verb, ctx.state.capabilities
    # Before the hypervisor was first asked nothing is known: the driver itself will refuse what it cannot do.
    if verb in OPTIONAL_VERBS and verb not in known.verbs and known.hypervisor_type != "unknown":
        raise Unsupported(f"driver {ctx.driver.name} cannot do {verb} on this host", code="verb_unsupported", verb=verb)
