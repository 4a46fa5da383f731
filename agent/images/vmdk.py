"""What a vmdk must be before qemu-img is given it: one file, with all of its data in itself.

The general inspector (see `inspect`) checks the descriptor as well. This module is stricter, because QEMU reads
a descriptor with another parser: it takes the first `createType` that it finds, follows a parent's name wherever
it stands, and opens the files that the descriptor names where the header has no capacity. So each of these is
looked for in the bytes as such, and every line must be one that we know.
"""

from __future__ import annotations

import os
import re
import struct
from array import array

from agent.images.qcow2 import MAX_VIRTUAL_BYTES, corrupt, unsafe

_SECTOR = 512
_HEADER = struct.Struct("<4sIIQQQQIQQ")
_DESCRIPTOR_AT = 1
_DESCRIPTOR_SECTORS = 20
"""QEMU looks for a parent's name in so many sectors, whatever the header says."""
_MAX_TABLES = 65_536
"""Grain tables that are looked at: those of the first 2 TiB with QEMU's grains."""
_DIRECTORY = 56
_AT_END = 0xFFFF_FFFF_FFFF_FFFF
_TYPE = re.compile(r'createType="(monolithicSparse|streamOptimized)"')
_EXTENT = re.compile(r'(?:RW|RDONLY) (\d{1,15}) SPARSE "[^"/\\\x00-\x1f]{1,255}"')
_OTHER = re.compile(
    r"(?:version=[123]|encoding=\"[\w-]{1,32}\"|CID=[0-9a-fA-F]{1,8}|parentCID=[fF]{8}|isNativeSnapshot=\"no\""
    r"|ddb\.[\w.]{1,64} ?= ?\"[^\"\x00-\x1f]{0,255}\"|#[^\x00-\x08\x0e-\x1f]*)?"
)
_REPEATED = re.compile(rb"createtype|parentfilenamehint|parentcid", re.IGNORECASE)


def check_head(head: bytes | bytearray) -> int:
    """Check header and descriptor in a vmdk's first bytes, and return its virtual size in bytes.

    Raises `ImageRejected` with code `image_unsafe` or `image_corrupt`.
    """
    capacity, descriptor_at, sectors = _header(head)
    if descriptor_at != _DESCRIPTOR_AT or not 0 < sectors * _SECTOR < len(head) - _SECTOR:
        raise unsafe("the vmdk image has no descriptor where it belongs")
    area = bytes(head[_SECTOR : _SECTOR * (1 + max(sectors, _DESCRIPTOR_SECTORS))])
    counts = [match[0].lower() for match in _REPEATED.finditer(area)]
    if b"parentfilenamehint" in counts or counts.count(b"createtype") != 1 or counts.count(b"parentcid") > 1:
        raise unsafe("the vmdk image names a parent, or its descriptor is ambiguous; publish it flattened")
    text, _, behind = bytes(head[_SECTOR : _SECTOR * (1 + sectors)]).partition(b"\0")
    if behind.strip(b"\0"):
        raise unsafe("the vmdk image's descriptor holds something behind its end")
    _check_lines(text, capacity)
    return capacity * _SECTOR


def check_tables(head: bytes | bytearray, fd: int, file_bytes: int) -> None:
    """Check what needs the whole file: a header at its end agrees with the first, and no grain lies behind its end.

    QEMU reads what is missing as zeros. Raises as `check_head`.
    """
    capacity, grain = struct.unpack_from("<QQ", head, 12)
    entries = struct.unpack_from("<I", head, 44)[0]
    directory = _footer(head, fd, file_bytes)
    count = -(-capacity // (grain * entries))
    tables = array("I", os.pread(fd, 4 * count, directory * _SECTOR))
    if len(tables) < count:
        raise corrupt("the vmdk image is truncated: its grain directory lies behind its end")
    last = max((_last_grain(fd, table, entries) for table in tables[:_MAX_TABLES] if table), default=0)
    if last * _SECTOR >= file_bytes:
        raise corrupt(f"the vmdk image is truncated: a grain lies at {last * _SECTOR} of {file_bytes} bytes")


def _last_grain(fd: int, table: int, entries: int) -> int:
    grains = array("I", os.pread(fd, 4 * entries, table * _SECTOR))
    if len(grains) < entries:
        raise corrupt("the vmdk image is truncated: a grain table lies behind its end")
    return max(grains)


def _footer(head: bytes | bytearray, fd: int, file_bytes: int) -> int:
    """Return the sector of the grain directory, which a header at the end has where the first one does not."""
    directory = int(struct.unpack_from("<Q", head, _DIRECTORY)[0])
    if directory != _AT_END:
        return _checked(directory)
    footer = os.pread(fd, _SECTOR, max(file_bytes - 2 * _SECTOR, 0))
    if len(footer) < _SECTOR or footer[:4] != b"KDMV":
        raise corrupt("the vmdk image is truncated: its footer is missing")
    if footer[:48] != bytes(head[:48]):  # all but the place of the grain directory, which is what a footer is for
        raise unsafe("the vmdk image's footer contradicts its header")
    return _checked(int(struct.unpack_from("<Q", footer, _DIRECTORY)[0]))


def _checked(directory: int) -> int:
    if not 0 < directory < 2**40:
        raise corrupt("the vmdk image has no grain directory")
    return directory


def _header(head: bytes | bytearray) -> tuple[int, int, int]:
    if len(head) < _SECTOR or head[:4] != b"KDMV":
        raise unsafe("the vmdk image is not of a single file; publish it as monolithicSparse or streamOptimized")
    (_magic, version, _flags, capacity, grain, descriptor_at, sectors,
     entries, _redundant, _directory) = _HEADER.unpack_from(head)  # fmt: skip
    if version not in {1, 2, 3} or grain not in {1 << n for n in range(17)} or not 0 < entries <= 512:
        raise corrupt("the vmdk header is damaged")
    if not 0 < capacity * _SECTOR <= MAX_VIRTUAL_BYTES:
        raise unsafe(f"the vmdk image's capacity is {capacity} sectors")
    return capacity, descriptor_at, sectors


def _check_lines(text: bytes, capacity: int) -> None:
    extents: list[int] = []
    try:
        lines = text.decode("ascii").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as exc:
        raise unsafe("the vmdk image's descriptor is not ASCII") from exc
    types = 0
    for line in (line.strip(" \t") for line in lines):
        extent = _EXTENT.fullmatch(line)
        if extent:
            extents.append(int(extent[1]))
        elif _TYPE.fullmatch(line):
            types += 1
        elif not _OTHER.fullmatch(line):
            raise unsafe(f"the vmdk image's descriptor has a line that is not allowed: {line[:80]!r}")
    if types != 1:
        raise unsafe("the vmdk image's createType is neither monolithicSparse nor streamOptimized")
    if extents != [capacity]:
        raise unsafe("the vmdk image must have just one extent, of its own size")
