"""The snapshot family of verbs on the simulated hypervisor.

Simulated disks hold nothing, so an export is an empty image of the right size; a snapshot is what can be seen of the
guest: its power, its boots, how long it ran.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from agent.drivers.base import CallContext
from agent.drivers.fake.domains import Domain
from agent.drivers.fake.parts import Parts
from agent.drivers.verbs.snapshot import DiskExport, ExportRequest, RevertRequest, SnapshotInfo, SnapshotRequest
from agent.errors import FailedPrecondition, NotFound, Unavailable
from agent.messages.spec import InstanceSpec
from agent.messages.types import DiskFormat

_MIB: Final = 1024 * 1024
_CLUSTER: Final = 64 * 1024


class FakeSnapshot(Parts):
    """See `agent.drivers.verbs.snapshot`."""

    def export_disks(
        self, instance_id: str, spec: InstanceSpec, request: ExportRequest, call: CallContext
    ) -> dict[str, DiskExport]:
        with self._call("export_disks", instance_id, verb="instance.export", context=call):
            with self._hypervisor.lock:
                live = self._hypervisor.find_owned(instance_id).active
                if self._hypervisor.disks.get(instance_id) is None:
                    raise FailedPrecondition("the instance has no disk", code="disk_missing")
            sizes = {name: _size_mib(spec, name) * _MIB for name in request.targets}
            for name, path in request.targets.items():
                try:
                    _write(path, sizes[name], request.format)
                except OSError as exc:
                    raise Unavailable(f"the export's folder: {exc.strerror}", code="storage_unavailable") from exc
                request.report(sizes[name], sum(sizes.values()))
        return {name: DiskExport(size, live) for name, size in sizes.items()}

    def abort_export(self, instance_id: str, folder: Path) -> None:
        with self._call("abort_export", instance_id):
            del folder  # an export here ends with the call that made it

    def create_snapshot(
        self, instance_id: str, spec: InstanceSpec, request: SnapshotRequest, call: CallContext
    ) -> SnapshotInfo:
        del spec
        name = request.name
        with self._call("create_snapshot", instance_id, verb="snapshot.create", context=call), self._hypervisor.lock:
            domain = self._hypervisor.find_owned(instance_id)
            if name not in domain.snapshots:
                domain.snapshots[name] = {
                    "power": domain.power,
                    "created_at": time.time(),
                    "description": request.description,
                    "boots": domain.boots,
                    "ran_s": _ran_s(domain),
                    "spec_json": domain.spec_json,
                }
                self._hypervisor.domains.put(domain)
            return _info(name, domain.snapshots[name])

    def list_snapshots(self, instance_id: str) -> list[SnapshotInfo]:
        with self._call("list_snapshots", instance_id, verb="snapshot.list"), self._hypervisor.lock:
            found = self._hypervisor.find_owned(instance_id).snapshots
            infos = [_info(name, kept) for name, kept in found.items()]
        return sorted(infos, key=lambda info: (info.created_at, info.name))

    def revert_snapshot(self, instance_id: str, spec: InstanceSpec, request: RevertRequest, call: CallContext) -> None:
        with self._call("revert_snapshot", instance_id, verb="snapshot.revert", context=call), self._hypervisor.lock:
            domain = self._hypervisor.find_owned(instance_id)
            if domain.reverted_by == request.mark:
                return
            kept = domain.snapshots.get(request.name)
            if kept is None:
                raise NotFound(f"the instance has no snapshot {request.name}", code="unknown_snapshot")
            self._hypervisor.stop(domain, "stopped", "from-snapshot")
            domain.set_spec(spec, request.generation, request.life)
            domain.boots, domain.reverted_by = kept["boots"], request.mark
            if kept["ran_s"] is None:
                self._hypervisor.domains.put(domain)
                if request.start:
                    self._hypervisor.start(instance_id)
                return
            now = time.time()
            domain.started_at = now - kept["ran_s"]
            domain.process_at = now
            paused = request.start is False or (request.start is None and kept["power"] == "paused")
            domain.paused_at = now if paused else None
            self._hypervisor.set_power(domain, "paused" if paused else "running", "from-snapshot")

    def delete_snapshot(self, instance_id: str, spec: InstanceSpec, name: str, call: CallContext) -> None:
        del spec
        with self._call("delete_snapshot", instance_id, verb="snapshot.delete", context=call), self._hypervisor.lock:
            domain = self._hypervisor.find_owned(instance_id)
            if domain.snapshots.pop(name, None) is not None:
                self._hypervisor.domains.put(domain)


def _ran_s(domain: Domain) -> float | None:
    if not domain.active or domain.started_at is None:
        return None
    return (domain.paused_at or time.time()) - domain.started_at


def _info(name: str, kept: Mapping[str, Any]) -> SnapshotInfo:
    return SnapshotInfo(
        name=name,
        memory=kept["ran_s"] is not None,
        power=kept["power"],
        created_at=datetime.fromtimestamp(kept["created_at"], UTC),
        description=kept["description"],
        spec=None if kept["spec_json"] is None else InstanceSpec.model_validate_json(kept["spec_json"]),
    )


def _size_mib(spec: InstanceSpec, name: str) -> int:
    if name == "root":
        return spec.root_disk.size_mib
    return next(getattr(disk, "size_mib", 0) for disk in spec.disks if disk.name == name)


def empty_qcow2(size_bytes: int) -> bytes:
    """A valid qcow2 image of zeros, without qemu-img: header, refcounts and an empty L1 table."""
    per_table = _CLUSTER // 8 * _CLUSTER
    entries = max(1, -(-size_bytes // per_table))
    l1_clusters = -(-entries * 8 // _CLUSTER)
    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQII", b"QFI\xfb", 3, 0, 0, 16, size_bytes, 0, entries, 3 * _CLUSTER, _CLUSTER, 1, 0, 0,
        0, 0, 0, 4, 104,
    )  # fmt: skip
    image = bytearray((3 + l1_clusters) * _CLUSTER)
    image[: len(header)] = header
    struct.pack_into(">Q", image, _CLUSTER, 2 * _CLUSTER)
    for cluster in range(3 + l1_clusters):
        struct.pack_into(">H", image, 2 * _CLUSTER + 2 * cluster, 1)
    return bytes(image)


def _write(path: Path, size_bytes: int, format: DiskFormat) -> None:
    if format == "qcow2":
        path.write_bytes(empty_qcow2(size_bytes))
        return
    with path.open("wb") as file:
        file.truncate(size_bytes)
