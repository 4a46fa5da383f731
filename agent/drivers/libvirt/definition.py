"""What a domain's definition depends on beside its spec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree as ET

from agent.drivers.libvirt.volumes import Location


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What a domain's definition depends on beside its spec."""

    domain_type: Literal["kvm", "qemu", "test"]
    architecture: str
    machine: str | None
    cpu_mode: str
    cpu_model: str | None
    emulator: Path | None
    vnc_listen: str


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


def text_element(parent: ET.Element, tag: str, text: str, **attributes: str) -> ET.Element:
    """Append an element with this text."""
    element = ET.SubElement(parent, tag, attributes)
    element.text = text
    return element
