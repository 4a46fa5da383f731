"""The rebuild family of verbs on the simulated hypervisor."""

from __future__ import annotations

import hashlib

from agent.drivers.base import CallContext, PreparedImage
from agent.drivers.fake.disks import NEW, RESCUE, Disk
from agent.drivers.fake.parts import Parts
from agent.drivers.verbs.rebuild import ImportedDisk
from agent.errors import FailedPrecondition, ImageRejected, InvalidArgument
from agent.messages.spec import ROOT, InstanceSpec
from agent.messages.spec_disks import CdromDisk, EphemeralDisk, SwapDisk

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
                    image_mib=needed_mib,
                )
            disks = self._hypervisor.disks
            disks.put_one(instance_id, ROOT + NEW, Disk(spec.root_disk.size_mib, image.sha256))
            for disk in spec.disks:
                if isinstance(disk, EphemeralDisk | SwapDisk):
                    disks.put_one(instance_id, disk.name + NEW, Disk(disk.size_mib))
        call.progress(100.0)

    def apply_rebuild(self, instance_id: str, spec: InstanceSpec) -> None:
        del spec
        with self._call("apply_rebuild", instance_id, verb="instance.rebuild"), self._hypervisor.lock:
            domain = self._hypervisor.find_owned(instance_id)
            if domain.active:
                raise FailedPrecondition(f"domain {domain.name} is {domain.power}", code="instance_running")
            disks = self._hypervisor.disks
            for name, disk in disks.all(instance_id).items():
                if name.endswith(NEW):
                    disks.put_one(instance_id, name.removesuffix(NEW), disk)
                    disks.remove_one(instance_id, name)

    def discard_rebuild(self, instance_id: str, spec: InstanceSpec) -> None:
        del spec
        with self._call("discard_rebuild", instance_id, verb="instance.rebuild"), self._hypervisor.lock:
            for name in self._hypervisor.disks.all(instance_id):
                if name.endswith(NEW):
                    self._hypervisor.disks.remove_one(instance_id, name)

    def create_rescue_disk(self, instance_id: str, spec: InstanceSpec, image: PreparedImage, call: CallContext) -> None:
        del spec
        with self._call("create_rescue_disk", instance_id, verb="instance.rescue", context=call), self._hypervisor.lock:
            self._hypervisor.find_owned(instance_id)
            size_mib = -(-image.virtual_size_bytes // _MIB)
            self._hypervisor.disks.put_one(instance_id, RESCUE, Disk(size_mib, image.sha256))
        call.progress(100.0)

    def remove_rescue_disk(self, instance_id: str, spec: InstanceSpec) -> None:
        del spec
        with self._call("remove_rescue_disk", instance_id, verb="instance.unrescue"), self._hypervisor.lock:
            self._hypervisor.disks.remove_one(instance_id, RESCUE)

    def shelve_storage(self, instance_id: str, call: CallContext) -> None:  # simulated guests have no variables
        with self._call("shelve_storage", instance_id, verb="instance.shelve"):
            self._hypervisor.delete_disks(instance_id)
        call.progress(100.0)

    def import_disk(self, instance_id: str, spec: InstanceSpec, disk: ImportedDisk, call: CallContext) -> None:
        with self._call("import_disk", instance_id, verb="instance.unshelve", context=call):
            try:
                found = hashlib.sha256(disk.path.read_bytes()).hexdigest()
            except FileNotFoundError as exc:
                raise ImageRejected(f"the exported disk {disk.path} is gone", code="image_missing") from exc
            if disk.sha256 is not None and found != disk.sha256:
                raise ImageRejected(
                    f"the exported disk {disk.path} is not what was exported", code="image_checksum_mismatch"
                )
            with self._hypervisor.lock:
                self._hypervisor.find_owned(instance_id)
                if self._hypervisor.disks.get(instance_id, disk.name) is None:
                    options = spec.disks_by_name()[disk.name]
                    size_mib = 0 if isinstance(options, CdromDisk) else options.size_mib
                    self._hypervisor.disks.put_one(instance_id, disk.name, Disk(size_mib))
        call.progress(100.0)
