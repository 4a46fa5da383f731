"""Small file work that several storage modules share: translated errors, durable writes, safe folder names."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from agent.errors import Internal, InvalidArgument, ResourceExhausted, Unavailable
from agent.messages.types import UUID_PATTERN

MIB: Final = 1024 * 1024
FOLDER_MODE: Final = 0o711
"""QEMU runs as another user: it may pass through the folders and sees only files whose names it was given."""
_UUID: Final = re.compile(UUID_PATTERN)
_FULL: Final = {errno.ENOSPC, errno.EDQUOT}


@contextlib.contextmanager
def os_errors(doing: str) -> Iterator[None]:
    """Translate what the file system raises."""
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


def make_folder(folder: Path) -> None:
    """Make an instance's folder. A link of that name is refused, not followed."""
    folder.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
    if folder.is_symlink():
        raise NotADirectoryError(errno.ENOTDIR, "a link is where the folder should be", str(folder))


def sync(path: Path) -> None:
    """Make a file durable: else a power cut after its rename could leave an empty file that looks finished."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, data: bytes) -> None:
    """Write a file that has its name only when it is complete."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(data)
        sync(part)
        part.rename(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def space_mib(folder: Path) -> tuple[int, int]:
    """Return total and free MiB of the file system that holds, or will hold, the folder."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    with os_errors("reading the free space"):
        facts = os.statvfs(folder)
    return facts.f_blocks * facts.f_frsize // MIB, facts.f_bavail * facts.f_frsize // MIB
