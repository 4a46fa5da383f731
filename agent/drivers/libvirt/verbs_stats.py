"""The stats family of verbs over libvirt.

Measured on libvirt 9.0 with QEMU 7.2: asked for figures that QEMU has, libvirt waits for ever where QEMU is frozen, and
NOWAIT does not help: it only keeps it from waiting for another call on the domain. The first caller that waits is such
another call, so one frozen QEMU holds up one thread and no more. What needs no QEMU is answered at all times.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree as ET

from agent.drivers.base import DomainInfo
from agent.drivers.libvirt import counters, domains, errors
from agent.drivers.libvirt.binding import libvirt
from agent.drivers.libvirt.counters import Counters
from agent.drivers.libvirt.parts import Parts
from agent.drivers.libvirt.volumes import Volume
from agent.drivers.verbs.stats import CpuUse, DiskUse, MemoryUse, NicUse, Use
from agent.errors import ComputeError, NotFound
from agent.messages.spec import InstanceSpec
from agent.messages.spec_disks import CdromDisk

MOST_ASKING: Final = 8
"""QEMUs asked at once. Where storage hangs all may be frozen, and each one asked holds a thread here and a worker of
libvirtd's twenty; beyond this limit answers are given without QEMU."""
_TURN_S: Final = 0.5
_TRIES: Final = 3
_PAUSE_S: Final = 0.1
_FREE_GROUPS: Final = ("STATE", "INTERFACE")
_QEMU_GROUPS: Final = ("STATE", "CPU_TOTAL", "BALLOON", "VCPU", "INTERFACE", "BLOCK")


class LibvirtStats(Parts):
    """See `agent.drivers.verbs.stats`."""

    _asking: threading.BoundedSemaphore

    def stats(self, instance_id: str, spec: InstanceSpec, ask_guest: bool = True) -> Use:
        at = datetime.now(UTC)
        if self._settings.containers or self._settings.simulated:
            with self._link.call() as connection:
                return self._simple(domains.find(connection, instance_id), at, instance_id, spec)
        if ask_guest and self._asking.acquire(timeout=_TURN_S):
            try:
                return self._qemu(at, instance_id, spec, ask_guest=True)
            finally:
                self._asking.release()
        return self._qemu(at, instance_id, spec, ask_guest=False)

    # --- QEMU -----------------------------------------------------------------------------------------------------

    def _qemu(self, at: datetime, instance_id: str, spec: InstanceSpec, *, ask_guest: bool) -> Use:
        with self._link.call() as connection:
            domain = domains.find(connection, instance_id)
            info = domains.describe(domain)
            root = _live(domain)
            found = _ask(connection, domain) if ask_guest else _look(connection, domain)
            active = _runs(domain, found)
            time_ns = current_kib = None
            if active and not found.answered:
                _state, _maximum, current_kib, _vcpus, time_ns = domain.info()
        # Of a stopped guest libvirt gives the times of a process that is not the guest's.
        vcpus, max_vcpus = counters.vcpus(root)
        cpu = replace(found.cpu(time_ns) if active else CpuUse(), vcpus=vcpus, max_vcpus=max_vcpus)
        memory = found.memory(root, current_kib) if active else MemoryUse(maximum_kib=counters.maximum_kib(root))
        names = self._disk_names(instance_id, spec, info, root)
        places = {device: _size_on_host(path) for device, (_name, path) in names.items()}
        disks = [found.disk(name, device, places[device], active) for device, (name, _path) in names.items()]
        nics = [_nic(found, index, element, active) for index, element in enumerate(root.findall("devices/interface"))]
        return Use(at, info.power, found.answered or not active, cpu, memory, tuple(disks), tuple(nics))

    def _disk_names(
        self, instance_id: str, spec: InstanceSpec, info: DomainInfo, root: ET.Element
    ) -> dict[str, tuple[str, str | None]]:
        """Libvirt's name of a disk → its name in the spec, and its path. The seed and a rescue disk have none."""
        known = spec.disks_by_name()
        places = self._cds(instance_id, spec)
        found: dict[str, tuple[str, str | None]] = {}
        for disk in root.findall("devices/disk"):
            target, source = disk.find("target"), disk.find("source")
            device = "" if target is None else target.get("dev", "")
            path = None if source is None else source.get("file") or source.get("dev")
            if info.life.adopted is not None:
                # As it was named when it was adopted.
                name = "root" if not found and disk.get("device", "disk") == "disk" else device
            else:
                name = disk.findtext("serial") or places.get(path or "", "")
            if name in known:
                found[device] = (name, path)
        order = list(known)
        return dict(sorted(found.items(), key=lambda item: order.index(item[1][0])))

    def _cds(self, instance_id: str, spec: InstanceSpec) -> dict[str, str]:
        """Path of a CD → its name. A CD has no serial number."""
        names = [name for name, disk in spec.disks_by_name().items() if isinstance(disk, CdromDisk)]
        if not names:
            return {}
        try:
            files = self._storage.files(instance_id, spec)
        except ComputeError:
            return {}
        return {str(files.disks[name].path): name for name in names}

    # --- containers, and the simulation ---------------------------------------------------------------------------

    def _simple(self, domain: Any, at: datetime, instance_id: str, spec: InstanceSpec) -> Use:
        """These have no `domainListGetStats` that is worth it."""
        info = domains.describe(domain)
        root = _live(domain)
        active = bool(domain.isActive())
        _state, maximum_kib, used_kib, vcpus, time_ns = domain.info()
        cpu, memory = CpuUse(vcpus=vcpus, max_vcpus=vcpus), MemoryUse(maximum_kib=maximum_kib)
        nics = root.findall("devices/interface")
        uses = [NicUse(index, mac=counters.mac(element)) for index, element in enumerate(nics)]
        if active and self._settings.simulated:
            # The rest is made up anew at every reading.
            cpu = CpuUse(cpu_time_ns=time_ns, vcpus=vcpus, max_vcpus=vcpus)
            memory = MemoryUse(current_kib=used_kib, maximum_kib=maximum_kib)
        elif active:
            cpu = CpuUse(*_container_times(domain), vcpus, vcpus)
            told = _or_none(domain.memoryStats) or {}
            memory = MemoryUse(told.get("actual"), maximum_kib, told.get("rss"))
            uses = [_container_nic(domain, index, element) for index, element in enumerate(nics)]
        return Use(at, info.power, True, cpu, memory, tuple(self._files(instance_id, spec)), tuple(uses))

    def _files(self, instance_id: str, spec: InstanceSpec) -> list[DiskUse]:
        """Sizes of the disks' files. What a container reads and writes libvirt does not count for us."""
        found = []
        for name, disk in spec.disks_by_name().items():
            if isinstance(disk, CdromDisk):
                continue
            backend, volume = self._storage.backend(spec, name), Volume(instance_id, name)
            try:
                capacity = backend.size_bytes(volume)
                taken, size = _size_on_host(str(backend.locate(volume).path))
            except ComputeError:
                continue  # it is on the shelf, or not made yet
            found.append(DiskUse(name, capacity_bytes=capacity, allocation_bytes=taken, physical_bytes=size))
        return found


