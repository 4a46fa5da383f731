"""Files of instances: the root disk, the seed ISO and the console log, all in one folder per instance.

A file gets its final name only when it is complete, so what has that name is kept by a repeated call. qemu-img is
given explicit formats, and reads only verified images, never what a guest wrote.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

from agent.drivers.base import CallContext, ConsoleChunk, PreparedImage
from agent.drivers.libvirt import seed
from agent.drivers.libvirt.settings import LibvirtSettings
from agent.drivers.libvirt.xml import InstanceFiles
from agent.errors import (
    Cancelled,
    ComputeError,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
    Unsupported,
)
from agent.messages.spec import InstanceSpec
from agent.messages.types import UUID_PATTERN

_MIB: Final = 1024 * 1024
_UUID: Final = re.compile(UUID_PATTERN)
_FULL: Final = {errno.ENOSPC, errno.EDQUOT}
_MAX_ROTATED: Final = 8
# QEMU runs as another user: it may pass through the folders and sees only files whose names it was given.
_FOLDER_MODE: Final = 0o711


@contextlib.contextmanager
def _os_errors(doing: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        if exc.errno in _FULL:
            raise ResourceExhausted(f"no space left while {doing}", code="no_space") from exc
        if exc.errno in (errno.EIO, errno.ESTALE, errno.EROFS, errno.ENOTCONN):
            raise Unavailable(f"storage failed while {doing}: {exc.strerror}", code="storage_unavailable") from exc
        raise Internal(f"failed while {doing}: {exc}", code="storage_failed") from exc


def check_id(instance_id: str) -> str:
    """Return the id. Raises `InvalidArgument` if it is no UUID in lower case, and so no safe folder name."""
    if not _UUID.fullmatch(instance_id):
        raise InvalidArgument("the instance id must be a UUID in lower case", code="invalid_instance_id")
    return instance_id


class Storage:
    """The instances' folder. Methods for one instance are called one at a time, except reads."""

    def __init__(self, settings: LibvirtSettings, state_dir: Path) -> None:
        self._settings = settings
        self.root = settings.instances_dir or state_dir / "instances"
        self._format: Literal["qcow2", "raw"] = "raw" if settings.simulated else "qcow2"

    def files(self, instance_id: str) -> InstanceFiles:
        """Name the instance's files. Raises `InvalidArgument` if the id is no UUID in lower case."""
        folder = self._folder(instance_id)
        return InstanceFiles(
            disk=folder / ("disk.raw" if self._format == "raw" else "disk.qcow2"),
            disk_format=self._format,
            seed=folder / "seed.iso",
            console_log=folder / "console.log",
        )

    def create(self, instance_id: str, spec: InstanceSpec, image: PreparedImage | None, call: CallContext) -> None:
        """Make disk, seed and an empty console log; finished files are kept. See `Driver.create_storage`."""
        size = spec.root_disk.size_mib * _MIB
        if image is not None and image.virtual_size_bytes > size:
            raise InvalidArgument(
                f"the root disk of {spec.root_disk.size_mib} MiB is smaller than the image, which needs "
                f"{-(-image.virtual_size_bytes // _MIB)} MiB",
                code="disk_too_small",
                size_mib=spec.root_disk.size_mib,
                image_mib=-(-image.virtual_size_bytes // _MIB),
            )
        iso = seed.build(instance_id, spec) if spec.seed is not None else None
        files = self.files(instance_id)
        with _os_errors("making the instance's files"):
            files.disk.parent.mkdir(mode=_FOLDER_MODE, parents=True, exist_ok=True)
            if files.disk.parent.is_symlink():
                raise NotADirectoryError(errno.ENOTDIR, "a link is where the folder should be", str(files.disk.parent))
            self._check_space()
            if not files.disk.exists():
                _check_cancelled(call)
                self._make_disk(files.disk, size, image)
            call.progress(80.0)
            if iso is not None and not files.seed.exists():
                _check_cancelled(call)
                _write_durably(files.seed, iso)
            if not self._settings.simulated:
                # Made here so that the log is the agent's; virtlogd would make one that only root can read.
                files.console_log.touch(mode=0o640)
        call.progress(100.0)

    def delete(self, instance_id: str) -> None:
        """Remove the instance's folder with all in it; a link of that name is removed, not followed. Idempotent."""
        folder = self._folder(instance_id)
        # Not a directory: what should hold the folder is none, so there is nothing to remove.
        nothing = contextlib.suppress(FileNotFoundError, NotADirectoryError)
        with _os_errors("removing the instance's files"), nothing:
            if stat.S_ISDIR(folder.lstat().st_mode):
                shutil.rmtree(folder)
            else:
                folder.unlink()

    def cache_mode(self, instance_id: str) -> str:
        """Return the disk cache mode: the configured one, or `writeback` where O_DIRECT is missing."""
        mode = self._settings.disk_cache
        if mode not in ("none", "directsync"):
            return mode
        disk = self.files(instance_id).disk
        # The mode also holds for the image below, which may be on another file system.
        backing = _backing_file(disk) if self._format == "qcow2" else None
        direct = all(_supports_direct(path) for path in (disk, backing) if path is not None)
        return mode if direct else "writeback"

    def space_mib(self) -> tuple[int, int]:
        """Return total and free MiB of the file system that holds, or will hold, the instances."""
        folder = self.root
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        with _os_errors("reading the free space"):
            facts = os.statvfs(folder)
        return facts.f_blocks * facts.f_frsize // _MIB, facts.f_bavail * facts.f_frsize // _MIB

    def console_tail(self, instance_id: str, max_bytes: int) -> ConsoleChunk:
        """Read the last `max_bytes` of the console log, rotated parts included; empty without a log."""
        log = self.files(instance_id).console_log
        parts = [log, *(log.with_name(f"{log.name}.{number}") for number in range(_MAX_ROTATED))]
        data = b""
        with _os_errors("reading the console log"):
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

    def _check_space(self) -> None:
        _total, free = self.space_mib()
        if free < self._settings.min_free_mib:
            raise ResourceExhausted(
                f"{free} MiB are free for instances and {self._settings.min_free_mib} MiB must stay free",
                code="no_space",
                free_mib=free,
                min_free_mib=self._settings.min_free_mib,
            )

    def _make_disk(self, disk: Path, size: int, image: PreparedImage | None) -> None:
        part = disk.with_name(disk.name + ".part")
        part.unlink(missing_ok=True)
        try:
            if self._format == "raw":
                # The simulation never opens it; a sparse file shows that it exists and how large it is.
                with part.open("xb") as handle:
                    handle.truncate(size)
            else:
                self._qemu_img_create(part, size, image)
            _sync(part)
            part.rename(disk)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def _qemu_img_create(self, part: Path, size: int, image: PreparedImage | None) -> None:
        command = [self._settings.qemu_img, "create", "-q", "-f", "qcow2"]
        if image is not None:
            command += ["-F", image.format, "-b", str(image.path)]
        command += ["--", str(part), str(size)]
        limit = self._settings.qemu_img_timeout_s
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit, check=False,
                env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"},
            )  # fmt: skip
        except FileNotFoundError as exc:
            raise Unsupported("qemu-img is not installed on this host", code="qemu_img_missing") from exc
        except subprocess.TimeoutExpired as exc:
            raise DeadlineExceeded(f"qemu-img took more than {limit:g} s", code="qemu_img_timeout") from exc
        if done.returncode != 0:
            raise _qemu_img_error(done.stderr.decode(errors="replace").strip())


def _qemu_img_error(message: str) -> ComputeError:
    if os.strerror(errno.ENOSPC) in message or os.strerror(errno.EDQUOT) in message:
        return ResourceExhausted("no space left for the root disk", code="no_space")
    return Internal(f"qemu-img failed: {message[-500:]}", code="qemu_img_failed")


def _check_cancelled(call: CallContext) -> None:
    if call.cancelled():
        raise Cancelled("cancelled while the instance's files were made")


def _sync(path: Path) -> None:
    # Without this a power cut after the rename could leave an empty file that looks finished.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_durably(path: Path, data: bytes) -> None:
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(data)
        _sync(part)
        part.rename(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


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
