"""What a vhdx must be before qemu-img is given it: complete, without parent, with nothing left to replay.

Reads the region and metadata tables from the finished file, as QEMU does. No I/O but `os.pread`; runs in the
download's worker thread.
"""

from __future__ import annotations

import os
import struct
import uuid

from agent.images.qcow2 import MAX_VIRTUAL_BYTES, corrupt, unsafe

_KIB = 1024
_HEADERS_AT = (64 * _KIB, 128 * _KIB)
_REGIONS_AT = 192 * _KIB
_TABLE_BYTES = 64 * _KIB
_MAX_ENTRIES = 2047
_METADATA = uuid.UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e")
_FILE_PARAMETERS = uuid.UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b")
_VIRTUAL_SIZE = uuid.UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8")
_PARENT_LOCATOR = uuid.UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c")
_HAS_PARENT = 2


def check_file(fd: int, file_bytes: int) -> int:
    """Check a complete vhdx, and return its virtual size in bytes.

    Raises `ImageRejected` with code `image_unsafe` or `image_corrupt`.
    """
    _check_log(fd)
    place = _metadata_at(fd)
    if place + _TABLE_BYTES > file_bytes:
        raise corrupt("the vhdx image is truncated: its metadata lies behind its end")
    items = _items(os.pread(fd, _TABLE_BYTES, place))
    if _PARENT_LOCATOR in items:
        raise unsafe("the vhdx image has a parent; publish it flattened")
    parameters, size = items.get(_FILE_PARAMETERS), items.get(_VIRTUAL_SIZE)
    if parameters is None or size is None:
        raise corrupt("the vhdx image's metadata is incomplete")
    data = os.pread(fd, 8, place + parameters), os.pread(fd, 8, place + size)
    if any(len(item) != 8 for item in data):
        raise corrupt("the vhdx image is truncated: its metadata lies behind its end")
    if struct.unpack_from("<I", data[0], 4)[0] & _HAS_PARENT:
        raise unsafe("the vhdx image has a parent; publish it flattened")
    virtual = int(struct.unpack("<Q", data[1])[0])
    if not 0 < virtual <= MAX_VIRTUAL_BYTES:
        raise corrupt(f"the vhdx metadata is damaged: the virtual size is {virtual} bytes")
    return virtual


def _check_log(fd: int) -> None:
    """The current header is the one with the higher sequence number; a log in it was never replayed."""
    found: list[tuple[int, bytes]] = []
    for place in _HEADERS_AT:
        header = os.pread(fd, 4 * _KIB, place)
        if header[:4] == b"head" and len(header) == 4 * _KIB:
            found.append((struct.unpack_from("<Q", header, 8)[0], header[48:64]))
    if not found:
        raise corrupt("the vhdx image has no header")
    if any(max(found)[1]):
        raise corrupt("the vhdx image was not closed cleanly; let its writer replay its log")


def _metadata_at(fd: int) -> int:
    table = os.pread(fd, _TABLE_BYTES, _REGIONS_AT)
    if len(table) < _TABLE_BYTES or table[:4] != b"regi":
        raise corrupt("the vhdx image has no region table")
    count = struct.unpack_from("<I", table, 8)[0]
    places = [
        struct.unpack_from("<Q", table, start + 16)[0]
        for start in range(16, 16 + 32 * min(count, _MAX_ENTRIES), 32)
        if table[start : start + 16] == _METADATA.bytes_le
    ]
    if count > _MAX_ENTRIES or len(places) != 1 or places[0] >= 2**62:
        raise corrupt("the vhdx region table is damaged")
    return int(places[0])


def _items(table: bytes) -> dict[uuid.UUID, int]:
    """Return each metadata item's offset within the region."""
    count = struct.unpack_from("<H", table, 10)[0]
    if table[:8] != b"metadata" or count > _MAX_ENTRIES:
        raise corrupt("the vhdx metadata table is damaged")
    found: dict[uuid.UUID, int] = {}
    for start in range(32, 32 + 32 * count, 32):
        key = uuid.UUID(bytes_le=table[start : start + 16])
        if key in found:
            raise corrupt("the vhdx metadata table is damaged: an item is there twice")
        found[key] = struct.unpack_from("<I", table, start + 16)[0]
    return found
