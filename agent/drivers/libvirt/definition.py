"""What a domain's definition depends on beside its spec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal
from xml.etree import ElementTree as ET

from agent.drivers.libvirt import firmware
from agent.drivers.libvirt.volumes import Location
from agent.messages.spec import InstanceSpec

NVRAM: Final = "nvram.fd"
"""The file of a guest's UEFI variables, in the instance's folder."""


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What a domain's definition depends on beside its spec.

    `machine` is the type for specs that name none, in a definition the one that this domain has; `machines` gives the
    versioned name of those that stand for the newest one. `shared_cpus`: where guests run that have no CPUs of their
    own; None: everywhere. `shares`: name → folder.
    """

    domain_type: Literal["kvm", "qemu", "test", "lxc"]
    architecture: str
    machine: str | None
    cpu_mode: str
    cpu_model: str | None
    emulator: Path | None
    vnc_listen: str
    machines: Mapping[str, str] = field(default_factory=dict)
    firmware_folders: tuple[Path, ...] = firmware.FOLDERS
    shared_cpus: frozenset[int] | None = None
    shares: Mapping[str, Path] = field(default_factory=dict)

    def machine_of(self, spec: InstanceSpec) -> str | None:
        """The versioned machine type that a new instance gets; None leaves it to libvirt."""
        machine = spec.machine.type or self.machine
        return self.machines.get(machine, machine) if machine else None


@dataclass(frozen=True, slots=True)
class Tuning:
    """How QEMU is to access a disk; libvirt's words. None: QEMU's default."""

    cache: str = "none"
    io: str | None = None
    discard: bool = True
    detect_zeroes: bool = False


@dataclass(frozen=True, slots=True)
class InstanceFiles:
    """Where an instance's files are. `disks`: name of a disk → where it is; `tuning`: name of a disk → how it is to
    be accessed; `kernel` and `initrd` are those of a direct kernel boot.
    """

    disks: Mapping[str, Location]
    seed: Path
    console_log: Path
    tuning: Mapping[str, Tuning] = field(default_factory=dict)
    kernel: Path | None = None
    initrd: Path | None = None

    @property
    def nvram(self) -> Path:
        """The guest's UEFI variables; libvirt makes the file when the guest first starts."""
        return self.console_log.with_name(NVRAM)


def text_element(parent: ET.Element, tag: str, text: str, **attributes: str) -> ET.Element:
    """Append an element with this text."""
    element = ET.SubElement(parent, tag, attributes)
    element.text = text
    return element


def section(domain: ET.Element, tag: str) -> ET.Element:
    """Return the element that several parts of the definition write to; append it where it is not there yet."""
    found = domain.find(tag)
    return ET.SubElement(domain, tag) if found is None else found
