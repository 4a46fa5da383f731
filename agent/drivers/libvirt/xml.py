"""Domain XML, built from an instance's spec. Nothing is pasted: every value goes through ElementTree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Final
from xml.etree import ElementTree as ET

from agent.drivers.libvirt import metadata, xml_container, xml_limits, xml_machine, xml_rescue
from agent.drivers.libvirt.definition import HostFacts, InstanceFiles
from agent.drivers.libvirt.definition import text_element as _text
from agent.drivers.libvirt.xml_devices import console_and_helpers, interface, mac_addresses
from agent.drivers.libvirt.xml_disks import disks, kernel
from agent.drivers.libvirt.xml_keep import Unchanged, keep_hardware
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
    cpus: Mapping[int, int] | None = None,
    present: ET.Element | None = None,
) -> str:
    """Return the domain XML.

    `cpus`: vCPU → host CPU that it has for itself. `present`: the definition that the domain has now, whose hardware
    stays. Raises `InvalidArgument` (code `spec_too_large`) if libvirt could not take it, and `FailedPrecondition`
    (`firmware_missing`).
    """
    before = None if present is None else metadata.read(present)
    unchanged = None if before is None else Unchanged.between(before.spec, spec)
    machine = facts.machine_of(spec)
    if present is not None and unchanged is not None and unchanged.machine:
        machine = _attribute_of(present, "os/type", "machine") or machine
    facts = replace(facts, machine=machine)
    domain = ET.Element("domain", {"type": facts.domain_type})
    _text(domain, "name", spec.name)
    _text(domain, "uuid", instance_id)
    ET.SubElement(domain, "metadata").append(metadata.build(spec, generation=generation, host=host, life=life))
    _text(domain, "memory", str(spec.memory_mib), unit="MiB")
    _text(domain, "currentMemory", str(spec.memory_mib), unit="MiB")
    _text(domain, "vcpu", str(spec.vcpus), placement="static")
    if facts.domain_type == "lxc":
        xml_container.check(spec)
        xml_container.fill(domain, instance_id, spec, files)
        return _text_of(domain)
    system = ET.SubElement(domain, "os")
    kind = _text(system, "type", "hvm")
    simulated = facts.domain_type == "test"
    if not simulated:
        kind.set("arch", facts.architecture)
        if machine:
            kind.set("machine", machine)
    kernel(system, spec, files)
    xml_machine.features(domain, spec, facts)
    if not simulated:
        _firmware(domain, spec, facts, files, keep=present if unchanged is not None and unchanged.machine else None)
        xml_machine.cpu(domain, spec, facts)
        xml_machine.memory_backing(domain, spec)
        xml_machine.placement(domain, facts, cpus or {})
        ET.SubElement(domain, "clock", {"offset": "utc"})
    _text(domain, "on_poweroff", "destroy")
    _text(domain, "on_reboot", "restart")
    _text(domain, "on_crash", "destroy")
    devices = ET.SubElement(domain, "devices")
    devices.extend(_devices(instance_id, spec, facts, files))
    xml_limits.apply(domain, spec, facts, files)
    if present is not None and unchanged is not None:
        xml_rescue.take_out(present)
        keep_hardware(domain, present, unchanged)
    if life.rescue is not None:
        xml_rescue.put_first(domain, spec.root_disk.bus, files.disks[xml_rescue.RESCUE])
    return _text_of(domain)


def _text_of(domain: ET.Element) -> str:
    text = ET.tostring(domain, encoding="unicode")
    if len(text.encode()) > _MAX_BYTES:
        raise InvalidArgument(
            "the instance's definition is too large for libvirt; shorten user_data and meta_data",
            code="spec_too_large",
            limit_bytes=_MAX_BYTES,
        )
    return text


def _firmware(
    domain: ET.Element, spec: InstanceSpec, facts: HostFacts, files: InstanceFiles, *, keep: ET.Element | None
) -> None:
    """Choose the firmware, unless the domain has one that it keeps: that one may be all that is left on the host."""
    if keep is None or keep.find("os/loader") is None:
        xml_machine.boot_firmware(domain, spec, facts, files)


def _attribute_of(element: ET.Element, path: str, name: str) -> str | None:
    found = element.find(path)
    return None if found is None else found.get(name)


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
