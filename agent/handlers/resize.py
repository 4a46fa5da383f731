"""`instance.resize` (cold), `confirm-resize`, `revert-resize`: through a stop, a new definition and a start.

Until it is confirmed the old sizes stay on record, so that there is a way back. Disks keep what they have grown to,
also where all else is taken back: nothing here throws data away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial

from agent.core.context import now
from agent.core.operation import Json, Operation, require
from agent.core.registry import Route
from agent.drivers.base import DomainInfo
from agent.errors import DeadlineExceeded, FailedPrecondition
from agent.handlers.live import resize_live
from agent.handlers.observe import read_back
from agent.handlers.sizes import (
    admit,
    back_to,
    check_sizes,
    generation_of,
    grow_disks,
    no_resize_pending,
    result_of,
    sizes_of,
    wanted_sizes,
    with_disks,
    with_sizes,
)
from agent.messages.events import PowerState
from agent.messages.life import Life, PendingResize, Sizes
from agent.messages.spec import InstanceSpec
from agent.messages.verb import CommandData
from agent.messages.verbs_resize import InstanceConfirmResize, InstanceResize, InstanceRevertResize, ResizeResult
from agent.store.base import InstanceRecord

DOWN: frozenset[PowerState] = frozenset({"stopped", "crashed"})
RETRY_S = 600
"""A confirmation by the clock that failed is tried again after so long."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What was there when the operation began, by which all of it is decided, also after a crash."""

    was_running: bool
    old: Sizes
    life: Life
    confirm_by: datetime | None


async def resize(op: Operation, data: InstanceResize) -> ResizeResult:
    """Change sizes. Refused: a resize that waits, a smaller disk, no room on the host or in the spec's machine."""
    if data.mode == "live":
        return await resize_live(op, data)
    record = op.ctx.instances.get(op.instance_id)
    if not op.begun and op.record.state != "undoing":
        info = await op.query(op.ctx.driver.get, op.instance_id)
        _check_stoppable(record, info)
        no_resize_pending(record)
        check_sizes(record.spec, data)
        if wanted_sizes(sizes_of(record.spec), data) == sizes_of(record.spec):
            return result_of(record, changed=False)
        admit(op.ctx, record.id, with_sizes(record.spec, wanted_sizes(sizes_of(record.spec), data)))
    plan = await _plan(op, None if data.confirm_within_s == "never" else data.confirm_within_s)
    wanted = with_sizes(record.spec, wanted_sizes(plan.old, data))
    pending = PendingResize(old=plan.old, confirm_by=plan.confirm_by)
    waiting = plan.life.model_copy(update={"resize": pending})

    def claim() -> None:
        admit(op.ctx, op.instance_id, wanted)
        op.stage(instance=op.ctx.instances.update(op.instance_id, spec=wanted, life=waiting))

    life = plan.life if data.confirm_within_s == 0 else waiting
    return await _through_a_stop(op, plan, wanted, life, timeout_s=data.timeout_s, claim=claim)


async def revert_resize(op: Operation, data: InstanceRevertResize) -> ResizeResult:
    """Go back to the old vCPUs and memory."""
    record = op.ctx.instances.get(op.instance_id)
    if not op.begun and op.record.state != "undoing":
        _pending(record)
        _check_stoppable(record, await op.query(op.ctx.driver.get, op.instance_id))
    plan = await _plan(op, None)
    back = plan.life.resize.old if plan.life.resize is not None else plan.old
    # Until the end both sizes stay claimed, as they were while the resize waited: there is room for the way back.
    wanted = with_sizes(record.spec, back.model_copy(update={"disks_mib": {}}))
    life = plan.life.model_copy(update={"resize": None})
    return await _through_a_stop(op, plan, wanted, life, timeout_s=data.timeout_s)


async def confirm_resize(op: Operation, data: InstanceConfirmResize) -> ResizeResult:
    """Forget the old sizes; the guest is not touched."""
    record = op.ctx.instances.get(op.instance_id)
    if not op.begun:
        pending = _pending(record)
        require(
            data.confirm_by is None or data.confirm_by == pending.confirm_by,
            "the resize that was meant is over; another one waits",
            code="no_resize_pending",
        )
    life = record.life.model_copy(update={"resize": None})

    async def define() -> Json:
        await op.mutate(
            op.ctx.driver.define, op.instance_id, record.spec, generation=generation_of(op, record), life=life
        )
        return None

    op.point_of_no_return()
    await op.step("define", define)
    record = op.ctx.instances.update(op.instance_id, life=life, generation=op.command.generation)
    op.stage(instance=record)
    op.ctx.heartbeat_now()
    return result_of(record, changed=True)


def due(record: InstanceRecord, at: datetime) -> Iterator[tuple[str, CommandData]]:
    """Confirm a resize whose time is up. A failed attempt is followed by another one later, under another id."""
    pending = record.life.resize
    if pending is None or pending.confirm_by is None or at < pending.confirm_by:
        return
    attempt = int((at - pending.confirm_by).total_seconds()) // RETRY_S
    command_id = f"due/confirm-resize/{record.id}/{int(pending.confirm_by.timestamp() * 1000)}/{attempt}"
    yield command_id, InstanceConfirmResize(confirm_by=pending.confirm_by)


# --- inside -------------------------------------------------------------------------------------------------------


def _pending(record: InstanceRecord) -> PendingResize:
    if record.life.resize is None:
        raise FailedPrecondition("no resize waits to be confirmed or reverted", code="no_resize_pending")
    return record.life.resize


