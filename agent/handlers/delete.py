"""`instance.delete`: end, undefine, remove storage, forget. There is no way back, only a next try.

With `restore_within_s` it is a soft delete (`restore`), which has one.
"""

from __future__ import annotations

from contextlib import suppress

from agent.core.context import now
from agent.core.operation import Json, Operation, require
from agent.core.registry import Route
from agent.errors import NotFound
from agent.handlers.restore import soft_delete
from agent.handlers.shelve import remove_exports
from agent.handlers.storage import storage_removal
from agent.messages.commands import InstanceDelete
from agent.messages.events import InstanceRemoved
from agent.messages.results import DeleteResult


async def delete(op: Operation, data: InstanceDelete) -> DeleteResult:
    """Remove an instance, at once or, with `restore_within_s`, when nobody has restored it in that time."""
    if data.restore_within_s is not None:
        return await soft_delete(op, data)
    if data.if_overdue and not op.begun:
        mark = op.ctx.instances.get(op.instance_id).life.soft_delete
        require(
            mark is not None and mark.restore_until <= now(),
            "the instance is not deleted, or can be restored yet",
            code="delete_not_due",
        )
    return await _remove(op, data)


async def _remove(op: Operation, data: InstanceDelete) -> DeleteResult:
    """Remove an instance and everything it owns here. After a failure the same command with a new id goes on."""
    driver, instance_id = op.ctx.driver, op.instance_id
    op.point_of_no_return()
    if not op.done_before("destroy"):
        record = op.ctx.instances.get(instance_id)
        op.stage(instance=op.ctx.instances.update(record.id, desired="deleted"))

    async def destroy() -> Json:
        with suppress(NotFound):  # somebody else removed the domain; what is left of it is ours to remove
            await op.mutate(driver.destroy, instance_id)
        return None

    async def undefine() -> Json:
        await op.mutate(driver.undefine, instance_id)
        return None

    async def storage() -> Json:
        await op.long(storage_removal(driver), instance_id)
        return None

    async def brought_along() -> Json:
        assert adopted is not None  # noqa: S101 - this step is only there where it is
        await op.mutate(driver.delete_adopted_disks, instance_id, adopted.disks)
        return None

    known = op.ctx.instances.find(instance_id)
    adopted = known.life.adopted if known is not None else None
    shelf = None if known is None or data.keep_exports else known.life.shelf
    await op.step("destroy", destroy)
    await op.step("undefine", undefine)
    await op.step("storage", storage)
    if adopted is not None and adopted.own_disks:
        await op.step("adopted-disks", brought_along)
    if shelf is not None:
        await op.step("exports", lambda: remove_exports(op, shelf))  # they are the instance's disks
    known = op.ctx.instances.find(instance_id)
    if known is not None:
        op.ctx.instances.remove(instance_id)
        op.stage(removed=instance_id, event=InstanceRemoved(instance_id=instance_id, name=known.name))
    op.ctx.heartbeat_now()
    return DeleteResult(instance_id=instance_id)


ROUTES = (Route("instance.delete", "power", delete),)
