"""Internal snapshots: create, list, revert, delete."""

from __future__ import annotations

from agent.core.operation import Json, Operation, require
from agent.core.registry import Route
from agent.drivers.verbs.snapshot import RevertRequest, SnapshotInfo, SnapshotRequest
from agent.errors import AlreadyExists, FailedPrecondition, NotFound, Unsupported
from agent.handlers.observe import read_back
from agent.handlers.view import instance_view
from agent.messages.events import DesiredState
from agent.messages.life import ORDINARY
from agent.messages.results import InstanceView
from agent.messages.spec import InstanceSpec
from agent.messages.verbs_snapshot import (
    SnapshotCreate,
    SnapshotDelete,
    SnapshotGone,
    SnapshotList,
    SnapshotListResult,
    SnapshotResult,
    SnapshotRevert,
    SnapshotView,
)

ACTIVE = frozenset({"running", "paused"})
SETTLED = ACTIVE | {"stopped", "crashed"}
NO_HARDWARE = frozenset({"labels", "policy"})
"""Parts of a spec that may differ from a snapshot's: the guest does not see them."""

_DESIRED: dict[str, DesiredState] = {"running": "running", "paused": "paused"}


async def create(op: Operation, data: SnapshotCreate) -> SnapshotResult:
    """Take a snapshot. A guest with memory pauses for it and runs on after it, or after its failure."""
    record, driver = op.ctx.instances.get(op.instance_id), op.ctx.driver
    if not op.begun:
        await _check_create(op, data, record.spec)

    async def look() -> Json:
        return {"power": (await op.query(driver.get, op.instance_id)).power}

    async def run_on() -> None:
        if was == "running" and (await op.query(driver.get, op.instance_id)).power == "paused":
            await op.mutate(driver.resume, op.instance_id)

    async def take() -> Json:
        request = SnapshotRequest(data.name, data.description, was == "running")
        info = await op.long(driver.create_snapshot, op.instance_id, record.spec, request)
        return _view(info).model_dump(mode="json")

    async def drop() -> None:
        await op.long(driver.delete_snapshot, op.instance_id, record.spec, data.name)
        await run_on()

    before = await op.step("look", look, harmless=True)
    was = before["power"] if before else None
    made = await op.step("snapshot", take, undo=drop)
    current = await read_back(op)
    return SnapshotResult(
        instance_id=op.instance_id, snapshot=SnapshotView.model_validate(made), observed=current.observed
    )


async def _check_create(op: Operation, data: SnapshotCreate, spec: InstanceSpec) -> None:
    _check_kind(op, spec)
    info = await op.query(op.ctx.driver.get, op.instance_id)
    require(info.power in SETTLED, f"the instance is {info.power}; a snapshot needs it running, paused or stopped")
    active = info.power in ACTIVE
    if data.memory is False and active:
        raise Unsupported(
            "a snapshot of a running guest is always with its memory; stop it, or leave memory out",
            code="snapshot_unsupported",
        )
    require(data.memory is not True or active, "the guest has no memory: start it first", code="instance_not_running")
    existing = await op.query(op.ctx.driver.list_snapshots, op.instance_id)
    if any(snapshot.name == data.name for snapshot in existing):
        raise AlreadyExists(f"the instance has a snapshot {data.name} already", code="snapshot_exists", name=data.name)
    limit = op.ctx.max_snapshots
    if len(existing) >= limit:
        raise FailedPrecondition(
            f"the instance has {len(existing)} snapshots and the host allows {limit}; delete one first",
            code="snapshot_limit", snapshots=len(existing), limit=limit,
        )  # fmt: skip


