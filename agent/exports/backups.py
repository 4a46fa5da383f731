"""The backups in a store: one manifest per backup, written when all its files are there.

All functions block and belong into a worker thread.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import structlog
from pydantic import ValidationError

from agent.exports import files
from agent.messages.verbs_snapshot import Backup

ENDING: Final = ".backup.json"
MAX_MANIFEST_BYTES: Final = 256 * 1024
_SAFE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,249}")
_STAMP: Final = re.compile(r"-\d{8}T\d{6}\.\d{6}Z\Z")
"""How the name of every backup ends: no file of an export that is none is taken for one of a backup."""
log = structlog.get_logger("backups")


def write(folder: Path, backup: Backup) -> None:
    """Write a backup's manifest: from now on it exists. Replaces one of the same name. Idempotent."""
    with files.translated("writing a backup's manifest"):
        files.write_durably(folder / f"{backup.name}{ENDING}", backup.model_dump_json(indent=1).encode())
        files.sync(folder)


def read(folder: Path, store: str, instance_id: str, series: str | None = None) -> list[Backup]:
    """An instance's backups in a store, newest first. What is no manifest of ours is passed over."""
    found = []
    with files.translated("reading the backups"):
        for path in folder.glob(f"*{ENDING}"):
            backup = _parse(path)
            if backup is None or backup.instance_id != instance_id or backup.store != store:
                continue
            if series is None or backup.series == series:
                found.append(backup)
    return sorted(found, key=lambda backup: (backup.taken_at, backup.name), reverse=True)


def _parse(path: Path) -> Backup | None:
    content = files.read_small(path, MAX_MANIFEST_BYTES)
    try:
        backup = None if content is None else Backup.model_validate_json(content)
    except ValidationError:
        return None
    if backup is None or not _STAMP.search(backup.name):
        return None
    return backup if f"{backup.name}{ENDING}" == path.name else None


def remove(folder: Path, backup: Backup) -> None:
    """Remove a backup: its manifest first, so that what is listed is whole, then its files. Idempotent.

    Only files in the store's own folder whose checksum is the manifest's are removed.
    """
    with files.translated("removing a backup"):
        for disk in backup.disks:
            name = disk.url.rpartition("/")[2]
            stem = backup.name if disk.name == "root" else f"{backup.name}-{disk.name}"
            if not _SAFE.fullmatch(name) or name != f"{stem}.{disk.format}":
                log.warning("backups.foreign_file", backup=backup.name, file=name[:80])
                continue
            files.remove(folder / name, disk.sha256)
        # Last: after a crash in the middle the manifest still says what there is to remove.
        (folder / f"{backup.name}{ENDING}").unlink(missing_ok=True)
