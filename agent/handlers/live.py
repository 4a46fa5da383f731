"""What is changed in a guest that runs: its sizes (`instance.resize`, live), its balloon's target, its limits.

First the guest, then the definition. A kill in between leaves an operation that is taken up again: it looks at the
guest, does what is missing there, and writes the definition. What a guest does not do is read back, and said.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from agent.core.capacity import ROOT, disk_sizes
from agent.core.operation import Json, Operation, require
from agent.core.registry import Route
from agent.drivers.base import DomainInfo
from agent.drivers.verbs.resize import GuestSizes
from agent.errors import ComputeError, FailedPrecondition, InvalidArgument, NotFound
from agent.handlers.observe import read_back
from agent.handlers.rescue import refuse_if_cancelled
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
from agent.messages.life import Sizes
from agent.messages.spec import InstanceSpec
from agent.messages.spec_disks import CdromDisk
from agent.messages.spec_limits import CpuLimits
from agent.messages.verbs_resize import (
    InstanceResize,
    InstanceSetLimits,
    InstanceSetMemoryTarget,
    LimitsResult,
    MemoryTargetResult,
    ResizeResult,
)

LOOK_EVERY_S = 0.25
ASK_EVERY_S = 5.0
"""A guest that was too busy to hear is asked again."""
UNDO_WAIT_S = 10.0

Ask = Callable[[], Any]


async def resize_live(op: Operation, data: InstanceResize) -> ResizeResult:
    """Change the sizes of a running guest, up to its maximum."""
    driver, record = op.ctx.driver, op.ctx.instances.get(op.instance_id)
    if not op.begun and op.record.state != "undoing":
        no_resize_pending(record)
        require_running(await op.query(driver.get, op.instance_id))
        check_sizes(record.spec, data)
        _check_room(record.spec, data)
        if wanted_sizes(sizes_of(record.spec), data) == sizes_of(record.spec):
            return result_of(record, changed=False)
        admit(op.ctx, record.id, with_sizes(record.spec, wanted_sizes(sizes_of(record.spec), data)))

    async def plan() -> Json:
        return sizes_of(record.spec).model_dump(mode="json")

    async def nothing() -> Json:
        return None

    async def untouched() -> None:
        """The undo of what the first step's undo takes back."""

    async def define() -> Json:
        generation = generation_of(op, op.ctx.instances.get(op.instance_id))
        await op.mutate(driver.define, op.instance_id, wanted, generation=generation, life=record.life)
        return None

    old = Sizes.model_validate(await op.step("plan", plan, harmless=True))
    wanted = with_sizes(record.spec, wanted_sizes(old, data))
    if op.record.state != "undoing" and not op.done_before("claim"):
        admit(op.ctx, op.instance_id, wanted)
        op.stage(instance=op.ctx.instances.update(op.instance_id, spec=wanted))
    await op.step("claim", nothing, undo=partial(_restore, op, old, wanted, data.timeout_s))
    await grow_disks(op, old.disks_mib, wanted)
    if wanted.vcpus != old.vcpus:
        step = partial(_vcpus, op, wanted.vcpus, data.timeout_s)
        await op.step("vcpus", step, undo=untouched, cancellable=True)
    if wanted.memory_mib != old.memory_mib:
        step = partial(_memory, op, wanted.memory_mib, data.timeout_s)
        await op.step("memory", step, undo=untouched, cancellable=True)
    await op.step("define", define, undo=untouched)
    op.ctx.instances.update(op.instance_id, spec=wanted)
    record = await read_back(op)
    op.ctx.heartbeat_now()
    return result_of(record, changed=True)


