"""What the host has: from libvirt's capabilities document, read once per connection, and from a few cheap facts.

Also the proof that KVM works. /dev/kvm alone proves nothing: inside a virtual machine without nested
virtualisation it can be opened, libvirt offers KVM, and a guest starts but never boots.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Final
from xml.etree import ElementTree as ET

from agent.messages.events import NumaCell, PagePool

_KVM: Final = Path("/dev/kvm")
_CPUINFO: Final = Path("/proc/cpuinfo")
_NODES: Final = Path("/sys/devices/system/node")
_X86: Final = ("x86_64", "i686")

# The kernel's CPU flag → the trait's name in os-traits after HW_CPU_X86_.
_CPU_TRAITS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "sse4_1": "SSE41",
        "sse4_2": "SSE42",
        "pni": "SSE3",
        "aes": "AESNI",
        "pclmulqdq": "CLMUL",
        "fma": "FMA3",
        "sha_ni": "SHA",
        "avx512_vnni": "AVX512VNNI",
        "rtm": "TSX",
        "mmx": "MMX",
        "sse": "SSE",
        "sse2": "SSE2",
        "ssse3": "SSSE3",
        "avx": "AVX",
        "avx2": "AVX2",
        "avx512f": "AVX512F",
        "avx512cd": "AVX512CD",
        "avx512bw": "AVX512BW",
        "avx512dq": "AVX512DQ",
        "avx512vl": "AVX512VL",
        "bmi1": "BMI1",
        "bmi2": "BMI2",
        "f16c": "F16C",
        "abm": "ABM",
        "vmx": "VMX",
        "svm": "SVM",
    }
)

COMPUTE_TRAITS: Final = frozenset(
    {
        "COMPUTE_IMAGE_TYPE_QCOW2",
        "COMPUTE_IMAGE_TYPE_RAW",
        "COMPUTE_STORAGE_BUS_VIRTIO",
        "COMPUTE_STORAGE_BUS_SATA",
        "COMPUTE_STORAGE_BUS_SCSI",
        "COMPUTE_NET_VIF_MODEL_VIRTIO",
        "COMPUTE_NET_VIF_MODEL_E1000",
        "COMPUTE_NET_VIF_MODEL_E1000E",
        "COMPUTE_NET_VIF_MODEL_RTL8139",
        "COMPUTE_GRAPHICS_MODEL_VGA",
    }
)


@dataclass(frozen=True, slots=True)
class HostDescription:
    """The parts of libvirt's capabilities document that the driver uses."""

    architecture: str
    cpu_model: str
    numa_cells: tuple[NumaCell, ...]
    kvm_offered: bool
    machines: Mapping[str, str] = field(default_factory=dict)
    """Every machine type, also those that stand for the newest one → its versioned name."""


def parse_capabilities(document: str) -> HostDescription:
    """Read the document that `getCapabilities` returns."""
    root = ET.fromstring(document)  # noqa: S314 - the daemon's answer, which we trust with more than this
    architecture = root.findtext("host/cpu/arch") or os.uname().machine
    domains = root.findall(f"guest/arch[@name='{architecture}']/domain")
    return HostDescription(
        architecture=architecture,
        cpu_model=root.findtext("host/cpu/model") or "unknown",
        numa_cells=tuple(_cell(cell) for cell in root.findall("host/topology/cells/cell")),
        kvm_offered=any(domain.get("type") == "kvm" for domain in domains),
        machines={
            name: machine.get("canonical", name)
            for machine in root.findall(f"guest/arch[@name='{architecture}']//machine")
            if (name := machine.text)
        },
    )


def _cell(cell: ET.Element) -> NumaCell:
    cpus = sorted(int(cpu.get("id", "0")) for cpu in cell.findall("cpus/cpu"))
    # An offline cell has no memory element.
    return NumaCell(id=int(cell.get("id", "0")), cpus=cpus, memory_mib=int(cell.findtext("memory") or 0) // 1024)


def pages_of_cell(cell: int, nodes: Path = _NODES) -> list[PagePool]:
    """Read a NUMA cell's huge pages from the kernel, which makes and frees them at any time; empty pools are left out.

    Not from libvirt: its capabilities document is large, and tells only how many there are, not how many are free.
    """
    pools = []
    for folder in sorted((nodes / f"node{cell}" / "hugepages").glob("hugepages-*kB")):
        try:
            total, free = (int((folder / name).read_text()) for name in ("nr_hugepages", "free_hugepages"))
        except (OSError, ValueError):
            continue
        if total:
            size_kib = int(folder.name.removeprefix("hugepages-").removesuffix("kB"))
            pools.append(PagePool(size_kib=size_kib, total=total, free=free))
    return sorted(pools, key=lambda pool: pool.size_kib)


def kvm_works(description: HostDescription, *, device: Path = _KVM, cpuinfo: Path = _CPUINFO) -> bool:
    """Tell whether KVM guests can run: libvirt offers it, the CPU has it, and the device opens.

    Where only our own user may not open the device, libvirt's word is taken, which it has from a QEMU that could.
    """
    if not description.kvm_offered:
        return False
    if description.architecture in _X86 and not cpu_flags(cpuinfo) & {"vmx", "svm"}:
        return False
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError as exc:
        return exc.errno in (errno.EACCES, errno.EPERM)
    return True


def cpu_flags(cpuinfo: Path = _CPUINFO) -> frozenset[str]:
    """Return the kernel's flags of the first CPU; empty where it has none."""
    try:
        with cpuinfo.open(encoding="ascii", errors="replace") as lines:
            return frozenset(next((line for line in lines if line.startswith("flags")), "").split())
    except OSError:
        return frozenset()


def traits(architecture: str, flags: frozenset[str]) -> frozenset[str]:
    """Return the host's traits in the names of os-traits; `flags` are those CPU flags that guests get to see."""
    arch = architecture.upper()
    cpu = {f"HW_CPU_X86_{_CPU_TRAITS[flag]}" for flag in flags if flag in _CPU_TRAITS}
    return COMPUTE_TRAITS | {f"COMPUTE_ARCH_{arch}", f"HW_ARCH_{arch}"} | cpu
