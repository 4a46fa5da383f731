"""Sizes of an instance: what a resize asks for against what there is, as specs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agent.core.capacity import ROOT, disk_sizes
from agent.core.context import Context
from agent.core.operation import Json, Operation, require
from agent.errors import InvalidArgument
from agent.messages.life import Sizes
from agent.messages.spec import InstanceSpec
from agent.messages.spec_disks import CdromDisk
from agent.messages.verbs_resize import InstanceResize, ResizeResult
from agent.store.base import InstanceRecord


def sizes_of(spec: InstanceSpec) -> Sizes:
    """The sizes that a spec has."""
    return Sizes(
        vcpus=spec.vcpus,
        memory_mib=spec.memory_mib,
        max_vcpus=spec.max_vcpus,
        max_memory_mib=spec.max_memory_mib,
        disks_mib=disk_sizes(spec),
    )


def with_disks(spec: InstanceSpec, sizes: Mapping[str, int]) -> InstanceSpec:
    """A spec with these disk sizes; what is not named, or is larger already, stays."""

    def grown(disk: Any, name: str) -> Any:
        if isinstance(disk, CdromDisk) or sizes.get(name, 0) <= disk.size_mib:
            return disk
        return disk.model_copy(update={"size_mib": sizes[name]})

    root = grown(spec.root_disk, ROOT)
    return spec.model_copy(update={"root_disk": root, "disks": [grown(disk, disk.name) for disk in spec.disks]})


def with_sizes(spec: InstanceSpec, sizes: Sizes) -> InstanceSpec:
    """A spec with these sizes; disks are never made smaller."""
    changed = spec.model_copy(
        update={
            "vcpus": sizes.vcpus,
            "memory_mib": sizes.memory_mib,
            "max_vcpus": sizes.max_vcpus,
            "max_memory_mib": sizes.max_memory_mib,
        }
    )
    return with_disks(changed, sizes.disks_mib)


def wanted_sizes(old: Sizes, data: InstanceResize) -> Sizes:
    """What a resize asks for. The maximum rises with what is above it; a live resize checks that before."""
    vcpus, memory_mib = data.vcpus or old.vcpus, data.memory_mib or old.memory_mib
    return Sizes(
        vcpus=vcpus,
        memory_mib=memory_mib,
        max_vcpus=None if old.max_vcpus is None else max(old.max_vcpus, vcpus),
        max_memory_mib=None if old.max_memory_mib is None else max(old.max_memory_mib, memory_mib),
        disks_mib=old.disks_mib | data.disks_mib,
    )


def check_sizes(spec: InstanceSpec, data: InstanceResize) -> None:
    """Refuse what this spec can never become.

    Raises `InvalidArgument` (`unknown_disk`, `disk_cannot_shrink`), `FailedPrecondition` (`size_fixed`).
    """
    disks = disk_sizes(spec)
    for name, size_mib in data.disks_mib.items():
        if name not in disks:
            raise InvalidArgument(
                f"the instance has no writable disk {name}; it has {', '.join(disks)}", code="unknown_disk", disk=name
            )
        if size_mib < disks[name]:
            raise InvalidArgument(
                f"disk {name} has {disks[name]} MiB, and disks only grow: data would be lost",
                code="disk_cannot_shrink", disk=name, size_mib=disks[name],
            )  # fmt: skip
    sizes = wanted_sizes(sizes_of(spec), data)
    topology = spec.cpu.topology
    require(
        topology is None or topology.vcpus == (sizes.max_vcpus or sizes.vcpus),
        "the spec's CPU topology fixes the number of vCPUs; it has no room for this one",
        code="size_fixed",
    )
    require(
        not spec.numa or (sizes.vcpus, sizes.memory_mib) == (spec.vcpus, spec.memory_mib),
        "the spec's NUMA cells fix vCPUs and memory; only disks can be resized",
        code="size_fixed",
    )


def no_resize_pending(record: InstanceRecord) -> None:
    """Raise `FailedPrecondition` (`resize_pending`) while an earlier resize waits."""
    require(
        record.life.resize is None,
        "an earlier resize waits; confirm it or revert it first",
        code="resize_pending",
    )


def generation_of(op: Operation, record: InstanceRecord) -> int:
    """The generation that a new definition carries."""
    return max(record.generation, op.command.generation or 0)


def back_to(spec: InstanceSpec, old: Sizes) -> InstanceSpec:
    """A spec with old sizes, those of disks included."""
    root = spec.root_disk.model_copy(update={"size_mib": old.disks_mib[ROOT]})
    disks = [
        disk.model_copy(update={"size_mib": old.disks_mib[disk.name]}) if disk.name in old.disks_mib else disk
        for disk in spec.disks
    ]
    return with_sizes(spec.model_copy(update={"root_disk": root, "disks": disks}), old)


async def grow_disks(op: Operation, old: Mapping[str, int], wanted: InstanceSpec) -> None:
    """One step per disk that grows. There is no undo: disks never shrink."""
    for name, size_mib in sorted(disk_sizes(wanted).items()):
        if size_mib > old.get(name, size_mib):

            async def grow(name: str = name, size_mib: int = size_mib) -> Json:
                await op.mutate(op.ctx.driver.grow_disk, op.instance_id, wanted, name, size_mib)
                return None

            await op.step(f"grow-{name}", grow)


def admit(ctx: Context, instance_id: str, spec: InstanceSpec) -> None:
    """Check that the instance still fits with this spec. Raises `ResourceExhausted` (`does_not_fit`)."""
    others = [record for record in ctx.instances.all() if record.id != instance_id]
    ctx.capacity.admit(spec, others, ctx.state.foreign.values())


def result_of(record: InstanceRecord, *, changed: bool, forced: bool = False) -> ResizeResult:
    """What is true of an instance's sizes now."""
    pending = record.life.resize
    return ResizeResult(
        instance_id=record.id,
        observed=record.observed,
        changed=changed,
        vcpus=record.spec.vcpus,
        memory_mib=record.spec.memory_mib,
        disks_mib=disk_sizes(record.spec),
        pending=pending is not None,
        confirm_by=None if pending is None else pending.confirm_by,
        forced=forced,
    )
