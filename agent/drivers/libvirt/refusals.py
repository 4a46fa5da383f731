"""What this host can never give an instance, found out before anything of it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final
from xml.etree import ElementTree as ET

from agent.drivers.libvirt import xml_machine
from agent.drivers.libvirt.definition import HostFacts
from agent.errors import FailedPrecondition, Unsupported
from agent.messages.spec import InstanceSpec

_ITCO_SINCE: Final = 9_001_000
_READONLY_SHARES_SINCE: Final = 11_000_000
_SESSION_SHARES_SINCE: Final = 10_000_000


@dataclass(frozen=True, slots=True)
class Offer:
    """libvirt's domain capabilities for one machine type: enumerations by name, and CPU modes and models.

    `models`: CPU models that QEMU knows, not all of which this host can run.
    """

    enums: dict[str, frozenset[str]]
    cpu_modes: frozenset[str]
    models: frozenset[str]
    max_vcpus: int | None


@dataclass(frozen=True, slots=True)
class Host:
    """What the checks need to know of the host. `offer` is None for a machine type that it does not have."""

    offer: Offer | None
    libvirt_version: int
    session: bool
    dedicated: frozenset[int]
    page_sizes: frozenset[int]


def parse_offer(document: str) -> Offer:
    """Read the document that `getDomainCapabilities` returns."""
    root = ET.fromstring(document)  # noqa: S314 - the daemon's answer
    enums = {
        f"{section.tag}.{enum.get('name')}": frozenset(value.text or "" for value in enum.findall("value"))
        for section in root.iter()
        for enum in section.findall("enum")
    }
    vcpu = root.find("vcpu")
    return Offer(
        enums=enums,
        cpu_modes=frozenset(mode.get("name", "") for mode in root.findall("cpu/mode[@supported='yes']")),
        models=frozenset(model.text or "" for model in root.findall("cpu/mode[@name='custom']/model")),
        max_vcpus=None if vcpu is None else int(vcpu.get("max", "0")) or None,
    )


def check(spec: InstanceSpec, facts: HostFacts, host: Host) -> None:
    """Raise `FailedPrecondition` or `Unsupported` for the first option that the host cannot do.

    Whether it has all features of a CPU model, only libvirt can tell.
    """
    offer = _machine(spec, facts, host)
    _cpu(spec, facts, offer)
    if spec.machine.firmware.type == "uefi":
        xml_machine.find_firmware(spec, facts)
    if spec.cpu.placement == "dedicated" and not host.dedicated:
        raise FailedPrecondition(
            "this host has no CPUs for dedicated guests (driver setting cpu_dedicated_set)", code="no_dedicated_cpus"
        )
    page_kib = spec.memory_backing.hugepages_kib
    if page_kib is not None and page_kib not in host.page_sizes:
        has = ", ".join(str(size) for size in sorted(host.page_sizes)) or "none at all"
        raise FailedPrecondition(
            f"this host has no huge pages of {page_kib} KiB; it has {has}", code="hugepages_missing", size_kib=page_kib
        )
    _devices(spec, facts, host, offer)


def _machine(spec: InstanceSpec, facts: HostFacts, host: Host) -> Offer:
    if host.offer is None:
        machine = facts.machine_of(spec)
        raise FailedPrecondition(
            f"the host's QEMU has no machine type {machine}", code="machine_unknown", machine=machine
        )
    most = host.offer.max_vcpus
    vcpus = spec.max_vcpus or spec.vcpus
    if most is not None and vcpus > most:
        raise _unsupported(f"the machine type has at most {most} vCPUs", "vcpus")
    return host.offer


def _cpu(spec: InstanceSpec, facts: HostFacts, offer: Offer) -> None:
    mode, model = xml_machine.cpu_mode(spec, facts)
    if mode == "default":
        if spec.cpu.features:
            raise _unsupported("the host leaves the CPU to QEMU (cpu_mode default); name a mode", "cpu.features")
        return
    if mode not in offer.cpu_modes:
        raise FailedPrecondition(f"the host cannot give a guest the CPU mode {mode}", code="cpu_unsupported", mode=mode)
    if mode == "custom" and model not in offer.models:
        raise FailedPrecondition(f"the host knows no CPU model {model}", code="cpu_unsupported", model=model)


def _devices(spec: InstanceSpec, facts: HostFacts, host: Host, offer: Offer) -> None:
    if spec.video is not None and spec.video.model not in offer.enums.get("video.modelType", frozenset()):
        raise _unsupported(f"the host's QEMU has no video device {spec.video.model}", "video.model")
    source = spec.memory_backing.source
    sources = offer.enums.get("memoryBacking.sourceType")
    if sources is not None and source not in sources:
        raise _unsupported(f"the host's QEMU has no memory of kind {source}", "memory_backing.source")
    if spec.watchdog is not None and spec.watchdog.model == "itco":
        if host.libvirt_version < _ITCO_SINCE:
            raise _unsupported("the watchdog itco needs libvirt 9.1; take i6300esb", "watchdog.model")
        if "q35" not in (facts.machine_of(spec) or ""):
            raise _unsupported("only the machine q35 has the watchdog itco; take i6300esb", "watchdog.model")
    for share in spec.shares:
        _share(share.source, facts)
        if share.readonly and host.libvirt_version < _READONLY_SHARES_SINCE:
            raise _unsupported("read-only shares need libvirt 11.0", "shares.readonly")
    if spec.shares and "virtiofs" not in offer.enums.get("filesystem.driverType", frozenset()):
        raise _unsupported("the host's QEMU has no virtiofs", "shares")
    if spec.shares and host.session and host.libvirt_version < _SESSION_SHARES_SINCE:
        raise _unsupported("shares of an unprivileged libvirt need libvirt 10.0", "shares")


def _share(name: str, facts: HostFacts) -> None:
    folder = facts.shares.get(name)
    if folder is None:
        raise FailedPrecondition(f"this host offers no share {name}", code="share_unknown", share=name)
    if not folder.is_dir():
        raise FailedPrecondition(f"the folder of the share {name} is not there", code="share_missing", share=name)


def _unsupported(what: str, option: str) -> Unsupported:
    return Unsupported(f"{what} (option {option})", code="option_unsupported", option=option)
