"""The rebuild family of verbs on the simulated hypervisor."""

from __future__ import annotations

from agent.drivers.base import CallContext, PreparedImage
from agent.drivers.fake.domains import Disk
from agent.drivers.fake.parts import Parts
from agent.drivers.fake.side_disks import RESCUE, ROOT_NEW
from agent.errors import FailedPrecondition, InvalidArgument
from agent.messages.spec import InstanceSpec

_MIB = 1024 * 1024


class FakeRebuild(Parts):
    """See `agent.drivers.verbs.rebuild`."""

    def prepare_rebuild(self, instance_id: str, spec: InstanceSpec, image: PreparedImage, call: CallContext) -> None:
        with self._call("prepare_rebuild", instance_id, verb="instance.rebuild", context=call), self._hypervisor.lock:
            self._hypervisor.find_owned(instance_id)
            needed_mib = -(-image.virtual_size_bytes // _MIB)
            if needed_mib > spec.root_disk.size_mib:
                raise InvalidArgument(
                    f"the root disk of {spec.root_disk.size_mib} MiB is smaller than its image of {needed_mib} MiB",
                    code="disk_too_small",
                    size_mib=spec.root_disk.size_mib,
                    needed_mib=needed_mib,
                )
            self._hypervisor.sides.put(instance_id, ROOT_NEW, Disk(spec.root_disk.size_mib, image.sha256))
        call.progress(100.0)

    def apply_rebuild(self, instance_id: str, spec: InstanceSpec) -> None:
        del spec
        with self._call("apply_rebuild", instance_id, verb="instance.rebuild"), self._hypervisor.lock:
            domain = self._hypervisor.find_owned(instance_id)
            if domain.active:
                raise FailedPrecondition(f"domain {domain.name} is {domain.power}", code="instance_running")
            disk = self._hypervisor.sides.get(instance_id, ROOT_NEW)
            if disk is not None:
                self._hypervisor.disks.replace(instance_id, disk)
                self._hypervisor.sides.remove(instance_id, ROOT_NEW)

    def discard_rebuild(self, instance_id: str, spec: InstanceSpec) -> None:
        del spec
        with self._call("discard_rebuild", instance_id, verb="instance.rebuild"), self._hypervisor.lock:
            self._hypervisor.sides.remove(instance_id, ROOT_NEW)

    def create_rescue_disk(self, instance_id: str, spec: InstanceSpec, image: PreparedImage, call: CallContext) -> None:
        del spec
        with self._call("create_rescue_disk", instance_id, verb="instance.rescue", context=call), self._hypervisor.lock:
            self._hypervisor.find_owned(instance_id)
            size_mib = -(-image.virtual_size_bytes // _MIB)
            self._hypervisor.sides.put(instance_id, RESCUE, Disk(size_mib, image.sha256))
        call.progress(100.0)

    def remove_rescue_disk(self, instance_id: str, spec: InstanceSpec) -> None:
        del spec
        with self._call("remove_rescue_disk", instance_id, verb="instance.unrescue"), self._hypervisor.lock:
            self._hypervisor.sides.remove(instance_id, RESCUE)
