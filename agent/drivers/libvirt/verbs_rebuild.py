"""The rebuild family of verbs over libvirt."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Final

from agent.drivers.base import CallContext, PreparedImage
from agent.drivers.libvirt import domains, qemu_img, seed
from agent.drivers.libvirt.definition import InstanceFiles
from agent.drivers.libvirt.files import MIB, os_errors, write_durably
from agent.drivers.libvirt.parts import Parts
from agent.drivers.libvirt.volumes import ROOT, Source, Volume
from agent.drivers.libvirt.xml_rescue import RESCUE
from agent.drivers.verbs.rebuild import ImportedDisk
from agent.errors import Cancelled, FailedPrecondition, ImageRejected, InvalidArgument, Unsupported
from agent.messages.spec import InstanceSpec
from agent.messages.spec_disks import EphemeralDisk, SwapDisk

NEW: Final = "_new"
"""Added to a disk's name while its successor waits beside it. No disk of a spec can have such a name."""
_NEW_SEED: Final = "seed-new.iso"


class LibvirtRebuild(Parts):
    """See `agent.drivers.verbs.rebuild`."""

    def prepare_rebuild(self, instance_id: str, spec: InstanceSpec, image: PreparedImage, call: CallContext) -> None:
        iso = seed.build(instance_id, spec) if spec.seed is not None else None
        _check_size(image, spec.root_disk.size_mib)
        self._find_owned(instance_id)
        for name, size_mib in _made_anew(spec).items():
            backend, new = self._storage.backend(spec, name), Volume(instance_id, name + NEW)
            # What is there may be of another image: of a rebuild that failed after its point of no return.
            backend.remove(new)
            backend.create(new, size_mib * MIB, image if name == ROOT else None, call)
        with os_errors("making the instance's files"):
            waiting = self._storage.files(instance_id, spec).seed.with_name(_NEW_SEED)
            waiting.unlink(missing_ok=True)
            if iso is not None:
                write_durably(waiting, iso)
        call.progress(100.0)

    def apply_rebuild(self, instance_id: str, spec: InstanceSpec) -> None:
        with self._link.call() as connection:
            if domains.find_owned(connection, instance_id).isActive():
                raise FailedPrecondition("the guest runs and would lose its disks; stop it", code="instance_running")
        for name in _made_anew(spec):
            self._storage.backend(spec, name).replace(Volume(instance_id, name), Volume(instance_id, name + NEW))
        current = self._storage.files(instance_id, spec).seed
        waiting = current.with_name(_NEW_SEED)
        with os_errors("replacing the seed"):
            if waiting.exists():
                waiting.replace(current)

    def discard_rebuild(self, instance_id: str, spec: InstanceSpec) -> None:
        for name in _made_anew(spec):
            self._storage.backend(spec, name).remove(Volume(instance_id, name + NEW))
        with os_errors("removing the new seed"):
            self._storage.files(instance_id, spec).seed.with_name(_NEW_SEED).unlink(missing_ok=True)

    def create_rescue_disk(self, instance_id: str, spec: InstanceSpec, image: PreparedImage, call: CallContext) -> None:
        self._find_owned(instance_id)
        backend, volume = self._storage.backend(spec, ROOT), Volume(instance_id, RESCUE)
        backend.remove(volume)
        backend.create(volume, image.virtual_size_bytes, image, call)
        call.progress(100.0)

    def remove_rescue_disk(self, instance_id: str, spec: InstanceSpec) -> None:
        self._storage.backend(spec, ROOT).remove(Volume(instance_id, RESCUE))

    def shelve_storage(self, instance_id: str, call: CallContext) -> None:
        self._remove_storage(instance_id, keep_variables=True)
        call.progress(100.0)

    def import_disk(self, instance_id: str, spec: InstanceSpec, disk: ImportedDisk, call: CallContext) -> None:
        if self._settings.simulated:
            raise Unsupported("libvirt's simulated hypervisor has no disks to import")
        self._find_owned(instance_id)
        backend, volume = self._storage.backend(spec, disk.name), Volume(instance_id, disk.name)
        if backend.exists(volume):
            return
        verify(disk, call)
        size = qemu_img.virtual_size(self._settings, disk.path, "qcow2", None)
        backend.create_from(volume, size, Source(disk.path, "qcow2", lasting=False), call)
        call.progress(100.0)

    def _with_rescue_disk(self, files: InstanceFiles, instance_id: str, spec: InstanceSpec) -> InstanceFiles:
        """Add the rescue disk to the places of the instance's disks."""
        place = self._storage.backend(spec, ROOT).locate(Volume(instance_id, RESCUE))
        return replace(files, disks={**files.disks, RESCUE: place})

    def _find_owned(self, instance_id: str) -> None:
        with self._link.call() as connection:
            domains.find_owned(connection, instance_id)


def verify(disk: ImportedDisk, call: CallContext) -> None:
    """Compare an exported file with its checksum. Raises `ImageRejected`, `Cancelled`."""
    hashed = hashlib.sha256()
    with os_errors("reading an exported disk"):
        try:
            with disk.path.open("rb", buffering=0) as file:
                while disk.sha256 is not None and (chunk := file.read(4 * MIB)):
                    if call.cancelled():
                        raise Cancelled("cancelled while an exported disk was read")
                    hashed.update(chunk)
        except FileNotFoundError as exc:
            raise ImageRejected(f"the exported disk {disk.path} is gone", code="image_missing") from exc
    if disk.sha256 is not None and hashed.hexdigest() != disk.sha256:
        raise ImageRejected(
            f"the exported disk {disk.path} is not what was exported", code="image_checksum_mismatch", disk=disk.name
        )


def _made_anew(spec: InstanceSpec) -> dict[str, int]:
    """The disks that a rebuild makes anew, with their sizes in MiB; all others are kept."""
    scratch = {disk.name: disk.size_mib for disk in spec.disks if isinstance(disk, EphemeralDisk | SwapDisk)}
    return {ROOT: spec.root_disk.size_mib, **scratch}


def _check_size(image: PreparedImage, size_mib: int) -> None:
    """Raises `InvalidArgument` where the image needs more than the root disk has."""
    needed_mib = -(-image.virtual_size_bytes // MIB)
    if needed_mib > size_mib:
        raise InvalidArgument(
            f"the root disk of {size_mib} MiB is smaller than the image, which needs {needed_mib} MiB",
            code="disk_too_small",
            size_mib=size_mib,
            image_mib=needed_mib,
        )
