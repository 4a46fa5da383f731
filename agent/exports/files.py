"""Files on their way into a store: hashed, made durable, and given their names at once and only once.

All functions block and belong into a worker thread. Each is idempotent. `claim` names the operation: a marker of that
name says what in a store is half published, and by whom.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent.errors import AlreadyExists, Cancelled, ComputeError, FailedPrecondition, ResourceExhausted, Unavailable

CHUNK: Final = 4 * 1024 * 1024
_CHECKSUM_BYTES: Final = 4096
_NO_FILE: Final = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.EISDIR}
_NO_LINKS: Final = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


@contextlib.contextmanager
def translated(doing: str) -> Iterator[None]:
    """Translate what the file system raises."""
    try:
        yield
    except OSError as exc:
        raise _error(exc, doing) from exc


def _error(exc: OSError, doing: str) -> ComputeError:
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceExhausted(f"no space left while {doing}", code="no_space")
    if exc.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
        return FailedPrecondition(f"the agent may not write while {doing}: {exc.strerror}", code="file_access_denied")
    return Unavailable(f"failed while {doing}: {exc.strerror}", code="export_unavailable")


@dataclass(frozen=True, slots=True)
class Slot:
    """One file's place in a store, with the names that belong to it."""

    final: Path
    claim: str

    @property
    def checksum(self) -> Path:
        return self.final.with_name(self.final.name + ".sha256")

    @property
    def _part(self) -> Path:
        return self.final.with_name(f".{self.final.name}.{self.claim}.part")

    @property
    def _marker(self) -> Path:
        return self.final.with_name(f".{self.final.name}.{self.claim}.own")

    def _is_ours(self, size: int) -> bool:
        if not (self._marker.exists() and self.final.exists()):
            return False
        if self._part.exists():
            return self._part.samefile(self.final)
        return self.final.stat().st_size == size  # where there are no links the part became the file

    def check_free(self) -> None:
        """Raises `AlreadyExists` (`export_exists`) if the name is taken, `FailedPrecondition` without the folder."""
        with translated("looking into the export store"):
            if not self.final.parent.is_dir():
                raise FailedPrecondition(
                    f"the folder {self.final.parent} of the export store does not exist", code="file_missing"
                )
            if os.path.lexists(self.final):
                raise self._taken()

    def _taken(self) -> AlreadyExists:
        return AlreadyExists(f"the store has a file {self.final.name} already; choose another", code="export_exists")

    def publish(self, source: Path, sha256: str, copied: Callable[[int], None]) -> None:
        """Give the file its name in the store, wholly and durably, without replacing anything."""
        size = source.stat().st_size
        with translated("publishing an export"):
            if not self._is_ours(size):
                self.check_free()
                _touch(self._marker)
                self._place(source, copied)
                try:
                    os.link(self._part, self.final)
                except FileExistsError:
                    raise self._taken() from None
                except OSError as exc:
                    if exc.errno not in _NO_LINKS:
                        raise
                    self._part.rename(self.final)
            write_durably(self.checksum, f"{sha256}  {self.final.name}\n".encode())
            sync(self.final.parent)

    def _place(self, source: Path, copied: Callable[[int], None]) -> None:
        self._part.unlink(missing_ok=True)
        try:
            os.link(source, self._part)
        except OSError as exc:
            if exc.errno not in _NO_LINKS:
                raise
            self._part.unlink(missing_ok=True)
            _copy(source, self._part, copied)
        self._part.chmod(0o640)
        sync(self._part)

    def settle(self) -> None:
        """Forget whose it is: the file stays."""
        with translated("publishing an export"):
            self._part.unlink(missing_ok=True)
            self._marker.unlink(missing_ok=True)

    def withdraw(self, size: int) -> None:
        """Remove what this operation published or half published, and nothing else."""
        with translated("removing an export"):
            if self._is_ours(size):
                self.final.unlink(missing_ok=True)
                self.checksum.unlink(missing_ok=True)
            self.settle()


def remove(final: Path, sha256: str) -> None:
    """Remove an export that was published with this checksum; another file of the name stays."""
    checksum = final.with_name(final.name + ".sha256")
    with translated("removing an export"):
        noted = (read_small(checksum, _CHECKSUM_BYTES) or b"").decode("ascii", errors="replace").split()
        if noted[:1] != [sha256]:
            return
        final.unlink(missing_ok=True)
        checksum.unlink(missing_ok=True)


def digest(path: Path, done: Callable[[int], None], cancelled: Callable[[], bool]) -> str:
    """The sha256 of a file. Raises `Cancelled`."""
    hashed, read = hashlib.sha256(), 0
    with translated("reading an export"), path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(CHUNK))
        while count := file.readinto(buffer):
            if cancelled():
                raise Cancelled("cancelled while the export was hashed")
            hashed.update(buffer[:count])
            read += count
            done(read)
    return hashed.hexdigest()


def sync(path: Path) -> None:
    """Make a file or folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, data: bytes) -> None:
    """Write a small file that has its name only when it is complete. Others may write to a store: no link of theirs is
    followed.
    """
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    with part.open("xb") as file:
        file.write(data)
    sync(part)
    part.replace(path)


def read_small(path: Path, most: int) -> bytes | None:
    """The content of a small plain file; None for anything else, which is not waited for and not followed."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as exc:
        if exc.errno in _NO_FILE:
            return None
        raise
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > most:
            return None
        return os.read(descriptor, most)
    finally:
        os.close(descriptor)


def _touch(path: Path) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o640))


def make_folder(folder: Path) -> None:
    """Make a staging folder: passable for QEMU, which sees only names it was given."""
    with translated("making the staging folder"):
        folder.mkdir(mode=0o711, parents=True, exist_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove a staging folder with all in it."""
    with translated("removing the staging folder"), contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)


def _copy(source: Path, target: Path, copied: Callable[[int], None]) -> None:
    done = 0
    with source.open("rb", buffering=0) as reading, target.open("xb", buffering=0) as writing:
        size = os.fstat(reading.fileno()).st_size
        while done < size:
            count = _copy_some(reading.fileno(), writing.fileno(), size - done)
            if count == 0:
                raise OSError(errno.EIO, "the export became shorter while it was copied")
            done += count
            copied(done)


def _copy_some(source: int, target: int, most: int) -> int:
    return os.sendfile(target, source, None, min(most, CHUNK))
