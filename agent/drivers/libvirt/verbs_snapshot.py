"""The snapshot family of verbs over libvirt."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree as ET

from agent.drivers.base import CallContext
from agent.drivers.libvirt import backup_job, domains, errors, metadata, snapshots
from agent.drivers.libvirt.binding import libvirt
from agent.drivers.libvirt.exports import Exporter
from agent.drivers.libvirt.parts import Parts
from agent.drivers.libvirt.volumes import ROOT, Location, Volume
from agent.drivers.verbs.snapshot import DiskExport, ExportRequest, RevertRequest, SnapshotInfo, SnapshotRequest
from agent.errors import Unsupported
from agent.messages.spec import InstanceSpec
from agent.messages.spec_disks import CdromDisk

_IDLE_S: Final = 600.0
"""Longest wait for a snapshot that outlived the agent."""


class LibvirtSnapshot(Parts):
    """See `agent.drivers.verbs.snapshot`."""

    # --- exports ------------------------------------------------------------------------------------------------

    def export_disks(
        self, instance_id: str, spec: InstanceSpec, request: ExportRequest, call: CallContext
    ) -> dict[str, DiskExport]:
        """Live: a push backup of libvirt's; cold: qemu-img."""
        self._refuse_simulation()
        with self._link.call() as connection:
            domains.find_owned(connection, instance_id)
        disks = {name: self._locate(instance_id, spec, name) for name in request.targets}
        backup_job.end(self._link, instance_id, next(iter(request.targets.values())).parent)
        exporter = Exporter(self._settings, self._link, instance_id, disks, request, call)
        return exporter.run()

    def abort_export(self, instance_id: str, folder: Path) -> None:
        if not self._settings.simulated:
            backup_job.end(self._link, instance_id, folder)

    # --- snapshots ----------------------------------------------------------------------------------------------

    def create_snapshot(
        self, instance_id: str, spec: InstanceSpec, request: SnapshotRequest, call: CallContext
    ) -> SnapshotInfo:
        self._refuse_simulation()
        paths = self._snapshot_paths(instance_id, spec)
        with self._link.call() as connection:
            domain = domains.find_owned(connection, instance_id)
            snapshots.wait_idle(domain, _IDLE_S)
            if request.running and domain.isActive() and int(domain.state()[0]) == libvirt.VIR_DOMAIN_PAUSED:
                domain.resume()
            found = snapshots.find(domain, request.name)
            if found is None:
                if domain.isActive():
                    snapshots.refuse_plugged_vcpus(ET.fromstring(domain.XMLDesc(0)))  # noqa: S314 - libvirtd wrote it
                document = snapshots.request(request.name, request.description, *_devices(domain, paths))
                found = domain.snapshotCreateXML(document)
            call.progress(100.0)
            return snapshots.describe(found)

    def list_snapshots(self, instance_id: str) -> list[SnapshotInfo]:
        self._refuse_simulation()
        with self._link.call() as connection:
            domain = domains.find_owned(connection, instance_id)
            found = []
            for snapshot in domain.listAllSnapshots():
                try:
                    found.append(snapshots.describe(snapshot))
                except libvirt.libvirtError as exc:
                    if not errors.is_code(exc, "VIR_ERR_NO_DOMAIN_SNAPSHOT"):  # deleted meanwhile
                        raise
        return sorted(found, key=lambda info: (info.created_at, info.name))

    def revert_snapshot(self, instance_id: str, spec: InstanceSpec, request: RevertRequest, call: CallContext) -> None:
        self._refuse_simulation()
        self._snapshot_paths(instance_id, spec)
        ours = metadata.build(spec, generation=request.generation, host=self._host, life=request.life)
        with self._link.call() as connection:
            domain = domains.find_owned(connection, instance_id)
            snapshots.wait_idle(domain, _IDLE_S)
            if snapshots.is_marked(domain, request.mark):
                return
            snapshot = snapshots.must_find(domain, request.name)
            memory = snapshots.describe(snapshot).memory
            renewed = snapshots.renew(domain, snapshot, ours, request.mark)
            flags = 0
            if request.start is True:
                flags = libvirt.VIR_DOMAIN_SNAPSHOT_REVERT_RUNNING
            elif request.start is False and memory:
                flags = libvirt.VIR_DOMAIN_SNAPSHOT_REVERT_PAUSED
            domain.revertToSnapshot(renewed, flags)
        call.progress(100.0)

    def delete_snapshot(self, instance_id: str, spec: InstanceSpec, name: str, call: CallContext) -> None:
        """Remove it. What an attempt that was cut off left in the disks goes too, though libvirt does not know it."""
        self._refuse_simulation()
        paths = self._snapshot_paths(instance_id, spec)
        with self._link.call() as connection:
            domain = domains.find_owned(connection, instance_id)
            snapshots.wait_idle(domain, _IDLE_S)
            found = snapshots.find(domain, name)
            if found is None:
                found = snapshots.assume(domain, name, *_devices(domain, paths))
            found.delete()
        call.progress(100.0)

    # --- inside -------------------------------------------------------------------------------------------------

    def _refuse_simulation(self) -> None:
        if self._settings.simulated:
            raise Unsupported("the disks of libvirt's simulated hypervisor hold nothing", code="verb_unsupported")

    def _locate(self, instance_id: str, spec: InstanceSpec, name: str) -> Location:
        return self._storage.backend(spec, name).locate(Volume(instance_id, name))

    def _snapshot_paths(self, instance_id: str, spec: InstanceSpec) -> list[Path]:
        """Files of the disks that a snapshot is of. Raises `Unsupported` for a disk that cannot hold one."""
        names = [ROOT, *(disk.name for disk in spec.disks if not isinstance(disk, CdromDisk))]
        paths = []
        for name in names:
            location = self._locate(instance_id, spec, name)
            if location.kind != "file" or location.format != "qcow2":
                raise Unsupported(
                    f"disk {name} is a {location.format} {location.kind}; only qcow2 files can hold snapshots",
                    code="snapshot_unsupported", disk=name,
                )  # fmt: skip
            paths.append(location.path)
        return paths


def _devices(domain: Any, paths: list[Path]) -> tuple[list[str], list[str]]:
    """The target devices of these files, and those of all other disks."""
    document = domain.XMLDesc(0 if domain.isActive() else libvirt.VIR_DOMAIN_XML_INACTIVE)
    wanted = {str(path) for path in paths}
    ours: list[str] = []
    others: list[str] = []
    for disk in ET.fromstring(document).findall("devices/disk"):  # noqa: S314 - libvirtd wrote it
        source, target = disk.find("source"), disk.find("target")
        device = "" if target is None else target.get("dev", "")
        (ours if source is not None and source.get("file") in wanted else others).append(device)
    return ours, others
