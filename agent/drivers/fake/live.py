"""What a simulated guest has since it was started, which its definition may differ from until the next start."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Self

from agent.errors import Unsupported
from agent.messages.spec import InstanceSpec, UserNic


@dataclass(frozen=True, slots=True)
class Live:
    """`memory_mib` is what is plugged in, `boot_mib` of it from the start; `held_mib` of it the balloon holds.

    `limits_json` are the limits of CPU, disks and NICs.
    """

    vcpus: int
    max_vcpus: int
    boot_mib: int
    memory_mib: int
    max_memory_mib: int
    held_mib: int = 0
    limits_json: str = "{}"

    @classmethod
    def booted(cls, spec: InstanceSpec) -> Self:
        """What a guest of this spec starts with."""
        return cls(
            vcpus=spec.vcpus,
            max_vcpus=spec.max_vcpus or spec.vcpus,
            boot_mib=spec.memory_mib,
            memory_mib=spec.memory_mib,
            max_memory_mib=spec.max_memory_mib or spec.memory_mib,
            limits_json=limits_json(spec),
        )

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote."""
        return cls(**json.loads(text))

    def to_json(self) -> str:
        """Write it for the domain's file."""
        return json.dumps(asdict(self))


def limits_json(spec: InstanceSpec) -> str:
    """The limits that a spec asks for, as comparable text."""
    disks = {"root": spec.root_disk.limits} | {disk.name: disk.limits for disk in spec.disks if disk.kind != "cdrom"}
    return json.dumps(
        {
            "cpu": spec.cpu_limits.model_dump(exclude_none=True),
            "disks": {name: limits.model_dump(exclude_none=True) for name, limits in disks.items() if limits},
            "nics": [nic.limits.model_dump(exclude_none=True) if nic.limits else None for nic in spec.nics],
        },
        sort_keys=True,
    )


def check_nics(spec: InstanceSpec) -> None:
    """Raise `Unsupported` (`nic_limits_unsupported`) for what libvirt cannot do either."""
    if any(isinstance(nic, UserNic) and nic.limits is not None for nic in spec.nics):
        raise Unsupported(
            "libvirt cannot limit a user-mode NIC; take its limits away, or put it on a network or a bridge",
            code="nic_limits_unsupported",
        )


def disk_names(spec: InstanceSpec) -> list[str]:
    """Names of the writable disks of a spec."""
    return ["root", *(disk.name for disk in spec.disks if disk.kind != "cdrom")]
