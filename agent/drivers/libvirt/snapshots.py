"""Internal snapshots of libvirt domains: XML, and what is needed so that none is ever half there."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any, Final
from xml.etree import ElementTree as ET

from agent.drivers.libvirt import errors, metadata
from agent.drivers.libvirt.binding import libvirt
from agent.drivers.verbs.snapshot import SnapshotInfo
from agent.errors import DeadlineExceeded, NotFound, Unsupported
from agent.messages.events import PowerState

_POWER: Final[dict[str, PowerState]] = {
    "running": "running",
    "paused": "paused",
    "blocked": "running",
    "shutoff": "stopped",
    "crashed": "crashed",
}
_MARK: Final = "reverted"
_POLL_S: Final = 0.05


def request(name: str, description: str | None, disks: list[str], others: list[str]) -> str:
    """The XML that asks for a snapshot of these devices and not of the others."""
    root = ET.Element("domainsnapshot")
    ET.SubElement(root, "name").text = name
    if description:
        ET.SubElement(root, "description").text = description
    listed = ET.SubElement(root, "disks")
    for devices, kind in ((disks, "internal"), (others, "no")):
        for device in devices:
            ET.SubElement(listed, "disk", {"name": device, "snapshot": kind})
    return ET.tostring(root, encoding="unicode")


def describe(snapshot: Any) -> SnapshotInfo:
    """Read one snapshot in one call."""
    root = _parse(snapshot.getXMLDesc())
    memory = root.find("memory")
    inside = root.find("inactiveDomain")
    if inside is None:
        inside = root.find("domain")
    ours = None if inside is None else metadata.read(inside)
    return SnapshotInfo(
        name=root.findtext("name") or "",
        memory=memory is not None and memory.get("snapshot") == "internal",
        power=_POWER.get(root.findtext("state") or "", "stopped"),
        created_at=datetime.fromtimestamp(int(root.findtext("creationTime") or 0), UTC),
        description=root.findtext("description"),
        spec=None if ours is None else ours.spec,
    )


def find(domain: Any, name: str) -> Any:
    """Return a snapshot, or None."""
    try:
        return domain.snapshotLookupByName(name)
    except libvirt.libvirtError as exc:
        if errors.is_code(exc, "VIR_ERR_NO_DOMAIN_SNAPSHOT"):
            return None
        raise


def must_find(domain: Any, name: str) -> Any:
    """Return a snapshot. Raises `NotFound` (`unknown_snapshot`)."""
    found = find(domain, name)
    if found is None:
        raise NotFound(f"the instance has no snapshot {name}", code="unknown_snapshot", name=name)
    return found


def wait_idle(domain: Any, limit_s: float) -> None:
    """Wait until libvirt works on nothing for this domain: a job that outlived the agent shows half a result."""
    deadline = time.monotonic() + limit_s
    while domain.isActive() and domain.controlInfo()[0] in (
        libvirt.VIR_DOMAIN_CONTROL_JOB,
        libvirt.VIR_DOMAIN_CONTROL_OCCUPIED,
    ):
        if time.monotonic() > deadline:
            raise DeadlineExceeded(f"the hypervisor was busy with the guest for more than {limit_s:g} s")
        # libvirt tells of no end of such a job, and a cancel waits too: what it takes back needs the domain idle.
        time.sleep(_POLL_S)


def refuse_plugged_vcpus(guest: ET.Element) -> None:
    """Raise `Unsupported` for the memory of a guest that has vCPUs which can be unplugged.

    libvirt starts QEMU with the others, loads the memory, and would plug these afterwards: QEMU ends over the memory of
    a CPU that it has not, with the guest already gone and its disks taken back.
    """
    plugged = [vcpu for vcpu in guest.findall("vcpus/vcpu[@hotpluggable='yes']") if vcpu.get("enabled") == "yes"]
    if plugged:
        raise Unsupported(
            f"{len(plugged)} of the guest's vCPUs can be unplugged (the spec has max_vcpus), and the hypervisor cannot "
            "go back to the memory of such a guest; take the snapshot while it is stopped",
            code="snapshot_unsupported",
        )


def renew(domain: Any, snapshot: Any, ours: ET.Element, mark: str) -> Any:
    """Put our present metadata into a snapshot, with the mark: libvirt's revert makes it the domain's.

    So there is no moment, also not of a crash, at which the domain has an old spec, generation or life. Raises
    `Unsupported` where the revert would fail, before anything is changed.
    """
    document = snapshot.getXMLDesc(libvirt.VIR_DOMAIN_SNAPSHOT_XML_SECURE)
    root = _parse(document)
    guest = root.find("domain")
    if guest is not None and root.find("memory[@snapshot='internal']") is not None:
        refuse_plugged_vcpus(guest)  # one from before this was known
    ours.set(_MARK, mark)
    for inside in (root.find("domain"), root.find("inactiveDomain")):
        place = None if inside is None else inside.find("metadata")
        if place is None:
            continue
        for old in place.findall(ours.tag):
            place.remove(old)
        place.append(ours)
    return domain.snapshotCreateXML(ET.tostring(root, encoding="unicode"), libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE)


def is_marked(domain: Any, mark: str) -> bool:
    """Whether the domain's definition came from a snapshot that was renewed with this mark."""
    root = _parse(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))
    return any(element.get(_MARK) == mark for element in root.findall("metadata/*"))


def assume(domain: Any, name: str, disks: list[str], others: list[str]) -> Any:
    """Make a snapshot known of which libvirt lost track, so that it can be deleted; the disks may hold it or not."""
    root = _parse(request(name, None, disks, others))
    active = bool(domain.isActive())
    ET.SubElement(root, "state").text = "running" if active else "shutoff"
    ET.SubElement(root, "creationTime").text = "0"
    ET.SubElement(root, "memory", {"snapshot": "internal" if active else "no"})
    root.append(_parse(domain.XMLDesc(0 if active else libvirt.VIR_DOMAIN_XML_INACTIVE)))
    return domain.snapshotCreateXML(ET.tostring(root, encoding="unicode"), libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REDEFINE)


def _parse(document: str) -> ET.Element:
    return ET.fromstring(document)  # noqa: S314 - libvirtd wrote it, and expands no entities