def _check_kind(op: Operation, spec: InstanceSpec) -> None:
    """Refuse what internal snapshots cannot hold, whatever the driver."""
    require(
        op.ctx.instances.get(op.instance_id).life == ORDINARY,
        "the instance is in the middle of a resize, a rescue, a shelving or a delete; end that first",
    )
    if spec.machine.firmware.type == "uefi":
        raise Unsupported(
            "a guest with UEFI keeps variables outside its disks, which a snapshot would not hold",
            code="snapshot_unsupported",
        )
    disks = [("root", spec.root_disk), *((disk.name, disk) for disk in spec.disks)]
    for name, disk in disks:
        if getattr(disk, "encryption", None) is not None:
            raise Unsupported(
                f"disk {name} is encrypted and cannot hold a snapshot", code="snapshot_unsupported", disk=name
            )


async def list_snapshots(op: Operation, _data: SnapshotList) -> SnapshotListResult:
    """List snapshots; takes no turn in the instance's lane."""
    op.ctx.instances.get(op.instance_id)
    found = await op.query(op.ctx.driver.list_snapshots, op.instance_id)
    return SnapshotListResult(instance_id=op.instance_id, snapshots=[_view(info) for info in found])


async def revert(op: Operation, data: SnapshotRevert) -> InstanceView:
    """Take the guest back. Our spec, generation and life stay as they are: they are put into the snapshot first."""
    record, driver = op.ctx.instances.get(op.instance_id), op.ctx.driver
    if not op.begun:
        _check_kind(op, record.spec)
        info = await op.query(driver.get, op.instance_id)
        require(info.power in SETTLED, f"the instance is {info.power}; it must be running, paused or stopped")
        _check_same(await _find(op, data.name), record.spec)
    generation = max(record.generation, op.command.generation or 0)

    async def back() -> Json:
        request = RevertRequest(data.name, generation, record.life, data.start, op.id)
        await op.long(driver.revert_snapshot, op.instance_id, record.spec, request)
        return None

    async def define() -> Json:
        await op.mutate(driver.define, op.instance_id, record.spec, generation=generation, life=record.life)
        return None

    op.point_of_no_return()
    await op.step("revert", back)
    await op.step("define", define)
    power = (await op.query(driver.get, op.instance_id)).power
    desired: DesiredState = _DESIRED.get(power, "stopped")
    return instance_view(await read_back(op, desired=desired, reason="reverted"))


async def _find(op: Operation, name: str) -> SnapshotInfo:
    for info in await op.query(op.ctx.driver.list_snapshots, op.instance_id):
        if info.name == name:
            return info
    raise NotFound(f"the instance has no snapshot {name}", code="unknown_snapshot", name=name)


def _check_same(snapshot: SnapshotInfo, spec: InstanceSpec) -> None:
    """Raise `FailedPrecondition` (`snapshot_differs`) where the guest of the snapshot had other hardware."""
    if snapshot.spec is None:
        raise FailedPrecondition(
            f"the snapshot {snapshot.name} does not say what instance it is of", code="snapshot_differs"
        )
    then, now = snapshot.spec.model_dump(), spec.model_dump()
    differ = sorted(key for key in now if key not in NO_HARDWARE and now[key] != then.get(key))
    if differ:
        raise FailedPrecondition(
            f"the instance was changed since the snapshot ({', '.join(differ)}); change it back before reverting",
            code="snapshot_differs", fields=", ".join(differ),
        )  # fmt: skip


async def delete(op: Operation, data: SnapshotDelete) -> SnapshotGone:
    """Remove a snapshot. One that a former run of this removed is no error."""
    record = op.ctx.instances.get(op.instance_id)
    if not op.begun:
        await _find(op, data.name)

    async def remove() -> Json:
        await op.long(op.ctx.driver.delete_snapshot, op.instance_id, record.spec, data.name)
        return None

    op.point_of_no_return()
    await op.step("remove", remove)
    return SnapshotGone(instance_id=op.instance_id, name=data.name)


def _view(info: SnapshotInfo) -> SnapshotView:
    return SnapshotView(
        name=info.name,
        memory=info.memory,
        power=info.power,
        created_at=info.created_at,
        description=info.description,
    )


ROUTES = (
    Route("snapshot.create", "power", create),
    Route("snapshot.list", "query", list_snapshots, lane="none"),
    Route("snapshot.revert", "power", revert),
    Route("snapshot.delete", "power", delete),
)
