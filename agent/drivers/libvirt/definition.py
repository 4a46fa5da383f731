"""What a domain's definition depends on beside its spec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree as ET

from agent.drivers.libvirt.volumes import Location


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What a domain's definition depends on beside its spec."""

    domain_type: Literal["kvm", "qemu", "test", "lxc"]
    architecture: str
    machine: str | None
    cpu_mode: str
    cpu_model: str | None
    emulator: Path | None
    disk_cache: str
    vnc_listen: str


@dataclass(frozen=True, slots=True)
class InstanceFiles:
    """Where an instance's files are. `disks`: name of a disk → where it is."""

    disks: Mapping[str, Location]
    seed: Path
    console_log: Path


def text_element(parent: ET.Element, tag: str, text: str, **attributes: str) -> ET.Element:
    """Append an element with this text."""
    element = ET.SubElement(parent, tag, attributes)
    element.text = text
    return element
