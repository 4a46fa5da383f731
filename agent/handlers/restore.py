"""Soft delete, the way back from it, and its end when nobody came for the instance."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta

from agent.core.context import now
from agent.core.operation import Operation, require
from agent.core.registry import Route
from agent.handlers import halt
from agent.handlers.observe import read_back
from agent.handlers.rebuild import generation_of
from agent.handlers.rescue import define_again, define_life, refuse_if_cancelled
from agent.handlers.view import instance_view
from agent.messages.commands import InstanceDelete
from agent.messages.life import SoftDelete
from agent.messages.results import DeleteResult, InstanceView
from agent.messages.verb import CommandData
from agent.messages.verbs_rebuild import InstanceRestore
from agent.store.base import InstanceRecord

RETRY_S = 600
"""A delete at the deadline that fails is given again after so long, under a new id."""


async def soft_delete(op: Operation, data: InstanceDelete) -> DeleteResult:
    """Stop the instance and mark it; whatever fails, it is as before."""
    record = op.ctx.instances.get(op.instance_id)
    require(
        record.life.soft_delete is None or op.begun,
        "the instance is deleted already; delete it without restore_within_s to remove it now",
        code="instance_soft_deleted",
    )
    require(
        record.life.shelf is None,
        "the instance is shelved: delete it for good, or unshelve it first",
        code="instance_shelved",
    )
    before = record.life.model_copy(update={"soft_delete": None})
    until = now() + timedelta(seconds=data.restore_within_s or 0.0)
    found = await halt.look(op, suspended=True, restore_until=until.isoformat())
    until = datetime.fromisoformat(found.facts.get("restore_until", until.isoformat()))
    after = before.model_copy(update={"soft_delete": SoftDelete(restore_until=until, was_running=found.was_up)})
    await halt.halt(op, found, data.timeout_s, force=False)
    await op.step(
        "define",
        lambda: define_life(op, after, generation_of(op, record)),
        undo=lambda: define_again(op, before, record.generation),
    )
    await read_back(op, reason="deleted")
    refuse_if_cancelled(op)
    record = op.ctx.instances.update(op.instance_id, desired="deleted", life=after)
    op.stage(instance=record, event=op.ctx.instances.state_event(record, previous=record.observed))
    return DeleteResult(instance_id=op.instance_id, restore_until=until)


async def restore(op: Operation, _data: InstanceRestore) -> InstanceView:
    """Take a soft delete back, and start the instance if it was running."""
    record = op.ctx.instances.get(op.instance_id)
    mark = record.life.soft_delete
    require(
        mark is not None or op.begun,
        "the instance is not deleted, so there is nothing to restore",
        code="instance_not_soft_deleted",
    )
    before, after = record.life, record.life.model_copy(update={"soft_delete": None})
    found = await halt.look(op, suspended=True, was_running=mark is not None and mark.was_running)
    restart = bool(found.facts.get("was_running"))
    await op.step(
        "define",
        lambda: define_life(op, after, generation_of(op, record)),
        undo=lambda: define_again(op, before, record.generation),
    )
    if restart:
        await op.step("start", lambda: halt.start(op), undo=lambda: halt.end(op))
    await read_back(op, reason="restored")
    refuse_if_cancelled(op)
    record = op.ctx.instances.update(op.instance_id, desired="running" if restart else "stopped", life=after)
    op.stage(instance=record, event=op.ctx.instances.state_event(record, previous=record.observed))
    return instance_view(record)


def overdue(record: InstanceRecord, at: datetime) -> Iterator[tuple[str, CommandData]]:
    """The delete that a soft-deleted instance is due for. It looks again itself, should a restore come first."""
    mark = record.life.soft_delete
    if mark is None or at < mark.restore_until:
        return
    tries = int((at - mark.restore_until).total_seconds() // RETRY_S)
    until = int(mark.restore_until.timestamp() * 1000)
    yield f"due/soft-delete/{record.id}/{until}/{tries}", InstanceDelete(if_overdue=True)


ROUTES = (Route("instance.restore", "power", restore),)
