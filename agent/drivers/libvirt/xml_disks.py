"""The disks of a domain's definition, and what it boots from.

Targets follow from the spec alone, so that a redefinition changes none: the root disk and the seed's drive come first,
then the disks in the order of the spec. A disk's serial number is its name, by which guests find it under
/dev/disk/by-id.
"""

from __future__ import annotations

import string
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final
from xml.etree import ElementTree as ET

from agent.drivers.libvirt.definition import HostFacts, InstanceFiles, Tuning, text_element
from agent.drivers.libvirt.volumes import ROOT, Location
from agent.messages.spec import InstanceSpec
from agent.messages.spec_disks import CdromDisk, DataDisk, RootDisk

_SCSI_UNITS: Final = 15
"""Disks of one controller, as libvirt deals them out by the letters of their targets."""
_IDE_TARGETS: Final = ("hdc", "hdd", "hda", "hdb")
SEED: Final = "boot.seed"
"""The seed's drive among the targets; no disk can have this name."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a guest finds a disk: libvirt's target name (`vda`), which also chooses the port, and the bus."""

    device: str
    bus: str
    index: int


class _Targets:
    """Deals out targets; sata and scsi share their letters."""

    def __init__(self, facts: HostFacts) -> None:
        self._taken = {"vd": 0, "sd": 0}
        self._ide = list(_IDE_TARGETS)
        self._cd_bus = _cd_bus(facts)

    def disk(self, bus: str) -> Target:
        prefix = "vd" if bus == "virtio" else "sd"
        index = self._taken[prefix]
        self._taken[prefix] += 1
        return Target(prefix + _letters(index), bus, index)

    def cd(self) -> Target:
        if self._cd_bus != "ide":
            return self.disk(self._cd_bus)
        # The two IDE controllers have four ports; later drives get a SATA controller.
        return Target(self._ide.pop(0), "ide", 0) if self._ide else self.disk("sata")


def disks(spec: InstanceSpec, facts: HostFacts, files: InstanceFiles) -> Iterator[ET.Element]:
    """Give every disk and the controllers that disks need."""
    places = targets(spec, facts)
    order = boot_order(spec)
    for name, disk in spec.disks_by_name().items():
        if isinstance(disk, CdromDisk):
            element = _cd(files.disks[name], places[name])
        else:
            tuning = None if facts.domain_type == "test" else files.tuning.get(name, Tuning())
            element = _disk(name, files.disks[name], places[name], tuning=tuning)
        if name in order:
            ET.SubElement(element, "boot", {"order": str(order.index(name) + 1)})
        yield element
        if name == ROOT and spec.seed is not None:
            yield _cd(Location("file", files.seed, "raw"), places[SEED])
    scsi = [place.index for place in places.values() if place.bus == "scsi"]
    for index in sorted({number // _SCSI_UNITS for number in scsi}):
        yield ET.Element("controller", {"type": "scsi", "index": str(index), "model": "virtio-scsi"})


def targets(spec: InstanceSpec, facts: HostFacts) -> dict[str, Target]:
    """Name of a disk, or `SEED` → where the guest finds it."""
    deal = _Targets(facts)
    places = {ROOT: deal.disk(spec.root_disk.bus)}
    if spec.seed is not None:
        places[SEED] = deal.cd()
    for disk in spec.disks:
        places[disk.name] = deal.cd() if isinstance(disk, CdromDisk) else deal.disk(disk.bus)
    return places


def boot_order(spec: InstanceSpec) -> list[str]:
    """Names of disks, the first first: those of `boot.order`, then all others that can have a system on them."""
    able = [name for name, disk in spec.disks_by_name().items() if isinstance(disk, RootDisk | DataDisk | CdromDisk)]
    return list(dict.fromkeys([*spec.boot.order, *able]))


def kernel(system: ET.Element, spec: InstanceSpec, files: InstanceFiles) -> None:
    """Add what a direct kernel boot needs to the `os` element."""
    if spec.boot.kernel is None or files.kernel is None:
        return
    text_element(system, "kernel", str(files.kernel))
    if files.initrd is not None:
        text_element(system, "initrd", str(files.initrd))
    if spec.boot.kernel.cmdline:
        text_element(system, "cmdline", spec.boot.kernel.cmdline)


def _disk(name: str, place: Location, target: Target, *, tuning: Tuning | None) -> ET.Element:
    element = ET.Element("disk", {"type": place.kind, "device": "disk"})
    driver = ET.SubElement(element, "driver", {"name": "qemu", "type": place.format})
    if tuning is not None:
        _tune(driver, tuning)
    _source(element, place)
    ET.SubElement(element, "target", {"dev": target.device, "bus": target.bus})
    text_element(element, "serial", name)
    return element


def _tune(driver: ET.Element, tuning: Tuning) -> None:
    driver.set("cache", tuning.cache)
    if tuning.io is not None:
        driver.set("io", tuning.io)
    driver.set("discard", "unmap" if tuning.discard else "ignore")
    if tuning.detect_zeroes:
        driver.set("detect_zeroes", "unmap")
    # A full host pauses the guest, which goes on when there is space; other errors are the guest's affair.
    driver.set("error_policy", "enospace")


def _source(element: ET.Element, place: Location) -> None:
    source = ET.SubElement(element, "source", {"dev" if place.kind == "block" else "file": str(place.path)})
    if place.sealed is not None:
        encryption = ET.SubElement(source, "encryption", {"format": "luks"})
        ET.SubElement(encryption, "secret", {"type": "passphrase", "uuid": place.sealed.secret_uuid})


def _cd(place: Location, target: Target) -> ET.Element:
    element = ET.Element("disk", {"type": "file", "device": "cdrom"})
    ET.SubElement(element, "driver", {"name": "qemu", "type": "raw"})
    _source(element, place)
    ET.SubElement(element, "target", {"dev": target.device, "bus": target.bus})
    ET.SubElement(element, "readonly")
    return element


def _cd_bus(facts: HostFacts) -> str:
    """Return the bus of a CD drive that a guest finds without extra drivers, as far as the machine has one."""
    if facts.architecture not in ("x86_64", "i686"):
        return "scsi"
    return "ide" if facts.machine and facts.machine.startswith("pc") and "q35" not in facts.machine else "sata"


def _letters(index: int) -> str:
    """A … z, aa, ab …"""
    letters = ""
    index += 1
    while index:
        index, rest = divmod(index - 1, len(string.ascii_lowercase))
        letters = string.ascii_lowercase[rest] + letters
    return letters
