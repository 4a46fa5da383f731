"""The rebuild family of verbs: a new system on the same instance, a rescue system, and the way back from a delete."""

from __future__ import annotations

from typing import ClassVar

from agent.messages.spec import Seed
from agent.messages.spec_disks import ImageSource
from agent.messages.types import Outbound, TimeoutS
from agent.messages.verb import CommandData
from agent.messages.verbs_snapshot import ExportTarget, PutUrl


class Halting(CommandData):
    """Base of verbs that stop a running guest: it is asked to shut down and ended after `timeout_s`, or at once with
    `force`. What was running before runs again afterwards.
    """

    timeout_s: TimeoutS = 60.0
    force: bool = False


class InstanceRebuild(Halting):
    """Make the instance anew from another image: same id, name, size, NICs and MACs.

    The root disk, ephemeral and swap disks are made anew; data disks are kept. `seed` None keeps the seed there is.
    """

    verb: ClassVar[str] = "instance.rebuild"
    image: ImageSource
    seed: Seed | None = None


class InstanceRescue(Halting):
    """Boot the instance from a rescue disk made of `image`, its own disks behind it untouched."""

    verb: ClassVar[str] = "instance.rescue"
    image: ImageSource


class InstanceUnrescue(Halting):
    """Remove the rescue disk; the guest boots from its own disks again if it ran when it was rescued."""

    verb: ClassVar[str] = "instance.unrescue"


class InstanceRestore(CommandData):
    """Bring back a soft-deleted instance, and start it if it ran when it was deleted."""

    verb: ClassVar[str] = "instance.restore"


class InstanceShelve(Halting):
    """Stop the instance, export all its disks to `target`, and remove them from this host. Its name, id and definition
    stay; it claims nothing else. Encrypted disks are refused, whose data would lie open.
    """

    verb: ClassVar[str] = "instance.shelve"
    target: ExportTarget


class InstanceUnshelve(CommandData):
    """Make a shelved instance's disks again from their exports, and start it if it ran when it was shelved.

    It must fit on the host. The exports are removed afterwards unless `keep_exports`. `url`: where to fetch them, with
    `{disk}` for the disk's name, if not from where they were put (an address that needs a signature, say).
    """

    verb: ClassVar[str] = "instance.unshelve"
    keep_exports: bool = False
    url: PutUrl | None = None


COMMANDS: tuple[type[CommandData], ...] = (
    InstanceRebuild,
    InstanceRescue,
    InstanceUnrescue,
    InstanceRestore,
    InstanceShelve,
    InstanceUnshelve,
)
RESULTS: dict[str, type[Outbound]] = {}
"""Verb → result, for the results that this module defines; those that return a shared one are in `results`."""
