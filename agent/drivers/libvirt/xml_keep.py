"""What a guest sees of its hardware stays when its domain is defined again.

libvirt fills in what a definition leaves open: controllers, addresses, details of models. Written again from the spec
alone, the definition would let it choose anew, by the rules of today's libvirt and of today's agent, and without the
gaps that removed devices left. So what stays is taken over from the present definition.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Final
from xml.etree import ElementTree as ET

from agent.messages.spec import InstanceSpec

_DRIVE_UNITS: Final = {
    "sata": (range(1), range(6)),
    "scsi": (range(1), range(7)),
    "ide": (range(2), range(2)),
}
"""Bus → buses of a controller, units of a bus, as libvirt places disks by the letters of their targets."""
_REST: Final = {
    "watchdog": "model",
    "rng": "model",
    "memballoon": "model",
    "tpm": "model",
    "panic": "model",
    "vsock": "model",
    "input": "type",
    "sound": "model",
    "memory": "model",
}
"""Devices that have no name: the attribute that tells their kinds apart. Equal ones are matched by their order."""


@dataclass(frozen=True, slots=True)
class Unchanged:
    """Which parts of the hardware a new spec asks for just as the old one did."""

    machine: bool
    features: bool
    cpu: bool
    video: bool

    @classmethod
    def between(cls, old: InstanceSpec, new: InstanceSpec) -> Unchanged:
        """Compare two specs of one instance."""
        cpus = [(spec.cpu.mode, spec.cpu.model, spec.cpu.features) for spec in (old, new)]
        same_machine = old.machine == new.machine
        return cls(
            machine=same_machine,
            features=same_machine and old.firmware_acpi == new.firmware_acpi,
            cpu=cpus[0] == cpus[1],
            video=(old.video, old.vnc) == (new.video, new.vnc),
        )


def keep_hardware(domain: ET.Element, present: ET.Element, unchanged: Unchanged) -> None:
    """Take over from the `present` definition whatever the guest would notice and the spec does not change."""
    if unchanged.cpu:
        _keep_cpu(domain, present)
    for tag in ("clock", "pm"):
        _replace(domain, present, tag)
    if unchanged.features:
        _replace(domain, present, "features")
    devices, before = domain.find("devices"), present.find("devices")
    if not unchanged.machine or devices is None or before is None:
        return
    for tag in ("os/loader", "os/nvram"):
        _replace(domain, present, tag)
    _keep_controllers(devices, before)
    _keep_addresses(devices, before, same_video=unchanged.video)
    _resolve_drives(devices)


def _replace(domain: ET.Element, present: ET.Element, path: str) -> None:
    old, new = present.find(path), domain.find(path)
    parent_path, _, _tag = path.rpartition("/")
    parent = domain.find(parent_path) if parent_path else domain
    if old is None or parent is None:
        return
    if new is None:
        parent.append(old)
    else:
        parent[list(parent).index(new)] = old


def _keep_cpu(domain: ET.Element, present: ET.Element) -> None:
    """Keep mode, model and features; topology and cells follow the numbers of the spec."""
    old, new = present.find("cpu"), domain.find("cpu")
    sized = [child for child in (new if new is not None else ()) if child.tag in ("topology", "numa")]
    if new is not None:
        domain.remove(new)
    made = ET.Element("cpu", {} if old is None else dict(old.attrib))
    made.extend(child for child in (old if old is not None else ()) if child.tag not in ("topology", "numa"))
    made.extend(sized)
    if made.attrib or len(made):
        domain.append(made)


def _keep_controllers(devices: ET.Element, before: ET.Element) -> None:
    """Keep every controller, used or not: it is there in the guest, and others are numbered behind it."""
    kept = before.findall("controller")
    taken = {(one.get("type"), one.get("index", "0")) for one in kept}
    for new in devices.findall("controller"):
        if (new.get("type"), new.get("index", "0")) in taken:
            devices.remove(new)
    devices.extend(kept)


def _keep_addresses(devices: ET.Element, before: ET.Element, *, same_video: bool) -> None:
    old = dict(_keyed(before))
    for key, device in _keyed(devices):
        match = old.get(key)
        if match is None:
            continue
        if device.find("address") is None and (address := match.find("address")) is not None:
            device.append(address)
        if device.tag == "video" and same_video:
            _replace(device, match, "model")


def _keyed(devices: ET.Element) -> Iterator[tuple[Hashable, ET.Element]]:
    counts: dict[Hashable, int] = {}
    for device in devices:
        key = _key(device)
        if key is None:
            continue
        number = counts[key] = counts.get(key, -1) + 1
        yield (key, number), device


def _key(device: ET.Element) -> tuple[str | None, ...] | None:
    """What makes a device the same one in two definitions; None if there is nothing to keep of it."""
    tag = device.tag
    if tag == "disk":
        target = device.find("target")
        bus, name = (None, None) if target is None else (target.get("bus"), target.get("dev"))
        kind, serial = device.get("device", "disk"), device.findtext("serial")
        # A serial belongs to the disk, a target only to its place. CDs have no serial, but each its own file.
        if serial or kind != "cdrom":
            return (tag, kind, bus, "serial" if serial else "target", serial or name)
        return (tag, kind, bus, "file", _attribute(device, "source", "file") or name)
    if tag == "interface":
        return (tag, _attribute(device, "mac", "address"), _attribute(device, "model", "type"))
    if tag == "filesystem":
        return (tag, _attribute(device, "target", "dir"))
    if tag in ("channel", "serial"):
        return (tag, _attribute(device, "target", "name"), _attribute(device, "target", "port"))
    if tag == "video":
        return (tag, _attribute(device, "model", "type"))
    if tag in _REST:
        return (tag, device.get(_REST[tag]), device.get("bus"))
    return None


def _attribute(device: ET.Element, tag: str, name: str) -> str | None:
    found = device.find(tag)
    return None if found is None else found.get(name)


def _resolve_drives(devices: ET.Element) -> None:
    """Give a new disk another place where the one that libvirt derives from its target is kept by an older disk."""
    disks = [(disk, _attribute(disk, "target", "bus") or "") for disk in devices.findall("disk")]
    taken = {
        (bus, _place(address))
        for disk, bus in disks
        if (address := disk.find("address")) is not None and address.get("type") == "drive"
    }
    for disk, bus in disks:
        if bus not in _DRIVE_UNITS or disk.find("address") is not None:
            continue
        wanted = _natural(bus, _attribute(disk, "target", "dev") or "")
        if (bus, wanted) in taken:
            wanted = next(place for place in _places(bus) if (bus, place) not in taken)
            names = ("controller", "bus", "unit")
            numbers = {name: str(number) for name, number in zip(names, wanted, strict=True)}
            ET.SubElement(disk, "address", {"type": "drive", **numbers, "target": "0"})
        taken.add((bus, wanted))


def _place(address: ET.Element) -> tuple[int, int, int]:
    return (int(address.get("controller", "0")), int(address.get("bus", "0")), int(address.get("unit", "0")))


def _natural(bus: str, target: str) -> tuple[int, int, int]:
    """The place that libvirt derives from a target such as `sdc`."""
    number = 0
    for letter in target[2:]:
        number = number * 26 + ord(letter) - ord("a") + 1
    return _nth(bus, max(0, number - 1))


def _nth(bus: str, number: int) -> tuple[int, int, int]:
    buses, units = _DRIVE_UNITS[bus]
    controller, rest = divmod(number, len(buses) * len(units))
    return (controller, buses[rest // len(units)], units[rest % len(units)])


def _places(bus: str) -> Iterator[tuple[int, int, int]]:
    return (_nth(bus, number) for number in itertools.count())
