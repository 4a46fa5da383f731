"""The resize family of verbs: sizes, cold and live; the balloon's target; limits. Commands and results."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from agent.messages.events import PowerState
from agent.messages.spec_disks import DiskName
from agent.messages.spec_limits import CpuLimits, DiskLimits, NicLimits
from agent.messages.types import DiskMib, Inbound, MemoryMib, Outbound, TimeoutS, Vcpus
from agent.messages.verb import CommandData

CONFIRM_WITHIN_S = 86_400.0

ConfirmWithinS = Annotated[float, Field(ge=0, le=366 * 86_400, allow_inf_nan=False)]


class InstanceResize(CommandData):
    """Change the sizes that are given; what is left out stays. Disks only grow. `disks_mib`: name of a disk → size.

    `cold` stops the guest if it runs, asking it for `timeout_s`, and starts it again with the new sizes; it then waits
    to be confirmed or reverted, and confirms itself after `confirm_within_s` (0: at once; `never`: it waits for ever).
    `live` changes the running guest up to the spec's `max_vcpus` and `max_memory_mib`; what the guest does not give
    back within `timeout_s` ends as `guest_refused`.
    """

    verb: ClassVar[str] = "instance.resize"

    vcpus: Vcpus | None = None
    memory_mib: MemoryMib | None = None
    disks_mib: dict[DiskName, DiskMib] = Field(default_factory=dict, max_length=21)
    mode: Literal["cold", "live"] = "cold"
    confirm_within_s: ConfirmWithinS | Literal["never"] = CONFIRM_WITHIN_S
    timeout_s: TimeoutS = 60.0

    @model_validator(mode="after")
    def _something(self) -> InstanceResize:
        if self.vcpus is None and self.memory_mib is None and not self.disks_mib:
            raise ValueError("give vcpus, memory_mib or disks_mib")
        return self


class InstanceConfirmResize(CommandData):
    """Keep the new sizes. With `confirm_by` only the resize that has this deadline is meant."""

    verb: ClassVar[str] = "instance.confirm-resize"

    confirm_by: datetime | None = None


class InstanceRevertResize(CommandData):
    """Go back to the old vCPUs and memory, through a stop and a start if the guest runs. Disks keep their size."""

    verb: ClassVar[str] = "instance.revert-resize"

    timeout_s: TimeoutS = 60.0


class InstanceSetMemoryTarget(CommandData):
    """Ask the running guest, through its balloon, to do with so much memory. It holds until the guest is stopped."""

    verb: ClassVar[str] = "instance.set-memory-target"

    memory_mib: MemoryMib
    timeout_s: TimeoutS = 30.0


class NicLimitsChange(Inbound):
    """New limits of one NIC: `nic` is its place in the spec, from 0. No `limits`: unlimited."""

    nic: Annotated[int, Field(ge=0, le=15)]
    limits: NicLimits | None = None


class InstanceSetLimits(CommandData):
    """Set limits at once and for good. What is given replaces all limits of that CPU set, disk or NIC.

    A limit that is null or left out of what is given is lifted; `{}` or null lifts all. What is not named at all stays.
    """

    verb: ClassVar[str] = "instance.set-limits"

    cpu: CpuLimits | None = None
    disks: dict[DiskName, DiskLimits | None] = Field(default_factory=dict, max_length=21)
    nics: list[NicLimitsChange] = Field(default_factory=list, max_length=16)

    @model_validator(mode="after")
    def _something(self) -> InstanceSetLimits:
        if self.cpu is None and not self.disks and not self.nics:
            raise ValueError("give cpu, disks or nics")
        places = [change.nic for change in self.nics]
        if len(places) != len(set(places)):
            raise ValueError("a NIC is named twice")
        return self


class ResizeResult(Outbound):
    """The sizes as they are now. `pending`: they wait to be confirmed, until `confirm_by` where there is a deadline.

    `forced`: the guest did not shut down in time and was ended.
    """

    instance_id: str
    observed: PowerState
    changed: bool
    vcpus: int
    memory_mib: int
    disks_mib: dict[str, int]
    pending: bool = False
    confirm_by: datetime | None = None
    forced: bool = False


class MemoryTargetResult(Outbound):
    """What the balloon was read back to: `actual_mib` is what the guest has."""

    instance_id: str
    memory_mib: int
    actual_mib: int


class LimitsResult(Outbound):
    """All limits that hold now; `disks` and `nics` (in the order of the spec) hold null where there are none."""

    instance_id: str
    changed: bool
    live: bool
    """Whether the guest runs, and they hold for it already."""
    cpu: CpuLimits
    disks: dict[str, DiskLimits | None]
    nics: list[NicLimits | None]


COMMANDS: tuple[type[CommandData], ...] = (
    InstanceResize,
    InstanceConfirmResize,
    InstanceRevertResize,
    InstanceSetMemoryTarget,
    InstanceSetLimits,
)
RESULTS: dict[str, type[Outbound]] = {
    "instance.resize": ResizeResult,
    "instance.confirm-resize": ResizeResult,
    "instance.revert-resize": ResizeResult,
    "instance.set-memory-target": MemoryTargetResult,
    "instance.set-limits": LimitsResult,
}
"""Verb → result, for the results that this module defines; those that return a shared one are in `results`."""
