"""`instance.rescue` and `instance.unrescue`: a system from elsewhere in front of the instance's own disks."""

from __future__ import annotations

from datetime import datetime

from agent.core.context import now
from agent.core.operation import Json, Operation, require
from agent.core.registry import Route
from agent.errors import Cancelled, Internal
from agent.handlers import halt
from agent.handlers.create import prepared_image
from agent.handlers.observe import read_back
from agent.handlers.rebuild import generation_of
from agent.handlers.storage import uncancellable
from agent.handlers.view import instance_view
from agent.messages.life import Life, Rescue
from agent.messages.results import InstanceView
from agent.messages.spec import ROOT
from agent.messages.verbs_rebuild import InstanceRescue, InstanceUnrescue


async def rescue(op: Operation, data: InstanceRescue) -> InstanceView:
    """Boot the instance from a rescue disk. Whatever fails, it is as before."""
    driver, instance_id = op.ctx.driver, op.instance_id
    record = op.ctx.instances.get(instance_id)
    spec, generation = record.spec, generation_of(op, record)
    before = record.life.model_copy(update={"rescue": None})  # also where a former run has staged it

    async def make() -> Json:
        await op.long(driver.create_rescue_disk, instance_id, spec, image)
        return {"since": now().isoformat()}

    async def remove() -> None:
        await op.long(uncancellable(driver.remove_rescue_disk), instance_id, spec)

    found = await halt.look(op)
    image = await prepared_image(op, ROOT, data.image)
    made = await op.step("disk", make, undo=remove)
    rescued = before.model_copy(
        update={"rescue": Rescue(image=data.image, since=_since(made), was_running=found.was_up)}
    )
    await halt.halt(op, found, data.timeout_s, force=data.force)
    await op.step(
        "define",
        lambda: define_life(op, rescued, generation),
        undo=lambda: define_again(op, before, record.generation),
    )
    await op.step("start", lambda: halt.start(op), undo=lambda: halt.end(op))
    await read_back(op, reason="rescued")
    refuse_if_cancelled(op)  # before anything is wanted otherwise: a policy would see to that
    desired = op.ctx.instances.get(instance_id).desired
    record = op.ctx.instances.update(instance_id, desired="running", life=rescued)
    event = op.ctx.instances.state_event(record, previous=record.observed) if desired != "running" else None
    op.stage(instance=record, event=event)
    return instance_view(record)


async def unrescue(op: Operation, data: InstanceUnrescue) -> InstanceView:
    """Take the rescue disk away and start the guest from its own disks if it ran when it was rescued."""
    driver, instance_id = op.ctx.driver, op.instance_id
    record = op.ctx.instances.get(instance_id)
    require(record.life.rescue is not None or op.begun, "the instance is not rescued", code="instance_not_rescued")
    before, generation = record.life, generation_of(op, record)
    after = before.model_copy(update={"rescue": None})

    async def remove() -> Json:
        await op.long(uncancellable(driver.remove_rescue_disk), instance_id, record.spec)
        return None

    found = await halt.look(op, was_running=before.rescue is not None and before.rescue.was_running)
    restart = bool(found.facts.get("was_running"))
    await halt.halt(op, found, data.timeout_s, force=data.force)
    await op.step(
        "define", lambda: define_life(op, after, generation), undo=lambda: define_again(op, before, record.generation)
    )
    op.point_of_no_return()
    # The definition does not name the disk any more: the instance is not rescued, whatever becomes of the rest.
    op.stage(instance=op.ctx.instances.update(instance_id, life=after))
    await op.step("disk", remove)
    if restart:
        await op.step("start", lambda: halt.start(op))
    return instance_view(await read_back(op, desired="running" if restart else "stopped", reason="unrescued"))


def refuse_if_cancelled(op: Operation) -> None:
    """Keep the promise of a cancel that came while the last step ran: there is no next step that would look for it."""
    if op.record.cancel_requested:
        raise Cancelled("the operation was cancelled")


async def define_life(op: Operation, life: Life, generation: int) -> Json:
    record = op.ctx.instances.get(op.instance_id)
    await op.mutate(op.ctx.driver.define, op.instance_id, record.spec, generation=generation, life=life)
    return None


async def define_again(op: Operation, life: Life, generation: int) -> None:
    await define_life(op, life, generation)


def _since(made: Json) -> datetime:
    if made is None:
        raise Internal("step disk has no output")
    return datetime.fromisoformat(made["since"])


ROUTES = (Route("instance.rescue", "build", rescue), Route("instance.unrescue", "power", unrescue))
