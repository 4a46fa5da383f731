"""The optional driver method of the stats family: what an instance uses."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, ClassVar

from agent.errors import Unsupported
from agent.messages.events import PowerState

if TYPE_CHECKING:
    from agent.messages.spec import InstanceSpec


@dataclass(frozen=True, slots=True)
class CpuUse:
    """CPU time in nanoseconds since the guest's process began; vCPUs now and at most."""

    cpu_time_ns: int | None = None
    user_time_ns: int | None = None
    system_time_ns: int | None = None
    vcpus: int | None = None
    max_vcpus: int | None = None


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Memory in KiB. From `available_kib` on it is what the guest's balloon driver said at `guest_at`."""

    current_kib: int | None = None
    maximum_kib: int | None = None
    rss_kib: int | None = None
    available_kib: int | None = None
    unused_kib: int | None = None
    usable_kib: int | None = None
    guest_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class DiskUse:
    """One disk, by its name in the spec. Counters since the guest's process began; sizes in bytes.

    See `agent.messages.verbs_stats.DiskStats` for what each means.
    """

    name: str
    device: str | None = None
    read_requests: int | None = None
    read_bytes: int | None = None
    read_time_ns: int | None = None
    write_requests: int | None = None
    write_bytes: int | None = None
    write_time_ns: int | None = None
    flush_requests: int | None = None
    flush_time_ns: int | None = None
    errors: int | None = None
    capacity_bytes: int | None = None
    allocation_bytes: int | None = None
    physical_bytes: int | None = None
    written_up_to_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class NicUse:
    """One NIC, by its place in the spec, as the guest sees its traffic."""

    nic: int
    mac: str | None = None
    device: str | None = None
    rx_bytes: int | None = None
    rx_packets: int | None = None
    rx_errors: int | None = None
    rx_drops: int | None = None
    tx_bytes: int | None = None
    tx_packets: int | None = None
    tx_errors: int | None = None
    tx_drops: int | None = None


@dataclass(frozen=True, slots=True)
class Use:
    """What an instance used up to the moment `at`. What is not known is None, never 0.

    `complete`: nothing is missing for want of an answer from the guest's process.
    """

    at: datetime
    power: PowerState
    complete: bool = True
    cpu: CpuUse = CpuUse()
    memory: MemoryUse = MemoryUse()
    disks: tuple[DiskUse, ...] = ()
    nics: tuple[NicUse, ...] = ()


class StatsVerbs:
    """What a driver may lack of the stats family."""

    name: ClassVar[str]

    def stats(self, instance_id: str, spec: InstanceSpec, ask_guest: bool = True) -> Use:  # noqa: ARG002 - for those who can
        """Read what the instance uses. Called at any time, also beside a call that changes the instance.

        Never waits for such a call: what cannot be had then is None, and `complete` false. With `ask_guest` false
        the guest's process is not asked either: such a call returns at once, also where that process is frozen.
        A stopped instance gives what is known of it. Raises `NotFound`, `Unavailable`.
        """
        raise Unsupported(f"driver {self.name} keeps no statistics")


VERBS: frozenset[str] = frozenset({"instance.stats"})
"""Verbs of this family that a driver announces one by one."""
