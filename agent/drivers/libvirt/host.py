"""The hypervisor as a whole: what it is, what it can do and what it has.

What cannot change while a connection lasts is read once per epoch of the link.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, Final, Literal

import structlog

from agent.drivers.base import OPTIONAL_VERBS, Capabilities, HostCapacity
from agent.drivers.libvirt import errors
from agent.drivers.libvirt.binding import libvirt
from agent.drivers.libvirt.capacity import HostDescription, cpu_flags, kvm_works, parse_capabilities, traits
from agent.drivers.libvirt.connection import Link, format_version
from agent.drivers.libvirt.definition import HostFacts
from agent.drivers.libvirt.settings import LibvirtSettings
from agent.drivers.libvirt.storage import Storage
from agent.drivers.verbs import snapshot
from agent.errors import FailedPrecondition

_log = structlog.get_logger(__name__)

# The simulation has no console, reboots without an event that could prove it, and its disks hold nothing.
_SIMULATED_VERBS: Final = (
    OPTIONAL_VERBS - {"console.log", "instance.reboot"} - snapshot.VERBS - {"instance.shelve", "instance.unshelve"}
)
_MACHINES: Final = {"x86_64": "q35", "i686": "q35", "aarch64": "virt"}


@dataclass(frozen=True, slots=True)
class _Known:
    """What was read in one epoch."""

    epoch: int
    description: HostDescription
    domain_type: Literal["kvm", "qemu", "test"]
    hypervisor_type: str
    version: str


class Hypervisor:
    """Reads facts over the link; thread-safe."""

    def __init__(self, settings: LibvirtSettings, link: Link, storage: Storage) -> None:
        self._settings = settings
        self._link = link
        self._storage = storage
        self._lock = threading.Lock()
        self._cached: _Known | None = None

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
            verbs=_SIMULATED_VERBS if simulated else OPTIONAL_VERBS,
            traits=traits(known.description.architecture, flags),
            events=frozenset() if simulated else self._link.kinds,
        )

    def capacity(self) -> HostCapacity:
        """See `Driver.capacity`: two calls to the hypervisor and one to the file system."""
        with self._link.call() as connection:
            known = self._known(connection)
            info = connection.getInfo()
            memory_mib = _memory_mib(connection, info)
        total, free = self._storage.space_mib()
        return HostCapacity(
            architecture=known.description.architecture,
            cpu_model=known.description.cpu_model,
            cpus=int(info[2]),
            memory_mib=memory_mib,
            disk_total_mib=total,
            disk_free_mib=free,
            numa_cells=known.description.numa_cells,
        )

    def facts(self, connection: Any) -> HostFacts:
        """Return what a definition needs to know of the host."""
        known = self._known(connection)
        settings = self._settings
        return HostFacts(
            domain_type=known.domain_type,
            architecture=known.description.architecture,
            machine=settings.machine or _MACHINES.get(known.description.architecture),
            cpu_mode=settings.cpu_mode,
            cpu_model=settings.cpu_model,
            emulator=settings.emulator,
            vnc_listen=settings.vnc_listen,
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
        )

    def _domain_type(self, description: HostDescription) -> Literal["kvm", "qemu", "test"]:
        wanted = self._settings.virt_type
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


def _memory_mib(connection: Any, info: Any) -> int:
    # The node information adds up NUMA cells as they were at boot; memory plugged in later counts only here.
    try:
        stats = connection.getMemoryStats(libvirt.VIR_NODE_MEMORY_STATS_ALL_CELLS)
    except libvirt.libvirtError as exc:
        if not errors.is_code(exc, "VIR_ERR_NO_SUPPORT"):
            raise
        return int(info[1])
    return int(stats["total"]) // 1024
