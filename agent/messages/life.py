"""What an instance is in the middle of, over days: a resize to be confirmed, a rescue, the shelf, a soft delete.

It is kept with the instance in the journal and travels in the domain's own metadata, so that it survives the loss of
either. It holds no secrets: it goes out with every view of the instance.
"""

from __future__ import annotations

from datetime import datetime

from pydantic import Field

from agent.messages.spec_disks import ImageSource
from agent.messages.types import Outbound


class Sizes(Outbound):
    """The sizes that a resize changes. `disks_mib`: name of a disk → size; the root disk is `root`.

    A cold resize beyond `max_vcpus` or `max_memory_mib` raises these too, so they are kept for the way back.
    """

    vcpus: int
    memory_mib: int
    max_vcpus: int | None = None
    max_memory_mib: int | None = None
    disks_mib: dict[str, int] = Field(default_factory=dict)


class PendingResize(Outbound):
    """A cold resize that waits to be confirmed or reverted. At `confirm_by` it confirms itself; None: never."""

    old: Sizes
    confirm_by: datetime | None = None


class Rescue(Outbound):
    """The guest is booted, or is to be booted, from a rescue image; its own disks come behind it."""

    image: ImageSource
    since: datetime
    was_running: bool


class ShelvedDisk(Outbound):
    """A disk's export: a flattened qcow2 image at `url` whose bytes have `sha256`."""

    name: str
    url: str
    sha256: str
    size_bytes: int


class Shelf(Outbound):
    """The instance is stopped, its disks are exported and removed from this host; it claims no resources.

    `returning`: an unshelve is under way, and it claims them again.
    """

    disks: list[ShelvedDisk]
    since: datetime
    was_running: bool
    returning: bool = False


class SoftDelete(Outbound):
    """The instance was deleted and can be restored until `restore_until`, when it is removed for good."""

    restore_until: datetime
    was_running: bool


class Adoption(Outbound):
    """The domain was made by somebody else and taken over as it was: its definition is kept, and `disks` are the
    files and devices it uses, wherever they are. They are removed with the instance only if `own_disks`. `kept` names
    what of the definition the spec cannot say.
    """

    disks: list[str]
    own_disks: bool
    since: datetime
    kept: list[str] = Field(default_factory=list)


class Life(Outbound):
    """All of it; every part is None for an instance that nothing special is the matter with."""

    resize: PendingResize | None = None
    rescue: Rescue | None = None
    shelf: Shelf | None = None
    soft_delete: SoftDelete | None = None
    adopted: Adoption | None = None


ORDINARY = Life()
"""Nothing special."""
