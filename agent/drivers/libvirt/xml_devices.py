"""The devices of a domain's definition other than disks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Final
from xml.etree import ElementTree as ET

from agent.drivers.libvirt.definition import HostFacts, InstanceFiles
from agent.errors import FailedPrecondition
from agent.messages.spec import BridgeNic, InstanceSpec, NetworkNic, Nic
from agent.messages.spec_machine import Share

_BALLOON_PERIOD_S: Final = 10


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


def interface(nic: Nic, mac: str) -> ET.Element:
    element = ET.Element("interface", {"type": nic.type})
    ET.SubElement(element, "mac", {"address": mac})
    if isinstance(nic, NetworkNic):
        ET.SubElement(element, "source", {"network": nic.network})
    elif isinstance(nic, BridgeNic):
        ET.SubElement(element, "source", {"bridge": nic.bridge})
    ET.SubElement(element, "model", {"type": nic.model})
    return element


def console_and_helpers(spec: InstanceSpec, facts: HostFacts, files: InstanceFiles) -> Iterator[ET.Element]:
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
    if spec.vnc or spec.video is not None:
        yield _video(spec, facts)
    if spec.watchdog is not None:
        yield ET.Element("watchdog", {"model": spec.watchdog.model, "action": spec.watchdog.action})
    yield from (_share(share, facts) for share in spec.shares)
    if spec.rng:
        rng = ET.Element("rng", {"model": "virtio"})
        backend = ET.SubElement(rng, "backend", {"model": "random"})
        backend.text = "/dev/urandom"
        yield rng
    if spec.firmware_acpi and facts.architecture in ("x86_64", "i686"):
        # Through it a guest tells that it panicked; one without the driver does not mind.
        yield ET.Element("panic", {"model": "isa"})
    balloon = ET.Element("memballoon", {"model": "virtio" if spec.balloon else "none"})
    if spec.balloon:
        ET.SubElement(balloon, "stats", {"period": str(_BALLOON_PERIOD_S)})
    yield balloon


def _video(spec: InstanceSpec, facts: HostFacts) -> ET.Element:
    video = ET.Element("video")
    if spec.video is None:
        ET.SubElement(video, "model", {"type": "vga" if facts.architecture != "aarch64" else "virtio"})
        return video
    model = ET.SubElement(video, "model", {"type": spec.video.model})
    if spec.video.vram_kib is not None:
        model.set("vram", str(spec.video.vram_kib))
    return video


def _share(share: Share, facts: HostFacts) -> ET.Element:
    """Build a virtiofs share. Raises `FailedPrecondition` (code `share_unknown`)."""
    folder = facts.shares.get(share.source)
    if folder is None:
        raise FailedPrecondition(
            f"this host offers no share {share.source}; it is set in the driver's settings (shares)",
            code="share_unknown",
            share=share.source,
        )
    element = ET.Element("filesystem", {"type": "mount", "accessmode": "passthrough"})
    ET.SubElement(element, "driver", {"type": "virtiofs"})
    ET.SubElement(element, "source", {"dir": str(folder)})
    ET.SubElement(element, "target", {"dir": share.tag})
    return element
