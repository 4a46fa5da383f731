"""The optional driver methods of the snapshot family: exporting disks, internal snapshots."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from agent.errors import Unsupported
from agent.messages.events import PowerState
from agent.messages.life import Life
from agent.messages.spec import InstanceSpec
from agent.messages.types import DiskFormat

if TYPE_CHECKING:
    from agent.drivers.base import CallContext

Report = Callable[[int, int], None]
"""Takes bytes done and bytes in all."""


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """What is to be exported: name of a disk → new file, in a folder that the agent has made."""

    targets: Mapping[str, Path]
    format: DiskFormat
    compress: bool = False
    report: Report = lambda _done, _total: None


@dataclass(frozen=True, slots=True)
class SnapshotRequest:
    """A snapshot to be taken. `running`: the guest ran when the work began; where an attempt that was cut off left it
    paused, it runs on first.
    """

    name: str
    description: str | None = None
    running: bool = False


@dataclass(frozen=True, slots=True)
class RevertRequest:
    """A snapshot to go back to, and what of the instance stays as it is now.

    `start`: None as the guest was. `mark` names the operation: a repeated call with the same mark finds that it was
    done, and does not take the guest back a second time; `define` forgets the mark.
    """

    name: str
    generation: int
    life: Life
    start: bool | None
    mark: str


@dataclass(frozen=True, slots=True)
class DiskExport:
    """What became of one disk. `live`: it was read while the guest ran."""

    virtual_size_bytes: int
    live: bool


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """One snapshot as the hypervisor has it. `spec` is the instance's at that time, None where it cannot be read."""

    name: str
    memory: bool
    power: PowerState
    created_at: datetime
    description: str | None
    spec: InstanceSpec | None


class SnapshotVerbs:
    """What a driver may lack of the snapshot family."""

    name: ClassVar[str]

    def export_disks(
        self,
        instance_id: str,  # noqa: ARG002
        spec: InstanceSpec,  # noqa: ARG002
        request: ExportRequest,  # noqa: ARG002
        call: CallContext,  # noqa: ARG002
    ) -> dict[str, DiskExport]:
        """Copy disks (name → new file, in a folder of the agent's) as flattened images, all of one point in time.

        The chain of a running guest's disks is not changed, and it goes on. Files there are replaced: a repeated call
        begins anew, and ends an export into the same folder that outlived the agent. Raises `ResourceExhausted`
        (`no_space`) before anything is copied where it cannot fit, `FailedPrecondition`, `Unsupported`
        (`export_unsupported`), `Cancelled`.
        """
        raise Unsupported(f"driver {self.name} cannot export disks", code="verb_unsupported")

    def abort_export(self, instance_id: str, folder: Path) -> None:
        """End an export into this folder that still runs, and wait until it has ended. Idempotent."""

    def create_snapshot(
        self,
        instance_id: str,  # noqa: ARG002
        spec: InstanceSpec,  # noqa: ARG002
        request: SnapshotRequest,  # noqa: ARG002
        call: CallContext,  # noqa: ARG002
    ) -> SnapshotInfo:
        """Take an internal snapshot: with memory where the guest is active, which runs on (or stays paused) after it.

        A snapshot of this name that is complete is returned; half a one is removed first. Raises `Unsupported`
        (`snapshot_unsupported`), `ResourceExhausted`.
        """
        raise Unsupported(f"driver {self.name} takes no snapshots", code="verb_unsupported")

    def list_snapshots(self, instance_id: str) -> list[SnapshotInfo]:  # noqa: ARG002
        """List snapshots, oldest first. Raises `NotFound`, `Unavailable`."""
        raise Unsupported(f"driver {self.name} takes no snapshots", code="verb_unsupported")

    def revert_snapshot(
        self,
        instance_id: str,  # noqa: ARG002
        spec: InstanceSpec,  # noqa: ARG002
        request: RevertRequest,  # noqa: ARG002
        call: CallContext,  # noqa: ARG002
    ) -> None:
        """Take disks and memory back to a snapshot. Spec, generation and life stay the domain's own throughout.

        Raises `NotFound` (`unknown_snapshot`).
        """
        raise Unsupported(f"driver {self.name} takes no snapshots", code="verb_unsupported")

    def delete_snapshot(self, instance_id: str, spec: InstanceSpec, name: str, call: CallContext) -> None:  # noqa: ARG002
        """Remove a snapshot, also half a one. Absent: nothing."""
        raise Unsupported(f"driver {self.name} takes no snapshots", code="verb_unsupported")


VERBS: frozenset[str] = frozenset(
    {
        "instance.export",
        "instance.backup",
        "snapshot.create",
        "snapshot.list",
        "snapshot.revert",
        "snapshot.delete",
    }
)
"""Verbs of this family that a driver announces one by one."""
