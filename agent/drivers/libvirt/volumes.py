"""What holds an instance's disks: the small interface behind which files, block devices and LVM are alike."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from agent.drivers.base import CallContext, PreparedImage
from agent.messages.spec import ROOT
from agent.messages.types import DiskFormat

__all__ = ["ROOT", "Backend", "Location", "Volume"]


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


class Backend(Protocol):
    """Keeps volumes. Every method but `locate` may take long and runs in a worker thread; calls for one volume come
    one at a time. All are idempotent. They raise `ResourceExhausted` (`no_space`), `Unavailable`
    (`storage_unavailable`), `DeadlineExceeded` and `Internal` (`storage_failed`, `qemu_img_failed`).
    """

    def locate(self, volume: Volume) -> Location:
        """Name the place, whether or not the volume is there. Raises `InvalidArgument` for an unsafe id."""

    def exists(self, volume: Volume) -> bool:
        """Whether the finished volume is there."""

    def create(self, volume: Volume, size_bytes: int, image: PreparedImage | None, call: CallContext) -> None:
        """Make a volume of this virtual size, with the content of `image` or empty. A finished one is kept as it is."""

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
