"""The virtual hardware of an instance's spec, beyond disks and NICs. Every default is today's plain machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Protocol

from pydantic import Field, StringConstraints, model_validator

from agent.messages.types import Inbound, MemoryMib, Name

CpuFeature = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,31}$")]
Count = Annotated[int, Field(ge=1, le=1024)]


class Topology(Inbound):
    """What the guest sees; the product must be `max_vcpus` (or `vcpus` where that is not given)."""

    sockets: Count = 1
    dies: Count = 1
    cores: Count = 1
    threads: Count = 1

    @property
    def vcpus(self) -> int:
        """The product."""
        return self.sockets * self.dies * self.cores * self.threads


class Cpu(Inbound):
    """The CPU model. `default` leaves it to the host's configuration; `model` is for `custom` only.

    Whatever it is, the instance keeps it: another default of the host changes no instance that is there.
    `placement` `dedicated`: each vCPU is pinned to a host CPU of its own from the host's dedicated set.
    """

    mode: Literal["default", "host-passthrough", "host-model", "maximum", "custom"] = "default"
    model: Name | None = None
    features: dict[CpuFeature, Literal["force", "require", "optional", "disable", "forbid"]] = Field(
        default_factory=dict, max_length=64
    )
    topology: Topology | None = None
    placement: Literal["shared", "dedicated"] = "shared"

    @model_validator(mode="after")
    def _model_for_custom(self) -> Cpu:
        if (self.mode == "custom") != (self.model is not None):
            raise ValueError("cpu mode 'custom' and model belong together")
        return self


class NumaNode(Inbound):
    """One NUMA cell of the guest: which vCPUs, how much memory."""

    vcpus: Annotated[list[Annotated[int, Field(ge=0, le=1023)]], Field(min_length=1, max_length=1024)]
    memory_mib: MemoryMib


class MemoryBacking(Inbound):
    """What the guest's memory is made of. `hugepages_kib` is a page size that the host has pages of.

    `shared` (which shares imply) lets other processes of the host map it; anonymous memory then becomes `memfd`.
    `locked` keeps it from being swapped out.
    """

    hugepages_kib: Annotated[int, Field(ge=64, le=16 * 1024 * 1024)] | None = None
    source: Literal["anonymous", "file", "memfd"] = "anonymous"
    shared: bool = False
    locked: bool = False


class Firmware(Inbound):
    """`uefi` needs its firmware files on the host; `secure_boot` a build of them that can do it."""

    type: Literal["bios", "uefi"] = "bios"
    secure_boot: bool = False

    @model_validator(mode="after")
    def _secure_boot_of_uefi(self) -> Firmware:
        if self.secure_boot and self.type != "uefi":
            raise ValueError("secure_boot needs the firmware type uefi")
        return self


class Machine(Inbound):
    """The machine type, pinned to its version when the instance is made (`q35` becomes `pc-q35-7.2`)."""

    type: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")] | None = None
    firmware: Firmware = Field(default_factory=Firmware)


class Share(Inbound):
    """A virtiofs share. `source` names one of the host's shares (driver setting `shares`), never a path; `tag` is
    what the guest mounts.
    """

    source: Name
    tag: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,35}$")]
    readonly: bool = False


class Watchdog(Inbound):
    """A watchdog device, and what happens when the guest no longer feeds it."""

    model: Literal["i6300esb", "itco"] = "i6300esb"
    action: Literal["reset", "shutdown", "poweroff", "pause", "none", "inject-nmi"] = "reset"


class Video(Inbound):
    """A video device; without one a guest with VNC gets the usual one."""

    model: Literal["vga", "virtio", "bochs", "qxl", "none"] = "vga"
    vram_kib: Annotated[int, Field(ge=1024, le=1024 * 1024)] | None = None

    @model_validator(mode="after")
    def _memory_of_a_device(self) -> Video:
        if self.model == "none" and self.vram_kib is not None:
            raise ValueError("no video device has no vram_kib")
        return self


class Hardware(Protocol):
    """The parts of an instance's spec that have to agree with each other."""

    @property
    def vcpus(self) -> int: ...
    @property
    def max_vcpus(self) -> int | None: ...
    @property
    def memory_mib(self) -> int: ...
    @property
    def cpu(self) -> Cpu: ...
    @property
    def numa(self) -> Sequence[NumaNode]: ...
    @property
    def memory_backing(self) -> MemoryBacking: ...
    @property
    def shares(self) -> Sequence[Share]: ...


def check_agreement(spec: Hardware) -> None:
    """Raise `ValueError` where CPUs, memory, cells, pages or shares contradict each other, whatever the host."""
    vcpus = spec.max_vcpus or spec.vcpus
    topology = spec.cpu.topology
    if topology is not None and topology.vcpus != vcpus:
        raise ValueError(f"cpu.topology makes {topology.vcpus} vCPUs and the instance has {vcpus}")
    if spec.cpu.placement == "dedicated" and vcpus != spec.vcpus:
        raise ValueError("an instance with dedicated CPUs cannot have max_vcpus above vcpus")
    if spec.numa:
        if sorted(vcpu for node in spec.numa for vcpu in node.vcpus) != list(range(vcpus)):
            raise ValueError(f"each of the vCPUs 0 to {vcpus - 1} must be in exactly one of the numa cells")
        total = sum(node.memory_mib for node in spec.numa)
        if total != spec.memory_mib:
            raise ValueError(f"the numa cells have {total} MiB together and the instance has {spec.memory_mib}")
    page_kib = spec.memory_backing.hugepages_kib
    if page_kib is not None and any(
        size * 1024 % page_kib for size in (spec.memory_mib, *(node.memory_mib for node in spec.numa))
    ):
        raise ValueError(f"memory_mib, also of each numa cell, must be made of whole pages of {page_kib} KiB")
    tags = [share.tag for share in spec.shares]
    if len(tags) != len(set(tags)):
        raise ValueError("two shares have the same tag; give each its own")
