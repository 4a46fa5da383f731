"""What handlers use of the exports: targets, staging, publishing, backups. Blocking work is in worker threads."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

import structlog

from agent.errors import ComputeError
from agent.exports import backups, files, web
from agent.exports.policy import ExportPolicy, check_url, public_url, store_folder
from agent.messages.types import DiskFormat
from agent.messages.verbs_snapshot import Backup, ExportTarget

Report = Callable[[int, int], None]
log = structlog.get_logger("exports")


def claim_of(operation_id: str) -> str:
    """A name for an operation that is safe in file names: its staging folder has it."""
    return hashlib.sha256(operation_id.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Destination:
    """Where one disk's file goes: a slot in a store, or a URL."""

    url: str
    slot: files.Slot | None

    @property
    def shown(self) -> str:
        """The address without what may be a secret."""
        return self.url if self.slot is not None else public_url(self.url)


@dataclass(slots=True)
class Exports:
    """The exports of one host."""

    policy: ExportPolicy = field(default_factory=ExportPolicy)
    root: Path = Path("/nonexistent")

    def staging(self, operation_id: str) -> Path:
        """The folder in which an operation makes its exports."""
        return (self.policy.staging_dir or self.root) / claim_of(operation_id)

    def destination(self, target: ExportTarget, disk: str, format: DiskFormat, operation_id: str) -> Destination:
        """Where a disk goes. Raises `InvalidArgument` (`export_store_unknown`, `export_target_forbidden`)."""
        if target.url is not None:
            url = target.url.replace("{disk}", disk)
            check_url(self.policy, url)
            return Destination(url, None)
        stem = target.name if disk == "root" else f"{target.name}-{disk}"
        final = store_folder(self.policy, target.store or "") / f"{stem}.{format}"
        return Destination(final.as_uri(), files.Slot(final, claim_of(operation_id)))

    async def check_free(self, destination: Destination) -> None:
        """Raises `AlreadyExists` (`export_exists`) where the name is taken."""
        if destination.slot is not None:
            await asyncio.to_thread(destination.slot.check_free)

    async def publish(self, source: Path, destination: Destination, sha256: str, report: Report) -> None:
        """Bring a finished file to its destination. Idempotent for the same operation."""
        if destination.slot is None:
            await web.put(source, destination.url, self.policy, report)
            return
        size = (await asyncio.to_thread(source.stat)).st_size
        loop = asyncio.get_running_loop()

        def copied(done: int) -> None:
            with suppress(RuntimeError):  # the loop is closed, the thread was left behind
                loop.call_soon_threadsafe(report, done, size)

        await asyncio.to_thread(destination.slot.publish, source, sha256, copied)

    async def settle(self, destination: Destination) -> None:
        """What was published stays: forget whose it is."""
        if destination.slot is not None:
            await asyncio.to_thread(destination.slot.settle)

    async def withdraw(self, source: Path, destination: Destination, sha256: str | None) -> None:
        """Take back a publishing, whole or half. `sha256` where it is known to have been published whole."""
        if destination.slot is None:
            if sha256 is not None:
                await self.remove(destination.url, sha256)
            return
        size = await asyncio.to_thread(_size, source)
        await asyncio.to_thread(destination.slot.withdraw, size)
        if sha256 is not None:
            await asyncio.to_thread(files.remove, destination.slot.final, sha256)

    async def remove(self, url: str, sha256: str) -> None:
        """Remove an export by its address: a file of a store if it has this checksum, else by DELETE, which a server
        may refuse: that is logged and no error.
        """
        if url.startswith("file:"):
            path = Path(unquote(urlsplit(url).path))
            if path.parent in self.policy.stores.values():
                await asyncio.to_thread(files.remove, path, sha256)
            return
        try:
            check_url(self.policy, url)
            gone = await web.delete(url, self.policy)
        except ComputeError as exc:
            gone = False
            log.info("exports.not_removed", url=public_url(url), error=exc.message)
        except Exception as exc:
            gone = False
            log.info("exports.not_removed", url=public_url(url), error=type(exc).__name__)
        if not gone:
            log.warning("exports.left_behind", url=public_url(url))

    # --- backups ----------------------------------------------------------------------------------------------

    async def backups(self, store: str, instance_id: str, series: str | None = None) -> list[Backup]:
        """An instance's backups in one store, newest first."""
        folder = store_folder(self.policy, store)
        return await asyncio.to_thread(backups.read, folder, store, instance_id, series)

    async def note_backup(self, backup: Backup) -> None:
        """Write a backup's manifest."""
        await asyncio.to_thread(backups.write, store_folder(self.policy, backup.store), backup)

    async def remove_backup(self, backup: Backup) -> None:
        """Remove a backup with its files."""
        await asyncio.to_thread(backups.remove, store_folder(self.policy, backup.store), backup)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1
