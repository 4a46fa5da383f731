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

from agent.drivers.libvirt import domains, errors
from agent.drivers.libvirt.binding import libvirt
from agent.drivers.libvirt.connection import Link
from agent.drivers.libvirt.volumes import Location
from agent.errors import Cancelled, ComputeError, DeadlineExceeded, FailedPrecondition, Internal, ResourceExhausted

_FIRST_POLL_S: Final = 0.005
_POLL_S: Final = 0.25
_END_S: Final = 60.0
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
    cancelled: Callable[[], bool],
    limit_s: float,
) -> None:
    """Wait for the end of the job. Raises `Cancelled` (the caller ends the job), `Interrupted`, `DeadlineExceeded`, and
    what the job failed of.
    """
    deadline, pause = time.monotonic() + limit_s, _FIRST_POLL_S
    while True:
        if cancelled():
            raise Cancelled("cancelled while disks were copied")
        if time.monotonic() > deadline:
            raise DeadlineExceeded(f"copying the disks took more than {limit_s:g} s")
        with link.call() as connection:
            domain = domains.find(connection, instance_id)
            if not domain.isActive():
                raise Interrupted
            stats = domain.jobStats()
            if stats["type"] == libvirt.VIR_DOMAIN_JOB_NONE:
                return _check_success(domain.jobStats(libvirt.VIR_DOMAIN_JOB_STATS_COMPLETED))
            report(int(stats.get("disk_processed", 0)), int(stats.get("disk_total", 0)))
        time.sleep(pause)
        pause = min(pause * 1.5, _POLL_S)


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
    deadline, pause = time.monotonic() + _END_S, _FIRST_POLL_S
    while True:
        with link.call() as connection:
            try:
                domain = domains.find(connection, instance_id)
                if not domain.isActive() or not _copies_into(domain, folder):
                    return
                if pause == _FIRST_POLL_S:
                    domain.abortJob()
            except libvirt.libvirtError as exc:
                if errors.is_lost(exc):
                    raise
                if errors.is_code(exc, "VIR_ERR_NO_DOMAIN"):
                    return
                if not errors.is_code(exc, "VIR_ERR_OPERATION_INVALID"):  # it ended meanwhile
                    raise
        if time.monotonic() > deadline:
            raise DeadlineExceeded("the copying of disks could not be ended in time")
        time.sleep(pause)
        pause = min(pause * 1.5, _POLL_S)


def _copies_into(domain: Any, folder: Path) -> bool:
    try:
        root = ET.fromstring(domain.backupGetXMLDesc())  # noqa: S314 - libvirtd wrote it
    except libvirt.libvirtError as exc:
        if errors.is_code(exc, "VIR_ERR_NO_DOMAIN_BACKUP"):
            return False
        raise
    targets = [Path(target.get("file", "")) for target in root.findall("disks/disk/target")]
    return any(folder in target.parents for target in targets)
