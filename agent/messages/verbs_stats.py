"""The stats family of verbs: what an instance uses, in one read."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, ClassVar

from pydantic import Field

from agent.messages.events import PowerState
from agent.messages.types import Outbound
from agent.messages.verb import CommandData

Count = Annotated[int, Field(ge=0)]
"""Counters count from the start of the guest's process, and begin anew with it."""


class InstanceStats(CommandData):
    """Read what the instance uses: CPU time, memory, disks, NICs. Answers also while an operation acts on it."""

    verb: ClassVar[str] = "instance.stats"


class CpuStats(Outbound):
    """CPU time that the host spent on the guest, and its vCPUs now and at most."""

    cpu_time_ns: Count | None = None
    user_time_ns: Count | None = None
    system_time_ns: Count | None = None
    vcpus: Count | None = None
    max_vcpus: Count | None = None


class MemoryStats(Outbound):
    """Memory. `current_kib`: what the balloon leaves the guest of `maximum_kib`. `rss_kib`: what the guest takes on the
    host. The rest is what the guest's balloon driver last said, at `guest_at`: `available_kib` is all that the guest
    sees, `unused_kib` of it is free, `usable_kib` can be had without swapping.
    """

    current_kib: Count | None = None
    maximum_kib: Count | None = None
    rss_kib: Count | None = None
    available_kib: Count | None = None
    unused_kib: Count | None = None
    usable_kib: Count | None = None
    guest_at: datetime | None = None


class DiskStats(Outbound):
    """One disk, by its name in the spec; `device` is the hypervisor's name of it.

    `capacity_bytes`: what the guest sees. `allocation_bytes`: what it takes on the host's storage. `physical_bytes`:
    the size of the file or device that holds it. `written_up_to_bytes`: the end of the guest's highest write in that
    file or device since the guest was started. `errors`: failed requests, where the hypervisor counts them.
    """

    name: str
    device: str | None = None
    read_requests: Count | None = None
    read_bytes: Count | None = None
    read_time_ns: Count | None = None
    write_requests: Count | None = None
    write_bytes: Count | None = None
    write_time_ns: Count | None = None
    flush_requests: Count | None = None
    flush_time_ns: Count | None = None
    errors: Count | None = None
    capacity_bytes: Count | None = None
    allocation_bytes: Count | None = None
    physical_bytes: Count | None = None
    written_up_to_bytes: Count | None = None


class NicStats(Outbound):
    """One NIC, by its place in the spec (from 0), seen from the guest: `rx` is what it received.

    `device`: its host device, while it has one.
    """

    nic: Count
    mac: str | None = None
    device: str | None = None
    rx_bytes: Count | None = None
    rx_packets: Count | None = None
    rx_errors: Count | None = None
    rx_drops: Count | None = None
    tx_bytes: Count | None = None
    tx_packets: Count | None = None
    tx_errors: Count | None = None
    tx_drops: Count | None = None


class InstanceStatsResult(Outbound):
    """What an instance used up to the moment `at`. What is not known is null, never 0.

    `complete` is false where the hypervisor was busy with the guest, or the guest's process did not answer: what only
    it knows is null then, and a later read can have it.
    """

    instance_id: str
    at: datetime
    power: PowerState
    complete: bool
    cpu: CpuStats
    memory: MemoryStats
    disks: list[DiskStats]
    nics: list[NicStats]


COMMANDS: tuple[type[CommandData], ...] = (InstanceStats,)
RESULTS: dict[str, type[Outbound]] = {"instance.stats": InstanceStatsResult}
"""Verb → result, for the results that this module defines; those that return a shared one are in `results`."""
