"""Overwriting block devices, so that no instance reads what another left."""

from __future__ import annotations

import fcntl
import os
import stat
import struct
from pathlib import Path
from typing import Final, Literal

from agent.drivers.base import CallContext
from agent.drivers.libvirt.files import MIB
from agent.errors import Cancelled, Internal

# The ioctls of linux/fs.h; both take the first byte and the length. The kernel zeroes with what the device has for
# it, or writes.
_REQUESTS: Final = {"zero": 0x127F, "discard": 0x1277}
_CHUNK: Final = 64 * MIB


def overwrite(
    device: Path, how: Literal["zero", "discard"], call: CallContext | None = None, *, start: int = 0
) -> None:
    """Zero or discard a block device from byte `start` to its end. Raises `OSError`, and `Cancelled` on a cancel."""
    descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    try:
        if not stat.S_ISBLK(os.fstat(descriptor).st_mode):
            raise Internal(f"{device} is no block device", code="storage_failed")
        size = os.lseek(descriptor, 0, os.SEEK_END)
        for first in range(start, size, _CHUNK):
            if call is not None and call.cancelled():
                raise Cancelled("cancelled while the instance's files were made")
            fcntl.ioctl(descriptor, _REQUESTS[how], struct.pack("QQ", first, min(_CHUNK, size - first)))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
