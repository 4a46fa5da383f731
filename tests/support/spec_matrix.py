"""A wide matrix of specs: every value of every option of `InstanceSpec` together with every value of every other."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, Final

from agent.messages.spec import InstanceSpec
from support.pairwise import all_pairs

# Eight vCPUs and 1024 MiB where something depends on the numbers.
AXES: Final[dict[str, list[dict[str, Any]]]] = {
    "size": [{"vcpus": 8, "memory_mib": 1024}],
    "machine": [
        {"machine": {}},
        {"machine": {"type": "pc"}},
        {"machine": {"type": "pc-q35-7.0"}},
        {"machine": {"firmware": {"type": "uefi"}}},
        {"machine": {"type": "pc", "firmware": {"type": "uefi"}}},
        {"machine": {"type": "q35", "firmware": {"type": "uefi", "secure_boot": True}}},
    ],
    "cpu": [
        {},
        {"mode": "maximum", "features": {"avx2": "disable"}},
        {"mode": "host-model"},
        {"mode": "custom", "model": "qemu64", "features": {"sse4.2": "require", "x2apic": "disable"}},
        {"mode": "custom", "model": "Skylake-Client", "features": {"hle": "disable", "rtm": "optional"}},
    ],
    "topology": [
        {},
        {"topology": {"sockets": 2, "cores": 2, "threads": 2}},
        {"topology": {"sockets": 1, "dies": 2, "cores": 4}},
        {"topology": {"sockets": 8}},
    ],
    "placement": [{}, {"placement": "dedicated"}],
    "numa": [
        {},
        {"numa": [{"vcpus": [0, 1, 2, 3], "memory_mib": 512}, {"vcpus": [7, 6, 5, 4], "memory_mib": 512}]},
        {"numa": [{"vcpus": [0, 2, 4, 6], "memory_mib": 256}, {"vcpus": [1, 3, 5, 7], "memory_mib": 768}]},
    ],
    "pages": [{}, {"hugepages_kib": 2048}],
    "source": [{}, {"source": "file"}, {"source": "memfd"}],
    "shared": [{}, {"shared": True}],
    "locked": [{}, {"locked": True}],
    "shares": [
        {},
        {"shares": [{"source": "data", "tag": "d"}]},
        {"shares": [{"source": "data", "tag": n} for n in "ab"]},
    ],
    "watchdog": [
        {},
        *(
            {"watchdog": {"model": "i6300esb", "action": action}}
            for action in ("reset", "shutdown", "poweroff", "pause", "none", "inject-nmi")
        ),
    ],
    "video": [
        {},
        {"video": {"model": "vga", "vram_kib": 16384}},
        {"video": {"model": "virtio"}},
        {"video": {"model": "bochs", "vram_kib": 16384}},
        {"video": {"model": "qxl"}},
        {"video": {"model": "none"}},
    ],
    "vnc": [{}, {"vnc": True}],
    "helpers": [{}, {"rng": False, "balloon": False}, {"guest_agent": False}, {"firmware_acpi": False}],
    "root": [
        {"root_disk": {"size_mib": 10}},
        {"root_disk": {"size_mib": 10, "bus": "sata", "cache": "writeback", "io": "threads"}},
        {"root_disk": {"size_mib": 10, "bus": "scsi", "discard": False, "limits": {"total_iops": 100}}},
        {"root_disk": {"size_mib": 10, "cache": "none", "io": "native"}},
    ],
    "disks": [
        {},
        {"disks": [{"kind": "data", "name": "data-1", "size_mib": 5, "bus": "scsi"}]},
        {
            "disks": [
                {"kind": "ephemeral", "name": "scratch", "size_mib": 5, "bus": "sata"},
                {"kind": "swap", "name": "swap", "size_mib": 5},
            ]
        },
    ],
    "seed": [{}, {"seed": {}}, {"seed": {"datasource": "config-drive"}}],
    "nics": [
        {},
        {"nics": [{"type": "user"}, {"type": "user", "model": "e1000e"}]},
        {"nics": [{"type": "bridge", "bridge": "br0", "limits": {"inbound_kib_s": 100, "outbound_kib_s": 50}}]},
        {"nics": [{"type": "network", "network": "lan", "model": "rtl8139", "mac": "52:54:00:00:00:01"}]},
        {"nics": [{"type": "user", "model": "e1000"}]},
    ],
    "limits": [{}, {"cpu_limits": {"shares": 512, "quota_percent": 50}}],
}
DISKS: Final = ("root", "data-1", "scratch", "swap")
"""Names of the disks that specs of the matrix have."""
_CPU: Final = ("cpu", "topology", "placement")
_MEMORY: Final = ("pages", "source", "shared", "locked")


def matrix() -> list[InstanceSpec]:
    """The specs, the same on every call. All pairs are in it several times, each time among other options."""
    rows: list[Mapping[str, int]] = []
    for seed in range(5):
        names = list(AXES)
        random.Random(seed).shuffle(names)
        rows += all_pairs({name: AXES[name] for name in names}, _possible)
    return [_spec(number, row) for number, row in enumerate(rows)]


def _possible(row: Mapping[str, int]) -> bool:
    """Whether a host of this kind can do it at all; what it cannot is refused, and tested by name."""
    machine = AXES["machine"][row.get("machine", 0)]["machine"]
    piix = machine.get("type") == "pc"
    if piix and row.get("root") == 1:
        return False  # the machine pc has no SATA
    if piix and row.get("disks") == 2:
        return False
    # OVMF cannot do without, and libvirt has a rule of its own for SMM.
    return not (machine.get("firmware") and row.get("helpers") == 3)


def _spec(number: int, row: Mapping[str, int]) -> InstanceSpec:
    merged: dict[str, Any] = {"name": f"matrix-{number}", "cpu": {}, "memory_backing": {}}
    for name, index in row.items():
        value = AXES[name][index]
        if name in _CPU:
            merged["cpu"] |= value
        elif name in _MEMORY:
            merged["memory_backing"] |= value
        else:
            merged |= value
    return InstanceSpec.model_validate(merged)
