"""The parts of a definition that a resize and limits change: room to grow, CPU time, rates of disks and NICs.

They are put into the tree that the other modules have built, so that what is found there (NUMA cells, CPU pins) stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final
from xml.etree import ElementTree as ET

from agent.drivers.libvirt.definition import HostFacts, InstanceFiles, text_element
from agent.errors import Unsupported
from agent.messages.spec import InstanceSpec, Nic, UserNic
from agent.messages.spec_limits import CpuLimits, DiskLimits, NicLimits

PERIOD_US: Final = 100_000
"""The period of the CPU quota."""
BLOCK_KIB: Final = 2048
"""What virtio-mem plugs at a time, unless the guest's pages are larger."""
_SLOTS: Final = 16

IOTUNE: Final[Mapping[str, str]] = {
    "total_bytes_s": "total_bytes_sec",
    "read_bytes_s": "read_bytes_sec",
    "write_bytes_s": "write_bytes_sec",
    "total_iops": "total_iops_sec",
    "read_iops": "read_iops_sec",
    "write_iops": "write_iops_sec",
}
"""Our names of a disk's limits → libvirt's, in XML and in `setBlockIoTune` alike."""


def apply(domain: ET.Element, spec: InstanceSpec, facts: HostFacts, files: InstanceFiles) -> None:
    """Put them into a definition. Raises `Unsupported` (`nic_limits_unsupported`)."""
    simulated = facts.domain_type == "test"
    _vcpus(domain, spec, simulated=simulated)
    if not simulated and facts.architecture == "x86_64":
        _memory(domain, spec)
    _cputune(domain, spec.cpu_limits)
    _disks(domain, spec, files)
    for element, nic in zip(domain.findall("devices/interface"), spec.nics, strict=True):
        _bandwidth(element, nic)


# --- room to grow -------------------------------------------------------------------------------------------------


def _vcpus(domain: ET.Element, spec: InstanceSpec, *, simulated: bool) -> None:
    if spec.max_vcpus is None or (element := domain.find("vcpu")) is None:
        return
    element.text = str(spec.max_vcpus)
    element.set("current", str(spec.vcpus))
    if simulated:
        return
    vcpus = ET.SubElement(domain, "vcpus")
    for number in range(spec.max_vcpus):
        enabled = "yes" if number < spec.vcpus else "no"
        # Only what is plugged can be unplugged, so all but the first one are, also those that the guest boots with.
        ET.SubElement(vcpus, "vcpu", {"id": str(number), "enabled": enabled, "hotpluggable": "yes" if number else "no"})


def _memory(domain: ET.Element, spec: InstanceSpec) -> None:
    """One virtio-mem device holds all that can be plugged: the guest takes and gives back parts of it."""
    if spec.max_memory_mib is None:
        return
    block_kib = max(BLOCK_KIB, spec.memory_backing.hugepages_kib or 0)
    room_kib = (spec.max_memory_mib - spec.memory_mib) * 1024 // block_kib * block_kib
    if room_kib == 0:
        return
    text_element(domain, "maxMemory", str(spec.memory_mib * 1024 + room_kib), unit="KiB", slots=str(_SLOTS))
    _one_numa_cell(domain, spec)
    devices = domain.find("devices")
    if devices is None:
        return
    target = ET.SubElement(ET.SubElement(devices, "memory", {"model": "virtio-mem"}), "target")
    text_element(target, "size", str(room_kib), unit="KiB")
    text_element(target, "node", "0")
    text_element(target, "block", str(block_kib), unit="KiB")
    text_element(target, "requested", "0", unit="KiB")


def _one_numa_cell(domain: ET.Element, spec: InstanceSpec) -> None:
    """Libvirt plugs memory only into NUMA cells: give the guest one where it has none."""
    cpu = domain.find("cpu")
    if cpu is None:
        cpu = ET.SubElement(domain, "cpu")
    if cpu.find("numa") is not None:
        return
    last = (spec.max_vcpus or spec.vcpus) - 1
    cell = {"id": "0", "cpus": f"0-{last}" if last else "0", "memory": str(spec.memory_mib), "unit": "MiB"}
    ET.SubElement(ET.SubElement(cpu, "numa"), "cell", cell)


# --- limits -------------------------------------------------------------------------------------------------------


def quota_us(limits: CpuLimits) -> int | None:
    """The quota of one vCPU in a period, in microseconds."""
    return None if limits.quota_percent is None else PERIOD_US * limits.quota_percent // 100


def _cputune(domain: ET.Element, limits: CpuLimits) -> None:
    quota = quota_us(limits)
    if limits.shares is None and quota is None:
        return
    tune = domain.find("cputune")
    if tune is None:
        tune = ET.SubElement(domain, "cputune")
    if limits.shares is not None:
        text_element(tune, "shares", str(limits.shares))
    if quota is not None:
        text_element(tune, "period", str(PERIOD_US))
        text_element(tune, "quota", str(quota))


def disk_limits(spec: InstanceSpec) -> dict[str, DiskLimits | None]:
    """Limits of every writable disk, by its name."""
    found = {"root": spec.root_disk.limits}
    return found | {disk.name: disk.limits for disk in spec.disks if disk.kind != "cdrom"}


def iotune(limits: DiskLimits | None) -> dict[str, int]:
    """Return libvirt's parameters for a disk; 0 is unlimited."""
    return {theirs: (getattr(limits, ours) or 0) if limits else 0 for ours, theirs in IOTUNE.items()}


def _disks(domain: ET.Element, spec: InstanceSpec, files: InstanceFiles) -> None:
    by_source = {source_of(disk): disk for disk in domain.findall("devices/disk")}
    for name, limits in disk_limits(spec).items():
        wanted = {key: value for key, value in iotune(limits).items() if value}
        location = files.disks.get(name)
        disk = by_source.get(str(location.path)) if location is not None else None
        if not wanted or disk is None:
            continue
        tune = ET.SubElement(disk, "iotune")
        for key, value in wanted.items():
            text_element(tune, key, str(value))


def source_of(disk: ET.Element) -> str | None:
    """The file or block device of a disk of a definition."""
    source = disk.find("source")
    return None if source is None else source.get("file") or source.get("dev")


def check_nic(nic: Nic) -> None:
    """Raise `Unsupported` (`nic_limits_unsupported`) where libvirt would ignore the limits of a NIC."""
    if nic.limits is not None and isinstance(nic, UserNic):
        raise Unsupported(
            "libvirt cannot limit a user-mode NIC; take its limits away, or put it on a network or a bridge",
            code="nic_limits_unsupported",
        )


def bandwidth(limits: NicLimits | None) -> dict[str, int]:
    """Average rates in KiB/s by direction; 0 is unlimited."""
    if limits is None:
        return {"inbound": 0, "outbound": 0}
    return {"inbound": limits.inbound_kib_s or 0, "outbound": limits.outbound_kib_s or 0}


def _bandwidth(element: ET.Element, nic: Nic) -> None:
    check_nic(nic)
    wanted = {direction: rate for direction, rate in bandwidth(nic.limits).items() if rate}
    if not wanted:
        return
    parent = ET.SubElement(element, "bandwidth")
    for direction, rate in wanted.items():
        ET.SubElement(parent, direction, {"average": str(rate)})
