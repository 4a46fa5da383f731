"""The folder of memory dumps: names, free space, checksums."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Final

from agent.drivers.base import CallContext
from agent.drivers.libvirt.files import MIB, os_errors, space_mib, sync
from agent.drivers.verbs.memory import Dump
from agent.errors import Cancelled, InvalidArgument, ResourceExhausted

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9.-]{0,127}")
_CHUNK: Final = 4 * MIB
_OVERHEAD_MIB: Final = 16


class Dumps:
    """Finished dumps, and parts of those that are being made; files of a name are touched by one call at a time."""

    def __init__(self, folder: Path, min_free_mib: int) -> None:
        self._folder = folder
        self._min_free_mib = min_free_mib

    def check_space(self, memory_mib: int) -> None:
        """Raise `ResourceExhausted` unless so much memory fits."""
        free = space_mib(self._folder)[1]
        needed = memory_mib + _OVERHEAD_MIB + self._min_free_mib
        if free < needed:
            raise ResourceExhausted(
                f"the dump needs up to {needed} MiB in {self._folder} and {free} MiB are free",
                code="no_space",
                free_mib=free,
                needed_mib=needed,
            )

    def find(self, name: str, call: CallContext) -> Dump | None:
        """The finished dump of this name."""
        path = self._path(name)
        if not path.exists():
            return None
        return Dump(path, path.stat().st_size, _sha256(path, call))

    def begin(self, name: str) -> Path:
        """Make the empty file that the hypervisor fills: it stays ours, whoever writes it."""
        part = self._part(name)
        with os_errors("making the file of a memory dump"):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            part.unlink(missing_ok=True)
            os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        return part

    def finish(self, name: str, call: CallContext) -> Dump:
        """Take the part for the whole: durable, with its checksum, under its name. Raises `Cancelled`."""
        part, path = self._part(name), self._path(name)
        with os_errors("finishing a memory dump"):
            digest = _sha256(part, call)
            sync(part)
            size = part.stat().st_size
            part.rename(path)
            sync(self._folder)
        return Dump(path, size, digest)

    def drop_part(self, name: str) -> None:
        """Remove what is half made."""
        with os_errors("removing a memory dump"):
            self._part(name).unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Remove the dump and what is half made of it."""
        self.drop_part(name)
        with os_errors("removing a memory dump"):
            self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise InvalidArgument(f"{name!r} is no name for a memory dump", code="invalid_argument")
        return self._folder / name

    def _part(self, name: str) -> Path:
        path = self._path(name)
        return path.with_name(path.name + ".part")


def _sha256(path: Path, call: CallContext) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(_CHUNK):
            if call.cancelled():
                raise Cancelled("cancelled while the memory dump was read")
            digest.update(chunk)
    return digest.hexdigest()
