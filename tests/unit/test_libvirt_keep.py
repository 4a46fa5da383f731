"""Taking over a present definition's hardware, where real libvirt would have to be coaxed into the case."""

from __future__ import annotations

from xml.etree import ElementTree as ET

from agent.drivers.libvirt.xml_keep import Unchanged, keep_hardware

ALL = Unchanged(machine=True, features=True, cpu=True, video=True)


def disk(target: str, bus: str, *, serial: str = "", place: str = "") -> str:
    number = f"<serial>{serial}</serial>" if serial else ""
    controller, _, unit = place.partition(":")
    address = f"<address type='drive' controller='{controller}' bus='0' unit='{unit}'/>" if place else ""
    return f"<disk device='disk'><target dev='{target}' bus='{bus}'/>{number}{address}</disk>"


def kept(present: str, wanted: str, unchanged: Unchanged = ALL) -> ET.Element:
    domain = ET.fromstring(wanted)
    keep_hardware(domain, ET.fromstring(present), unchanged)
    return domain


def devices(*parts: str) -> str:
    return f"<domain><devices>{''.join(parts)}</devices></domain>"


def places(domain: ET.Element) -> dict[str, str]:
    found = {}
    for one in domain.findall("devices/disk"):
        address = one.find("address")
        name = one.findtext("serial") or str(one.find("target").get("dev"))  # type: ignore[union-attr]
        found[name] = "" if address is None else f"{address.get('controller')}:{address.get('unit')}"
    return found


def test_a_disk_that_moved_up_keeps_its_place_and_the_new_one_gets_another() -> None:
    present = devices(
        disk("sda", "sata", serial="a", place="0:0"),
        disk("sdb", "sata", serial="b", place="0:1"),
        disk("sdc", "sata", serial="c", place="0:2"),
    )
    # `a` is gone, the others moved up, and the new one's target would be where `c` is.
    wanted = devices(
        disk("sda", "sata", serial="b"), disk("sdb", "sata", serial="c"), disk("sdc", "sata", serial="new")
    )
    assert places(kept(present, wanted)) == {"b": "0:1", "c": "0:2", "new": "0:0"}


def test_a_new_disk_whose_place_is_free_is_left_to_libvirt() -> None:
    present = devices(disk("sda", "scsi", place="0:0"))
    assert places(kept(present, devices(disk("sda", "scsi"), disk("sdb", "scsi")))) == {"sda": "0:0", "sdb": ""}


def test_a_full_controller_is_followed_by_another() -> None:
    present = devices(*(disk(f"sd{'bcdefg'[unit]}", "sata", serial=str(unit), place=f"0:{unit}") for unit in range(6)))
    wanted = devices(
        disk("sda", "sata", serial="new"), *(disk(f"sd{'bcdefg'[u]}", "sata", serial=str(u)) for u in range(6))
    )
    assert places(kept(present, wanted))["new"] == "1:0"


def test_a_cd_that_moved_up_keeps_its_place() -> None:
    def cd(target: str, file: str, unit: str = "") -> str:
        address = f"<address type='drive' controller='0' bus='0' unit='{unit}'/>" if unit else ""
        return f"<disk device='cdrom'><source file='{file}'/><target dev='{target}' bus='sata'/>{address}</disk>"

    present = devices(cd("sda", "/seed", "0"), cd("sdb", "/iso", "1"))
    assert places(kept(present, devices(cd("sda", "/iso")))) == {"sda": "0:1"}


def test_a_disk_on_another_bus_is_another_device() -> None:
    present = devices(disk("sda", "sata", place="0:0"))
    assert places(kept(present, devices(disk("sda", "scsi")))) == {"sda": ""}


def test_controllers_are_kept_and_not_doubled() -> None:
    scsi = "<controller type='scsi' index='0' model='virtio-scsi'/>"
    addressed = "<controller type='scsi' index='0' model='virtio-scsi'><address type='pci' slot='0x05'/></controller>"
    usb = "<controller type='usb' index='0' model='qemu-xhci'/>"
    domain = kept(devices(addressed, usb), devices(scsi, "<controller type='scsi' index='1' model='virtio-scsi'/>"))
    found = [(one.get("type"), one.get("index"), len(one)) for one in domain.findall("devices/controller")]
    assert sorted(found) == [("scsi", "0", 1), ("scsi", "1", 0), ("usb", "0", 0)]


def test_equal_devices_are_told_apart_by_their_order() -> None:
    first = "<rng model='virtio'><address type='pci' slot='0x01'/></rng>"
    second = "<rng model='virtio'><address type='pci' slot='0x02'/></rng>"
    plain = "<rng model='virtio'/>"
    domain = kept(devices(first, second), devices(plain, plain, plain))
    slots = [one.find("address") for one in domain.findall("devices/rng")]
    assert [None if slot is None else slot.get("slot") for slot in slots] == ["0x01", "0x02", None]


def test_the_cpu_stays_while_its_numbers_follow_the_spec() -> None:
    present = "<domain><cpu mode='maximum' check='none'><feature name='x'/><topology sockets='1'/></cpu></domain>"
    wanted = "<domain><cpu mode='custom'><model>m</model><topology sockets='2'/></cpu></domain>"
    cpu = kept(present, wanted).find("cpu")
    assert ET.tostring(cpu) == (  # type: ignore[arg-type]
        b'<cpu mode="maximum" check="none"><feature name="x" /><topology sockets="2" /></cpu>'
    )
    none = kept("<domain/>", "<domain><cpu mode='maximum'/></domain>").find("cpu")
    assert none is None
    other = kept(present, wanted, Unchanged(machine=True, features=True, cpu=False, video=True)).find("cpu")
    assert other is not None
    assert other.get("mode") == "custom"


def test_another_machine_keeps_no_addresses() -> None:
    present = devices("<rng model='virtio'><address type='pci' slot='0x01'/></rng>")
    changed = Unchanged(machine=False, features=False, cpu=True, video=True)
    assert kept(present, devices("<rng model='virtio'/>"), changed).find("devices/rng/address") is None


def test_video_keeps_its_memory_unless_the_spec_changes_it() -> None:
    present = devices("<video><model type='vga' vram='16384' heads='1'/><address type='pci' slot='0x01'/></video>")
    wanted = devices("<video><model type='vga' vram='32768'/></video>")
    same = kept(present, wanted).find("devices/video/model")
    asked = kept(present, wanted, Unchanged(machine=True, features=True, cpu=True, video=False))
    assert same is not None
    assert same.get("vram") == "16384"
    assert asked.find("devices/video/model").get("vram") == "32768"  # type: ignore[union-attr]
    assert asked.find("devices/video/address") is not None
