"""The optional driver methods of the resize family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from agent.errors import Unsupported
from agent.messages.spec import InstanceSpec


@dataclass(frozen=True, slots=True)
class GuestSizes:
    """What a running guest has. `memory_mib` is what is plugged in; `balloon_mib` what the balloon leaves it of that,
    None where it has no balloon.
    """

    vcpus: int
    memory_mib: int
    balloon_mib: int | None = None


class ResizeVerbs:
    """What a driver may lack of the resize family. Those about a running guest raise `FailedPrecondition`
    (`instance_not_running`) without one, and all of them `NotFound` and `Unavailable`.
    """

    name: ClassVar[str]

    def disk_sizes(self, instance_id: str, spec: InstanceSpec) -> Mapping[str, int]:  # noqa: ARG002
        """Virtual sizes in whole MiB of the writable disks of `spec`, by name. Raises `NotFound` (`disk_missing`)."""
        raise Unsupported(f"driver {self.name} cannot resize")

    def grow_disk(self, instance_id: str, spec: InstanceSpec, disk: str, size_mib: int) -> None:  # noqa: ARG002
        """Let a disk be so large, under a running guest too, which sees it at once. Larger already: nothing.

        `spec` is the instance's, for finding the disk; its sizes are not read. Raises `ResourceExhausted`.
        """
        raise Unsupported(f"driver {self.name} cannot resize")

    def guest_sizes(self, instance_id: str) -> GuestSizes:  # noqa: ARG002
        """Read what the running guest has now."""
        raise Unsupported(f"driver {self.name} cannot resize a running guest")

    def request_vcpus(self, instance_id: str, vcpus: int) -> None:  # noqa: ARG002
        """Plug vCPUs into the running guest, or ask it to give some back; `guest_sizes` tells what came of it.

        The definition is not touched. Asking again repeats the request. Raises `FailedPrecondition` (`above_maximum`,
        `vcpu_unplug_unsafe`).
        """
        raise Unsupported(f"driver {self.name} cannot resize a running guest")

    def request_memory(self, instance_id: str, memory_mib: int) -> None:  # noqa: ARG002
        """Ask the running guest to take memory that is plugged in, or to give it back; as `request_vcpus`.

        Raises `FailedPrecondition` (`above_maximum`, `below_boot_memory`), `InvalidArgument` (`memory_step`).
        """
        raise Unsupported(f"driver {self.name} cannot resize a running guest")

    def request_memory_target(self, instance_id: str, memory_mib: int) -> None:  # noqa: ARG002
        """Ask the running guest's balloon to leave it so much memory; as `request_vcpus`.

        Raises `FailedPrecondition` without a balloon, or where the balloon cannot reach this.
        """
        raise Unsupported(f"driver {self.name} cannot resize a running guest")

    def apply_limits(self, instance_id: str, spec: InstanceSpec) -> None:  # noqa: ARG002
        """Let the limits of `spec` hold for the running guest at once; what is equal already is left alone, and a
        guest that does not run too. The definition is not touched. Raises `Unsupported` (`nic_limits_unsupported`),
        `FailedPrecondition` (`cpu_limits_unavailable`).
        """
        raise Unsupported(f"driver {self.name} cannot limit a guest")


VERBS: frozenset[str] = frozenset({"instance.resize", "instance.set-memory-target", "instance.set-limits"})
"""Verbs of this family that a driver announces one by one. Confirming and reverting need no more than `define`."""
