"""The resize family of verbs on the simulated hypervisor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from agent.drivers.fake.disks import Disk
from agent.drivers.fake.domains import Domain
from agent.drivers.fake.live import Live, check_nics, disk_names, limits_json
from agent.drivers.fake.parts import Parts
from agent.drivers.verbs.resize import GuestSizes
from agent.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from agent.messages.spec import InstanceSpec

_BLOCK_MIB: Final = 2


class FakeResize(Parts):
    """See `agent.drivers.verbs.resize`. A guest with the label `fake.refuses-unplug` gives nothing back."""

    def disk_sizes(self, instance_id: str, spec: InstanceSpec) -> Mapping[str, int]:
        with self._call("disk_sizes", instance_id), self._hypervisor.lock:
            self._hypervisor.find_owned(instance_id)
            return {name: self._disk(instance_id, name).size_mib for name in disk_names(spec)}

    def grow_disk(self, instance_id: str, spec: InstanceSpec, disk: str, size_mib: int) -> None:  # noqa: ARG002 - the contract's
        with self._call("grow_disk", instance_id, verb="instance.resize"), self._hypervisor.lock:
            self._hypervisor.find_owned(instance_id)
            old = self._disk(instance_id, disk)
            free = self._settings.disk_mib - self._hypervisor.disks.used_mib
            if size_mib - old.size_mib > free:
                raise ResourceExhausted(
                    f"disk {disk} needs {size_mib - old.size_mib} MiB more and {free} MiB are free", code="no_space"
                )
            if size_mib > old.size_mib:
                self._hypervisor.disks.put_one(instance_id, disk, replace(old, size_mib=size_mib))

    def guest_sizes(self, instance_id: str) -> GuestSizes:
        with self._call("guest_sizes", instance_id), self._hypervisor.lock:
            domain = self._active(instance_id, "measured")
            live = domain.live
            balloon = None if domain.spec is not None and not domain.spec.balloon else live.memory_mib - live.held_mib
            return GuestSizes(vcpus=live.vcpus, memory_mib=live.memory_mib, balloon_mib=balloon)

    def request_vcpus(self, instance_id: str, vcpus: int) -> None:
        with self._call("request_vcpus", instance_id, verb="instance.resize"), self._hypervisor.lock:
            domain = self._active(instance_id, "resized")
            live = domain.live
            if vcpus > live.max_vcpus:
                raise FailedPrecondition(
                    f"the guest runs with room for {live.max_vcpus} vCPUs; resize it cold",
                    code="above_maximum", max_vcpus=live.max_vcpus,
                )  # fmt: skip
            if vcpus > live.vcpus or not domain.steering.refuses_unplug:
                self._keep(domain, replace(live, vcpus=vcpus))

    def request_memory(self, instance_id: str, memory_mib: int) -> None:
        with self._call("request_memory", instance_id, verb="instance.resize"), self._hypervisor.lock:
            domain = self._active(instance_id, "resized")
            live = domain.live
            if memory_mib < live.boot_mib:
                raise FailedPrecondition(
                    f"the guest booted with {live.boot_mib} MiB, which cannot be unplugged; resize it cold, or set its "
                    "memory target",
                    code="below_boot_memory", boot_mib=live.boot_mib,
                )  # fmt: skip
            if memory_mib > live.max_memory_mib:
                raise FailedPrecondition(
                    f"the guest runs with room for {live.max_memory_mib} MiB; resize it cold",
                    code="above_maximum", max_memory_mib=live.max_memory_mib,
                )  # fmt: skip
            if (memory_mib - live.boot_mib) % _BLOCK_MIB:
                raise InvalidArgument(
                    f"memory is plugged in blocks of {_BLOCK_MIB} MiB above {live.boot_mib} MiB",
                    code="memory_step", block_mib=_BLOCK_MIB, boot_mib=live.boot_mib,
                )  # fmt: skip
            if memory_mib > live.memory_mib or not domain.steering.refuses_unplug:
                self._keep(domain, replace(live, memory_mib=memory_mib))

    def request_memory_target(self, instance_id: str, memory_mib: int) -> None:
        verb = "instance.set-memory-target"
        with self._call("request_memory_target", instance_id, verb=verb), self._hypervisor.lock:
            domain = self._active(instance_id, "ballooned")
            live = domain.live
            if domain.spec is not None and not domain.spec.balloon:
                raise FailedPrecondition("the instance has no balloon; its spec says balloon: false")
            plugged = live.memory_mib - live.boot_mib
            if not plugged < memory_mib <= live.memory_mib:
                raise FailedPrecondition(
                    f"the balloon works between {plugged + 1} and {live.memory_mib} MiB: memory that was plugged in is "
                    "given back by a live resize",
                    plugged_mib=plugged, memory_mib=live.memory_mib,
                )  # fmt: skip
            held = live.memory_mib - memory_mib
            if held < live.held_mib or not domain.steering.refuses_unplug:
                self._keep(domain, replace(live, held_mib=held))

    def apply_limits(self, instance_id: str, spec: InstanceSpec) -> None:
        with self._call("apply_limits", instance_id, verb="instance.set-limits"), self._hypervisor.lock:
            domain = self._hypervisor.find_owned(instance_id)
            check_nics(spec)
            if domain.active:
                self._keep(domain, replace(domain.live, limits_json=limits_json(spec)))

    def _keep(self, domain: Domain, live: Live) -> None:
        domain.live = live
        self._hypervisor.domains.put(domain)

    def _disk(self, instance_id: str, name: str) -> Disk:
        disk = self._hypervisor.disks.get(instance_id, name)
        if disk is None:
            raise NotFound(f"the instance has no disk {name}", code="disk_missing", disk=name)
        return disk
