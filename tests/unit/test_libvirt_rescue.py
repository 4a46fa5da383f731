"""The definition of a rescued domain, by itself: names, addresses, boot order, and the way back."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from agent.drivers.libvirt.encryption import Sealed
from agent.drivers.libvirt.volumes import Location
from agent.drivers.libvirt.xml_rescue import put_first, take_out

RESCUE = Location("file", Path("/i/rescue.qcow2"), "qcow2")


def disk(name: str, dev: str, bus: str, slot: int | None, *, device: str = "disk", order: int | None = None) -> str:
    address = "" if slot is None else f"<address type='pci' slot='{slot}'/>"
    boot = "" if order is None else f"<boot order='{order}'/>"
    serial = f"<serial>{name}</serial>" if device == "disk" else ""
    return (
        f"<disk type='file' device='{device}'><driver name='qemu' type='raw' cache='none'/>"
        f"<target dev='{dev}' bus='{bus}'/>{boot}{serial}{address}</disk>"
    )


def domain(*disks: str) -> ET.Element:
    nic = "<interface type='user'><boot order='9'/></interface>"
    system = "<os><type>hvm</type><boot dev='hd'/><kernel>/k</kernel><initrd>/i</initrd><cmdline>x</cmdline></os>"
    return ET.fromstring(f"<domain>{system}<devices><emulator/>{''.join(disks)}{nic}</devices></domain>")


def shape(definition: ET.Element) -> list[tuple[str | None, str | None, str | None]]:
    """Serial, target and slot of every disk."""
    found = []
    for one in definition.iterfind("devices/disk"):
        target, address = one.find("target"), one.find("address")
        assert target is not None
        found.append((one.findtext("serial"), target.get("dev"), None if address is None else address.get("slot")))
    return found


def test_it_comes_first_and_the_others_move_on() -> None:
    made = domain(
        disk("root", "vda", "virtio", 4, order=1),
        disk("", "sda", "sata", 2, device="cdrom"),
        disk("data", "vdb", "virtio", 7, order=2),
        disk("last", "vdz", "virtio", None),
    )
    put_first(made, "virtio", RESCUE)
    assert shape(made) == [
        ("rescue_disk", "vda", "4"),
        ("root", "vdb", "7"),
        (None, "sda", "2"),
        ("data", "vdc", None),
        ("last", "vdaa", None),
    ]
    assert [boot.get("order") for boot in made.iterfind("devices/*/boot")] == ["1", "2", "3", "10"]
    assert [child.tag for child in made.iterfind("os/*")] == ["type"]
    first = made.find("devices/disk/driver")
    assert first is not None
    assert (first.get("type"), first.get("cache")) == ("qcow2", "none")


@pytest.mark.parametrize("bus", ["virtio", "sata", "scsi"])
def test_the_way_back_gives_each_disk_its_name_and_address(bus: str) -> None:
    prefix = "vd" if bus == "virtio" else "sd"
    disks = [disk(f"d{n}", f"{prefix}{letter}", bus, n + 3) for n, letter in enumerate("abc")]
    made, before = domain(*disks), shape(domain(*disks))
    put_first(made, bus, RESCUE)  # type: ignore[arg-type]
    # libvirt fills in what was left open.
    last = made.findall("devices/disk")[-1]
    ET.SubElement(last, "address", {"type": "pci", "slot": "9"})
    assert [slot for _, _, slot in shape(made)] == ["3", "4", "5", "9"]
    take_out(made)
    assert shape(made) == before


def test_a_definition_without_a_rescue_disk_stays() -> None:
    made = domain(disk("root", "vda", "virtio", 4))
    take_out(made)
    assert shape(made) == [("root", "vda", "4")]


def test_an_encrypted_rescue_disk_on_a_block_device() -> None:
    made = domain(disk("root", "sda", "scsi", None))
    put_first(made, "scsi", Location("block", Path("/dev/vg/rescue"), "raw", Sealed("k", "a-uuid", "usage")))
    source = made.find("devices/disk/source")
    assert source is not None
    assert source.get("dev") == "/dev/vg/rescue"
    secret = source.find("encryption/secret")
    assert secret is not None
    assert secret.get("uuid") == "a-uuid"
