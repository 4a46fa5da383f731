"""The snapshot family of verbs: exports, backups, snapshots; commands and results."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, ClassVar, Literal

from pydantic import AwareDatetime, Field, StringConstraints, model_validator

from agent.messages.events import PowerState
from agent.messages.spec_disks import DiskName
from agent.messages.types import DiskFormat, Inbound, LongPattern, Name, Outbound, Sha256
from agent.messages.verb import CommandData

FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,149}$")]
"""A name that becomes a file's, without its ending."""

PutUrl = Annotated[str, LongPattern(r"^https?://[!-~]{1,2000}$")]

SeriesName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,30}$")]

SnapshotName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]

Disks = Annotated[list[DiskName], Field(min_length=1, max_length=21)]


def _distinct(disks: list[str]) -> None:
    if len(disks) != len(set(disks)):
        raise ValueError("a disk is named twice")


class ExportTarget(Inbound):
    """Where an export goes: either a file of `store`, one of the host's export stores (`exports.stores`), or an HTTP
    PUT to `url`.

    In a store the root disk becomes `<name>.<format>` and another disk `<name>-<disk>.<format>`, each with a
    `.sha256` file beside it. With several disks `url` holds `{disk}`, which becomes the disk's name.
    """

    store: Name | None = None
    name: FileName | None = None
    url: PutUrl | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> ExportTarget:
        if (self.store is None) == (self.url is None):
            raise ValueError("give either store and name, or url")
        if (self.store is None) != (self.name is None):
            raise ValueError("store and name belong together")
        return self


class InstanceExport(CommandData):
    """Export disks as flattened images, all of one point in time; a running guest goes on."""

    verb: ClassVar[str] = "instance.export"
    disks: Disks = Field(default_factory=lambda: ["root"])
    target: ExportTarget
    format: DiskFormat = "qcow2"
    compress: bool = False

    @model_validator(mode="after")
    def _fits_together(self) -> InstanceExport:
        _distinct(self.disks)
        if self.compress and self.format != "qcow2":
            raise ValueError("only qcow2 can be compressed")
        if self.target.url is not None and len(self.disks) > 1 and "{disk}" not in self.target.url:
            raise ValueError("with several disks the url needs {disk} in it")
        return self


class InstanceBackup(CommandData):
    """Export disks into a store as one more backup of a series; then the oldest beyond `keep` are removed."""

    verb: ClassVar[str] = "instance.backup"
    series: SeriesName
    keep: Annotated[int, Field(ge=1, le=1000)]
    store: Name
    disks: Disks = Field(default_factory=lambda: ["root"])
    compress: bool = False

    @model_validator(mode="after")
    def _disks_distinct(self) -> InstanceBackup:
        _distinct(self.disks)
        return self


class InstanceListBackups(CommandData):
    """List an instance's backups, of all series or one, newest first. Works without the hypervisor, and also when
    the instance is no longer on this host.
    """

    verb: ClassVar[str] = "instance.list-backups"
    store: Name | None = None
    series: SeriesName | None = None


class SnapshotCreate(CommandData):
    """Take an internal snapshot of all disks; of a running guest with its memory, for which it pauses.

    `memory`: `auto` takes it where the guest runs; true or false refuse where that is not possible.
    """

    verb: ClassVar[str] = "snapshot.create"
    name: SnapshotName
    memory: Literal["auto"] | bool = "auto"
    description: Annotated[str, LongPattern(r"^[ -~]{0,256}$")] | None = None


class SnapshotList(CommandData):
    """List an instance's snapshots, oldest first."""

    verb: ClassVar[str] = "snapshot.list"


class SnapshotRevert(CommandData):
    """Take disks, and memory if the snapshot has it, back to the snapshot. What came after it is lost.

    `start`: None as it was in the snapshot; true also starts a guest whose snapshot has no memory; false leaves one
    whose snapshot has memory paused.
    """

    verb: ClassVar[str] = "snapshot.revert"
    name: SnapshotName
    start: bool | None = None


class SnapshotDelete(CommandData):
    """Remove a snapshot; the guest's present state is not changed."""

    verb: ClassVar[str] = "snapshot.delete"
    name: SnapshotName


class ExportedDisk(Outbound):
    """One disk's exported image at `url`, whose bytes have `sha256`."""

    name: str
    url: str
    sha256: Sha256
    size_bytes: int
    virtual_size_bytes: int
    format: DiskFormat


class ExportResult(Outbound):
    """What was exported. `live`: while the guest ran."""

    instance_id: str
    disks: list[ExportedDisk]
    live: bool


class Backup(Outbound):
    """One backup of a series. It is complete: it is listed only when all its files are."""

    name: str
    instance_id: str
    instance_name: str
    series: str
    store: str
    taken_at: AwareDatetime
    disks: list[ExportedDisk]


class BackupResult(Outbound):
    """The new backup, what the series holds now (newest first), and the names of those removed by rotation."""

    instance_id: str
    backup: Backup
    backups: list[Backup]
    removed: list[str]


class BackupListResult(Outbound):
    """Backups, newest first."""

    instance_id: str
    backups: list[Backup]


class SnapshotView(Outbound):
    """One snapshot. `power` is what the guest was; with `memory` it goes on from there."""

    name: str
    memory: bool
    power: PowerState
    created_at: datetime
    description: str | None = None


class SnapshotResult(Outbound):
    """The snapshot that was made."""

    instance_id: str
    snapshot: SnapshotView
    observed: PowerState


class SnapshotListResult(Outbound):
    """Snapshots, oldest first."""

    instance_id: str
    snapshots: list[SnapshotView]


class SnapshotGone(Outbound):
    """The snapshot is gone."""

    instance_id: str
    name: str


COMMANDS: tuple[type[CommandData], ...] = (
    InstanceExport,
    InstanceBackup,
    InstanceListBackups,
    SnapshotCreate,
    SnapshotList,
    SnapshotRevert,
    SnapshotDelete,
)
RESULTS: dict[str, type[Outbound]] = {
    "instance.export": ExportResult,
    "instance.backup": BackupResult,
    "instance.list-backups": BackupListResult,
    "snapshot.create": SnapshotResult,
    "snapshot.list": SnapshotListResult,
    "snapshot.delete": SnapshotGone,
}
"""Verb → result, for the results that this module defines; those that return a shared one are in `results`."""
