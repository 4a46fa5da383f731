"""The definition of a rescued domain: the rescue disk in front, everything else as it is."""

from __future__ import annotations

from typing import Final
from xml.etree import ElementTree as ET

from agent.drivers.libvirt.definition import text_element
from agent.drivers.libvirt.volumes import Location
from agent.messages.spec_disks import DiskBus

RESCUE: Final = "rescue_disk"
"""The rescue disk's volume, and its serial number. No disk of a spec can have this name."""

_PREFIX: Final = {"virtio": "vd", "sata": "sd", "scsi": "sd"}


def put_first(domain: ET.Element, bus: DiskBus, rescue: Location) -> None:
    """Put the rescue disk before all disks, as what the guest boots from.

    It is on the root disk's bus and takes the first name there (`vda`); the names of the others move on by one, and so
    do their addresses, where they have any: by these a guest counts its disks. A kernel that is booted directly is left
    out: it is not the rescue system's.
    """
    devices, system = domain.find("devices"), domain.find("os")
    if devices is None or system is None:
        raise AssertionError("a domain has devices and a way to boot")
    behind = _on(devices, bus)
    addresses = _take_addresses(behind)
    _shift(devices, _PREFIX[bus], 1)
    for tag in ("boot", "kernel", "initrd", "cmdline"):
        for element in system.findall(tag):
            system.remove(element)
    for boot in devices.iterfind("*/boot"):
        boot.set("order", str(int(boot.get("order", "1")) + 1))
    position = next((at for at, device in enumerate(devices) if device.tag == "disk"), len(devices))
    disk = _disk(devices, bus, rescue)
    devices.insert(position, disk)
    _give_addresses([disk, *behind], addresses)


def take_out(definition: ET.Element) -> None:
    """Undo `put_first` in a definition that libvirt gave, so that it can be compared with one that has no rescue disk.

    What it boots from is not restored. Without a rescue disk: nothing.
    """
    devices = definition.find("devices")
    if devices is None:
        return
    rescue = next((disk for disk in devices.iterfind("disk") if disk.findtext("serial") == RESCUE), None)
    if rescue is None:
        return
    target = rescue.find("target")
    bus = "virtio" if target is None else target.get("bus", "virtio")
    all_of_them = _on(devices, bus)
    addresses = _take_addresses(all_of_them)
    devices.remove(rescue)
    _give_addresses([disk for disk in all_of_them if disk is not rescue], addresses)
    _shift(devices, _PREFIX[bus], -1)


def _disk(devices: ET.Element, bus: DiskBus, rescue: Location) -> ET.Element:
    disk = ET.Element("disk", {"type": rescue.kind, "device": "disk"})
    # Cache and discard modes that suit the root disk suit the one beside it.
    like = next((d.find("driver") for d in devices.iterfind("disk") if d.get("device") == "disk"), None)
    driver = ET.SubElement(disk, "driver", dict(like.attrib) if like is not None else {"name": "qemu"})
    driver.set("type", rescue.format)
    source = ET.SubElement(disk, "source", {"file" if rescue.kind == "file" else "dev": str(rescue.path)})
    if rescue.sealed is not None:  # as the root disk is, so as not to leak through a rescue
        encryption = ET.SubElement(source, "encryption", {"format": "luks"})
        ET.SubElement(encryption, "secret", {"type": "passphrase", "uuid": rescue.sealed.secret_uuid})
    ET.SubElement(disk, "target", {"dev": f"{_PREFIX[bus]}a", "bus": bus})
    ET.SubElement(disk, "boot", {"order": "1"})
    text_element(disk, "serial", RESCUE)
    return disk


def _on(devices: ET.Element, bus: str) -> list[ET.Element]:
    """The disks on a bus, in the order of their names."""
    found = []
    for disk in devices.iterfind("disk"):
        target = disk.find("target")
        if target is not None and target.get("bus") == bus:
            found.append((_number(target.get("dev", "")[2:]), disk))
    return [disk for _number_, disk in sorted(found, key=lambda pair: pair[0])]


def _take_addresses(disks: list[ET.Element]) -> list[ET.Element | None]:
    taken = []
    for disk in disks:
        address = disk.find("address")
        if address is not None:
            disk.remove(address)
        taken.append(address)
    return taken


def _give_addresses(disks: list[ET.Element], addresses: list[ET.Element | None]) -> None:
    """Give each disk the address at its place; who is one too many gets a new one from libvirt."""
    for disk, address in zip(disks, addresses, strict=False):
        if address is not None:
            disk.append(address)


def _shift(devices: ET.Element, prefix: str, by: int) -> None:
    for target in devices.iterfind("disk/target"):
        name = target.get("dev", "")
        if name.startswith(prefix):
            target.set("dev", prefix + _letters(_number(name.removeprefix(prefix)) + by))


def _number(letters: str) -> int:
    """The place of a name among its like: 0 for `a`, 25 for `z`, 26 for `aa`."""
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
