"""Domain XML, built from an instance's spec. Nothing is pasted: every value goes through ElementTree."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal
from xml.etree import ElementTree as ET

from agent.drivers.libvirt import metadata
from agent.errors import InvalidArgument
from agent.messages.spec import BridgeNic, InstanceSpec, NetworkNic, Nic

# libvirt refuses longer strings on the wire (VIR_NET_MESSAGE_STRING_MAX, 4 MiB); leave room for what it adds.
_MAX_BYTES: Final = 3_500_000
_BALLOON_PERIOD_S: Final = 10
_ROOT_TARGET: Final = {"virtio": "vda", "sata": "sda", "scsi": "sda"}


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What a domain's definition depends on beside its spec."""

    domain_type: Literal["kvm", "qemu", "test"]
    architecture: str
    machine: str | None
    cpu_mode: str
    cpu_model: str | None
    emulator: Path | None
    disk_cache: str
    vnc_listen: str


@dataclass(frozen=True, slots=True)
class InstanceFiles:
    """Where an instance's files are. `disk_format` is explicit, so that it is never probed."""

    disk: Path
    disk_format: Literal["qcow2", "raw"]
    seed: Path
    console_log: Path


def mac_addresses(instance_id: str, nics: list[Nic]) -> list[str]:
    """Return every NIC's MAC: the given one, or a stable one derived from the instance id and the position."""
    taken = {nic.mac for nic in nics if nic.mac}
    macs = []
    for index, nic in enumerate(nics):
        mac = nic.mac
        salt = 0
        while mac is None:
            digest = hashlib.sha256(f"{instance_id}/{index}/{salt}".encode()).digest()
            candidate = f"52:54:00:{digest[0]:02x}:{digest[1]:02x}:{digest[2]:02x}"
            mac = candidate if candidate not in taken else None
            salt += 1
        taken.add(mac)
        macs.append(mac)
    return macs


def build(
    instance_id: str,
    spec: InstanceSpec,
    *,
    generation: int,
    host: str,
    facts: HostFacts,
    files: InstanceFiles,
) -> str:
    """Return the domain XML. Raises `InvalidArgument` (code `spec_too_large`) if libvirt could not take it."""
    domain = ET.Element("domain", {"type": facts.domain_type})
    _text(domain, "name", spec.name)
    _text(domain, "uuid", instance_id)
    ET.SubElement(domain, "metadata").append(metadata.build(spec, generation=generation, host=host))
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
    ET.SubElement(system, "boot", {"dev": "hd"})
    _features(domain, spec, facts)
    if not simulated:
        _cpu(domain, facts)
        ET.SubElement(domain, "clock", {"offset": "utc"})
    _text(domain, "on_poweroff", "destroy")
    _text(domain, "on_reboot", "restart")
    _text(domain, "on_crash", "destroy")
    devices = ET.SubElement(domain, "devices")
    devices.extend(_devices(instance_id, spec, facts, files))
    text = ET.tostring(domain, encoding="unicode")
    if len(text.encode()) > _MAX_BYTES:
        raise InvalidArgument(
            "the instance's definition is too large for libvirt; shorten user_data and meta_data",
            code="spec_too_large",
            limit_bytes=_MAX_BYTES,
        )
    return text


def _text(parent: ET.Element, tag: str, text: str, **attributes: str) -> ET.Element:
    element = ET.SubElement(parent, tag, attributes)
    element.text = text
    return element


def _features(domain: ET.Element, spec: InstanceSpec, facts: HostFacts) -> None:
    if not spec.firmware_acpi:
        return
    features = ET.SubElement(domain, "features")
    ET.SubElement(features, "acpi")
    if facts.architecture in ("x86_64", "i686") and facts.domain_type != "test":
        ET.SubElement(features, "apic")


def _cpu(domain: ET.Element, facts: HostFacts) -> None:
    mode = facts.cpu_mode
    if mode == "auto":
        mode = "host-passthrough" if facts.domain_type == "kvm" else "maximum"
    if mode == "default":
        return
    cpu = ET.SubElement(domain, "cpu", {"mode": mode})
    if mode == "custom" and facts.cpu_model:
        cpu.set("match", "exact")
        _text(cpu, "model", facts.cpu_model, fallback="forbid")


def _devices(instance_id: str, spec: InstanceSpec, facts: HostFacts, files: InstanceFiles) -> Iterator[ET.Element]:
    if facts.emulator and facts.domain_type != "test":
        emulator = ET.Element("emulator")
        emulator.text = str(facts.emulator)
        yield emulator
    yield _root_disk(spec, facts, files)
    cd_bus = _cd_bus(facts)
    if spec.seed is not None:
        yield _seed_disk(spec, cd_bus, files)
    if spec.root_disk.bus == "scsi" or (spec.seed is not None and cd_bus == "scsi"):
        yield ET.Element("controller", {"type": "scsi", "index": "0", "model": "virtio-scsi"})
    for nic, mac in zip(spec.nics, mac_addresses(instance_id, spec.nics), strict=True):
        yield _interface(nic, mac)
    if facts.domain_type != "test":
        yield from _console_and_helpers(spec, facts, files)


def _root_disk(spec: InstanceSpec, facts: HostFacts, files: InstanceFiles) -> ET.Element:
    disk = ET.Element("disk", {"type": "file", "device": "disk"})
    driver = ET.SubElement(disk, "driver", {"name": "qemu", "type": files.disk_format})
    if facts.domain_type != "test":
        # A full host pauses the guest, which goes on when there is space; other errors are the guest's affair.
        driver.attrib.update({"cache": facts.disk_cache, "discard": "unmap", "error_policy": "enospace"})
    ET.SubElement(disk, "source", {"file": str(files.disk)})
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


def _interface(nic: Nic, mac: str) -> ET.Element:
    interface = ET.Element("interface", {"type": nic.type})
    ET.SubElement(interface, "mac", {"address": mac})
    if isinstance(nic, NetworkNic):
        ET.SubElement(interface, "source", {"network": nic.network})
    elif isinstance(nic, BridgeNic):
        ET.SubElement(interface, "source", {"bridge": nic.bridge})
    ET.SubElement(interface, "model", {"type": nic.model})
    return interface


def _console_and_helpers(spec: InstanceSpec, facts: HostFacts, files: InstanceFiles) -> Iterator[ET.Element]:
    serial = ET.Element("serial", {"type": "pty"})
    # virtlogd writes the file, so that a guest cannot fill the disk and a restart of libvirtd loses nothing.
    ET.SubElement(serial, "log", {"file": str(files.console_log), "append": "on"})
    ET.SubElement(serial, "target", {"port": "0"})
    yield serial
    if spec.guest_agent:
        channel = ET.Element("channel", {"type": "unix"})
        ET.SubElement(channel, "target", {"type": "virtio", "name": "org.qemu.guest_agent.0"})
        yield channel
    if spec.vnc:
        graphics = {"type": "vnc", "port": "-1", "autoport": "yes", "listen": facts.vnc_listen}
        yield ET.Element("graphics", graphics)
        video = ET.Element("video")
        ET.SubElement(video, "model", {"type": "vga" if facts.architecture != "aarch64" else "virtio"})
        yield video
    if spec.rng:
        rng = ET.Element("rng", {"model": "virtio"})
        backend = ET.SubElement(rng, "backend", {"model": "random"})
        backend.text = "/dev/urandom"
        yield rng
    balloon = ET.Element("memballoon", {"model": "virtio" if spec.balloon else "none"})
    if spec.balloon:
        ET.SubElement(balloon, "stats", {"period": str(_BALLOON_PERIOD_S)})
    yield balloon
