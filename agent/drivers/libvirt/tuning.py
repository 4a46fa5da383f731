"""How QEMU is to access each disk, from what the spec and the configuration ask for and what the host can do.

What the host cannot do is replaced by the nearest that keeps the guest's data as safe: without O_DIRECT `none` becomes
`writeback` and `directsync` `writethrough`; an asynchronous mode that is not there becomes `threads`.
"""

from __future__ import annotations

import errno
import os
import struct
import tempfile
import threading
from pathlib import Path
from typing import Final

import structlog

from agent.drivers.libvirt import qemu_img
from agent.drivers.libvirt.definition import Tuning
from agent.drivers.libvirt.settings import LibvirtSettings
from agent.drivers.libvirt.volumes import Location
from agent.errors import ComputeError
from agent.messages.spec_disks import DiskOptions

_log = structlog.get_logger(__name__)
_DIRECT: Final = ("none", "directsync")
_WITHOUT_DIRECT: Final = {"none": "writeback", "directsync": "writethrough"}


class Tuner:
    """Thread-safe."""

    def __init__(self, settings: LibvirtSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._io_uring: bool | None = None

    def of(self, disk: DiskOptions, location: Location) -> Tuning:
        """The access to a disk that is there, or will be."""
        cache: str = self._settings.disk_cache if disk.cache == "auto" else disk.cache
        if cache in _DIRECT and not _direct(location):
            cache = _WITHOUT_DIRECT[cache]
        # An encrypted disk is not to tell which of its blocks are unused or zero.
        discard = disk.discard and location.sealed is None
        return Tuning(
            cache=cache,
            io=self._io(self._settings.disk_io if disk.io == "auto" else disk.io, cache, location),
            discard=discard,
            # Files stay sparse; on a block device it would only turn cheap writes into dear discards.
            detect_zeroes=discard and location.kind == "file",
        )

    def _io(self, wanted: str, cache: str, location: Location) -> str:
        direct = cache in _DIRECT
        if wanted == "auto":
            # Native AIO blocks QEMU's thread where a write to a sparse file has to allocate.
            return "native" if direct and location.kind == "block" else "threads"
        if wanted == "native":
            return "native" if direct else "threads"
        if wanted == "io_uring":
            return "io_uring" if self._has_io_uring() else "threads"
        return "threads"

    def _has_io_uring(self) -> bool:
        """Whether kernel and QEMU can, found out once by one read."""
        with self._lock:
            if self._io_uring is None:
                self._io_uring = _try_io_uring(self._settings)
            return self._io_uring


def _try_io_uring(settings: LibvirtSettings) -> bool:
    with tempfile.NamedTemporaryFile(prefix="io-uring-") as file:
        file.truncate(65536)
        try:
            qemu_img.run(settings, ["bench", "-q", "-c", "1", "-d", "1", "-i", "io_uring", "-f", "raw", file.name])
        except ComputeError as exc:
            _log.info("libvirt.io_uring.missing", error=exc.message)
            return False
    return True


def _direct(disk: Location) -> bool:
    # The mode also holds for the image below, which may be on another file system.
    backing = _backing_file(disk.path) if disk.format == "qcow2" else None
    return all(_supports_direct(path) for path in (disk.path, backing) if path is not None)


def _supports_direct(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC))
    except OSError as exc:
        return exc.errno != errno.EINVAL
    return True


def _backing_file(disk: Path) -> Path | None:
    """Read the backing file's name from a qcow2 header, which QEMU and not the guest writes."""
    try:
        with disk.open("rb") as handle:
            magic, _version, offset, length = struct.unpack(">4sIQI", handle.read(20))
            if magic != b"QFI\xfb" or not offset or length > 1023:
                return None
            handle.seek(offset)
            return Path(os.fsdecode(handle.read(length)))
    except (OSError, struct.error):
        return None
