"""Images and disks of an instance's spec."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from agent.messages.spec_limits import DiskLimits
from agent.messages.types import DiskMib, ImageFormat, Inbound, LongPattern, Name, Sha256

Url = Annotated[str, LongPattern(r"^(https?|file)://[!-~]{1,2000}$")]
"""An image's address: http, https, or file with an absolute path; printable ASCII without spaces."""

DiskName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]{0,14}$")]
"""A disk's name among an instance's disks; part of file and volume names. `root` is the root disk's."""

DiskBus = Literal["virtio", "sata", "scsi"]


class ImageSignature(Inbound):
    """An Ed25519 signature, in base64, over the 32 bytes of the image's sha256. `key` names a trusted key of the host
    (`images.trusted_keys`).
    """

    key: Name
    ed25519: Annotated[str, LongPattern(r"^[A-Za-z0-9+/]{86}==$")]


class ImageSource(Inbound):
    """Where an image comes from and what its bytes must be.

    `sha256` is of the bytes at `url`, compressed as they may be. `format` is a claim that is checked against what the
    (decompressed) bytes are; vmdk and vhdx are converted. The image is refused above `max_size_mib` (of download, not
    of virtual size).
    """

    url: Url
    sha256: Sha256
    format: ImageFormat
    max_size_mib: DiskMib | None = None
    compression: Literal["gzip", "xz", "zstd"] | None = None
    signature: ImageSignature | None = None


class Encryption(Inbound):
    """The disk is encrypted with LUKS. `key` names a key file of the host (driver setting `keys_dir`): no key ever
    travels in a message.
    """

    format: Literal["luks"] = "luks"
    key: Name


class DiskOptions(Inbound):
    """What every writable disk has. `auto` is what suits the host best. `backend` names one of the host's storage
    back ends; None is its default. What the host cannot do of `cache` and `io` becomes the nearest that keeps data as
    safe. `discard`: the guest can give space back; an encrypted disk never does. Guests find a disk by its name, which
    is its serial number.
    """

    size_mib: DiskMib
    bus: DiskBus = "virtio"
    backend: Name | None = None
    cache: Literal["auto", "none", "writeback", "writethrough", "directsync", "unsafe"] = "auto"
    io: Literal["auto", "threads", "native", "io_uring"] = "auto"
    discard: bool = True
    encryption: Encryption | None = None
    limits: DiskLimits | None = None

    @model_validator(mode="after")
    def _native_without_cache(self) -> Self:
        if self.io == "native" and self.cache not in ("auto", "none", "directsync"):
            raise ValueError("io native needs cache none or directsync (or auto): the others go through the page cache")
        return self


class RootDisk(DiskOptions):
    """The root disk: an overlay on `image`, or an empty disk without one. `size_mib` is its virtual size."""

    image: ImageSource | None = None


class DataDisk(DiskOptions):
    """A further disk that is the user's: kept by a rebuild. Made from `image`, or empty."""

    kind: Literal["data"]
    name: DiskName
    image: ImageSource | None = None


class EphemeralDisk(DiskOptions):
    """Scratch space, formatted with `filesystem` and labelled with its name; made anew by a rebuild."""

    kind: Literal["ephemeral"]
    name: DiskName
    filesystem: Literal["none", "ext4"] = "ext4"


class SwapDisk(DiskOptions):
    """A disk that is formatted as swap space, labelled with its name."""

    kind: Literal["swap"]
    name: DiskName


class CdromDisk(Inbound):
    """A CD drive with an ISO image in it (`format` raw)."""

    kind: Literal["cdrom"]
    name: DiskName
    image: ImageSource

    @model_validator(mode="after")
    def _plain_bytes(self) -> Self:
        if self.image.format != "raw":
            raise ValueError("the image of a CD is an ISO image: its format is raw")
        return self


Disk = Annotated[DataDisk | EphemeralDisk | SwapDisk | CdromDisk, Field(discriminator="kind")]


class BootFile(Inbound):
    """A kernel or an initial ramdisk. Its `signature` is as an image's."""

    url: Url
    sha256: Sha256
    signature: ImageSignature | None = None


class KernelBoot(Inbound):
    """Direct kernel boot, without boot loader."""

    kernel: BootFile
    initrd: BootFile | None = None
    cmdline: Annotated[str, LongPattern(r"^[ -~]{0,2000}$")] = ""


class Boot(Inbound):
    """What the guest boots from. `order` names disks; root, data disks and CDs that are not named follow in the order
    of the spec. With `kernel` the disks are not asked.
    """

    order: Annotated[list[DiskName], Field(max_length=16)] = Field(default_factory=list)
    kernel: KernelBoot | None = None

    @model_validator(mode="after")
    def _once(self) -> Self:
        if len(set(self.order)) != len(self.order):
            raise ValueError("boot.order names a disk twice")
        return self
