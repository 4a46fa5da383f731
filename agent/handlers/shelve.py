"""`instance.shelve` and `instance.unshelve`: off the host into exports, and back.

A shelved instance keeps its record and its definition, whose metadata says where the exports are. It has no disks here
and claims nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from urllib.parse import unquote, urlsplit

from agent.core.context import now
from agent.core.operation import Json, Operation, Undo, require
from agent.core.registry import Route
from agent.drivers.verbs.rebuild import ImportedDisk
from agent.errors import FailedPrecondition
from agent.handlers import halt
from agent.handlers.create import prepared_image
from agent.handlers.exporting import check_export, data_disks, export_disks
from agent.handlers.observe import read_back
from agent.handlers.rebuild import generation_of
from agent.handlers.rescue import define_again, define_life
from agent.handlers.states import refuse_snapshots
from agent.handlers.view import instance_view
from agent.messages.life import Shelf, ShelvedDisk
from agent.messages.results import InstanceView
from agent.messages.spec import ImageSource, InstanceSpec, images_of
from agent.messages.verbs_rebuild import InstanceShelve, InstanceUnshelve
from agent.messages.verbs_snapshot import ExportedDisk


async def shelve(op: Operation, data: InstanceShelve) -> InstanceView:
    """Export the disks and remove them. Until the exports are complete all of it is taken back."""
    instance_id = op.instance_id
    record = op.ctx.instances.get(instance_id)
    before = record.life.model_copy(update={"shelf": None})
    disks = data_disks(record.spec)
    if not op.begun:
        require(
            data.target.url is None or len(disks) == 1 or "{disk}" in data.target.url,
            "the instance has several disks: put {disk} into the url",
            code="invalid_argument",
        )
        await check_export(op, disks, data.target, "qcow2")
        await refuse_snapshots(op)

    async def remove_disks() -> Json:
        await op.long(op.ctx.driver.shelve_storage, instance_id)
        return None

    found = await halt.look(op, since=now().isoformat())
    await halt.halt(op, found, data.timeout_s, force=data.force)
    exported = await export_disks(op, disks, data.target)
    shelf = _shelf(exported, since=str(found.facts.get("since")), was_running=found.was_up)
    after = before.model_copy(update={"shelf": shelf})
    await op.step(
        "define",
        lambda: define_life(op, after, generation_of(op, record)),
        undo=lambda: define_again(op, before, record.generation),
    )
    op.point_of_no_return()
    # The definition says that the exports are what counts now, whatever becomes of the disks that are left.
    op.stage(instance=op.ctx.instances.update(instance_id, life=after))
    await op.step("disks", remove_disks)
    record = await read_back(op, desired="stopped", reason="shelved")
    op.ctx.heartbeat_now()
    return instance_view(record)


async def unshelve(op: Operation, data: InstanceUnshelve) -> InstanceView:
    """Bring the instance back from its exports. Whatever fails, it is shelved as before."""
    driver, instance_id = op.ctx.driver, op.instance_id
    if not op.begun and op.record.state != "undoing":
        _claim(op)
    record = op.ctx.instances.get(instance_id)

    async def claim() -> Json:
        kept = op.ctx.instances.get(instance_id).life.shelf
        return None if kept is None else {"shelf": kept.model_dump(mode="json")}

    async def unclaim() -> None:
        kept = op.ctx.instances.get(instance_id).life
        if kept.shelf is not None:
            shelved = kept.shelf.model_copy(update={"returning": False})
            life = kept.model_copy(update={"shelf": shelved})
            op.stage(instance=op.ctx.instances.update(instance_id, life=life))

    async def remove() -> None:
        await op.long(driver.shelve_storage, instance_id)

    async def storage() -> Json:
        await op.long(driver.create_storage, instance_id, record.spec, images)
        return None

    claimed = await op.step("claim", claim, undo=unclaim)
    if claimed is None:
        raise FailedPrecondition("the instance is not shelved", code="instance_not_shelved")
    shelf = Shelf.model_validate(claimed["shelf"])
    images = {name: await prepared_image(op, name, source) for name, source in _small_images(record.spec).items()}
    for disk in shelf.disks:
        await _bring_back(op, record.spec, disk, data, undo=remove)
    await op.step("storage", storage, undo=remove)
    after = record.life.model_copy(update={"shelf": None})
    before = record.life.model_copy(update={"shelf": shelf.model_copy(update={"returning": False})})
    await op.step(
        "define",
        lambda: define_life(op, after, generation_of(op, record)),
        undo=lambda: define_again(op, before, record.generation),
    )
    if shelf.was_running:
        await op.step("start", lambda: halt.start(op), undo=lambda: halt.end(op))
    op.point_of_no_return()
    op.stage(instance=op.ctx.instances.update(instance_id, life=after))
    if not data.keep_exports:
        await op.step("exports", lambda: remove_exports(op, shelf))
    record = await read_back(op, desired="running" if shelf.was_running else "stopped", reason="unshelved")
    op.ctx.heartbeat_now()
    return instance_view(record)


async def remove_exports(op: Operation, shelf: Shelf) -> Json:
    """Remove the exports of a shelf, as far as their store or server lets us."""
    for disk in shelf.disks:
        await op.ctx.exports.remove(disk.url, disk.sha256)
    return None


def _shelf(exported: Sequence[ExportedDisk], *, since: str, was_running: bool) -> Shelf:
    disks = [
        ShelvedDisk(name=disk.name, url=disk.url, sha256=disk.sha256, size_bytes=disk.size_bytes) for disk in exported
    ]
    return Shelf(disks=disks, since=datetime.fromisoformat(since), was_running=was_running)


def _claim(op: Operation) -> None:
    """Check and claim without giving way to another. The claim is committed with the first step."""
    ctx = op.ctx
    record = ctx.instances.get(op.instance_id)
    shelf = record.life.shelf
    if shelf is None:
        raise FailedPrecondition("the instance is not shelved", code="instance_not_shelved")
    require(
        ctx.state.enabled,
        f"this host takes no new instances: {ctx.state.disabled_reason or 'it was disabled'}",
        code="host_disabled",
    )
    if not shelf.returning:
        ctx.capacity.admit(record.spec, ctx.instances.all(), ctx.state.foreign.values())
    life = record.life.model_copy(update={"shelf": shelf.model_copy(update={"returning": True})})
    op.stage(instance=ctx.instances.update(record.id, life=life))


async def _bring_back(
    op: Operation, spec: InstanceSpec, disk: ShelvedDisk, data: InstanceUnshelve, *, undo: Undo
) -> None:
    """Fetch one export if it is not in a store of this host, and make the disk of it."""
    url = data.url.replace("{disk}", disk.name) if data.url is not None else disk.url
    if url.startswith("file:"):
        source = ImportedDisk(disk.name, _in_store(op, url), disk.sha256)
    else:
        image = ImageSource(url=url, sha256=disk.sha256, format="qcow2")
        fetched = await prepared_image(op, f"shelved-{disk.name}", image, ours=True)
        source = ImportedDisk(disk.name, fetched.path, None)

    async def import_it() -> Json:
        await op.long(op.ctx.driver.import_disk, op.instance_id, spec, source)
        return None

    await op.step(f"import-{disk.name}", import_it, undo=undo)


def _in_store(op: Operation, url: str) -> Path:
    """The path of an export in a store that this host still has: no other file is read."""
    path = Path(unquote(urlsplit(url).path))
    require(
        path.parent in op.ctx.exports.policy.stores.values(),
        f"the folder {path.parent} is no export store of this host any more; configure it, or give a url",
        code="export_store_unknown",
    )
    return path


def _small_images(spec: InstanceSpec) -> dict[str, ImageSource]:
    """The images of the spec that no disk is made of: CDs, and the files of a kernel boot."""
    exported = set(data_disks(spec))
    return {name: source for name, source in images_of(spec).items() if name not in exported}


ROUTES = (Route("instance.shelve", "build", shelve), Route("instance.unshelve", "build", unshelve))
