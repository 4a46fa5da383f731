"""The hypervisor as a whole: what it is, what it can do and what it has.

What cannot change while a connection lasts is read once per epoch of the link.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal
from xml.etree import ElementTree as ET

import structlog

from agent.drivers.base import OPTIONAL_VERBS, Capabilities, HostCapacity
from agent.drivers.libvirt import domains, errors, refusals, xml_machine
from agent.drivers.libvirt.binding import libvirt
from agent.drivers.libvirt.capacity import (
    HostDescription,
    cpu_flags,
    kvm_works,
    pages_of_cell,
    parse_capabilities,
    traits,
)
from agent.drivers.libvirt.connection import Link, format_version
from agent.drivers.libvirt.definition import HostFacts
from agent.drivers.libvirt.pins import Pins
from agent.drivers.libvirt.refusals import Offer
from agent.drivers.libvirt.settings import LibvirtSettings
from agent.drivers.libvirt.storage import Storage
from agent.drivers.plain import check_plain
from agent.drivers.verbs import snapshot
from agent.errors import FailedPrecondition
from agent.messages.cpus import parse_cpus
from agent.messages.events import NumaCell
from agent.messages.spec import InstanceSpec

_log = structlog.get_logger(__name__)

# The simulation has no console, no memory and no guest that could be limited, reboots without an event that could prove
# it, and its disks hold nothing.
_SIMULATED_VERBS: Final = (
    OPTIONAL_VERBS
    - {
        "console.log",
        "instance.adopt",
        "instance.reboot",
        "instance.reset",
        "instance.trigger-crash-dump",
        "instance.memory-dump",
        "instance.set-memory-target",
        "instance.set-limits",
        "instance.shelve",
        "instance.unshelve",
    }
    - snapshot.VERBS
)
# libvirt keeps no log of a container's console, tells nothing of reboots, and saves and hot-plugs next to nothing.
_CONTAINER_VERBS: Final = frozenset({"instance.pause", "instance.resume", "instance.stats", "host.audit"})
_MACHINES: Final = {"x86_64": "q35", "i686": "q35", "aarch64": "virt"}


@dataclass(frozen=True, slots=True)
class _Known:
    """What was read in one epoch."""

    epoch: int
    description: HostDescription
    domain_type: Literal["kvm", "qemu", "test", "lxc"]
    hypervisor_type: str
    version: str
    libvirt_version: int
    offers: dict[str, Offer] = field(default_factory=dict)
    """Machine type → what QEMU can do with it; read when first asked for."""


class Hypervisor:
    """Reads facts over the link; thread-safe."""

    def __init__(self, settings: LibvirtSettings, link: Link, storage: Storage) -> None:
        self._settings = settings
        self._link = link
        self._storage = storage
        self._lock = threading.Lock()
        self._cached: _Known | None = None
        self.pins = Pins()

    def capabilities(self) -> Capabilities:
        """See `Driver.capabilities`."""
        with self._link.call() as connection:
            known = self._known(connection)
        simulated = self._settings.simulated
        passed_through = known.domain_type == "kvm" and self._settings.cpu_mode in ("auto", "host-passthrough")
        flags = cpu_flags() if passed_through else frozenset[str]()
        return Capabilities(
            hypervisor_type=known.hypervisor_type,
            hypervisor_version=known.version,
            verbs=self._verbs,
            traits=traits(known.description.architecture, flags),
            events=frozenset() if simulated else self._link.kinds,
        )

    @property
    def _verbs(self) -> frozenset[str]:
        return verbs_of(self._settings)

    def capacity(self) -> HostCapacity:
        """See `Driver.capacity`: two calls to the hypervisor and one to the file system."""
        with self._link.call() as connection:
            known = self._known(connection)
            info = connection.getInfo()
            memory_mib = _memory_mib(connection, info)
            self._know_pins(connection)
        total, free = self._storage.space_mib()
        online = {cpu for cell in known.description.numa_cells for cpu in cell.cpus}
        dedicated, shared = self._dedicated(known), self._shared(known)
        return HostCapacity(
            architecture=known.description.architecture,
            cpu_model=known.description.cpu_model,
            cpus=int(info[2]),
            memory_mib=memory_mib,
            disk_total_mib=total,
            disk_free_mib=free,
            numa_cells=self._cells(known, dedicated),
            shared_cpus=None if shared is None else len(shared & online),
            dedicated_cpus=len(dedicated) if self._settings.cpu_dedicated_set else None,
        )

    def _cells(self, known: _Known, dedicated: frozenset[int]) -> tuple[NumaCell, ...]:
        free = dedicated - self.pins.taken()
        return tuple(
            cell.model_copy(
                update={
                    "pages": [] if self._settings.simulated else pages_of_cell(cell.id),
                    "dedicated_cpus": sorted(dedicated & set(cell.cpus)),
                    "free_dedicated_cpus": sorted(free & set(cell.cpus)),
                }
            )
            for cell in known.description.numa_cells
        )

    def _dedicated(self, known: _Known) -> frozenset[int]:
        """CPUs of the set that the host really has."""
        online = {cpu for cell in known.description.numa_cells for cpu in cell.cpus}
        return parse_cpus(self._settings.cpu_dedicated_set) & online

    def _shared(self, known: _Known) -> frozenset[int] | None:
        """CPUs of guests without their own; None: all."""
        settings = self._settings
        if settings.cpu_shared_set:
            return parse_cpus(settings.cpu_shared_set)
        if not settings.cpu_dedicated_set:
            return None
        online = {cpu for cell in known.description.numa_cells for cpu in cell.cpus}
        return frozenset(online - parse_cpus(settings.cpu_dedicated_set))

    def check(self, spec: InstanceSpec) -> None:
        """See `Driver.check`."""
        if self._settings.simulated:
            check_plain(spec, self._settings.uri)
            return
        with self._link.call() as connection:
            known = self._known(connection)
            facts = self._facts(known)
            machine = facts.machine_of(spec)
            offer = known.offers.get(machine or "")
            if offer is None and (machine is None or machine in known.description.machines):
                document = connection.getDomainCapabilities(
                    _text(self._settings.emulator), facts.architecture, machine, known.domain_type
                )
                offer = known.offers[machine or ""] = refusals.parse_offer(document)
            self._check(spec, facts, known, offer)
            if xml_machine.cpu_mode(spec, facts)[0] == "custom":
                self._compare_cpu(connection, spec, facts)

    def _check(self, spec: InstanceSpec, facts: HostFacts, known: _Known, offer: Offer | None) -> None:
        refusals.check(
            spec,
            facts,
            refusals.Host(
                offer=offer,
                libvirt_version=known.libvirt_version,
                session=self._settings.session,
                dedicated=self._dedicated(known),
                page_sizes=frozenset(
                    pool.size_kib for cell in known.description.numa_cells for pool in pages_of_cell(cell.id)
                ),
            ),
        )

    def _compare_cpu(self, connection: Any, spec: InstanceSpec, facts: HostFacts) -> None:
        """Let libvirt raise if the host cannot give a guest this model with these features.

        An emulated guest would otherwise start without some of them, and nobody would know.
        """
        flags = libvirt.VIR_CONNECT_COMPARE_CPU_FAIL_INCOMPATIBLE | libvirt.VIR_CONNECT_COMPARE_CPU_VALIDATE_XML
        document = ET.tostring(xml_machine.cpu_model(spec, facts), encoding="unicode")
        arguments = (_text(self._settings.emulator), facts.architecture, facts.machine_of(spec), facts.domain_type)
        try:
            connection.compareHypervisorCPU(*arguments, document, flags)
        except libvirt.libvirtError as exc:
            if not errors.is_code(exc, "VIR_ERR_NO_SUPPORT"):
                raise

    @contextlib.contextmanager
    def dedicated(self, connection: Any, instance_id: str, spec: InstanceSpec) -> Iterator[dict[int, int]]:
        """Give CPUs for the definition that is made in the block; if that fails, all is as before.

        Raises `ResourceExhausted` (code `does_not_fit`).
        """
        known = self._known(connection)
        before = self.pins.held_by(instance_id)
        if spec.cpu.placement != "dedicated":
            yield {}
            if before:
                self.pins.put_back(instance_id, {})
            return
        self._know_pins(connection)
        before = self.pins.held_by(instance_id)
        cells = [cell.cpus for cell in known.description.numa_cells]
        given = self.pins.take(instance_id, spec.vcpus, among=self._dedicated(known), cells=cells)
        try:
            yield given
        except BaseException:
            self.pins.put_back(instance_id, before)
            raise

    def _know_pins(self, connection: Any) -> None:
        """Read the domains once, where nobody has yet; from then on `recover` keeps it true."""
        if self._settings.cpu_dedicated_set and not self.pins.known:
            mark = self.pins.mark()
            self.pins.learn(domains.describe_all(connection), mark)

    def facts(self, connection: Any) -> HostFacts:
        """Return what a definition needs to know of the host."""
        return self._facts(self._known(connection))

    def _facts(self, known: _Known) -> HostFacts:
        settings = self._settings
        return HostFacts(
            domain_type=known.domain_type,
            architecture=known.description.architecture,
            machine=settings.machine or _MACHINES.get(known.description.architecture),
            cpu_mode=settings.cpu_mode,
            cpu_model=settings.cpu_model,
            emulator=settings.emulator,
            vnc_listen=settings.vnc_listen,
            machines=known.description.machines,
            firmware_folders=settings.firmware_dirs,
            shared_cpus=self._shared(known),
            shares=settings.shares,
        )

    def _known(self, connection: Any) -> _Known:
        epoch, cached = self._link.epoch, self._cached
        if cached is not None and cached.epoch == epoch:
            return cached
        with self._lock:
            if self._cached is None or self._cached.epoch != epoch:
                self._cached = self._read(connection, epoch)
            return self._cached

    def _read(self, connection: Any, epoch: int) -> _Known:
        description = parse_capabilities(connection.getCapabilities())
        return _Known(
            epoch=epoch,
            description=description,
            domain_type=self._domain_type(description),
            hypervisor_type=connection.getType(),
            version=format_version(connection.getVersion()),
            libvirt_version=connection.getLibVersion(),
        )

    def _domain_type(self, description: HostDescription) -> Literal["kvm", "qemu", "test", "lxc"]:
        wanted = self._settings.virt_type
        if self._settings.containers:
            return "lxc"
        if self._settings.simulated:
            return "test"
        if wanted == "qemu":
            return "qemu"
        if kvm_works(description):
            return "kvm"
        if wanted == "kvm":
            raise FailedPrecondition(
                "virt_type is kvm, but KVM does not work on this host; set auto or qemu to emulate",
                code="kvm_missing",
            )
        _log.warning("libvirt.kvm.missing", consequence="guests are emulated and slow")
        return "qemu"


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def verbs_of(settings: LibvirtSettings) -> frozenset[str]:
    """The optional verbs of the hypervisor that the settings name."""
    if settings.containers:
        return _CONTAINER_VERBS
    return _SIMULATED_VERBS if settings.simulated else OPTIONAL_VERBS


def _memory_mib(connection: Any, info: Any) -> int:
    # The node information adds up NUMA cells as they were at boot; memory plugged in later counts only here.
    try:
        stats = connection.getMemoryStats(libvirt.VIR_NODE_MEMORY_STATS_ALL_CELLS)
    except libvirt.libvirtError as exc:
        if not errors.is_code(exc, "VIR_ERR_NO_SUPPORT"):
            raise
        return int(info[1])
    return int(stats["total"]) // 1024
