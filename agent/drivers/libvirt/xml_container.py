"""The definition of a container (libvirt's lxc driver), and what of a spec a container cannot be.

The root disk is a raw image of a file system without partitions: libvirt attaches it to a loop device and mounts it as
the container's root. `/sbin/init` in it is the container's first process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from xml.etree import ElementTree as ET

from agent.drivers.libvirt.definition import InstanceFiles, text_element
from agent.drivers.libvirt.volumes import ROOT
from agent.drivers.libvirt.xml_devices import interface, mac_addresses
from agent.errors import InvalidArgument, Unsupported
from agent.messages.spec import InstanceSpec, UserNic

INIT: Final = "/sbin/init"
_LOOP_NAME: Final = 63
"""libvirt refuses a longer path: it keeps it in the loop device's own record (LO_NAME_SIZE, 64 with the end)."""
_BELOW: Final = len("/00000000-0000-0000-0000-000000000000/disk.raw")
_IGNORED: Final = frozenset(
    {"name", "vcpus", "memory_mib", "root_disk", "nics", "labels", "policy", "firmware_acpi", "rng", "balloon"}
    | {"guest_agent", "vcpus", "max_vcpus", "max_memory_mib"}
)
"""Parts of a spec that a container has, or that mean nothing to it and harm nothing."""


def check(spec: InstanceSpec) -> None:
    """Raise `Unsupported` (code `config_unsupported`) that names what a container cannot have."""
    wrong = [
        name
        for name, field in InstanceSpec.model_fields.items()
        if name not in _IGNORED and getattr(spec, name) != field.get_default(call_default_factory=True)
    ]
    if spec.root_disk.image is None:
        wrong.append("a root_disk without image")
    if spec.root_disk.encryption is not None:
        wrong.append("root_disk.encryption")
    if any(isinstance(nic, UserNic) for nic in spec.nics):
        wrong.append("a NIC of type user")
    if wrong:
        raise Unsupported(
            f"a container cannot have {', '.join(wrong)}; leave it out, or use a host with virtual machines",
            code="config_unsupported",
            fields=", ".join(wrong),
        )


def check_folder(root: Path) -> None:
    """Raise `InvalidArgument` (code `bad_driver_settings`) where the instances' folder has too long a path."""
    limit = _LOOP_NAME - _BELOW
    if len(os.fsencode(root)) > limit:
        raise InvalidArgument(
            f"driver setting 'instances_dir': containers need a path of at most {limit} characters, because libvirt's "
            f"loop devices take no longer one; {root} is too long",
            code="bad_driver_settings",
            key="instances_dir",
        )


def fill(domain: ET.Element, instance_id: str, spec: InstanceSpec, files: InstanceFiles) -> None:
    """Add all that comes after the sizes."""
    system = ET.SubElement(domain, "os")
    text_element(system, "type", "exe")
    text_element(system, "init", INIT)
    ET.SubElement(ET.SubElement(domain, "features"), "privnet")
    text_element(domain, "on_poweroff", "destroy")
    text_element(domain, "on_reboot", "restart")
    text_element(domain, "on_crash", "destroy")
    ET.SubElement(domain, "devices").extend(_devices(instance_id, spec, files))


def _devices(instance_id: str, spec: InstanceSpec, files: InstanceFiles) -> Iterator[ET.Element]:
    root = ET.Element("filesystem", {"type": "file", "accessmode": "passthrough"})
    ET.SubElement(root, "driver", {"type": "loop", "format": "raw"})
    ET.SubElement(root, "source", {"file": str(files.disks[ROOT].path)})
    ET.SubElement(root, "target", {"dir": "/"})
    yield root
    for nic, mac in zip(spec.nics, mac_addresses(instance_id, spec.nics), strict=True):
        element = interface(nic, mac)
        for model in element.findall("model"):
            element.remove(model)  # a container has the host's own kind of link
        yield element
    yield ET.Element("console", {"type": "pty"})
