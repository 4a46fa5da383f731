"""The resize family of verbs over libvirt. What holds for the running guest is set here; the definition by `define`.

Measured on libvirt 9.0 with QEMU 7.2 without KVM: virtio-mem plugs and unplugs in blocks of 2 MiB. vCPUs can be
plugged; one that the guest gives back is never reported as gone, and QEMU's heap is damaged by it. Where vCPUs can be
unplugged, libvirt waits 5 s for the guest and then raises a timeout; the guest may give it back later all the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree as ET

from agent.drivers.libvirt import domains, errors, xml_limits
from agent.drivers.libvirt.binding import libvirt
from agent.drivers.libvirt.files import MIB
from agent.drivers.libvirt.parts import Parts
from agent.drivers.libvirt.volumes import Volume
from agent.drivers.verbs.resize import GuestSizes
from agent.errors import FailedPrecondition, InvalidArgument, NotFound, Unsupported
from agent.messages.spec import InstanceSpec

_DEFAULT_SHARES: Final = 1024
_DEFAULT_WEIGHT: Final = 100
_CGROUP_V2: Final = Path("/sys/fs/cgroup/cgroup.controllers")


class LibvirtResize(Parts):
    """See `agent.drivers.verbs.resize`."""

    def disk_sizes(self, instance_id: str, spec: InstanceSpec) -> Mapping[str, int]:
        with self._link.call() as connection:
            domain = domains.find_owned(connection, instance_id)
            # The simulation opens no disks, and makes their sizes up.
            held = domain.isActive() and not self._settings.simulated
            root = _live(domain) if held else None
            sizes: dict[str, int] = {}
            for name in xml_limits.disk_limits(spec):
                if root is not None:
                    # QEMU holds the disk: it knows best, and qemu-img is not to look over its shoulder.
                    target = self._target(root, instance_id, spec, name)
                    sizes[name] = int(domain.blockInfo(target)[0]) // MIB
                else:
                    backend = self._storage.backend(spec, name)
                    sizes[name] = backend.size_bytes(Volume(instance_id, name)) // MIB
            return sizes

    def grow_disk(self, instance_id: str, spec: InstanceSpec, disk: str, size_mib: int) -> None:
        with self._link.call() as connection:
            domain = domains.find_owned(connection, instance_id)
            if domain.isActive() and not self._settings.simulated:
                target = self._target(_live(domain), instance_id, spec, disk)
                if int(domain.blockInfo(target)[0]) < size_mib * MIB:
                    domain.blockResize(target, size_mib * MIB, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
                return
        self._storage.backend(spec, disk).grow(Volume(instance_id, disk), size_mib * MIB)

    def guest_sizes(self, instance_id: str) -> GuestSizes:
        with self._active_domain(instance_id) as domain:
            root = _live(domain)
            plugged_kib = _plugged_kib(root)
            balloon = None
            if _has_balloon(root):
                # What the balloon leaves is told without the memory that is plugged in.
                actual = domain.memoryStats().get("actual")
                balloon = None if actual is None else round((actual + plugged_kib) / 1024)
            return GuestSizes(
                vcpus=domain.vcpusFlags(libvirt.VIR_DOMAIN_VCPU_LIVE),
                memory_mib=(_boot_kib(root) + plugged_kib) // 1024,
                balloon_mib=balloon,
            )

    def request_vcpus(self, instance_id: str, vcpus: int) -> None:
        with self._active_domain(instance_id) as domain:
            now = domain.vcpusFlags(libvirt.VIR_DOMAIN_VCPU_LIVE)
            if now == vcpus:
                return
            most = domain.vcpusFlags(libvirt.VIR_DOMAIN_VCPU_LIVE | libvirt.VIR_DOMAIN_VCPU_MAXIMUM)
            if vcpus > most:
                raise FailedPrecondition(
                    f"the guest runs with room for {most} vCPUs; resize it cold", code="above_maximum", max_vcpus=most
                )
            if vcpus < now and _live(domain).get("type") != "kvm":
                raise FailedPrecondition(
                    "without KVM, QEMU crashes some time after a vCPU was unplugged; resize the guest cold",
                    code="vcpu_unplug_unsafe",
                )
            try:
                domain.setVcpusFlags(vcpus, libvirt.VIR_DOMAIN_VCPU_LIVE)
            except libvirt.libvirtError as exc:
                # Asked, and not done yet; it may still be done.
                if vcpus > now or not _asked_in_vain(exc):
                    raise

    def request_memory(self, instance_id: str, memory_mib: int) -> None:
        with self._active_domain(instance_id) as domain:
            root = _live(domain)
            boot_kib, wanted_kib = _boot_kib(root), memory_mib * 1024 - _boot_kib(root)
            if wanted_kib < 0:
                raise FailedPrecondition(
                    f"the guest booted with {boot_kib // 1024} MiB, which cannot be unplugged; resize it cold, or set "
                    "its memory target",
                    code="below_boot_memory", boot_mib=boot_kib // 1024,
                )  # fmt: skip
            device = root.find("devices/memory[@model='virtio-mem']")
            room_kib = 0 if device is None else _kib(device, "target/size")
            if wanted_kib > room_kib:
                raise FailedPrecondition(
                    f"the guest runs with room for {(boot_kib + room_kib) // 1024} MiB; resize it cold",
                    code="above_maximum", max_memory_mib=(boot_kib + room_kib) // 1024,
                )  # fmt: skip
            if device is None or _kib(device, "target/requested") == wanted_kib:
                return
            step_kib = _kib(device, "target/block")
            if wanted_kib % step_kib:
                raise InvalidArgument(
                    f"memory is plugged in blocks of {step_kib // 1024} MiB above {boot_kib // 1024} MiB",
                    code="memory_step", block_mib=step_kib // 1024, boot_mib=boot_kib // 1024,
                )  # fmt: skip
            requested = device.find("target/requested")
            if requested is not None:
                requested.text = str(wanted_kib)
            domain.updateDeviceFlags(ET.tostring(device, encoding="unicode"), libvirt.VIR_DOMAIN_DEVICE_MODIFY_LIVE)

    def request_memory_target(self, instance_id: str, memory_mib: int) -> None:
        with self._active_domain(instance_id) as domain:
            root = _live(domain)
            boot_kib, plugged_kib = _boot_kib(root), _plugged_kib(root)
            if not _has_balloon(root):
                raise FailedPrecondition("the instance has no balloon; its spec says balloon: false")
            target_kib = memory_mib * 1024 - plugged_kib
            if not 0 < target_kib <= boot_kib:
                raise FailedPrecondition(
                    f"the balloon works between {plugged_kib // 1024 + 1} and {(boot_kib + plugged_kib) // 1024} MiB: "
                    "memory that was plugged in is given back by a live resize",
                    plugged_mib=plugged_kib // 1024, memory_mib=(boot_kib + plugged_kib) // 1024,
                )  # fmt: skip
            domain.setMemoryFlags(target_kib, libvirt.VIR_DOMAIN_MEM_LIVE)

    def apply_limits(self, instance_id: str, spec: InstanceSpec) -> None:
        if self._settings.simulated:
            raise Unsupported("libvirt's simulated hypervisor has no limits")
        for nic in spec.nics:
            xml_limits.check_nic(nic)
        with self._link.call() as connection:
            domain = domains.find_owned(connection, instance_id)
            if not domain.isActive():
                return
            root = _live(domain)
            _apply_cpu(domain, root, spec)
            for name, limits in xml_limits.disk_limits(spec).items():
                wanted = xml_limits.iotune(limits)
                target = self._target(root, instance_id, spec, name)
                now = domain.blockIoTune(target, libvirt.VIR_DOMAIN_AFFECT_LIVE)
                if any(now.get(key, 0) != value for key, value in wanted.items()):
                    domain.setBlockIoTune(target, wanted, libvirt.VIR_DOMAIN_AFFECT_LIVE)
            for element, nic in zip(root.findall("devices/interface"), spec.nics, strict=False):
                _apply_bandwidth(domain, element, xml_limits.bandwidth(nic.limits))

    @contextlib.contextmanager
    def _active_domain(self, instance_id: str) -> Iterator[Any]:
        """A domain of ours that runs, for a few calls."""
        if self._settings.simulated:
            raise Unsupported("libvirt's simulated hypervisor has no guest that could be resized while it runs")
        with self._link.call() as connection:
            domain = domains.find_owned(connection, instance_id)
            if not domain.isActive():
                raise FailedPrecondition("the instance does not run; start it first", code="instance_not_running")
            yield domain

    def _target(self, root: ET.Element, instance_id: str, spec: InstanceSpec, name: str) -> str:
        """The name by which libvirt knows a disk of a running guest, whatever order the definition has."""
        path = str(self._storage.backend(spec, name).locate(Volume(instance_id, name)).path)
        for disk in root.findall("devices/disk"):
            target = disk.find("target")
            if xml_limits.source_of(disk) == path and target is not None:
                return str(target.get("dev"))
        raise NotFound(f"the running guest has no disk {name}", code="disk_missing", disk=name)


def _live(domain: Any) -> ET.Element:
    return ET.fromstring(domain.XMLDesc())  # noqa: S314 - libvirtd wrote it, and expands no entities


def _kib(element: ET.Element, path: str) -> int:
    # libvirt always answers in KiB.
    return int(element.findtext(path) or 0)


def _plugged_kib(root: ET.Element) -> int:
    return sum(_kib(device, "target/current") for device in root.findall("devices/memory[@model='virtio-mem']"))


def _boot_kib(root: ET.Element) -> int:
    return _kib(root, "memory") - sum(_kib(device, "target/size") for device in root.findall("devices/memory"))


def _has_balloon(root: ET.Element) -> bool:
    balloon = root.find("devices/memballoon")
    return balloon is not None and balloon.get("model") != "none"


def _asked_in_vain(exc: Any) -> bool:
    if errors.is_code(exc, "VIR_ERR_OPERATION_TIMEOUT"):
        return True
    message = exc.get_error_message() or ""
    return "rejected" in message or "already in the process of unplug" in message


def _apply_cpu(domain: Any, root: ET.Element, spec: InstanceSpec) -> None:
    limits, quota = spec.cpu_limits, xml_limits.quota_us(spec.cpu_limits)
    shares_now, quota_now = root.findtext("cputune/shares"), root.findtext("cputune/quota")
    wanted: dict[str, int] = {}
    if str(limits.shares or "") != (shares_now or ""):
        default = _DEFAULT_WEIGHT if _CGROUP_V2.exists() else _DEFAULT_SHARES
        if limits.shares is not None or int(shares_now or default) != default:
            wanted["cpu_shares"] = limits.shares or default
    if quota is not None and str(quota) != quota_now:
        wanted |= {"vcpu_period": xml_limits.PERIOD_US, "vcpu_quota": quota}
    elif quota is None and quota_now is not None and 0 < int(quota_now) < 2**63:
        wanted["vcpu_quota"] = -1
    if not wanted:
        return
    try:
        domain.setSchedulerParametersFlags(wanted, libvirt.VIR_DOMAIN_AFFECT_LIVE)
    except libvirt.libvirtError as exc:
        if errors.is_code(exc, "VIR_ERR_OPERATION_INVALID") and "cgroup" in (exc.get_error_message() or ""):
            raise FailedPrecondition(
                "libvirt has no CPU control group for this guest; enable the cpu controller on the host",
                code="cpu_limits_unavailable",
            ) from exc
        raise


def _apply_bandwidth(domain: Any, element: ET.Element, wanted: Mapping[str, int]) -> None:
    mac = element.find("mac")
    if mac is None:
        return
    changed: dict[str, int] = {}
    for direction, rate in wanted.items():
        found = element.find(f"bandwidth/{direction}")
        now = int(found.get("average", "0")) if found is not None else 0
        if now != rate:
            changed[f"{direction}.average"] = rate
    if changed:
        domain.setInterfaceParameters(mac.get("address"), changed, libvirt.VIR_DOMAIN_AFFECT_LIVE)