async def set_memory_target(op: Operation, data: InstanceSetMemoryTarget) -> MemoryTargetResult:
    """Set the balloon's target and wait for the guest to follow."""
    driver, record = op.ctx.driver, op.ctx.instances.get(op.instance_id)
    if not op.begun and op.record.state != "undoing":
        require_running(await op.query(driver.get, op.instance_id))
        require(
            data.memory_mib <= record.spec.memory_mib,
            f"the guest has {record.spec.memory_mib} MiB; a balloon only takes of that, a resize gives more",
            code="above_maximum",
        )

    async def look() -> Json:
        sizes = await op.query(driver.guest_sizes, op.instance_id)
        return {"balloon_mib": sizes.balloon_mib}

    async def inflate() -> Json:
        ask = partial(op.mutate, driver.request_memory_target, op.instance_id, data.memory_mib)
        sizes = await _guest_has(op, lambda sizes: sizes.balloon_mib == data.memory_mib, ask, data.timeout_s)
        if sizes.balloon_mib != data.memory_mib:
            raise _refused("memory target", asked=data.memory_mib, read_back=sizes.balloon_mib)
        return {"actual_mib": sizes.balloon_mib}

    async def deflate() -> None:
        # A guest that has stopped meanwhile has lost its target with its memory.
        if before and (await op.query(driver.get, op.instance_id)).power in ("running", "paused"):
            await op.mutate(driver.request_memory_target, op.instance_id, before)

    found = await op.step("look", look, harmless=True)
    before = found["balloon_mib"] if found else None
    done = await op.step("balloon", inflate, undo=deflate, cancellable=True)
    actual = done["actual_mib"] if done else data.memory_mib
    return MemoryTargetResult(instance_id=op.instance_id, memory_mib=data.memory_mib, actual_mib=actual)


async def set_limits(op: Operation, data: InstanceSetLimits) -> LimitsResult:
    """Set limits for the running guest and in the definition."""
    driver, record = op.ctx.driver, op.ctx.instances.get(op.instance_id)
    before = record.spec
    wanted = with_limits(before, data)
    if not op.begun and wanted == before:
        info = await op.query(driver.get, op.instance_id)
        return _limits(op.instance_id, before, changed=False, live=info.power in ("running", "paused"))

    async def apply(spec: InstanceSpec) -> Json:
        await op.mutate(driver.apply_limits, op.instance_id, spec)
        return None

    async def define(spec: InstanceSpec) -> Json:
        generation = generation_of(op, record)
        await op.mutate(driver.define, op.instance_id, spec, generation=generation, life=record.life)
        return None

    async def unapply() -> None:
        await apply(before)

    async def undefine() -> None:
        await define(before)

    await op.step("live", partial(apply, wanted), undo=unapply)
    await op.step("define", partial(define, wanted), undo=undefine)
    await read_back(op)  # first, because it may fail: what is undone then must not be in the record
    refuse_if_cancelled(op)
    record = op.ctx.instances.update(op.instance_id, spec=wanted)
    op.stage(instance=record)
    return _limits(op.instance_id, wanted, changed=True, live=record.observed in ("running", "paused"))


def with_limits(spec: InstanceSpec, data: InstanceSetLimits) -> InstanceSpec:
    """A spec with these limits. Raises `InvalidArgument` (`unknown_disk`, `unknown_nic`)."""
    unknown = data.disks.keys() - disk_sizes(spec).keys()
    if unknown:
        name = min(unknown)
        raise InvalidArgument(f"the instance has no writable disk {name}", code="unknown_disk", disk=name)
    nics = list(spec.nics)
    for change in data.nics:
        if change.nic >= len(nics):
            raise InvalidArgument(
                f"the instance has {len(nics)} NICs, and the first one is 0", code="unknown_nic", nic=change.nic
            )
        nics[change.nic] = nics[change.nic].model_copy(update={"limits": change.limits})

    def limited(disk: Any, name: str) -> Any:
        return disk.model_copy(update={"limits": data.disks[name]}) if name in data.disks else disk

    return spec.model_copy(
        update={
            "cpu_limits": data.cpu or spec.cpu_limits,
            "root_disk": limited(spec.root_disk, ROOT),
            "disks": [limited(disk, disk.name) for disk in spec.disks],
            "nics": nics,
        }
    )


def require_running(info: DomainInfo) -> None:
    """Raise `FailedPrecondition` unless the guest runs: a paused one can neither take nor give."""
    require(info.power != "paused", "a paused guest takes and gives nothing; resume it first", code="instance_paused")
    require(
        info.power == "running",
        f"only a running guest can be changed live, this one is {info.power}; start it, or resize it cold",
        code="instance_not_running",
    )


# --- inside -------------------------------------------------------------------------------------------------------


def _check_room(spec: InstanceSpec, data: InstanceResize) -> None:
    for asked, most, unit in (
        (data.vcpus, spec.max_vcpus or spec.vcpus, "vCPUs"),
        (data.memory_mib, spec.max_memory_mib or spec.memory_mib, "MiB of memory"),
    ):
        require(
            asked is None or asked <= most,
            f"the running guest has room for {most} {unit}; resize it cold",
            code="above_maximum",
        )


