"""What the host has, what is used, and whether one more instance fits. Placement's arithmetic.

Used amounts are kept by the agent, not asked for: reading capacity costs the same with one instance or a thousand.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from agent.drivers.base import DomainInfo, HostCapacity
from agent.errors import ResourceExhausted, Unavailable
from agent.messages.events import Inventory
from agent.messages.spec import InstanceSpec
from agent.store.base import InstanceRecord


@dataclass(frozen=True, slots=True)
class Reservations:
    """What is kept for the host itself, and how far each class may be over-committed."""

    cpu_allocation_ratio: float = 4.0
    ram_allocation_ratio: float = 1.0
    disk_allocation_ratio: float = 1.0
    reserved_vcpus: int = 0
    reserved_memory_mib: int = 512
    reserved_disk_gib: int = 1


def disk_gib(spec: InstanceSpec) -> int:
    """Disk claim of an instance: the root disk's virtual size, rounded up to GiB as Placement counts."""
    return math.ceil(spec.root_disk.size_mib / 1024)


class Capacity:
    """Host totals as the driver last read them, with claims of the agent's own instances and foreign domains."""

    def __init__(self, reservations: Reservations) -> None:
        self._reservations = reservations
        self.host: HostCapacity | None = None

    def inventory(self, instances: Iterable[InstanceRecord], foreign: Iterable[DomainInfo]) -> dict[str, Inventory]:
        """Resource class → inventory. Empty until the driver has been asked once."""
        if self.host is None:
            return {}
        vcpus = memory = disk = 0
        for record in instances:
            if record.life.shelf is not None and not record.life.shelf.returning:
                continue  # it has nothing here but its name
            vcpus += record.spec.vcpus
            memory += record.spec.memory_mib
            disk += disk_gib(record.spec)
        for domain in foreign:
            if domain.power in ("running", "paused"):
                vcpus += domain.vcpus
                memory += domain.memory_mib
        host, kept = self.host, self._reservations
        total_disk_gib = host.disk_total_mib // 1024
        return {
            "VCPU": _inventory(host.cpus, kept.reserved_vcpus, kept.cpu_allocation_ratio, vcpus),
            "MEMORY_MB": _inventory(host.memory_mib, kept.reserved_memory_mib, kept.ram_allocation_ratio, memory),
            "DISK_GB": _inventory(total_disk_gib, kept.reserved_disk_gib, kept.disk_allocation_ratio, disk),
        }

    def admit(self, spec: InstanceSpec, instances: Iterable[InstanceRecord], foreign: Iterable[DomainInfo]) -> None:
        """Check that one more instance fits.

        Raises `ResourceExhausted` (code `does_not_fit`) whose details name what is short and by how much, and
        `Unavailable` while the capacity has not been read yet.
        """
        inventory = self.inventory(instances, foreign)
        if not inventory:
            raise Unavailable("the host's capacity has not been read yet; try again", code="capacity_unknown")
        wanted = {"VCPU": spec.vcpus, "MEMORY_MB": spec.memory_mib, "DISK_GB": disk_gib(spec)}
        short: dict[str, int] = {}
        for resource, amount in wanted.items():
            free = free_of(inventory[resource])
            # max_unit: an instance larger than the host is refused however far the host may be over-committed.
            if amount > free or amount > inventory[resource].max_unit:
                short[resource] = amount - min(free, inventory[resource].max_unit)
        if short:
            parts = [f"{resource}: {wanted[resource]} asked, {missing} too many" for resource, missing in short.items()]
            raise ResourceExhausted(
                f"the instance does not fit on this host ({'; '.join(parts)})", code="does_not_fit", **short
            )


def free_of(inventory: Inventory) -> int:
    """What can still be claimed, never below zero."""
    usable = int((inventory.total - inventory.reserved) * inventory.allocation_ratio)
    return max(0, usable - inventory.used)


def _inventory(total: int, reserved: int, ratio: float, used: int) -> Inventory:
    return Inventory(
        total=total,
        reserved=min(reserved, total),
        max_unit=max(total, 1),
        allocation_ratio=ratio,
        used=used,
    )
