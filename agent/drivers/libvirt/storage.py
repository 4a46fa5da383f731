"""Files of instances: the root disk, the seed ISO and the console log, all in one folder per instance.

A file gets its final name only when it is complete, so what has that name is kept by a repeated call. qemu-img is
given explicit formats, and reads only verified images, never what a guest wrote.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from agent.drivers.base import CallContext, ConsoleChunk, PreparedImage
from agent.drivers.libvirt import seed
from agent.drivers.libvirt.backend_files import FileBackend
from agent.drivers.libvirt.definition import InstanceFiles, Tuning
from agent.drivers.libvirt.files import MIB, check_id, os_errors, write_durably
from agent.drivers.libvirt.settings import LibvirtSettings
from agent.drivers.libvirt.volumes import Backend, Location, Volume
from agent.errors import Cancelled, InvalidArgument
from agent.messages.spec import InstanceSpec
from agent.messages.spec_disks import CdromDisk

_MAX_ROTATED: Final = 8


class Storage:
    """The instances' folder. Methods for one instance are called one at a time, except reads."""

    def __init__(self, settings: LibvirtSettings, state_dir: Path) -> None:
        self._settings = settings
        self.root = settings.instances_dir or state_dir / "instances"
        self._backend: Backend = FileBackend(settings, self.root, "raw" if settings.simulated else "qcow2")

    def backend(self, spec: InstanceSpec, disk_name: str) -> Backend:  # noqa: ARG002 - all disks are files so far
        """Return what keeps this disk of the spec."""
        return self._backend

    def files(self, instance_id: str, spec: InstanceSpec) -> InstanceFiles:
        """Name the instance's files. Raises `InvalidArgument` if the id is no UUID in lower case."""
        folder = self._folder(instance_id)
        disks = {name: self.backend(spec, name).locate(Volume(instance_id, name)) for name in spec.disks_by_name()}
        return InstanceFiles(
            disks=disks,
            seed=folder / "seed.iso",
            console_log=self.console_log(instance_id),
            tuning={name: self._tuning(location) for name, location in disks.items()},
        )

    def console_log(self, instance_id: str) -> Path:
        """Where the console's log is. Raises `InvalidArgument` if the id is no UUID in lower case."""
        return self._folder(instance_id) / "console.log"

    def create(
        self, instance_id: str, spec: InstanceSpec, images: Mapping[str, PreparedImage], call: CallContext
    ) -> None:
        """Make disks, seed and an empty console log; finished files are kept. See `Driver.create_storage`."""
        for name, disk in spec.disks_by_name().items():
            if not isinstance(disk, CdromDisk):
                _check_size(name, disk.size_mib, images.get(name))
        iso = seed.build(instance_id, spec) if spec.seed is not None else None
        files = self.files(instance_id, spec)
        _check_cancelled(call)
        for name, disk in spec.disks_by_name().items():
            if not isinstance(disk, CdromDisk):
                volume = Volume(instance_id, name)
                self.backend(spec, name).create(volume, disk.size_mib * MIB, images.get(name), call)
        call.progress(80.0)
        with os_errors("making the instance's files"):
            if iso is not None and not files.seed.exists():
                _check_cancelled(call)
                write_durably(files.seed, iso)
            if not self._settings.simulated:
                # Made here so that the log is the agent's; virtlogd would make one that only root can read.
                files.console_log.touch(mode=0o640)
        call.progress(100.0)

    def delete(self, instance_id: str) -> None:
        """Remove the instance's folder with all in it; a link of that name is removed, not followed. Idempotent."""
        folder = self._folder(instance_id)
        # Not a directory: what should hold the folder is none, so there is nothing to remove.
        nothing = contextlib.suppress(FileNotFoundError, NotADirectoryError)
        with os_errors("removing the instance's files"), nothing:
            if stat.S_ISDIR(folder.lstat().st_mode):
                shutil.rmtree(folder)
            else:
                folder.unlink()

    def _tuning(self, disk: Location) -> Tuning:
        """The configured cache mode, or `writeback` where O_DIRECT is missing."""
        mode = self._settings.disk_cache
        if mode not in ("none", "directsync"):
            return Tuning(mode)
        # The mode also holds for the image below, which may be on another file system.
        backing = _backing_file(disk.path) if disk.format == "qcow2" else None
        direct = all(_supports_direct(path) for path in (disk.path, backing) if path is not None)
        return Tuning(mode if direct else "writeback")

    def space_mib(self) -> tuple[int, int]:
        """Return total and free MiB of the file system that holds, or will hold, the instances."""
        return self._backend.space_mib()

    def console_tail(self, instance_id: str, max_bytes: int) -> ConsoleChunk:
        """Read the last `max_bytes` of the console log, rotated parts included; empty without a log."""
        log = self.console_log(instance_id)
        parts = [log, *(log.with_name(f"{log.name}.{number}") for number in range(_MAX_ROTATED))]
        data = b""
        with os_errors("reading the console log"):
            for part in parts:
                try:
                    chunk, truncated = _tail(part, max_bytes - len(data))
                except FileNotFoundError:
                    # virtlogd renames while we read; the gap is at the older end.
                    if part != log:
                        break
                    continue
                data = chunk + data
                if truncated:
                    return ConsoleChunk(data, truncated=True)
        return ConsoleChunk(data, truncated=False)

    def _folder(self, instance_id: str) -> Path:
        return self.root / check_id(instance_id)


def _check_size(name: str, size_mib: int, image: PreparedImage | None) -> None:
    if image is not None and image.virtual_size_bytes > size_mib * MIB:
        needed = -(-image.virtual_size_bytes // MIB)
        raise InvalidArgument(
            f"disk {name} of {size_mib} MiB is smaller than its image, which needs {needed} MiB",
            code="disk_too_small", disk=name, size_mib=size_mib, image_mib=needed,
        )  # fmt: skip


def _check_cancelled(call: CallContext) -> None:
    if call.cancelled():
        raise Cancelled("cancelled while the instance's files were made")


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


def _tail(path: Path, max_bytes: int) -> tuple[bytes, bool]:
    """Return the last bytes of a file, and whether there was more."""
    with path.open("rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        start = max(0, size - max_bytes)
        handle.seek(start)
        return handle.read(size - start), start > 0
