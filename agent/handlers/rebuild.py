"""`instance.rebuild`: another system on the same instance.

Everything is made beside the old disks first. The swap is the point of no return: before it the old guest comes back as
it was, after it the new one is finished.
"""

from __future__ import annotations

from agent.core.operation import Json, Operation
from agent.core.registry import Route
from agent.handlers import halt
from agent.handlers.create import prepared_image
from agent.handlers.observe import read_back
from agent.handlers.states import refuse_snapshots
from agent.handlers.storage import uncancellable
from agent.handlers.view import instance_view
from agent.messages.results import InstanceView
from agent.messages.spec import ROOT, InstanceSpec
from agent.messages.verbs_rebuild import InstanceRebuild
from agent.store.base import InstanceRecord


def rebuilt_spec(spec: InstanceSpec, data: InstanceRebuild) -> InstanceSpec:
    """The spec with the new image, and the new seed if there is one. Computing it again changes nothing."""
    root = spec.root_disk.model_copy(update={"image": data.image})
    return spec.model_copy(update={"root_disk": root, "seed": data.seed or spec.seed})


async def rebuild(op: Operation, data: InstanceRebuild) -> InstanceView:
    """Give the instance a new root disk, and new ephemeral and swap disks; start it if it was running."""
    driver, instance_id = op.ctx.driver, op.instance_id
    record = op.ctx.instances.get(instance_id)
    old, new = record.spec, rebuilt_spec(record.spec, data)
    generation = generation_of(op, record)

    async def make() -> Json:
        await op.long(driver.prepare_rebuild, instance_id, new, image)
        return None

    async def discard() -> None:
        await op.long(uncancellable(driver.discard_rebuild), instance_id, new)

    async def define() -> Json:
        await op.mutate(driver.define, instance_id, new, generation=generation, life=record.life)
        return None

    async def define_old() -> None:
        await op.mutate(driver.define, instance_id, old, generation=record.generation, life=record.life)

    async def swap() -> Json:
        await op.mutate(driver.apply_rebuild, instance_id, new)
        return None

    await refuse_snapshots(op)
    found = await halt.look(op)
    image = await prepared_image(op, ROOT, data.image)
    await op.step("make", make, undo=discard)
    await halt.halt(op, found, data.timeout_s, force=data.force)
    # Before the swap, where it can be taken back: the new definition names the same disks.
    await op.step("define", define, undo=define_old)
    op.point_of_no_return()
    await op.step("swap", swap)
    # From here on the instance is of the new image, whatever becomes of its start.
    op.stage(instance=op.ctx.instances.update(instance_id, spec=new))
    if found.was_up:
        await op.step("start", lambda: halt.start(op))
    record = await read_back(op, desired="running" if found.was_up else None, reason="rebuilt")
    return instance_view(record)


def generation_of(op: Operation, record: InstanceRecord) -> int:
    """The generation that the definition carries from now on."""
    return max(op.command.generation or 0, record.generation)


ROUTES = (Route("instance.rebuild", "build", rebuild),)
