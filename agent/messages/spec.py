"""What an instance is made of: the part of `instance.create` that is kept with the instance for its whole life."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from agent.messages.types import (
    DiskMib,
    ImageFormat,
    Inbound,
    InterfaceName,
    LongPattern,
    MacAddress,
    MemoryMib,
    Name,
    Sha256,
    Vcpus,
)

Url = Annotated[str, LongPattern(r"^(https?|file)://[!-~]{1,2000}$")]
"""An image's address: http, https, or file with an absolute path; printable ASCII without spaces."""

SeedText = Annotated[str, Field(max_length=64 * 1024)]


class ImageSource(Inbound):
    """Where an image comes from and what its bytes must be.

    `sha256` is of the bytes at `url`. `format` is a claim that is checked against what the bytes are. The image is
    refused above `max_size_mib` (of download, not of virtual size).
    """

    url: Url
    sha256: Sha256
    format: ImageFormat
    max_size_mib: DiskMib | None = None


class RootDisk(Inbound):
    """The root disk: an overlay on `image`, or an empty disk without one. `size_mib` is its virtual size."""

    size_mib: DiskMib
    image: ImageSource | None = None
    bus: Literal["virtio", "sata", "scsi"] = "virtio"


class NicBase(Inbound):
    """What every kind of NIC has; without `mac` the driver derives a stable one from the instance id."""

    mac: MacAddress | None = None
    model: Literal["virtio", "e1000", "e1000e", "rtl8139"] = "virtio"


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
    """The whole definition of an instance, independent of the driver. Stored in the domain's own metadata."""

    name: Name
    vcpus: Vcpus
    memory_mib: MemoryMib
    root_disk: RootDisk
    nics: list[Nic] = Field(default_factory=list, max_length=16)
    seed: Seed | None = None
    firmware_acpi: bool = True
    rng: bool = True
    balloon: bool = True
    guest_agent: bool = True
    vnc: bool = False
    labels: dict[Name, Annotated[str, Field(max_length=256)]] = Field(default_factory=dict, max_length=64)

    @model_validator(mode="after")
    def _distinct_macs(self) -> InstanceSpec:
        macs = [nic.mac for nic in self.nics if nic.mac]
        if len(macs) != len(set(macs)):
            raise ValueError("two NICs have the same mac; give each its own or leave it out")
        return self
