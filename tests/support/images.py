"""Image bytes made field by field."""

from __future__ import annotations

import struct
from typing import Any

CLUSTER = 65_536
MIB = 2**20


def qcow2(*, name: bytes = b"", **changes: Any) -> bytes:
    """A small valid qcow2 of 10 MiB, with header fields changed. `name` is put where a backing file's name is."""
    fields: dict[str, Any] = {
        "magic": b"QFI\xfb", "version": 3, "backing_offset": 0, "backing_size": 0, "cluster_bits": 16, "size": 10 * MIB,
        "crypt": 0, "l1_size": 1, "l1_offset": 3 * CLUSTER, "reftable_offset": CLUSTER, "reftable_clusters": 1,
        "snapshots": 0, "snapshots_offset": 0, "incompatible": 0, "compatible": 0, "autoclear": 0, "refcount_order": 4,
        "header_length": 104,
    }  # fmt: skip
    assert not set(changes) - set(fields)
    fields |= changes
    if name:
        fields |= {"backing_offset": 1024, "backing_size": len(name)}
    image = bytearray(5 * CLUSTER)
    struct.pack_into(">4sIQIIQIIQQIIQQQQII", image, 0, *fields.values())
    struct.pack_into(">Q", image, CLUSTER, 2 * CLUSTER)
    for cluster in range(5):
        struct.pack_into(">H", image, 2 * CLUSTER + 2 * cluster, 1)
    struct.pack_into(">Q", image, 3 * CLUSTER, 4 * CLUSTER | 1 << 63)
    image[1024 : 1024 + len(name)] = name
    return bytes(image)
