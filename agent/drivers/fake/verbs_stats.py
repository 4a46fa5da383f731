"""The stats family of verbs on the simulated hypervisor. All figures follow from how long the guest has run.

So they stand while it is paused, begin anew with its process, and outlive the agent where domains do. As with libvirt,
a user-mode NIC has no counters.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Final

from agent.drivers.fake.domains import Domain
from agent.drivers.fake.parts import Parts
from agent.drivers.verbs.stats import CpuUse, DiskUse, MemoryUse, NicUse, Use
from agent.messages.spec import InstanceSpec, UserNic

_KIB_S: Final = 64
"""What a guest writes to each of its disks in a second; it reads half of that."""
_PAGE: Final = 4096
_PACKETS_S: Final = 10
_PACKET: Final = 512
_MIB: Final = 1024 * 1024


class FakeStats(Parts):
    """See `agent.drivers.verbs.stats`."""

    def stats(self, instance_id: str, spec: InstanceSpec, ask_guest: bool = True) -> Use:
        # Named apart, so that a fault of `stats` is that of a guest that does not answer.
        call = "stats" if ask_guest else "stats_without_guest"
        with self._call(call, instance_id, verb="instance.stats"), self._hypervisor.lock:
            domain = self._hypervisor.find(instance_id)
            ran_s = _ran_s(domain)
            return Use(
                at=datetime.now(UTC),
                power=domain.power,
                complete=ask_guest or ran_s is None,
                cpu=_cpu(domain, ran_s),
                memory=_memory(domain, ran_s if ask_guest else None),
                disks=tuple(self._disks_of(instance_id, spec, ran_s if ask_guest else None)),
                nics=tuple(_nics(spec, ran_s)),
            )

    def _disks_of(self, instance_id: str, spec: InstanceSpec, ran_s: float | None) -> Iterator[DiskUse]:
        made = self._hypervisor.disks.all(instance_id)
        for name in spec.disks_by_name():
            disk = made.get(name)
            if disk is None:
                continue
            capacity = disk.size_mib * _MIB
            if ran_s is None or not capacity:  # a CD is never read here
                yield DiskUse(name, capacity_bytes=capacity or None)
                continue
            pages = int(ran_s * _KIB_S * 1024) // _PAGE
            yield DiskUse(
                name,
                read_requests=pages // 2,
                read_bytes=pages // 2 * _PAGE,
                read_time_ns=pages // 2 * 1000,
                write_requests=pages,
                write_bytes=pages * _PAGE,
                write_time_ns=pages * 2000,
                capacity_bytes=capacity,
                allocation_bytes=min(capacity, pages * _PAGE),
                physical_bytes=capacity,
            )


def _ran_s(domain: Domain) -> float | None:
    """How long the guest's process has run, without pauses; None without one."""
    if not domain.active or domain.process_at is None:
        return None
    return max(0.0, (domain.paused_at or time.time()) - domain.process_at)


def _cpu(domain: Domain, ran_s: float | None) -> CpuUse:
    live = domain.live if domain.live_json and ran_s is not None else None
    spec = domain.spec
    most = domain.vcpus if spec is None else spec.max_vcpus or spec.vcpus
    if ran_s is None:
        return CpuUse(vcpus=domain.vcpus, max_vcpus=most)
    user, system = int(ran_s * 4e8), int(ran_s * 1e8)
    return CpuUse(
        cpu_time_ns=user + system,
        user_time_ns=user,
        system_time_ns=system,
        vcpus=domain.vcpus if live is None else live.vcpus,
        max_vcpus=most if live is None else live.max_vcpus,
    )


def _memory(domain: Domain, ran_s: float | None) -> MemoryUse:
    spec, live = domain.spec, domain.live if domain.active and domain.live_json else None
    maximum = domain.memory_mib if spec is None else spec.max_memory_mib or spec.memory_mib
    if live is None:
        return MemoryUse(current_kib=domain.memory_mib * 1024, maximum_kib=maximum * 1024)
    current = (live.memory_mib - live.held_mib) * 1024
    if ran_s is None:
        return MemoryUse(current_kib=current, maximum_kib=live.max_memory_mib * 1024)
    told = spec is None or spec.balloon
    return MemoryUse(
        current_kib=current,
        maximum_kib=live.max_memory_mib * 1024,
        rss_kib=current // 2,
        available_kib=current * 15 // 16 if told else None,
        unused_kib=current // 2 if told else None,
        usable_kib=current * 5 // 8 if told else None,
        guest_at=datetime.fromtimestamp(int(time.time()), UTC) if told else None,
    )


def _nics(spec: InstanceSpec, ran_s: float | None) -> Iterator[NicUse]:
    for index, nic in enumerate(spec.nics):
        if ran_s is None or isinstance(nic, UserNic):
            yield NicUse(index, mac=nic.mac)
            continue
        packets = int(ran_s * _PACKETS_S)
        yield NicUse(
            index,
            mac=nic.mac,
            device=f"fake{index}",
            rx_bytes=packets * _PACKET,
            rx_packets=packets,
            rx_errors=0,
            rx_drops=0,
            tx_bytes=packets // 2 * _PACKET,
            tx_packets=packets // 2,
            tx_errors=0,
            tx_drops=0,
        )
