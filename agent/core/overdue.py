"""Operations that run longer than the host allows for their kind of work."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime

import structlog

from agent.core.context import Context
from agent.core.open_operations import OpenOperation
from agent.core.outcome import OVERDUE
from agent.core.runner import Runner
from agent.errors import ComputeError

log = structlog.get_logger("message")


async def end_overdue(ctx: Context, runner: Runner, at: datetime, limits_s: Mapping[str, float]) -> dict[str, str]:
    """Cancel operations that run longer than the limit of their class of work; 0, or none named: no limit.

    Returns operation id → sentence for each that could not be ended yet, and for each that waits behind a stuck call.
    """
    stuck: dict[str, str] = {}
    for item in runner.open:
        record, operation = item.record, item.operation
        name = f"{record.verb} {record.id}"
        if operation is None:
            if item.acts and record.instance_id and not ctx.executor.is_settled(record.instance_id):
                stuck[record.id] = f"{name} waits behind a hypervisor call that does not return"
        elif not _is_overdue(item, at, limits_s):
            continue
        elif record.error_code == OVERDUE or record.cancel_requested:
            stuck[record.id] = f"{name} is overdue and was cancelled; its present step has not ended yet"
        elif record.state == "undoing":
            stuck[record.id] = f"{name} is overdue; it is being undone"
        elif not operation.can_be_cancelled:
            stuck[record.id] = f"{name} is overdue, and past the point from which it can be taken back"
        else:
            log.warning("operation.overdue", verb=record.verb, operation=record.id, limit_s=limits_s[item.route.work])
            record.error_code = OVERDUE
            stuck[record.id] = f"{name} is overdue and was cancelled"
            with suppress(ComputeError):  # it ended, or passed its point of no return, just now
                await runner.cancel(record.id)
    return stuck


def _is_overdue(item: OpenOperation, at: datetime, limits_s: Mapping[str, float]) -> bool:
    limit_s = limits_s.get(item.route.work, 0.0)
    if not limit_s or item.record.started_at is None:
        return False
    return (at - item.record.started_at).total_seconds() > limit_s
