"""The definition of a rescued domain: the rescue disk in front, everything else as it is."""

from __future__ import annotations

from typing import Final
from xml.etree import ElementTree as ET

from agent.drivers.libvirt.volumes import Location
from agent.messages.spec_disks import DiskBus

RESCUE: Final = "rescue_disk"
"""The rescue disk's volume. No disk of a spec can have this name."""

_PREFIX: Final = {"virtio": "vd", "sata": "sd", "scsi": "sd"}


def put_first(domain: ET.Element, bus: DiskBus, rescue: Location) -> None:
    """Put the rescue disk before all disks, as what the guest boots from.

    It is on the root disk's bus and takes the first name there (`vda`); the names of the others move on by one. A
    kernel that is booted directly is left out: it is not the rescue system's.
    """
    devices = domain.find("devices")
    system = domain.find("os")
    if devices is None or system is None:
        raise AssertionError("a domain has devices and a way to boot")
    prefix = _PREFIX[bus]
    for target in devices.iterfind("disk/target"):
        name = target.get("dev", "")
        if name.startswith(prefix):
            target.set("dev", prefix + _letters(_number(name.removeprefix(prefix)) + 1))
    for tag in ("boot", "kernel", "initrd", "cmdline"):
        for element in system.findall(tag):
            system.remove(element)
    for boot in devices.iterfind("*/boot"):
        boot.set("order", str(int(boot.get("order", "1")) + 1))
    position = next((at for at, device in enumerate(devices) if device.tag == "disk"), len(devices))
    devices.insert(position, _disk(devices, bus, prefix, rescue))


def _disk(devices: ET.Element, bus: DiskBus, prefix: str, rescue: Location) -> ET.Element:
    disk = ET.Element("disk", {"type": rescue.kind, "device": "disk"})
    # Cache and discard modes that suit the root disk suit the one beside it.
    like = next((d.find("driver") for d in devices.iterfind("disk") if d.get("device") == "disk"), None)
    driver = ET.SubElement(disk, "driver", dict(like.attrib) if like is not None else {"name": "qemu"})
    driver.set("type", rescue.format)
    ET.SubElement(disk, "source", {"file" if rescue.kind == "file" else "dev": str(rescue.path)})
    ET.SubElement(disk, "target", {"dev": f"{prefix}a", "bus": bus})
    ET.SubElement(disk, "boot", {"order": "1"})
    return disk


def _number(letters: str) -> int:
    """`a` → 0, `z` → 25, `aa` → 26."""
    number = 0
    for letter in letters:
        number = number * 26 + ord(letter) - ord("a") + 1
    return number - 1


def _letters(number: int) -> str:
    text = ""
    number += 1
    while number:
        number, rest = divmod(number - 1, 26)
        text = chr(ord("a") + rest) + text
    return text
