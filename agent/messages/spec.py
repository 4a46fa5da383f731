"""What an instance is made of: the part of `instance.create` that is kept with the instance for its whole life."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field, StringConstraints, model_validator

from agent.messages.spec_disks import Boot, BootFile, Disk, EphemeralDisk, ImageSource, RootDisk, SwapDisk
from agent.messages.spec_limits import CpuLimits, NicLimits
from agent.messages.spec_machine import (
    Cpu,
    Machine,
    MemoryBacking,
    NumaNode,
    Share,
    Video,
    Watchdog,
    check_agreement,
)
from agent.messages.spec_policy import Policy
from agent.messages.types import Inbound, InterfaceName, LongPattern, MacAddress, MemoryMib, Name, Vcpus

__all__ = [
    "BOOT_INITRD",
    "BOOT_KERNEL",
    "ROOT",
    "BridgeNic",
    "ImageSource",
    "InstanceSpec",
    "NetworkNic",
    "Nic",
    "NicBase",
    "RootDisk",
    "Seed",
    "UserNic",
    "images_of",
]

ROOT: Final = "root"
"""The root disk's name among an instance's disks."""

BOOT_KERNEL: Final = "boot.kernel"
BOOT_INITRD: Final = "boot.initrd"
"""Names of the files of a direct kernel boot among an instance's images. No disk can have them: they have a dot."""

SeedText = Annotated[str, Field(max_length=64 * 1024)]


class NicBase(Inbound):
    """What every kind of NIC has; without `mac` the driver derives a stable one from the instance id."""

    mac: MacAddress | None = None
    model: Literal["virtio", "e1000", "e1000e", "rtl8139"] = "virtio"
    limits: NicLimits | None = None


class NetworkNic(NicBase):
    """A NIC on a libvirt network, which must exist and be active."""

    type: Literal["network"]
    network: Name


class BridgeNic(NicBase):
    """A NIC on a host bridge, which must exist."""

    type: Literal["bridge"]
    bridge: InterfaceName


class UserNic(NicBase):
    """User-mode networking: no privileges, no inbound connections."""

    type: Literal["user"]


Nic = Annotated[NetworkNic | BridgeNic | UserNic, Field(discriminator="type")]

SshKey = Annotated[str, LongPattern(r"^[a-z0-9@.-]{4,64} [A-Za-z0-9+/=]{16,16384}( [ -~]{0,256})?$")]


class Seed(Inbound):
    """First-boot data for cloud-init: an ISO labelled `cidata` (NoCloud) or `config-2` (config-drive)."""

    datasource: Literal["nocloud", "config-drive"] = "nocloud"
    hostname: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?$")] | None = (
        None
    )
    user_data: SeedText | None = None
    meta_data: dict[Annotated[str, Field(max_length=255)], SeedText] = Field(default_factory=dict, max_length=256)
    network_config: SeedText | None = None
    ssh_keys: list[SshKey] = Field(default_factory=list, max_length=64)


class InstanceSpec(Inbound):
    """The whole definition of an instance, independent of the driver. Stored in the domain's own metadata.

    `max_vcpus` and `max_memory_mib` are how far a live resize can go; None: no further than now.
    """

    name: Name
    vcpus: Vcpus
    memory_mib: MemoryMib
    max_vcpus: Vcpus | None = None
    max_memory_mib: MemoryMib | None = None
    root_disk: RootDisk
    disks: list[Disk] = Field(default_factory=list, max_length=20)
    boot: Boot = Field(default_factory=Boot)
    nics: list[Nic] = Field(default_factory=list, max_length=16)
    seed: Seed | None = None
    firmware_acpi: bool = True
    rng: bool = True
    balloon: bool = True
    guest_agent: bool = True
    vnc: bool = False
    cpu: Cpu = Field(default_factory=Cpu)
    cpu_limits: CpuLimits = Field(default_factory=CpuLimits)
    machine: Machine = Field(default_factory=Machine)
    numa: list[NumaNode] = Field(default_factory=list, max_length=64)
    memory_backing: MemoryBacking = Field(default_factory=MemoryBacking)
    shares: list[Share] = Field(default_factory=list, max_length=16)
    watchdog: Watchdog | None = None
    video: Video | None = None
    policy: Policy = Field(default_factory=Policy)
    labels: dict[Name, Annotated[str, Field(max_length=256)]] = Field(default_factory=dict, max_length=64)

    def disks_by_name(self) -> dict[str, RootDisk | Disk]:
        """All disks, the root disk first, then in the order of the spec."""
        return {ROOT: self.root_disk, **{disk.name: disk for disk in self.disks}}

    @model_validator(mode="after")
    def _distinct_macs(self) -> InstanceSpec:
        macs = [nic.mac for nic in self.nics if nic.mac]
        if len(macs) != len(set(macs)):
            raise ValueError("two NICs have the same mac; give each its own or leave it out")
        return self

    @model_validator(mode="after")
    def _distinct_disks(self) -> InstanceSpec:
        names = [ROOT, *(disk.name for disk in self.disks)]
        if len(names) != len(set(names)):
            raise ValueError("two disks have the same name, or one is called root; give each its own")
        unknown = [name for name in self.boot.order if name not in names]
        if unknown:
            raise ValueError(f"boot.order names {unknown[0]!r}, which is none of the disks")
        return self

    @model_validator(mode="after")
    def _room_to_grow(self) -> InstanceSpec:
        if self.max_vcpus is not None and self.max_vcpus < self.vcpus:
            raise ValueError("max_vcpus is smaller than vcpus")
        if self.max_memory_mib is not None and self.max_memory_mib < self.memory_mib:
            raise ValueError("max_memory_mib is smaller than memory_mib")
        return self

    @model_validator(mode="after")
    def _hardware_agrees(self) -> InstanceSpec:
        check_agreement(self)
        return self


def images_of(spec: InstanceSpec) -> dict[str, ImageSource]:
    """Every image that the instance is made from: disk's name, `boot.kernel` or `boot.initrd` → source."""
    images: dict[str, ImageSource] = {}
    for name, disk in spec.disks_by_name().items():
        if not isinstance(disk, EphemeralDisk | SwapDisk) and disk.image is not None:
            images[name] = disk.image
    if spec.boot.kernel is not None:
        images[BOOT_KERNEL] = _as_image(spec.boot.kernel.kernel)
        if spec.boot.kernel.initrd is not None:
            images[BOOT_INITRD] = _as_image(spec.boot.kernel.initrd)
    return images


def _as_image(file: BootFile) -> ImageSource:
    return ImageSource(url=file.url, sha256=file.sha256, format="raw", signature=file.signature)