def _check_stoppable(record: InstanceRecord, info: DomainInfo) -> None:
    require(info.power != "paused", "a paused guest cannot shut down; resume or stop it first", code="instance_paused")
    require(
        info.power in ("running", *DOWN),
        f"the instance is {info.power}; a resize needs it running or stopped",
    )
    life = record.life
    require(
        life.rescue is None and life.shelf is None and life.soft_delete is None,
        "the instance is being rescued, shelved or deleted; end that first",
    )


async def _plan(op: Operation, confirm_within_s: float | None) -> Plan:
    """Journal what was found, before anything changes."""
    record = op.ctx.instances.get(op.instance_id)

    async def look() -> Json:
        info = await op.query(op.ctx.driver.get, op.instance_id)
        confirm_by = None if confirm_within_s is None else now() + timedelta(seconds=confirm_within_s)
        return {
            "was_running": info.power not in DOWN,
            "old": sizes_of(record.spec).model_dump(mode="json"),
            "life": record.life.model_dump(mode="json", exclude_none=True),
            "confirm_by": None if confirm_by is None else confirm_by.isoformat(),
        }

    found = await op.step("plan", look, harmless=True) or {}
    confirm_by = found.get("confirm_by")
    return Plan(
        was_running=bool(found.get("was_running")),
        old=Sizes.model_validate(found["old"]),
        life=Life.model_validate(found.get("life") or {}),
        confirm_by=None if confirm_by is None else datetime.fromisoformat(confirm_by),
    )


async def _through_a_stop(
    op: Operation,
    plan: Plan,
    wanted: InstanceSpec,
    life: Life,
    *,
    timeout_s: float,
    claim: Callable[[], None] | None = None,
) -> ResizeResult:
    """Stop, grow disks, define, start again. Whatever fails: the old definition, running if it ran."""
    driver, instance_id = op.ctx.driver, op.instance_id

    async def nothing() -> Json:
        return None

    async def untouched() -> None:
        """The undo of what the first step's undo takes back."""

    async def ask() -> Json:
        await op.mutate(driver.shutdown, instance_id)
        return {"asked_at": now().isoformat()}

    async def define() -> Json:
        record = op.ctx.instances.get(instance_id)
        await op.mutate(driver.define, instance_id, wanted, generation=generation_of(op, record), life=life)
        return None

    async def start() -> Json:
        await op.mutate(driver.start, instance_id)
        return None

    async def destroy() -> None:
        await op.mutate(driver.destroy, instance_id)

    if claim is not None and op.record.state != "undoing" and not op.done_before("claim"):
        claim()
    await op.step("claim", nothing, undo=partial(_restore, op, plan, wanted))
    forced = False
    if plan.was_running:
        asked = await op.step("shutdown", ask, undo=partial(_let_it_end, op, timeout_s))
        stopped = await op.step("stop", partial(_stop, op, timeout_s, asked), undo=untouched)
        forced = bool(stopped and stopped["forced"])
    await grow_disks(op, plan.old.disks_mib, wanted)
    await op.step("define", define, undo=untouched)
    if plan.was_running:
        await op.step("start", start, undo=destroy)
    op.ctx.instances.update(instance_id, spec=wanted, life=life)
    record = await read_back(op, reason="resized")
    op.ctx.heartbeat_now()
    return result_of(record, changed=True, forced=forced)


async def _stop(op: Operation, timeout_s: float, asked: Json) -> Json:
    """Wait for the guest to be down, and end it when it does not obey in time."""
    if (await op.query(op.ctx.driver.get, op.instance_id)).power in DOWN:
        return {"forced": False}  # taken up after a restart: the event of its end may have been missed
    waited_s = (now() - datetime.fromisoformat(asked["asked_at"])).total_seconds() if asked else 0.0
    try:
        await op.wait_observed(DOWN, max(0.0, timeout_s - waited_s))
    except DeadlineExceeded:
        # An event may have been lost with a connection.
        if (await op.query(op.ctx.driver.get, op.instance_id)).power not in DOWN:
            await op.mutate(op.ctx.driver.destroy, op.instance_id)
            return {"forced": True}
    return {"forced": False}


async def _let_it_end(op: Operation, timeout_s: float) -> None:
    """Wait for a guest that was asked to shut down: it may obey only after it was found running, and stay down then."""
    if (await op.query(op.ctx.driver.get, op.instance_id)).power in DOWN:
        return
    try:
        await op.ctx.instances.wait_observed(op.instance_id, DOWN, min(timeout_s, op.ctx.deadlines.settle_s))
    except DeadlineExceeded:
        return


async def _restore(op: Operation, plan: Plan, wanted: InstanceSpec) -> None:
    """The old definition, but for disks that have grown; running again if it ran."""
    driver, instance_id = op.ctx.driver, op.instance_id
    old = back_to(wanted, plan.old)
    record = op.ctx.instances.update(instance_id, spec=old, life=plan.life)
    op.stage(instance=record)  # also where the domain is gone, which ends this undo
    real = await op.query(driver.disk_sizes, instance_id, old)
    spec = with_disks(old, real)
    await op.mutate(driver.define, instance_id, spec, generation=record.generation, life=plan.life)
    op.stage(instance=op.ctx.instances.update(instance_id, spec=spec))
    if plan.was_running:
        await op.mutate(driver.start, instance_id)
    await read_back(op)
    op.ctx.heartbeat_now()


ROUTES = (
    Route("instance.resize", "build", resize),
    Route("instance.confirm-resize", "power", confirm_resize),
    Route("instance.revert-resize", "build", revert_resize),
)