async def _vcpus(op: Operation, wanted: int, timeout_s: float) -> Json:
    ask = partial(op.mutate, op.ctx.driver.request_vcpus, op.instance_id, wanted)
    sizes = await _guest_has(op, lambda sizes: sizes.vcpus == wanted, ask, timeout_s)
    if sizes.vcpus != wanted:
        raise _refused("vcpus", asked=wanted, read_back=sizes.vcpus)
    return {"vcpus": sizes.vcpus}


async def _memory(op: Operation, wanted_mib: int, timeout_s: float) -> Json:
    ask = partial(op.mutate, op.ctx.driver.request_memory, op.instance_id, wanted_mib)
    sizes = await _guest_has(op, lambda sizes: sizes.memory_mib == wanted_mib, ask, timeout_s)
    if sizes.memory_mib != wanted_mib:
        raise _refused("memory_mib", asked=wanted_mib, read_back=sizes.memory_mib)
    return {"memory_mib": sizes.memory_mib}


def _refused(what: str, *, asked: int, read_back: int | None) -> FailedPrecondition:
    return FailedPrecondition(
        f"the guest did not do it in time: {what} {asked} was asked, and it has {read_back}",
        code="guest_refused", resource=what, asked=asked, read_back=read_back,
    )  # fmt: skip


async def _guest_has(op: Operation, done: Callable[[GuestSizes], bool], ask: Ask, timeout_s: float) -> GuestSizes:
    """Ask, and look until the guest has done it or the time is up. Returns what was read back last.

    It is asked also where it has what it should: an earlier request for something else may wait in it.
    """
    clock = asyncio.get_running_loop().time
    until, ask_at = clock() + timeout_s, 0.0
    while True:
        if clock() >= ask_at:
            await ask()
            ask_at = clock() + ASK_EVERY_S
        sizes = await op.query(op.ctx.driver.guest_sizes, op.instance_id)
        if done(sizes) or clock() >= until:
            return sizes
        await asyncio.sleep(LOOK_EVERY_S)


async def _restore(op: Operation, old: Sizes, wanted: InstanceSpec, timeout_s: float) -> None:
    """Give the guest what it had, and write down what it then has: guest and definition agree, whatever it refuses."""
    driver, instance_id = op.ctx.driver, op.instance_id
    spec = back_to(wanted, old)
    record = op.ctx.instances.update(instance_id, spec=spec)
    op.stage(instance=record)  # also where the domain is gone, which ends this undo
    info = await op.query(driver.get, instance_id)
    spec = with_disks(spec, await op.query(driver.disk_sizes, instance_id, spec))
    if info.power in ("running", "paused"):
        wait_s = min(timeout_s, UNDO_WAIT_S) if info.power == "running" else 0.0
        has = await _given_back(op, old, wait_s)
        spec = spec.model_copy(update={"vcpus": has.vcpus, "memory_mib": has.memory_mib})
    await op.mutate(driver.define, instance_id, spec, generation=record.generation, life=record.life)
    op.stage(instance=op.ctx.instances.update(instance_id, spec=spec))
    await read_back(op)
    op.ctx.heartbeat_now()


async def _given_back(op: Operation, old: Sizes, wait_s: float) -> GuestSizes:
    driver, instance_id = op.ctx.driver, op.instance_id

    async def ask() -> None:
        for request, amount in ((driver.request_vcpus, old.vcpus), (driver.request_memory, old.memory_mib)):
            try:
                await op.mutate(request, instance_id, amount)
            except (FailedPrecondition, NotFound, InvalidArgument) as exc:
                if exc.code == "instance_not_running":
                    raise

    def done(sizes: GuestSizes) -> bool:
        return (sizes.vcpus, sizes.memory_mib) == (old.vcpus, old.memory_mib)

    try:
        return await _guest_has(op, done, ask, wait_s)
    except ComputeError as exc:
        if exc.code != "instance_not_running":
            raise
        return GuestSizes(vcpus=old.vcpus, memory_mib=old.memory_mib)


def _limits(instance_id: str, spec: InstanceSpec, *, changed: bool, live: bool) -> LimitsResult:
    disks = {ROOT: spec.root_disk.limits}
    disks |= {disk.name: disk.limits for disk in spec.disks if not isinstance(disk, CdromDisk)}
    return LimitsResult(
        instance_id=instance_id,
        changed=changed,
        live=live,
        cpu=spec.cpu_limits or CpuLimits(),
        disks=disks,
        nics=[nic.limits for nic in spec.nics],
    )


ROUTES = (
    Route("instance.set-memory-target", "power", set_memory_target),
    Route("instance.set-limits", "power", set_limits),
)
