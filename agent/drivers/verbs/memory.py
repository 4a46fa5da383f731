"""The optional driver methods of the power and memory family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from agent.errors import Unsupported
from agent.messages.verbs_memory import DumpFormat

if TYPE_CHECKING:
    from agent.drivers.base import CallContext
    from agent.messages.spec import InstanceSpec


@dataclass(frozen=True, slots=True)
class Dump:
    """A finished memory dump."""

    path: Path
    size_bytes: int
    sha256: str


class MemoryVerbs:
    """What a driver may lack of the power and memory family."""

    name: ClassVar[str]

    def suspend(self, instance_id: str, call: CallContext) -> None:  # noqa: ARG002 - for those who can
        """Save the guest's memory to disk and end it; power is `suspended` then. Suspended already: nothing.

        Raises `FailedPrecondition` (`instance_not_running`), `ResourceExhausted` (`no_space`), `Cancelled`; after any
        of these the guest is as it was.
        """
        raise Unsupported(f"driver {self.name} cannot suspend")

    def restore(self, instance_id: str, call: CallContext) -> None:  # noqa: ARG002 - for those who can
        """Bring a suspended guest back, running or paused as it was.

        Not suspended: nothing, but that what a saving left that was cut off is removed.
        Raises `FailedPrecondition` (`saved_state_damaged`): the saved memory cannot be used, and is kept.
        """
        raise Unsupported(f"driver {self.name} cannot suspend")

    def discard_saved(self, instance_id: str) -> None:  # noqa: ARG002 - for those who can
        """Throw away the saved memory of a guest that does not run: it is stopped then. None there: nothing."""
        raise Unsupported(f"driver {self.name} cannot suspend")

    def reset(self, instance_id: str) -> None:  # noqa: ARG002 - for those who can
        """Reset the guest at once; an `instance.rebooted` event proves it. Not idempotent: each call resets."""
        raise Unsupported(f"driver {self.name} cannot reset")

    def inject_nmi(self, instance_id: str) -> None:  # noqa: ARG002 - for those who can
        """Send the guest a non-maskable interrupt. Not idempotent: each call sends one."""
        raise Unsupported(f"driver {self.name} cannot trigger a crash dump")

    def check_dump_space(self, instance_id: str) -> None:  # noqa: ARG002 - for those who can
        """Raise `ResourceExhausted` (`no_space`) if a dump of all the guest's memory does not fit on the host."""
        raise Unsupported(f"driver {self.name} cannot dump memory")

    def memory_dump(self, instance_id: str, name: str, form: DumpFormat, live: bool, call: CallContext) -> Dump:  # noqa: ARG002
        """Write the guest's memory to the file `name` in the dumps folder; a finished file of that name is kept.

        A file gets the name only when it is complete and durable. Raises `FailedPrecondition`
        (`instance_not_running`), `ResourceExhausted` (`no_space`), `Cancelled`; nothing is left after any of these.
        """
        raise Unsupported(f"driver {self.name} cannot dump memory")

    def remove_memory_dump(self, instance_id: str, name: str) -> None:  # noqa: ARG002 - for those who can
        """Remove a dump and what is half made of it; waits for the hypervisor if it is still at it."""
        raise Unsupported(f"driver {self.name} cannot dump memory")

    def room_mib(self, instances: Mapping[str, InstanceSpec]) -> dict[str, int]:  # noqa: ARG002 - for those who can
        """Free MiB where each instance's disks grow: the least of its disks. No call to the hypervisor.

        A driver that cannot tell leaves the instance out; what waits for space is then tried now and then.
        """
        return {}


VERBS: frozenset[str] = frozenset(
    {"instance.suspend", "instance.reset", "instance.trigger-crash-dump", "instance.memory-dump"}
)
"""Verbs of this family that a driver announces one by one."""
