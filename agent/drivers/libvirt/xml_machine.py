"""The machine of a domain's definition: CPU, features, firmware, memory."""

from __future__ import annotations

from xml.etree import ElementTree as ET

from agent.drivers.libvirt.definition import HostFacts, text_element
from agent.messages.spec import InstanceSpec


def features(domain: ET.Element, spec: InstanceSpec, facts: HostFacts) -> None:
    if not spec.firmware_acpi:
        return
    element = ET.SubElement(domain, "features")
    ET.SubElement(element, "acpi")
    if facts.architecture in ("x86_64", "i686") and facts.domain_type != "test":
        ET.SubElement(element, "apic")


def cpu(domain: ET.Element, facts: HostFacts) -> None:
    mode = facts.cpu_mode
    if mode == "auto":
        mode = "host-passthrough" if facts.domain_type == "kvm" else "maximum"
    if mode == "default":
        return
    element = ET.SubElement(domain, "cpu", {"mode": mode})
    if mode == "custom" and facts.cpu_model:
        element.set("match", "exact")
        text_element(element, "model", facts.cpu_model, fallback="forbid")
