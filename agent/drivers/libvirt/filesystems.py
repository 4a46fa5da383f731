"""File systems in new disks, made in a file: nothing is mounted and no loop device is needed."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Final, Literal

from agent.drivers.base import CallContext
from agent.drivers.libvirt import programs
from agent.drivers.libvirt.volumes import Source, Volume

Filesystem = Literal["ext4", "swap"]

_TIMEOUT_S: Final = 120.0
_SPACE: Final = uuid.UUID("0f6dc1ec-7d0e-4c8f-93b5-5f1f2e8a7c10")


def filesystem_uuid(volume: Volume, label: str) -> str:
    """Always the same for a disk, so that a repeated run makes the same."""
    return str(uuid.uuid5(_SPACE, f"{volume.instance_id}/{label}"))


def make(
    path: Path, filesystem: Filesystem, size_bytes: int, volume: Volume, label: str, *, call: CallContext
) -> Source:
    """Make a sparse file of this size with an empty file system in it. Raises `OSError`, and as `programs.run` does."""
    uuid_ = filesystem_uuid(volume, label)
    with path.open("wb") as handle:
        path.chmod(0o600)
        handle.truncate(size_bytes)
    if filesystem == "swap":
        command = ["mkswap", "--label", label, "--uuid", uuid_, str(path)]
    else:
        # What can wait until the guest mounts it is not written now.
        later = f"hash_seed={uuid_},nodiscard,lazy_itable_init=1,lazy_journal_init=1"
        command = ["mkfs.ext4", "-q", "-F", "-L", label, "-U", uuid_, "-E", later, str(path)]
    programs.run(command, timeout_s=_TIMEOUT_S, call=call)
    return Source(path, "raw", lasting=False)
