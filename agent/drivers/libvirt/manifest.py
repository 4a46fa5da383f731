"""The list of an instance's volumes, so that they can be removed by who knows only the instance's id.

The file is `volumes.json` in the instance's folder: `{"version": 1, "volumes": [entry, …]}`. An entry is written,
durably, before its volume is made, and taken out after it was removed: the list may name what is not there, but
nothing that is there is missing from it. It also pins each disk to the back end that it was made on, should the
host's default change, and holds names of keys, never keys.

    name      the volume's name; for a disk of the spec that of the disk
    backend   the host's back end that keeps it; empty for `kind` image
    kind      file, block, or image: a CD in the image cache, which is only referred to and is not the instance's
    path      where QEMU finds it
    format    qcow2 or raw
    key       name of the key, for an encrypted volume; else null
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints, TypeAdapter, ValidationError

from agent.drivers.libvirt.files import os_errors, sync, write_durably
from agent.errors import FailedPrecondition
from agent.messages.types import DiskFormat

NAME: Final = "volumes.json"


class Entry(BaseModel):
    """One volume of the list."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    """It becomes a part of a file's name: one that leads elsewhere makes the list a damaged one."""
    backend: str
    kind: Literal["file", "block", "image"]
    path: Path
    format: DiskFormat
    key: str | None = None


class _Content(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    version: Literal[1] = 1
    volumes: list[Entry] = []


_CONTENT: Final = TypeAdapter(_Content)


class Manifest:
    """The list in an instance's folder. Changes of one instance come one at a time."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME

    def read(self) -> dict[str, Entry]:
        """Name of a volume → entry; empty without a file. Raises `FailedPrecondition` (`manifest_damaged`)."""
        with os_errors("reading the list of volumes"):
            try:
                content = self.path.read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return {}
        try:
            return {entry.name: entry for entry in _CONTENT.validate_json(content).volumes}
        except ValidationError as exc:
            raise FailedPrecondition(
                f"{self.path} cannot be understood; repair it, or remove it and look for volumes by hand",
                code="manifest_damaged", path=str(self.path),
            ) from exc  # fmt: skip

    def record(self, entries: Iterable[Entry]) -> None:
        """Add entries, in place of those of the same names. The folder must be there."""
        known = self.read()
        changed = known | {entry.name: entry for entry in entries}
        if changed != known:
            self._write(changed)

    def forget(self, name: str) -> None:
        """Take an entry out. Idempotent."""
        known = self.read()
        if known.pop(name, None) is not None:
            self._write(known)

    def _write(self, entries: dict[str, Entry]) -> None:
        body = {"version": 1, "volumes": [entry.model_dump(mode="json") for entry in entries.values()]}
        with os_errors("writing the list of volumes"):
            write_durably(self.path, (json.dumps(body, indent=1) + "\n").encode())
            # Its name too must outlive a power cut: what it lists may be on another disk.
            sync(self.path.parent)
