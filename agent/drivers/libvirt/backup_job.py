"""One push backup of libvirt: begun, watched, ended. QEMU copies; the disks' chains are not changed.

Each function makes a few calls and keeps no libvirt object, so that a connection that is lost in between is found by
the next call.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree as ET

from agent.drivers.base import CallContext
from agent.drivers.libvirt import domains, errors
from agent.drivers.libvirt.binding import libvirt
from agent.drivers.libvirt.connection import Link
from agent.drivers.libvirt.volumes import Location
from agent.errors import Cancelled, ComputeError, DeadlineExceeded, FailedPrecondition, Internal, ResourceExhausted

_LOOK_S: Final = 0.25
"""How often the progress is told. The job's end is an event, which ends the wait."""
_END_S: Final = 60.0
# libvirtd may not have noticed yet that the QEMU it asks is gone. What it says then has no code of its own.
_MONITOR_GONE: Final = "monitor"
_NO_SPACE: Final = "No space left on device"


class Interrupted(Exception):
    """The guest ended while its disks were copied."""


def begin(domain: Any, disks: Mapping[str, tuple[Location, Path]]) -> None:
    """Begin to copy disks to qcow2 files that are there already. Raises `FailedPrecondition`."""
    root = ET.Element("domainbackup", {"mode": "push"})
    listed = ET.SubElement(root, "disks")
    for name, (location, target) in disks.items():
        device = _device(domain, location.path)
        if device is None:
            raise FailedPrecondition(f"disk {name} is not attached to the guest", code="disk_missing", disk=name)
        disk = ET.SubElement(listed, "disk", {"name": device, "backup": "yes", "type": "file"})
        ET.SubElement(disk, "target", {"file": str(target)})
        ET.SubElement(disk, "driver", {"type": "qcow2"})
    # The files are ours: libvirt would make them as root's, and an agent that is not root could not read them.
    domain.backupBegin(ET.tostring(root, encoding="unicode"), None, libvirt.VIR_DOMAIN_BACKUP_BEGIN_REUSE_EXTERNAL)


def _device(domain: Any, path: Path) -> str | None:
    root = ET.fromstring(domain.XMLDesc())  # noqa: S314 - libvirtd wrote it, and expands no entities
    for disk in root.findall("devices/disk"):
        source, target = disk.find("source"), disk.find("target")
        if source is not None and target is not None and str(path) in (source.get("file"), source.get("dev")):
            return target.get("dev")
    return None


def wait(
    link: Link,
    instance_id: str,
    report: Callable[[int, int], None],
    call: CallContext,
    limit_s: float,
) -> None:
    """Wait for the end of the job. Raises `Cancelled` (the caller ends the job), `Interrupted`, `DeadlineExceeded`, and
    what the job failed of.
    """
    deadline = time.monotonic() + limit_s
    with link.listening(instance_id, call) as news:
        while True:
            news.clear()
            if call.cancelled():
                raise Cancelled("cancelled while disks were copied")
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"copying the disks took more than {limit_s:g} s")
            stats = _look(link, instance_id)
            if stats is not None and stats["type"] == libvirt.VIR_DOMAIN_JOB_NONE:
                return
            if stats is not None:
                report(int(stats.get("disk_processed", 0)), int(stats.get("disk_total", 0)))
            news.wait(_LOOK_S)


def _look(link: Link, instance_id: str) -> Mapping[str, Any] | None:
    """How far the job is; None where QEMU is just ending and cannot be asked. Raises `Interrupted` when it has ended,
    and what the job failed of.
    """
    with link.call() as connection:
        domain = domains.find(connection, instance_id)
        if not domain.isActive():
            raise Interrupted
        try:
            stats: dict[str, Any] = domain.jobStats()
        except libvirt.libvirtError as exc:
            if errors.is_lost(exc):
                raise
            if domain.isActive():
                if _MONITOR_GONE not in (exc.get_error_message() or ""):
                    raise
                return None
            raise Interrupted from exc
        if stats["type"] == libvirt.VIR_DOMAIN_JOB_NONE:
            _check_success(domain.jobStats(libvirt.VIR_DOMAIN_JOB_STATS_COMPLETED))
        return stats


def _check_success(stats: Mapping[str, Any]) -> None:
    if stats.get("success"):
        return
    message = str(stats.get("errmsg", "it says no more"))
    error: ComputeError = Internal(f"libvirt: the copying failed: {message}", code="hypervisor_operation_failed")
    if _NO_SPACE in message:
        error = ResourceExhausted("no space left while disks were copied", code="no_space")
    raise error


def end(link: Link, instance_id: str, folder: Path) -> None:
    """End a job that copies into this folder, and wait for its end. Another's job is left alone. Idempotent."""
    deadline = time.monotonic() + _END_S
    asked = False
    # It is what ends a cancelled call, so no cancel ends it.
    with link.listening(instance_id, CallContext()) as news:
        while True:
            news.clear()
            if not _end_once(link, instance_id, folder, abort=not asked):
                return
            asked = True
            if time.monotonic() > deadline:
                raise DeadlineExceeded("the copying of disks could not be ended in time")
            news.wait(_LOOK_S)


def _end_once(link: Link, instance_id: str, folder: Path, *, abort: bool) -> bool:
    """Ask the job to end, if it is to be asked. False where there is none any more that copies into the folder."""
    with link.call() as connection:
        try:
            domain = domains.find(connection, instance_id)
            if not domain.isActive() or not _copies_into(domain, folder):
                return False
            if abort:
                domain.abortJob()
        except libvirt.libvirtError as exc:
            if errors.is_code(exc, "VIR_ERR_NO_DOMAIN"):
                return False
            if not errors.is_code(exc, "VIR_ERR_OPERATION_INVALID"):  # it ended meanwhile
                raise
        return True


def _copies_into(domain: Any, folder: Path) -> bool:
    try:
        root = ET.fromstring(domain.backupGetXMLDesc())  # noqa: S314 - libvirtd wrote it
    except libvirt.libvirtError as exc:
        if errors.is_code(exc, "VIR_ERR_NO_DOMAIN_BACKUP"):
            return False
        raise
    targets = [Path(target.get("file", "")) for target in root.findall("disks/disk/target")]
    return any(folder in target.parents for target in targets)
