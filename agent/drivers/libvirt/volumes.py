"""What holds an instance's disks: the small interfaces behind which files, block devices and LVM are alike.

`Backend` is what verbs work with (`Storage.backend`); `Keeper` is what a kind of storage has to offer for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from agent.drivers.base import CallContext, PreparedImage
from agent.drivers.libvirt.encryption import Key, Sealed
from agent.messages.spec import ROOT
from agent.messages.types import DiskFormat

__all__ = ["ROOT", "Backend", "Keeper", "Location", "Source", "Volume"]


@dataclass(frozen=True, slots=True)
class Volume:
    """One disk of one instance, by the disk's name in the spec."""

    instance_id: str
    name: str


@dataclass(frozen=True, slots=True)
class Location:
    """Where QEMU finds a volume. `format` is explicit, so that it is never probed."""

    kind: Literal["file", "block"]
    path: Path
    format: DiskFormat
    sealed: Sealed | None = None
    """Set for an encrypted volume: LUKS inside qcow2, or around raw bytes."""


@dataclass(frozen=True, slots=True)
class Source:
    """What a new volume begins with. `lasting`: it stays as it is, so that a volume may refer to it for good;
    otherwise it is a scratch file that can be taken.
    """

    path: Path
    format: str
    lasting: bool


class Backend(Protocol):
    """Keeps one disk of a spec, and volumes that are to take its place. Every method but `locate` may take long and
    runs in a worker thread; calls for one instance come one at a time. All are idempotent. They raise
    `ResourceExhausted` (`no_space`), `Unavailable` (`storage_unavailable`), `DeadlineExceeded`, `Internal`
    (`storage_failed`, `qemu_img_failed`, `program_failed`), and `FailedPrecondition` where the volume's own back end
    is no longer configured or its key cannot be used.
    """

    def locate(self, volume: Volume) -> Location:
        """Name the place, whether or not the volume is there. Raises `InvalidArgument` for an unsafe id."""

    def exists(self, volume: Volume) -> bool:
        """Whether the finished volume is there."""

    def create(self, volume: Volume, size_bytes: int, image: PreparedImage | None, call: CallContext) -> None:
        """Make a volume of this virtual size, with the content of `image`, or as the spec's disk has it: empty, or
        with a file system. A finished one is kept as it is. Back ends may round sizes up.
        """

    def create_from(self, volume: Volume, size_bytes: int, source: Source, call: CallContext) -> None:
        """As `create`, with the content of a source that is no image of the cache."""

    def size_bytes(self, volume: Volume) -> int:
        """The virtual size. Raises `NotFound`."""

    def grow(self, volume: Volume, size_bytes: int) -> None:
        """Make it larger while nobody uses it; one that is that large already is left alone. Never shrinks."""

    def replace(self, volume: Volume, by: Volume) -> None:
        """Let `by` take the place of `volume`, at once and wholly. Where `by` is gone it has happened already."""

    def remove(self, volume: Volume) -> None:
        """Remove it and what is half made of it."""

    def names(self, instance_id: str) -> list[str]:
        """Names of the instance's volumes that are there."""

    def space_mib(self) -> tuple[int, int]:
        """Total and free MiB."""


class Keeper(Protocol):
    """One configured storage: a folder, or a volume group. As `Backend`, but it knows neither spec nor manifest:
    content and key are given. With a `key` the volume is (to be) encrypted.
    """

    def locate(self, volume: Volume) -> Location: ...

    def exists(self, volume: Volume) -> bool: ...

    def create(
        self, volume: Volume, size_bytes: int, source: Source | None, key: Key | None, call: CallContext
    ) -> None: ...

    def size_bytes(self, volume: Volume, key: Key | None) -> int: ...

    def grow(self, volume: Volume, size_bytes: int, key: Key | None) -> None: ...

    def replace(self, volume: Volume, by: Volume) -> None: ...

    def remove(self, volume: Volume) -> None: ...

    def names(self, instance_id: str) -> list[str]: ...

    def space_mib(self) -> tuple[int, int]: ...
