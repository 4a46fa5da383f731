"""Reads domains: finding them, their definition and their state.

Only calls that libvirtd answers without asking QEMU are used here, so that a frozen QEMU holds up neither a
listing nor the look that every verb takes before it acts: lookups, `state`, `isActive`, `hasManagedSaveImage`,
`metadata`, and `XMLDesc` of the inactive definition.
"""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree as ET

from agent.drivers.base import DomainInfo, InstanceDetails
from agent.drivers.libvirt import errors, metadata, saved, states, xml_machine
from agent.drivers.libvirt.binding import libvirt
from agent.drivers.libvirt.files import check_id
from agent.errors import AlreadyExists, FailedPrecondition
from agent.messages.life import ORDINARY, Life


def find(connection: Any, instance_id: str) -> Any:
    """Return the domain. Raises `libvirtError` NO_DOMAIN; `InvalidArgument` if the id is no UUID."""
    return connection.lookupByUUIDString(check_id(instance_id))


def find_owned(connection: Any, instance_id: str) -> Any:
    """Return a domain of ours. Raises `FailedPrecondition` (code `foreign_domain`) for another's."""
    domain = find(connection, instance_id)
    if metadata.read(_inactive(domain)) is None:
        raise FailedPrecondition(
            f"domain {domain.name()} does not belong to this agent, which therefore does not touch it",
            code="foreign_domain",
            instance_id=instance_id,
        )
    return domain


def check_free(connection: Any, instance_id: str, name: str) -> ET.Element | None:
    """Raise `AlreadyExists` if the name belongs to another domain, or the id to a foreign one.

    Returns the present definition of our own domain, if it is there.
    """
    same_id = _or_none(find, connection, instance_id)
    present = None if same_id is None else _inactive(same_id)
    if same_id is not None and present is not None and metadata.read(present) is None:
        raise AlreadyExists(
            f"the id {instance_id} belongs to domain {same_id.name()}, which is not this agent's",
            instance_id=instance_id,
        )
    same_name = _or_none(lambda link, key: link.lookupByName(key), connection, name)
    if same_name is not None and same_name.UUIDString() != instance_id:
        raise AlreadyExists(
            f"the name {name} belongs to domain {same_name.UUIDString()}",
            name=name,
            instance_id=same_name.UUIDString(),
        )
    return present


def _or_none(look: Any, connection: Any, key: str) -> Any:
    try:
        return look(connection, key)
    except libvirt.libvirtError as exc:
        if errors.is_code(exc, "VIR_ERR_NO_DOMAIN"):
            return None
        raise


def _inactive(domain: Any) -> ET.Element:
    return _parse(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))


def _parse(document: str) -> ET.Element:
    return ET.fromstring(document)  # noqa: S314 - libvirtd wrote it, and expands no entities


def describe(domain: Any, *, managed_save: bool | None = None) -> DomainInfo:
    """Read one domain in two or three calls; `managed_save` spares one where it is known."""
    root = _inactive(domain)
    state, reason = domain.state()
    if managed_save is None:
        managed_save = state == libvirt.VIR_DOMAIN_SHUTOFF and saved.is_saved(domain)
    power, word = states.of_state(state, reason, managed_save=managed_save)
    ours = metadata.read(root)
    return DomainInfo(
        id=domain.UUIDString(),
        name=root.findtext("name") or domain.name(),
        power=power,
        reason=word,
        owned=ours is not None,
        vcpus=int(root.findtext("vcpu") or 0),
        # libvirt always answers in KiB.
        memory_mib=int(root.findtext("memory") or 0) // 1024,
        spec=ours.spec if ours else None,
        generation=ours.generation if ours else None,
        life=_proven(ours.life, root) if ours else ORDINARY,
        dedicated_cpus=_dedicated_cpus(root) if ours and ours.spec.cpu.placement == "dedicated" else (),
    )


def _proven(life: Life, root: ET.Element) -> Life:
    """What our element says, but for disks that an adopted domain is said to own and its definition does not name: of
    those nothing is removed with it. A journal that was lost is rebuilt from this.
    """
    adopted = life.adopted
    if adopted is None or not adopted.own_disks:
        return life
    named = {source.get("file") for source in root.findall("devices/disk[@device='disk']/source")}
    if named.issuperset(adopted.disks):
        return life
    return life.model_copy(update={"adopted": adopted.model_copy(update={"own_disks": False})})


def _dedicated_cpus(root: ET.Element) -> tuple[int, ...]:
    return tuple(cpu for _vcpu, cpu in sorted(xml_machine.pinned(root).items()))


def describe_all(connection: Any) -> list[DomainInfo]:
    """Read every domain: two calls, and two more per domain. One that vanishes meanwhile is left out."""
    saved = {domain.UUIDString() for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_MANAGEDSAVE)}
    found = []
    for domain in connection.listAllDomains():
        try:
            found.append(describe(domain, managed_save=domain.UUIDString() in saved))
        except libvirt.libvirtError as exc:
            if not errors.is_code(exc, "VIR_ERR_NO_DOMAIN"):
                raise
    return found


def details(domain: Any, console_log: str | None) -> InstanceDetails:
    """Read addresses from the live definition."""
    root = _parse(domain.XMLDesc())
    ours = metadata.read(root)
    devices = "devices/"
    return InstanceDetails(
        vnc_address=_vnc_address(root.find(f"{devices}graphics[@type='vnc']")),
        console_log=console_log,
        mac_addresses=tuple(str(mac.get("address")) for mac in root.findall(f"{devices}interface/mac")),
        disk_paths=tuple(
            source.get("file") or source.get("dev") or ""
            for source in root.findall(f"{devices}disk[@device='disk']/source")
            if source.get("file") or source.get("dev")
        ),
        dedicated_cpus=_dedicated_cpus(root) if ours and ours.spec.cpu.placement == "dedicated" else (),
    )


def _vnc_address(graphics: ET.Element | None) -> str | None:
    if graphics is None or int(graphics.get("port", "-1")) < 0:
        return None
    listen = graphics.get("listen", "127.0.0.1")
    host = f"[{listen}]" if ":" in listen else listen
    return f"{host}:{graphics.get('port')}"
