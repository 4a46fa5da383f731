"""What a qcow2 file must hold before QEMU is given it: our own look at header, L1 table and file length.

The general inspector (see `inspect`) decides about backing files, data files and unknown features. This
module adds what it does not look at: damage marks, encryption, absurd geometry, and tables that lie behind
the end of the file, which is how a truncated upload shows. Data clusters are not walked; the checksum
vouches for those. No I/O but `os.pread`; runs in the download's worker thread.
"""

from __future__ import annotations

import os
import struct
import sys
from array import array
from dataclasses import dataclass

from agent.errors import ImageRejected

_MAGIC = b"QFI\xfb"
_HEADER = struct.Struct(">4sIQIIQIIQQIIQ")  # up to snapshots_offset: 72 bytes, all that version 2 has
_DIRTY, _CORRUPT = 1, 2
# QEMU's own limits (block/qcow2.h): it refuses larger tables when it opens the image.
_MAX_L1_BYTES = 32 * 1024 * 1024
_MAX_REFTABLE_BYTES = 8 * 1024 * 1024
_MAX_SNAPSHOTS = 65_536
_OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
MAX_VIRTUAL_BYTES = 64 * 2**40
"""The largest root disk that a command can ask for (`DiskMib`); a larger image could never be used."""


@dataclass(frozen=True, slots=True)
class Qcow2Header:
    """The fields of a header that passed `parse_header`; offsets and sizes in bytes."""

    cluster_bytes: int
    virtual_size_bytes: int
    l1_entries: int
    l1_offset: int
    reftable_offset: int
    reftable_clusters: int
    snapshots: int
    snapshots_offset: int


def corrupt(message: str) -> ImageRejected:
    """Make the refusal of a damaged image: code `image_corrupt`; a retry cannot help."""
    return ImageRejected(message, code="image_corrupt")


def unsafe(message: str) -> ImageRejected:
    """Make the refusal of an image that QEMU must not get: code `image_unsafe`; a retry cannot help."""
    return ImageRejected(message, code="image_unsafe")


def parse_header(head: bytes | bytearray) -> Qcow2Header:
    """Check a qcow2's first bytes and return its geometry.

    Internal snapshots are accepted: an overlay never reads them. Encryption is refused: a spec carries no
    key. Raises `ImageRejected` with code `image_unsafe` or `image_corrupt`.
    """
    if len(head) < 112:
        raise corrupt("the qcow2 image is shorter than its header")
    (_magic, version, backing, _backing_len, cluster_bits, size, crypt, l1_entries, l1_offset,
     reftable_offset, reftable_clusters, snapshots, snapshots_offset) = _HEADER.unpack_from(head)  # fmt: skip
    features = struct.unpack_from(">Q", head, 72)[0] if version >= 3 else 0
    if backing:
        raise unsafe("the qcow2 image has a backing file; publish it flattened")
    if crypt:
        raise unsafe("the qcow2 image is encrypted, and no key can be given for it")
    if features & _CORRUPT:
        raise corrupt("the qcow2 image is marked corrupt; repair it with qemu-img check -r")
    if features & _DIRTY:
        raise corrupt("the qcow2 image was not closed cleanly; repair it with qemu-img check -r")
    if not 9 <= cluster_bits <= 21:
        raise corrupt(f"the qcow2 header is damaged: cluster_bits is {cluster_bits}")
    if not 0 < size <= MAX_VIRTUAL_BYTES:
        raise corrupt(f"the qcow2 header is damaged: its virtual size is {size} bytes")
    cluster = 1 << cluster_bits
    needed = -(-size // (cluster * (cluster // 8)))
    if l1_entries < needed or l1_entries * 8 > _MAX_L1_BYTES:
        raise corrupt(f"the qcow2 header is damaged: {l1_entries} L1 entries where {needed} are needed")
    if reftable_clusters * cluster > _MAX_REFTABLE_BYTES or snapshots > _MAX_SNAPSHOTS:
        raise corrupt("the qcow2 header is damaged: a refcount or snapshot table larger than QEMU admits")
    if l1_offset % cluster or reftable_offset % cluster:
        raise corrupt("the qcow2 header is damaged: a table is not aligned to a cluster")
    return Qcow2Header(
        cluster_bytes=cluster,
        virtual_size_bytes=size,
        l1_entries=l1_entries,
        l1_offset=l1_offset,
        reftable_offset=reftable_offset,
        reftable_clusters=reftable_clusters,
        snapshots=snapshots,
        snapshots_offset=snapshots_offset,
    )


def check_tables(header: Qcow2Header, fd: int, file_bytes: int) -> None:
    """Check that every table that QEMU reads at once, and every L2 table, lies inside the file.

    Raises `ImageRejected` with code `image_corrupt`.
    """
    ends = {
        "L1 table": header.l1_offset + header.l1_entries * 8,
        "refcount table": header.reftable_offset + header.reftable_clusters * header.cluster_bytes,
        "snapshot table": header.snapshots_offset if header.snapshots else 0,
    }
    for name, end in ends.items():
        if end > file_bytes:
            raise corrupt(f"the qcow2 image is truncated: its {name} ends at {end} of {file_bytes} bytes")
    table = array("Q", os.pread(fd, header.l1_entries * 8, header.l1_offset))
    if sys.byteorder == "little":
        table.byteswap()
    last = max((entry & _OFFSET_MASK for entry in table), default=0)
    if last and last + header.cluster_bytes > file_bytes:
        raise corrupt(f"the qcow2 image is truncated: an L2 table lies at {last} of {file_bytes} bytes")


def is_qcow2(head: bytes | bytearray) -> bool:
    """Tell whether the bytes begin like a qcow or qcow2 image of any version."""
    return head[:4] == _MAGIC
