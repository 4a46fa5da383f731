"""Domain XML, built from an instance's spec. Nothing is pasted: every value goes through ElementTree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final
from xml.etree import ElementTree as ET

from agent.drivers.libvirt import metadata, xml_machine, xml_rescue
from agent.drivers.libvirt.definition import HostFacts, InstanceFiles
from agent.drivers.libvirt.definition import text_element as _text
from agent.drivers.libvirt.xml_devices import console_and_helpers, interface, mac_addresses
from agent.drivers.libvirt.xml_disks import disks, kernel
from agent.errors import InvalidArgument
from agent.messages.life import ORDINARY, Life
from agent.messages.spec import InstanceSpec

# libvirt refuses longer strings on the wire (VIR_NET_MESSAGE_STRING_MAX, 4 MiB); leave room for what it adds.
_MAX_BYTES: Final = 3_500_000


def build(
    instance_id: str,
    spec: InstanceSpec,
    *,
    generation: int,
    life: Life = ORDINARY,
    host: str,
    facts: HostFacts,
    files: InstanceFiles,
) -> str:
    """Return the domain XML. Raises `InvalidArgument` (code `spec_too_large`) if libvirt could not take it."""
    domain = ET.Element("domain", {"type": facts.domain_type})
    _text(domain, "name", spec.name)
    _text(domain, "uuid", instance_id)
    ET.SubElement(domain, "metadata").append(metadata.build(spec, generation=generation, host=host, life=life))
    _text(domain, "memory", str(spec.memory_mib), unit="MiB")
    _text(domain, "currentMemory", str(spec.memory_mib), unit="MiB")
    _text(domain, "vcpu", str(spec.vcpus), placement="static")
    system = ET.SubElement(domain, "os")
    kind = _text(system, "type", "hvm")
    simulated = facts.domain_type == "test"
    if not simulated:
        kind.set("arch", facts.architecture)
        if facts.machine:
            kind.set("machine", facts.machine)
    kernel(system, spec, files)
    xml_machine.features(domain, spec, facts)
    if not simulated:
        xml_machine.cpu(domain, facts)
        ET.SubElement(domain, "clock", {"offset": "utc"})
    _text(domain, "on_poweroff", "destroy")
    _text(domain, "on_reboot", "restart")
    _text(domain, "on_crash", "destroy")
    devices = ET.SubElement(domain, "devices")
    devices.extend(_devices(instance_id, spec, facts, files))
    if life.rescue is not None:
        xml_rescue.put_first(domain, spec.root_disk.bus, files.disks[xml_rescue.RESCUE])
    text = ET.tostring(domain, encoding="unicode")
    if len(text.encode()) > _MAX_BYTES:
        raise InvalidArgument(
            "the instance's definition is too large for libvirt; shorten user_data and meta_data",
            code="spec_too_large",
            limit_bytes=_MAX_BYTES,
        )
    return text


def _devices(instance_id: str, spec: InstanceSpec, facts: HostFacts, files: InstanceFiles) -> Iterator[ET.Element]:
    if facts.emulator and facts.domain_type != "test":
        emulator = ET.Element("emulator")
        emulator.text = str(facts.emulator)
        yield emulator
    yield from disks(spec, facts, files)
    for nic, mac in zip(spec.nics, mac_addresses(instance_id, spec.nics), strict=True):
        yield interface(nic, mac)
    if facts.domain_type != "test":
        yield from console_and_helpers(spec, facts, files)
