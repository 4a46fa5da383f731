"""The machine of a domain's definition: firmware, CPU, features, NUMA cells, what memory is made of, placement."""

from __future__ import annotations

from collections.abc import Mapping
from xml.etree import ElementTree as ET

from agent.drivers.libvirt import firmware
from agent.drivers.libvirt.definition import HostFacts, InstanceFiles, section, text_element
from agent.errors import FailedPrecondition
from agent.messages.cpus import format_cpus
from agent.messages.spec import InstanceSpec


def boot_firmware(domain: ET.Element, spec: InstanceSpec, facts: HostFacts, files: InstanceFiles) -> None:
    """Name the UEFI's files. Raises `FailedPrecondition` (code `firmware_missing`)."""
    wanted = spec.machine.firmware
    if wanted.type != "uefi":
        return
    build = find_firmware(spec, facts)
    system = section(domain, "os")
    loader = text_element(system, "loader", str(build.code), readonly="yes", type="pflash")
    text_element(system, "nvram", str(files.nvram), template=str(build.variables))
    if build.needs_smm:
        loader.set("secure", "yes")
        ET.SubElement(section(domain, "features"), "smm", {"state": "on"})


def find_firmware(spec: InstanceSpec, facts: HostFacts) -> firmware.FirmwareBuild:
    """Return the UEFI build for a spec. Raises `FailedPrecondition` (code `firmware_missing`)."""
    wanted, machine = spec.machine.firmware, facts.machine_of(spec) or ""
    build = firmware.find(wanted, architecture=facts.architecture, machine=machine, folders=facts.firmware_folders)
    if build is None:
        kind = "UEFI with secure boot" if wanted.secure_boot else "UEFI"
        raise FailedPrecondition(
            f"this host has no {kind} firmware for {machine or facts.architecture}; install one (Debian: ovmf)",
            code="firmware_missing",
            machine=machine,
        )
    return build


def features(domain: ET.Element, spec: InstanceSpec, facts: HostFacts) -> None:
    if not spec.firmware_acpi:
        return
    element = section(domain, "features")
    ET.SubElement(element, "acpi")
    if facts.architecture in ("x86_64", "i686") and facts.domain_type != "test":
        ET.SubElement(element, "apic")


def cpu_mode(spec: InstanceSpec, facts: HostFacts) -> tuple[str, str | None]:
    """Return mode and model: what the spec says, or the host's default."""
    if spec.cpu.mode != "default":
        return spec.cpu.mode, spec.cpu.model
    mode = facts.cpu_mode
    if mode == "auto":
        mode = "host-passthrough" if facts.domain_type == "kvm" else "maximum"
    return mode, facts.cpu_model


def cpu_model(spec: InstanceSpec, facts: HostFacts) -> ET.Element:
    """Mode, model and features: what a host can or cannot give."""
    mode, model = cpu_mode(spec, facts)
    element = ET.Element("cpu")
    if mode != "default":
        element.set("mode", mode)
    if mode == "custom" and model:
        element.set("match", "exact")
        text_element(element, "model", model, fallback="forbid")
    if mode == "maximum" and spec.cpu.features:
        # Without it an emulated guest silently gets less than was asked for.
        element.set("check", "full")
    for name, policy in spec.cpu.features.items():
        ET.SubElement(element, "feature", {"policy": policy, "name": name})
    return element


def cpu(domain: ET.Element, spec: InstanceSpec, facts: HostFacts) -> None:
    element = cpu_model(spec, facts)
    topology = spec.cpu.topology
    if topology is not None:
        parts = {"sockets": topology.sockets, "dies": topology.dies}
        parts |= {"cores": topology.cores, "threads": topology.threads}
        ET.SubElement(element, "topology", {name: str(count) for name, count in parts.items()})
    if spec.numa:
        element.append(_numa(spec))
    if element.attrib or len(element):
        domain.append(element)


def _numa(spec: InstanceSpec) -> ET.Element:
    numa = ET.Element("numa")
    for number, node in enumerate(spec.numa):
        cell = {"id": str(number), "cpus": format_cpus(node.vcpus), "memory": str(node.memory_mib), "unit": "MiB"}
        if _shared(spec):
            cell["memAccess"] = "shared"
        ET.SubElement(numa, "cell", cell)
    return numa


def _shared(spec: InstanceSpec) -> bool:
    # virtiofsd maps the guest's memory.
    return spec.memory_backing.shared or bool(spec.shares)


def memory_backing(domain: ET.Element, spec: InstanceSpec) -> None:
    backing, source = spec.memory_backing, spec.memory_backing.source
    element = ET.Element("memoryBacking")
    if backing.hugepages_kib is not None:
        pages = ET.SubElement(element, "hugepages")
        ET.SubElement(pages, "page", {"size": str(backing.hugepages_kib), "unit": "KiB"})
    elif _shared(spec) and source == "anonymous":
        source = "memfd"  # nobody else can map anonymous memory
    if source != "anonymous":
        ET.SubElement(element, "source", {"type": source})
    if _shared(spec):
        ET.SubElement(element, "access", {"mode": "shared"})
    if backing.locked:
        ET.SubElement(element, "locked")
    if len(element):
        domain.append(element)


def placement(domain: ET.Element, facts: HostFacts, cpus: Mapping[int, int]) -> None:
    """Pin the vCPUs to the CPUs they have for themselves (`cpus`), or keep them off those of others."""
    if not cpus:
        if facts.shared_cpus:
            section(domain, "vcpu").set("cpuset", format_cpus(facts.shared_cpus))
        return
    tune = section(domain, "cputune")
    for vcpu, host_cpu in sorted(cpus.items()):
        ET.SubElement(tune, "vcpupin", {"vcpu": str(vcpu), "cpuset": str(host_cpu)})
    # QEMU's own threads must not take time from a vCPU, as long as there is another place for them.
    ET.SubElement(tune, "emulatorpin", {"cpuset": format_cpus(facts.shared_cpus or cpus.values())})


def pinned(domain: ET.Element) -> dict[int, int]:
    """Read back which CPU each vCPU has for itself, from a domain's definition."""
    pins = ((pin.get("vcpu", ""), pin.get("cpuset", "")) for pin in domain.findall("cputune/vcpupin"))
    return {int(vcpu): int(host_cpu) for vcpu, host_cpu in pins if vcpu.isdigit() and host_cpu.isdigit()}
