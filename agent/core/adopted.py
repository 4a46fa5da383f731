"""What can be done with an instance whose domain was made by somebody else."""

from __future__ import annotations

from agent.errors import FailedPrecondition
from agent.store.base import InstanceRecord

ADOPTED_VERBS = frozenset(
    {
        "instance.adopt",
        "instance.delete",
        "instance.restore",
        "instance.start",
        "instance.stop",
        "instance.reboot",
        "instance.reset",
        "instance.pause",
        "instance.resume",
        "instance.suspend",
        "instance.trigger-crash-dump",
        "instance.set-policy",
        "instance.show",
        "instance.list",
        "console.log",
        "image.prefetch",
        "image.list",
        "image.remove",
    }
)
"""Verbs that neither redefine the domain nor look for disks where our own instances have them. What is not named here
is refused: a verb is allowed when it has been thought about.
"""


def check_adopted(verb: str, record: InstanceRecord | None) -> None:
    """Raise `FailedPrecondition` (`instance_adopted`) for a verb that an adopted instance does not have."""
    if record is not None and record.life.adopted is not None and verb not in ADOPTED_VERBS:
        raise FailedPrecondition(
            f"{record.name} was adopted and keeps the definition it came with, which {verb} would have to rewrite; "
            "make a new instance for that",
            code="instance_adopted",
            verb=verb,
        )
