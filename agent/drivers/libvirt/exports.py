"""Copies an instance's disks as flattened images: through QEMU where the guest runs, with qemu-img where not."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import structlog

from agent.drivers.base import CallContext
from agent.drivers.libvirt import backup_job, disk_bounds, domains, qemu_img
from agent.drivers.libvirt.connection import Link
from agent.drivers.libvirt.files import MIB, os_errors
from agent.drivers.libvirt.qemu_img_convert import convert
from agent.drivers.libvirt.settings import LibvirtSettings
from agent.drivers.libvirt.volumes import Location
from agent.drivers.verbs.snapshot import DiskExport, ExportRequest
from agent.errors import ResourceExhausted

_log = structlog.get_logger(__name__)
_SLOWEST_MIB_S: Final = 4
_ATTEMPTS: Final = 2


class Exporter:
    """One export of one instance. Called in a worker thread."""

    def __init__(  # noqa: PLR0917 - the parts of one export
        self,
        settings: LibvirtSettings,
        link: Link,
        instance_id: str,
        disks: Mapping[str, Location],
        request: ExportRequest,
        call: CallContext,
    ) -> None:
        self._settings = settings
        self._link = link
        self._id = instance_id
        self._disks = disks
        self._bounds = {name: disk_bounds.bound(location) for name, location in disks.items()}
        self._request = request
        self._call = call
        self._total = sum(bound.virtual for bound in self._bounds.values())
        self._limit_s = settings.qemu_img_timeout_s + self._total / MIB / _SLOWEST_MIB_S

    def run(self) -> dict[str, DiskExport]:
        """Copy; see `Driver.export_disks`."""
        targets, again = self._request.targets, self._request.compress or self._request.format == "raw"
        for _attempt in range(_ATTEMPTS):
            live = self._is_active()
            self._check_space(next(iter(targets.values())).parent, twice=live and again)
            try:
                if live:
                    self._run_live(targets, again=again)
                else:
                    self._convert(self._disks)
            except backup_job.Interrupted:
                # Copying what the guest left is as good: it is of one point in time, too.
                _log.info("libvirt.export.guest_ended", instance=self._id)
                _remove(targets)
                continue
            return {name: DiskExport(bound.virtual, live) for name, bound in self._bounds.items()}
        raise ResourceExhausted("the guest starts and stops again and again; try later", code="resource_exhausted")

    def _is_active(self) -> bool:
        with self._link.call() as connection:
            return bool(domains.find_owned(connection, self._id).isActive())

    def _check_space(self, folder: Path, *, twice: bool) -> None:
        """A live copy for which there is no room would fail the guest's own writes: so it is not begun."""
        needed = sum(bound.data for bound in self._bounds.values()) * (2 if twice else 1)
        needed += self._settings.min_free_mib * MIB
        with os_errors("reading the free space"):
            facts = os.statvfs(folder)
        free = facts.f_bavail * facts.f_frsize
        if free < needed:
            raise ResourceExhausted(
                f"an export may need {-(-needed // MIB)} MiB where it is made, and {free // MIB} MiB are free",
                code="no_space", needed_mib=-(-needed // MIB), free_mib=free // MIB,
            )  # fmt: skip

    def _run_live(self, targets: Mapping[str, Path], *, again: bool) -> None:
        """QEMU writes qcow2; another form is made of that in a second pass, when the guest is no longer held up."""
        pushed = {name: path.with_suffix(".push") if again else path for name, path in targets.items()}
        for name, path in pushed.items():
            self._make(path, self._bounds[name].virtual)
        try:
            with self._link.call() as connection:
                domain = domains.find_owned(connection, self._id)
                if not domain.isActive():
                    raise backup_job.Interrupted
                backup_job.begin(domain, {name: (self._disks[name], path) for name, path in pushed.items()})
            backup_job.wait(self._link, self._id, self._request.report, self._call, self._limit_s)
        except backup_job.Interrupted:
            _remove(pushed)
            raise
        except BaseException:
            backup_job.end(self._link, self._id, next(iter(pushed.values())).parent)
            raise
        if again:
            copies = {name: Location("file", path, "qcow2") for name, path in pushed.items()}
            self._convert(copies)
            _remove(pushed)

    def _make(self, path: Path, size: int) -> None:
        path.unlink(missing_ok=True)
        qemu_img.run(self._settings, ["create", "-q", "-f", "qcow2", "--", str(path), str(size)])

    def _convert(self, sources: Mapping[str, Location]) -> None:
        request = self._request
        before = 0
        for name, target in request.targets.items():
            source, size = sources[name], self._bounds[name].virtual

            def percent(value: float, before: int = before, size: int = size) -> None:
                self._request.report(before + int(size * value / 100), self._total)

            target.unlink(missing_ok=True)
            convert(
                self._settings,
                (source.format, source.path),
                (request.format, target),
                compress=request.compress,
                percent=percent,
                cancelled=self._call.cancelled,
                limit_s=self._limit_s,
            )
            before += size


def _remove(paths: Mapping[str, Path]) -> None:
    for path in paths.values():
        path.unlink(missing_ok=True)
