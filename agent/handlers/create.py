"""`instance.create`: claim, image, storage, definition, start. Whatever fails, all of it is taken back."""

from __future__ import annotations

from pathlib import Path

from agent.core.context import now
from agent.core.operation import Json, Operation, require
from agent.core.registry import Route
from agent.drivers.base import PreparedImage
from agent.errors import AlreadyExists, Cancelled, NotFound
from agent.handlers.observe import read_back
from agent.handlers.storage import storage_removal
from agent.handlers.view import instance_view
from agent.messages.commands import InstanceCreate
from agent.messages.events import InstanceRemoved
from agent.messages.results import InstanceView
from agent.messages.spec import BOOT_INITRD, BOOT_KERNEL, ROOT, ImageSource, InstanceSpec, images_of
from agent.store.base import InstanceRecord


async def create(op: Operation, data: InstanceCreate) -> InstanceView:
    """Make an instance. Refused: id or name taken, host disabled, does not fit, bad image."""
    spec, driver, instance_id = data.spec, op.ctx.driver, op.instance_id
    if not op.begun and op.record.state != "undoing":
        if not _claimed(op):
            _require_free(op, spec)
            await op.query(driver.check, spec)
        _claim(op, data)

    async def keep_claim() -> Json:
        return None  # made above, so that check and claim are one and a refusal precedes the first step

    async def storage() -> Json:
        await op.long(driver.create_storage, instance_id, spec, images)
        return None

    async def remove_storage() -> None:
        await op.long(storage_removal(driver), instance_id)

    async def define() -> Json:
        await op.mutate(driver.define, instance_id, spec, generation=op.command.generation or 0)
        return None

    async def undefine() -> None:
        if await _is_ours(op):
            await op.mutate(driver.undefine, instance_id)

    async def start() -> Json:
        await op.mutate(driver.start, instance_id)
        return None

    async def destroy() -> None:
        if await _is_ours(op):
            await op.mutate(driver.destroy, instance_id)

    await op.step("claim", keep_claim, undo=lambda: _unclaim(op, data))
    images = await prepared_images(op, spec)
    await op.step("storage", storage, undo=remove_storage)
    await op.step("define", define, undo=undefine)
    if data.start:
        await op.step("start", start, undo=destroy)
    record = await read_back(op, reason="created")
    if op.record.cancel_requested:
        # It came while the last step ran, and was promised: there is no next step that would look for it.
        raise Cancelled("the operation was cancelled")
    op.ctx.heartbeat_now()
    return instance_view(record)


def _claimed(op: Operation) -> bool:
    """Whether this operation claimed already, in a run that ended before its first step was committed."""
    known = op.ctx.instances.find(op.instance_id)
    return known is not None and known.created_by == op.id


def _require_free(op: Operation, spec: InstanceSpec) -> None:
    """Raise unless id and name are free and the host takes instances."""
    ctx, instance_id = op.ctx, op.instance_id
    if ctx.instances.find(instance_id) is not None or instance_id in ctx.state.foreign:
        raise AlreadyExists(f"an instance {instance_id} is on this host already", code="instance_exists")
    named = ctx.instances.named(spec.name) or next((d for d in ctx.state.foreign.values() if d.name == spec.name), None)
    if named is not None:
        raise AlreadyExists(f"the name {spec.name} is taken by {named.id}; choose another", code="name_taken")
    require(
        ctx.state.enabled,
        f"this host takes no new instances: {ctx.state.disabled_reason or 'it was disabled'}",
        code="host_disabled",
    )


def _claim(op: Operation, data: InstanceCreate) -> None:
    """Check and claim without giving way to another create. The claim is committed with the first step."""
    ctx, instance_id = op.ctx, op.instance_id
    if _claimed(op):
        op.stage(instance=ctx.instances.get(instance_id))
        return
    _require_free(op, data.spec)  # again: another create may have come while the driver was asked
    ctx.capacity.admit(data.spec, ctx.instances.all(), ctx.state.foreign.values())
    at = now()
    record = InstanceRecord(
        id=instance_id,
        spec=data.spec,
        generation=op.command.generation or 0,
        desired="running" if data.start else "stopped",
        observed="stopped",
        reason="creating",
        created_by=op.id,
        created_at=at,
        updated_at=at,
    )
    op.stage(instance=ctx.instances.put(record))


async def _is_ours(op: Operation) -> bool:
    """Whether there is something of ours to undo: an undo that was cut off may have removed it, and what somebody else
    defined under this id meanwhile is not to be touched.
    """
    try:
        info = await op.query(op.ctx.driver.get, op.instance_id)
    except NotFound:
        return False
    return info.owned


async def _unclaim(op: Operation, data: InstanceCreate) -> None:
    record = op.ctx.instances.find(op.instance_id)
    if record is not None and record.created_by == op.id:
        op.ctx.instances.remove(op.instance_id)
        op.stage(removed=op.instance_id, event=InstanceRemoved(instance_id=op.instance_id, name=data.spec.name))
        op.ctx.heartbeat_now()


async def prepared_images(op: Operation, spec: InstanceSpec) -> dict[str, PreparedImage]:
    """Fetch and verify every image of the spec, in one step each: `image` for the root disk, `image:<name>` else."""
    return {name: await prepared_image(op, name, source) for name, source in images_of(spec).items()}


async def prepared_image(op: Operation, name: str, source: ImageSource, *, ours: bool = False) -> PreparedImage:
    """Fetch and verify one image in a step of its own. `ours`: an export of this agent, which nobody has signed."""

    async def fetch() -> Json:
        image = await op.ctx.images.prepare(
            source,
            lambda done, total: op.progress(done_bytes=done, total_bytes=total),
            boot_file=name in {BOOT_KERNEL, BOOT_INITRD},
            ours=ours,
        )
        return {"path": str(image.path), "format": image.format, "virtual_size_bytes": image.virtual_size_bytes}

    step = "image" if name == ROOT else f"image:{name}"
    found = await op.step(step, fetch, cancellable=True, harmless=True) or {}
    return PreparedImage(
        path=Path(found["path"]),
        format=found["format"],
        virtual_size_bytes=found["virtual_size_bytes"],
        sha256=source.sha256,
    )


ROUTES = (Route("instance.create", "build", create),)
