"""How much an export can come to, from files alone: no lock is taken, so it works beside a running guest."""

from __future__ import annotations

import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent.drivers.libvirt.files import MIB, os_errors
from agent.drivers.libvirt.volumes import Location
from agent.errors import FailedPrecondition

_CLUSTER: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class Bound:
    """`virtual` is what the guest sees; `data` is at least what a flattened copy takes up. In bytes."""

    virtual: int
    data: int


def bound(location: Location) -> Bound:
    """Read a disk's sizes. Raises `FailedPrecondition` (`disk_missing`)."""
    with os_errors("reading a disk's size"):
        try:
            virtual, data = _bound(location.path, location.format)
        except FileNotFoundError as exc:
            raise FailedPrecondition(f"the disk {location.path.name} is not there", code="disk_missing") from exc
    # Tables of a qcow2 take 8 + 2 bytes per cluster, and some to begin with.
    return Bound(virtual, min(virtual, data) + MIB + min(virtual, data) // _CLUSTER * 10)


def _bound(path: Path, format: str) -> tuple[int, int]:
    with path.open("rb") as file:
        facts = os.fstat(file.fileno())
        if stat.S_ISBLK(facts.st_mode):
            size = file.seek(0, os.SEEK_END)
            if format == "raw":
                return size, size
            file.seek(0)
            virtual, _backing = _header(file.read(32))
            return virtual, virtual
        used = facts.st_blocks * 512
        if format == "raw":
            return facts.st_size, used
        virtual, backing = _header(file.read(32))
    # What is below may be compressed, and come out at its full size; what is shared with a snapshot is counted twice.
    return virtual, used + _virtual_below(path, backing)


def _header(head: bytes) -> tuple[int, tuple[int, int]]:
    """Virtual size, and where the backing file's name is, of no length without one. It is QEMU's, not the guest's."""
    try:
        magic, _version, offset, length, _bits, virtual = struct.unpack(">4sIQIIQ", head)
    except struct.error:
        magic, offset, length, virtual = b"", 0, 0, 0
    if magic != b"QFI\xfb":
        raise FailedPrecondition("the disk is no qcow2 file", code="disk_missing")
    return int(virtual), (int(offset), int(length)) if offset and length <= 1023 else (0, 0)


def _virtual_below(path: Path, backing: tuple[int, int]) -> int:
    offset, length = backing
    if not length:
        return 0
    with path.open("rb") as file:
        file.seek(offset)
        below = Path(os.fsdecode(file.read(length)))
    with (path.parent / below).open("rb") as file:
        head = file.read(32)
        if head[:4] == b"QFI\xfb":
            return _header(head)[0]
        return os.fstat(file.fileno()).st_size
