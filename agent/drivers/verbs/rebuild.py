"""The optional driver methods of the rebuild family."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from agent.errors import Unsupported

if TYPE_CHECKING:
    from agent.drivers.base import CallContext, PreparedImage
    from agent.messages.spec import InstanceSpec


@dataclass(frozen=True, slots=True)
class ImportedDisk:
    """An exported image that a disk is to be made of: qcow2 without a backing file. `sha256` None: verified already."""

    name: str
    path: Path
    sha256: str | None


class RebuildVerbs:
    """What a driver may lack of the rebuild family. As everywhere, each call looks before it acts and can be repeated.

    All of them raise `NotFound` where there is no such domain and `FailedPrecondition` for a foreign one, except those
    that remove something: these succeed where there is nothing.
    """

    name: ClassVar[str]

    def prepare_rebuild(self, instance_id: str, spec: InstanceSpec, image: PreparedImage, call: CallContext) -> None:
        """Make, beside the disks that are in use, those that a rebuild to `spec` makes anew: the root disk with the
        content of `image`, ephemeral and swap disks, and the seed. What an earlier attempt left is replaced.

        The guest may run. Raises as `create_storage`.
        """
        del instance_id, spec, image, call
        raise Unsupported(f"driver {self.name} cannot rebuild", verb="instance.rebuild")

    def apply_rebuild(self, instance_id: str, spec: InstanceSpec) -> None:
        """Let what `prepare_rebuild` made take the place of the old disks. What was swapped before is left alone.

        Raises `FailedPrecondition` (`instance_running`) while the guest runs.
        """
        del instance_id, spec
        raise Unsupported(f"driver {self.name} cannot rebuild", verb="instance.rebuild")

    def discard_rebuild(self, instance_id: str, spec: InstanceSpec) -> None:
        """Remove what `prepare_rebuild` made and `apply_rebuild` did not take."""
        del instance_id, spec
        raise Unsupported(f"driver {self.name} cannot rebuild", verb="instance.rebuild")

    def create_rescue_disk(self, instance_id: str, spec: InstanceSpec, image: PreparedImage, call: CallContext) -> None:
        """Make the rescue disk from `image`, in place of what an earlier attempt left. A definition whose life has a
        rescue boots from it, and has the instance's own disks behind it. The guest may run, but not yet from this disk.
        """
        del instance_id, spec, image, call
        raise Unsupported(f"driver {self.name} cannot rescue", verb="instance.rescue")

    def remove_rescue_disk(self, instance_id: str, spec: InstanceSpec) -> None:
        """Remove the rescue disk. `delete_storage` removes it too."""
        del instance_id, spec
        raise Unsupported(f"driver {self.name} cannot rescue", verb="instance.unrescue")

    def shelve_storage(self, instance_id: str, call: CallContext) -> None:
        """Remove all that `create_storage` and `import_disk` make, and keep what only this host has and a guest could
        miss: its UEFI variables. The domain stays. `delete_storage` removes these too. It is not told of a cancel.
        """
        del instance_id, call
        raise Unsupported(f"driver {self.name} cannot shelve", verb="instance.shelve")

    def import_disk(self, instance_id: str, spec: InstanceSpec, disk: ImportedDisk, call: CallContext) -> None:
        """Make a disk of the spec from an exported image, whole and without referring to it. A finished one is kept.

        Raises `ImageRejected` (`image_checksum_mismatch`, `image_missing`), and as `create_storage`.
        """
        del instance_id, spec, disk, call
        raise Unsupported(f"driver {self.name} cannot unshelve", verb="instance.unshelve")


VERBS: frozenset[str] = frozenset(
    {"instance.rebuild", "instance.rescue", "instance.unrescue", "instance.shelve", "instance.unshelve"}
)
"""Verbs of this family that a driver announces one by one."""