def _live(domain: Any) -> ET.Element:
    return ET.fromstring(domain.XMLDesc())  # noqa: S314 - libvirtd wrote it, and expands no entities


def _ask(connection: Any, domain: Any) -> Counters:
    """Ask QEMU too. If another call asks it at this moment, a moment later."""
    found = _read(connection, domain, _QEMU_GROUPS)
    for _ in range(_TRIES - 1):
        if found.answered or not _runs(domain, found):
            break
        time.sleep(_PAUSE_S)
        found = _read(connection, domain, _QEMU_GROUPS)
    return found


def _look(connection: Any, domain: Any) -> Counters:
    """Read what needs no QEMU. Of a stopped guest all is read: there is no QEMU that could hang."""
    return _read(connection, domain, _FREE_GROUPS if domain.isActive() else _QEMU_GROUPS)


def _runs(domain: Any, found: Counters) -> bool:
    return bool(domain.isActive()) and found.number("state.state") != libvirt.VIR_DOMAIN_SHUTOFF


def _read(connection: Any, domain: Any, groups: tuple[str, ...]) -> Counters:
    wanted = sum(getattr(libvirt, f"VIR_DOMAIN_STATS_{group}") for group in groups)
    flags = libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT
    found = connection.domainListGetStats([domain], wanted, flags)
    if not found:
        raise NotFound(f"the hypervisor has no domain {domain.UUIDString()}")
    return Counters(found[0][1])


def _size_on_host(path: str | None) -> tuple[int | None, int | None]:
    """Bytes that a file takes, and its size. Of anything else, libvirt knows."""
    try:
        found = None if path is None else Path(path).stat()
    except OSError:
        return None, None
    if found is None or not counters.is_file(found.st_mode):
        return None, None
    return found.st_blocks * 512, found.st_size


def _nic(found: Counters, index: int, element: ET.Element, active: bool) -> NicUse:
    return found.nic(index, counters.mac(element)) if active else NicUse(index, mac=counters.mac(element))


def _container_nic(domain: Any, index: int, element: ET.Element) -> NicUse:
    target = element.find("target")
    device = None if target is None else target.get("dev")
    address = counters.mac(element)
    if device is None:
        return NicUse(index, mac=address)
    figures = _or_none(lambda: domain.interfaceStats(device)) or ()
    return NicUse(index, address, device, *(value if value >= 0 else None for value in figures))


def _container_times(domain: Any) -> tuple[int | None, int | None, int | None]:
    found = _or_none(lambda: domain.getCPUStats(True)) or [{}]
    return found[0].get("cpu_time"), found[0].get("user_time"), found[0].get("system_time")


def _or_none(read: Callable[[], Any]) -> Any:
    """What a container says. It may end at any moment, and its host may lack a control group."""
    try:
        return read()
    except libvirt.libvirtError as exc:
        if errors.is_lost(exc):
            raise
        return None
