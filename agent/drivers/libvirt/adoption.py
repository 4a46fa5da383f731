"""Foreign domains that become ours: their definition read as a spec, and our element put into it.

The definition itself is never rewritten: libvirt changes the metadata alone (`virDomainSetMetadata`), so devices,
addresses and whatever the spec cannot say stay as they are, and the guest is not asked.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree as ET

from pydantic import ValidationError

from agent.drivers.libvirt import metadata
from agent.drivers.libvirt.binding import libvirt
from agent.drivers.libvirt.files import MIB, os_errors
from agent.drivers.verbs.host import ForeignPlan
from agent.errors import FailedPrecondition
from agent.messages.life import Adoption, Life
from agent.messages.spec import BridgeNic, InstanceSpec, NetworkNic, Nic, UserNic

_KEY: Final = "compute-agent"
_EXPECTED: Final = frozenset(
    {
        "emulator", "disk", "interface", "controller", "serial", "console", "channel", "rng", "memballoon", "graphics",
        "video", "input", "audio",
    }
)  # fmt: skip
"""Devices that the spec can say, or that come with every machine."""
_EXPECTED_PARTS: Final = frozenset(
    {
        "name", "uuid", "metadata", "memory", "currentMemory", "vcpu", "os", "features", "cpu", "clock", "on_poweroff",
        "on_reboot", "on_crash", "pm", "devices", "resource", "seclabel", "title", "description",
    }
)  # fmt: skip


def plan(domain: Any, *, own_disks: bool) -> ForeignPlan:
    """Read a foreign domain. Raises `FailedPrecondition` (`not_adoptable`, `owned_domain`)."""
    document = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    root = ET.fromstring(document)  # noqa: S314 - libvirtd wrote it, and expands no entities
    name = root.findtext("name") or domain.name()
    if metadata.read(root) is not None:
        raise FailedPrecondition(f"domain {name} is this agent's already", code="owned_domain")
    if not domain.isPersistent():
        raise _refused(name, "it is transient, and would be gone when it stops; define it first")
    disks = [_Disk(element, domain) for element in root.findall("devices/disk[@device='disk']")]
    if not disks:
        raise _refused(name, "it has no disk")
    for disk in disks:
        disk.check(name, own=own_disks)
    kept = [*_kept(root), *(note for disk in disks for note in disk.notes)]
    values: dict[str, Any] = {
        "name": name,
        "vcpus": int(root.findtext("vcpu") or 1),
        "memory_mib": int(root.findtext("memory") or 0) // 1024,
        "root_disk": {"size_mib": disks[0].size_mib, "bus": disks[0].bus},
        "disks": [
            {"kind": "data", "name": disk.target, "size_mib": disk.size_mib, "bus": disk.bus} for disk in disks[1:]
        ],
        "nics": [nic.model_dump() for nic in _nics(root, kept)],
        "firmware_acpi": root.find("features/acpi") is not None,
        "rng": root.find("devices/rng") is not None,
        "balloon": root.find("devices/memballoon[@model='virtio']") is not None,
        "guest_agent": root.find("devices/channel/target[@name='org.qemu.guest_agent.0']") is not None,
        "vnc": root.find("devices/graphics[@type='vnc']") is not None,
    }
    try:
        spec = InstanceSpec.model_validate(values)
    except ValidationError as exc:
        first = exc.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise _refused(name, f"a spec cannot say it ({where}: {first['msg']})") from exc
    paths = [str(disk.path) for disk in disks]
    return ForeignPlan(spec, Adoption(disks=paths, own_disks=own_disks, since=datetime.now(UTC), kept=sorted(kept)))


def adopt(domain: Any, spec: InstanceSpec, *, generation: int, host: str, life: Life) -> None:
    """Write our element. Idempotent for the same adoption."""
    root = ET.fromstring(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))  # noqa: S314 - as above
    ours = metadata.read(root)
    if ours is not None and ours.life.adopted != life.adopted:
        raise FailedPrecondition(f"domain {domain.name()} is this agent's already", code="owned_domain")
    write(domain, spec, generation=generation, host=host, life=life)


def write(domain: Any, spec: InstanceSpec, *, generation: int, host: str, life: Life) -> None:
    """Replace our element in the persistent definition; nothing else of it changes."""
    element = metadata.build(spec, generation=generation, host=host, life=life)
    for part in element.iter():
        # libvirt puts the whole tree into the namespace that it is given beside it.
        part.tag = part.tag.rsplit("}", 1)[-1]
    domain.setMetadata(
        libvirt.VIR_DOMAIN_METADATA_ELEMENT,
        ET.tostring(element, encoding="unicode"),
        _KEY,
        metadata.NAMESPACE,
        libvirt.VIR_DOMAIN_AFFECT_CONFIG,
    )


def release(domain: Any) -> None:
    """Remove our element from an adopted domain. Any other: nothing."""
    root = ET.fromstring(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))  # noqa: S314 - as above
    ours = metadata.read(root)
    if ours is None or ours.life.adopted is None:
        return
    domain.setMetadata(
        libvirt.VIR_DOMAIN_METADATA_ELEMENT, None, _KEY, metadata.NAMESPACE, libvirt.VIR_DOMAIN_AFFECT_CONFIG
    )


def delete_disks(disks: list[str], used: set[str]) -> None:
    """Remove the disk files; what is no plain file any more, or is used by another domain, is left."""
    for name in disks:
        path = Path(name)
        with os_errors("removing the disks of an adopted instance"):
            try:
                plain = stat.S_ISREG(path.lstat().st_mode)
            except FileNotFoundError:
                continue
            if plain and name not in used:
                path.unlink(missing_ok=True)


class _Disk:
    def __init__(self, element: ET.Element, domain: Any) -> None:
        self.kind = element.get("type", "")
        source = element.find("source")
        named = None if source is None else source.get("file") or source.get("dev")
        self.path = Path(named) if named and self.kind in ("file", "block") else None
        target = element.find("target")
        self.target = "" if target is None else target.get("dev", "")
        bus = "" if target is None else target.get("bus", "")
        self.bus = bus if bus in ("virtio", "sata", "scsi") else "virtio"
        self.notes = [] if self.bus == bus else [f"disk {self.target}: bus {bus}"]
        self.readonly = element.find("readonly") is not None
        self._domain = domain

    def check(self, name: str, *, own: bool) -> None:
        if self.path is None:
            raise _refused(name, f"disk {self.target} is of type {self.kind}; only files and block devices can be")
        if not self.path.exists():
            raise _refused(name, f"its disk {self.path} does not exist")
        if own and (self.kind != "file" or self.path.is_symlink() or self.readonly):
            raise _refused(name, f"own_disks is for plain, writable disk files, and {self.path} is none")

    @property
    def size_mib(self) -> int:
        """The virtual size."""
        capacity = self._domain.blockInfo(self.target or str(self.path))[0]
        return max(1, -(-int(capacity) // MIB))


def _nics(root: ET.Element, kept: list[str]) -> Iterator[Nic]:
    kinds: dict[str, tuple[type[NetworkNic | BridgeNic | UserNic], str | None]] = {
        "network": (NetworkNic, "network"),
        "bridge": (BridgeNic, "bridge"),
        "user": (UserNic, None),
    }
    for index, element in enumerate(root.findall("devices/interface")):
        kind, key = kinds.get(element.get("type", ""), (None, None))
        source, mac, model = element.find("source"), element.find("mac"), element.find("model")
        values: dict[str, Any] = {"type": element.get("type"), "mac": None if mac is None else mac.get("address")}
        values["model"] = "virtio" if model is None else model.get("type", "virtio")
        if key is not None:
            values[key] = None if source is None else source.get(key)
        try:
            if kind is None:
                raise ValueError(values["type"])
            yield kind.model_validate(values)
        except ValueError:
            kept.append(f"interface {index}: {element.get('type')} {values['model']}")


def _kept(root: ET.Element) -> Iterator[str]:
    """What the spec cannot say, in words; it stays in the definition."""
    for part in root:
        tag = part.tag.rsplit("}", 1)[-1]
        if tag not in _EXPECTED_PARTS:
            yield tag
    for part in root.findall("os/*"):
        if part.tag not in ("type", "boot"):
            yield f"os/{part.tag}"
    for device in root.findall("devices/*"):
        if device.tag not in _EXPECTED:
            yield f"device {device.tag}"
    for cdrom in root.findall("devices/disk"):
        if cdrom.get("device") not in (None, "disk"):
            yield f"{cdrom.get('device')} drive"
    memory, current = root.findtext("memory"), root.findtext("currentMemory")
    if current is not None and current != memory:
        yield "currentMemory"


def _refused(name: str, why: str) -> FailedPrecondition:
    return FailedPrecondition(f"domain {name} cannot be adopted: {why}", code="not_adoptable")
