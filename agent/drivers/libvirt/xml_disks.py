"""The disks of a domain's definition."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal
from xml.etree import ElementTree as ET

from agent.drivers.libvirt.definition import HostFacts, InstanceFiles, Tuning
from agent.drivers.libvirt.volumes import ROOT
from agent.messages.spec import InstanceSpec

_ROOT_TARGET: Final = {"virtio": "vda", "sata": "sda", "scsi": "sda"}


def disks(spec: InstanceSpec, facts: HostFacts, files: InstanceFiles) -> Iterator[ET.Element]:
    """Give every disk and the controllers that disks need."""
    yield _root_disk(spec, facts, files)
    cd_bus = _cd_bus(facts)
    if spec.seed is not None:
        yield _seed_disk(spec, cd_bus, files)
    if spec.root_disk.bus == "scsi" or (spec.seed is not None and cd_bus == "scsi"):
        yield ET.Element("controller", {"type": "scsi", "index": "0", "model": "virtio-scsi"})


def _root_disk(spec: InstanceSpec, facts: HostFacts, files: InstanceFiles) -> ET.Element:
    root = files.disks[ROOT]
    disk = ET.Element("disk", {"type": "file", "device": "disk"})
    driver = ET.SubElement(disk, "driver", {"name": "qemu", "type": root.format})
    if facts.domain_type != "test":
        # A full host pauses the guest, which goes on when there is space; other errors are the guest's affair.
        cache = files.tuning.get(ROOT, Tuning()).cache
        driver.attrib.update({"cache": cache, "discard": "unmap", "error_policy": "enospace"})
    ET.SubElement(disk, "source", {"file": str(root.path)})
    bus = spec.root_disk.bus
    ET.SubElement(disk, "target", {"dev": _ROOT_TARGET[bus], "bus": bus})
    return disk


def _cd_bus(facts: HostFacts) -> Literal["sata", "ide", "scsi"]:
    """Return the bus of a CD drive that a guest finds without extra drivers, as far as the machine has one."""
    if facts.architecture not in ("x86_64", "i686"):
        return "scsi"
    return "ide" if facts.machine and facts.machine.startswith("pc") and "q35" not in facts.machine else "sata"


def _seed_disk(spec: InstanceSpec, bus: str, files: InstanceFiles) -> ET.Element:
    disk = ET.Element("disk", {"type": "file", "device": "cdrom"})
    ET.SubElement(disk, "driver", {"name": "qemu", "type": "raw"})
    ET.SubElement(disk, "source", {"file": str(files.seed)})
    # The letter also chooses the port, so keep it low: the root disk may be sda.
    device = "hdc" if bus == "ide" else ("sda" if spec.root_disk.bus == "virtio" else "sdb")
    ET.SubElement(disk, "target", {"dev": device, "bus": bus})
    ET.SubElement(disk, "readonly")
    return disk
