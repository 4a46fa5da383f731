"""`instance.backup`: an export that is one of a series; `instance.list-backups`."""

from __future__ import annotations

from agent.core.operation import Json, Operation
from agent.core.registry import Route
from agent.exports.policy import store_folder
from agent.handlers.exporting import check_export, export_disks
from agent.messages.verbs_snapshot import (
    Backup,
    BackupListResult,
    BackupResult,
    ExportTarget,
    InstanceBackup,
    InstanceListBackups,
)


async def backup(op: Operation, data: InstanceBackup) -> BackupResult:
    """Make one more backup of a series; only when it is complete are older ones beyond `keep` removed."""
    exports, instance = op.ctx.exports, op.ctx.instances.get(op.instance_id)
    # The time of acceptance: the same in every run of this operation.
    name = f"{instance.name}-{data.series}-{op.record.accepted_at:%Y%m%dT%H%M%S.%fZ}"
    target = ExportTarget(store=data.store, name=name)
    if not op.begun:
        await check_export(op, data.disks, target, "qcow2")
    disks = await export_disks(op, data.disks, target, compress=data.compress)
    made = Backup(
        name=name,
        instance_id=op.instance_id,
        instance_name=instance.name,
        series=data.series,
        store=data.store,
        taken_at=op.record.accepted_at,
        disks=disks,
    )

    async def note() -> Json:
        await exports.note_backup(made)
        return None

    async def forget() -> None:
        await exports.remove_backup(made)

    async def choose() -> Json:
        series = await exports.backups(data.store, op.instance_id, data.series)
        return {"old": [old.name for old in series[data.keep :]]}

    async def rotate() -> Json:
        for item in await exports.backups(data.store, op.instance_id, data.series):
            if item.name in old:
                await exports.remove_backup(item)
        return None

    await op.step("note", note, undo=forget)
    op.point_of_no_return()
    # A step of its own: what is removed must be known also to the run that comes after a crash in the removing.
    chosen = await op.step("choose", choose)
    old: list[str] = chosen["old"] if chosen else []
    await op.step("rotate", rotate)
    series = await exports.backups(data.store, op.instance_id, data.series)
    return BackupResult(instance_id=op.instance_id, backup=made, backups=series, removed=old)


async def list_backups(op: Operation, data: InstanceListBackups) -> BackupListResult:
    """List from the stores: they are there also when the instance is not."""
    exports = op.ctx.exports
    if data.store is not None:
        store_folder(exports.policy, data.store)
    stores = [data.store] if data.store is not None else sorted(exports.policy.stores)
    found = [item for store in stores for item in await exports.backups(store, op.instance_id, data.series)]
    found.sort(key=lambda item: (item.taken_at, item.name), reverse=True)
    return BackupListResult(instance_id=op.instance_id, backups=found)


ROUTES = (
    Route("instance.backup", "build", backup),
    Route("instance.list-backups", "query", list_backups, lane="none"),
)
