"""What the host has, what is used, and whether one more instance fits. Placement's arithmetic.

Used amounts are kept by the agent, not asked for: reading capacity costs the same with one instance or a thousand.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from agent.drivers.base import DomainInfo, HostCapacity
from agent.errors import ResourceExhausted, Unavailable
from agent.messages.events import Inventory
from agent.messages.life import ORDINARY, Life
from agent.messages.spec import InstanceSpec
from agent.messages.spec_disks import CdromDisk
from agent.store.base import InstanceRecord

ROOT: Final = "root"
"""The name of the root disk among the disks of a spec."""
_PAGE_PREFIX: Final = "CUSTOM_MEMORY_PAGE_"


@dataclass(frozen=True, slots=True)
class Reservations:
    """What is kept for the host itself, and how far each class may be over-committed.

    Dedicated CPUs and huge pages cannot be over-committed. `reserved_pages`: page size in KiB → number of pages.
    """

    cpu_allocation_ratio: float = 4.0
    ram_allocation_ratio: float = 1.0
    disk_allocation_ratio: float = 1.0
    reserved_vcpus: int = 0
    reserved_memory_mib: int = 512
    reserved_disk_gib: int = 1
    reserved_pcpus: int = 0
    reserved_pages: Mapping[int, int] = field(default_factory=dict)


def page_class(size_kib: int) -> str:
    """Resource class of huge pages of one size, counted in pages. Placement knows none, hence the prefix `CUSTOM_`."""
    return f"{_PAGE_PREFIX}{size_kib}"


def disk_sizes(spec: InstanceSpec) -> dict[str, int]:
    """Writable disk → size in MiB."""
    others = {disk.name: disk.size_mib for disk in spec.disks if not isinstance(disk, CdromDisk)}
    return {ROOT: spec.root_disk.size_mib, **others}


def disk_gib(spec: InstanceSpec, life: Life = ORDINARY) -> int:
    """Disk claim in GiB, rounded up as Placement counts: the virtual sizes of all disks, in a resize the larger."""
    sizes_mib = disk_sizes(spec)
    if life.resize is not None:
        for name, size_mib in life.resize.old.disks_mib.items():
            sizes_mib[name] = max(sizes_mib.get(name, 0), size_mib)
    return math.ceil(sum(sizes_mib.values()) / 1024)


def claim(spec: InstanceSpec, life: Life = ORDINARY) -> dict[str, int]:
    """Resource class → amount that an instance of this spec claims, whether it runs or not.

    While a resize waits to be confirmed, the larger of old and new is claimed, so that it can be taken back. What is
    on the shelf claims nothing; what can still be restored after a soft delete claims all.
    """
    if life.shelf is not None and not life.shelf.returning:
        return {}
    vcpus, memory_mib = spec.vcpus, spec.memory_mib
    if life.resize is not None:
        vcpus, memory_mib = max(vcpus, life.resize.old.vcpus), max(memory_mib, life.resize.old.memory_mib)
    wanted = {"PCPU" if spec.cpu.placement == "dedicated" else "VCPU": vcpus, "DISK_GB": disk_gib(spec, life)}
    page_kib = spec.memory_backing.hugepages_kib
    if page_kib is None:
        wanted["MEMORY_MB"] = memory_mib
    else:
        wanted[page_class(page_kib)] = math.ceil(memory_mib * 1024 / page_kib)
    return wanted


def claim_of(record: InstanceRecord) -> dict[str, int]:
    """Resource class → amount that an instance claims. See `claim`."""
    return claim(record.spec, record.life)


class Capacity:
    """Host totals as the driver last read them, with claims of the agent's own instances and foreign domains."""

    def __init__(self, reservations: Reservations) -> None:
        self._reservations = reservations
        self.host: HostCapacity | None = None

    def inventory(self, instances: Iterable[InstanceRecord], foreign: Iterable[DomainInfo]) -> dict[str, Inventory]:
        """Resource class → inventory. Empty until the driver has been asked once."""
        if self.host is None:
            return {}
        used: dict[str, int] = {}
        for record in instances:  # in plain dicts: this runs for every instance at each heartbeat and each create
            for resource, amount in claim_of(record).items():
                used[resource] = used.get(resource, 0) + amount
        for domain in foreign:
            if domain.power in ("running", "paused"):
                for resource, amount in (("VCPU", domain.vcpus), ("MEMORY_MB", domain.memory_mib)):
                    used[resource] = used.get(resource, 0) + amount
        host, kept = self.host, self._reservations
        pages = _pages(host)
        # Memory in the pool of huge pages is there only for those who ask for pages.
        pooled_mib = sum(size_kib * count for size_kib, count in pages.items()) // 1024
        vcpus = host.cpus if host.shared_cpus is None else host.shared_cpus
        made = {
            "VCPU": (vcpus, kept.reserved_vcpus, kept.cpu_allocation_ratio),
            "MEMORY_MB": (host.memory_mib, kept.reserved_memory_mib + pooled_mib, kept.ram_allocation_ratio),
            "DISK_GB": (host.disk_total_mib // 1024, kept.reserved_disk_gib, kept.disk_allocation_ratio),
        }
        if host.dedicated_cpus is not None:
            made["PCPU"] = (host.dedicated_cpus, kept.reserved_pcpus, 1.0)
        for size_kib, count in sorted(pages.items()):
            made[page_class(size_kib)] = (count, kept.reserved_pages.get(size_kib, 0), 1.0)
        return {name: _inventory(*figures, used.get(name, 0)) for name, figures in made.items()}

    def admit(self, spec: InstanceSpec, instances: Iterable[InstanceRecord], foreign: Iterable[DomainInfo]) -> None:
        """Check that one more instance fits. Raises as `admit_claim` does."""
        self.admit_claim(claim(spec), instances, foreign)

    def admit_claim(
        self, wanted: Mapping[str, int], instances: Iterable[InstanceRecord], foreign: Iterable[DomainInfo]
    ) -> None:
        """Check that a claim fits beside `instances`; for one that grows, give its new claim and leave it out of them.

        Raises `ResourceExhausted` (code `does_not_fit`) whose details name what is short and by how much, and
        `Unavailable` while the capacity has not been read yet.
        """
        inventory = self.inventory(instances, foreign)
        if not inventory:
            raise Unavailable("the host's capacity has not been read yet; try again", code="capacity_unknown")
        short: dict[str, int] = {}
        for resource, amount in wanted.items():
            has = inventory.get(resource)
            # max_unit: an instance larger than the host is refused however far the host may be over-committed.
            room = 0 if has is None else min(free_of(has), has.max_unit)
            if amount > room:
                short[resource] = amount - room
        if short:
            parts = [f"{resource}: {wanted[resource]} asked, {missing} too many" for resource, missing in short.items()]
            raise ResourceExhausted(
                f"the instance does not fit on this host ({'; '.join(parts)})", code="does_not_fit", **short
            )


def free_of(inventory: Inventory) -> int:
    """What can still be claimed, never below zero."""
    usable = int((inventory.total - inventory.reserved) * inventory.allocation_ratio)
    return max(0, usable - inventory.used)


def _pages(host: HostCapacity) -> dict[int, int]:
    """Page size in KiB → pages of the whole host; sizes that it has none of are left out."""
    pages: Counter[int] = Counter()
    for cell in host.numa_cells:
        for pool in cell.pages:
            pages[pool.size_kib] += pool.total
    return {size_kib: count for size_kib, count in pages.items() if count}


def _inventory(total: int, reserved: int, ratio: float, used: int) -> Inventory:
    return Inventory(
        total=total,
        reserved=min(reserved, total),
        max_unit=max(total, 1),
        allocation_ratio=ratio,
        used=used,
    )
