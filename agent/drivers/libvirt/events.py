"""libvirt's domain events: registration, and translation into the driver's typed events.

Callbacks run on the event loop's thread. They copy plain values, hand over and return; they make no call to the
hypervisor and never raise, because nobody would catch it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Final, Literal, NamedTuple

import structlog

from agent.drivers.base import DriverEvent, EventSink, PowerChanged, Reported
from agent.drivers.libvirt import states
from agent.drivers.libvirt.binding import constant, libvirt
from agent.messages.events import (
    HypervisorEvent,
    InstanceAgentLifecycle,
    InstanceBalloon,
    InstanceBlockJob,
    InstanceDeviceRemoved,
    InstanceIoError,
    InstanceJobCompleted,
    InstanceMigrationIteration,
    InstanceRebooted,
    InstanceWatchdog,
)

_log = structlog.get_logger(__name__)

_REBOOT_S: Final = 1.0

Translator = Callable[..., DriverEvent | None]
"""Takes the instance id and the event's own arguments."""


@cache
def _words(prefix: str, names: str) -> dict[int, str]:
    """Return {constant: word} for space-separated constant names; NAME_WITH_SCORES becomes name-with-scores."""
    numbers = {constant(prefix + name): name.lower().replace("_", "-") for name in names.split()}
    return {number: word for number, word in numbers.items() if number is not None}


def _lifecycle(instance_id: str, event: int, detail: int) -> DriverEvent | None:
    change = states.of_event(event, detail)
    return PowerChanged(instance_id, change.power, change.reason) if change else None


def _reboot(instance_id: str) -> DriverEvent:
    return Reported(InstanceRebooted(instance_id=instance_id))


_IO_ACTIONS: Final[tuple[Literal["none", "pause", "report"], ...]] = ("none", "pause", "report")


def _io_error(instance_id: str, path: str | None, alias: str, action: int, reason: str | None) -> DriverEvent:
    known = 0 <= action < len(_IO_ACTIONS)
    event = InstanceIoError(
        instance_id=instance_id,
        device=alias or "unknown",
        path=path or None,
        reason=reason or "unknown",
        action=_IO_ACTIONS[action] if known else "none",
    )
    return Reported(event)


def _watchdog(instance_id: str, action: int) -> DriverEvent:
    words = _words("VIR_DOMAIN_EVENT_WATCHDOG_", "NONE PAUSE RESET POWEROFF SHUTDOWN DEBUG INJECTNMI")
    return Reported(InstanceWatchdog(instance_id=instance_id, action=words.get(action, "unknown")))


_BLOCK_JOB_STATUS: Final[tuple[Literal["completed", "failed", "canceled", "ready"], ...]] = (
    "completed",
    "failed",
    "canceled",
    "ready",
)


def _block_job(instance_id: str, disk: str, job: int, status: int) -> DriverEvent | None:
    if not 0 <= status < len(_BLOCK_JOB_STATUS):
        return None
    jobs = _words("VIR_DOMAIN_BLOCK_JOB_TYPE_", "PULL COPY COMMIT ACTIVE_COMMIT BACKUP")
    event = InstanceBlockJob(
        instance_id=instance_id,
        device=disk or "unknown",
        job=jobs.get(job, "unknown"),
        status=_BLOCK_JOB_STATUS[status],
    )
    return Reported(event)


def _device_removed(instance_id: str, alias: str) -> DriverEvent:
    return Reported(InstanceDeviceRemoved(instance_id=instance_id, alias=alias))


def _device_removal_failed(instance_id: str, alias: str) -> DriverEvent:
    return Reported(InstanceDeviceRemoved(instance_id=instance_id, alias=alias, removed=False))


def _agent_lifecycle(instance_id: str, state: int, reason: int) -> DriverEvent:
    connected = state == constant("VIR_CONNECT_DOMAIN_EVENT_AGENT_LIFECYCLE_STATE_CONNECTED")
    reasons = _words("VIR_CONNECT_DOMAIN_EVENT_AGENT_LIFECYCLE_REASON_", "UNKNOWN DOMAIN_STARTED CHANNEL")
    event = InstanceAgentLifecycle(
        instance_id=instance_id,
        state="connected" if connected else "disconnected",
        reason=reasons.get(reason, "unknown"),
    )
    return Reported(event)


def _job_completed(instance_id: str, figures: Mapping[str, Any]) -> DriverEvent:
    operations = _words(
        "VIR_DOMAIN_JOB_OPERATION_",
        "UNKNOWN START SAVE RESTORE MIGRATION_IN MIGRATION_OUT SNAPSHOT SNAPSHOT_REVERT DUMP BACKUP SNAPSHOT_DELETE",
    )
    numbers = {key: value for key, value in figures.items() if isinstance(value, int)}
    event = InstanceJobCompleted(
        instance_id=instance_id,
        operation=operations.get(numbers.pop("operation", 0), "unknown"),
        # libvirt leaves the field out in old versions, which reported only completed jobs.
        succeeded=bool(numbers.pop("success", True)),
        figures={key: int(value) for key, value in numbers.items()},
    )
    return Reported(event)


def _migration_iteration(instance_id: str, iteration: int) -> DriverEvent:
    return Reported(InstanceMigrationIteration(instance_id=instance_id, iteration=iteration))


def _balloon(instance_id: str, actual_kib: int) -> DriverEvent:
    return Reported(InstanceBalloon(instance_id=instance_id, actual_mib=actual_kib // 1024))


class _Source(NamedTuple):
    event_id: str
    translate: Translator
    reports: type[HypervisorEvent] | None


_SOURCES: Final[tuple[_Source, ...]] = (
    _Source("LIFECYCLE", _lifecycle, None),
    _Source("REBOOT", _reboot, InstanceRebooted),
    _Source("IO_ERROR_REASON", _io_error, InstanceIoError),
    _Source("WATCHDOG", _watchdog, InstanceWatchdog),
    _Source("BLOCK_JOB_2", _block_job, InstanceBlockJob),
    _Source("DEVICE_REMOVED", _device_removed, InstanceDeviceRemoved),
    _Source("DEVICE_REMOVAL_FAILED", _device_removal_failed, InstanceDeviceRemoved),
    _Source("AGENT_LIFECYCLE", _agent_lifecycle, InstanceAgentLifecycle),
    _Source("JOB_COMPLETED", _job_completed, InstanceJobCompleted),
    _Source("MIGRATION_ITERATION", _migration_iteration, InstanceMigrationIteration),
    _Source("BALLOON_CHANGE", _balloon, InstanceBalloon),
)


class _RebootFilter:
    """Lets one reboot per instance through within `_REBOOT_S`: one reset of a q35 guest arrives two to seven times."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}

    def passes(self, event: DriverEvent) -> bool:
        if not (isinstance(event, Reported) and isinstance(event.event, InstanceRebooted)):
            return True
        now = time.monotonic()
        # Only a handful of guests reboot within a second, so the whole dictionary can be looked through.
        self._until = {key: until for key, until in self._until.items() if until > now}
        known = event.event.instance_id in self._until
        self._until[event.event.instance_id] = now + _REBOOT_S
        return not known


class Subscription:
    """The callbacks registered on one connection. Events that come after `end` are dropped."""

    def __init__(self, connection: Any, emit: EventSink) -> None:
        """Register for all domains. Raises `libvirtError` if lifecycle events are not to be had."""
        self._connection = connection
        self._emit = emit
        self._live = True
        self._reboots = _RebootFilter()
        self._ids: list[int] = []
        self.kinds: set[str] = set()
        for source in _SOURCES:
            self._register(source)

    def _register(self, source: _Source) -> None:
        number = constant(f"VIR_DOMAIN_EVENT_ID_{source.event_id}")
        if number is None:
            return
        try:
            callback = self._callback(source.translate)
            self._ids.append(self._connection.domainEventRegisterAny(None, number, callback, None))
        except libvirt.libvirtError:
            # An older hypervisor may lack one of the extra events, but without lifecycle there is no driver.
            if source.reports is None:
                raise
            return
        if source.reports is not None:
            self.kinds.add(source.reports.kind)

    def _callback(self, translate: Translator) -> Callable[..., None]:
        def callback(_connection: Any, domain: Any, *arguments: Any) -> None:
            try:
                # UUIDString reads a field of the local object; the last argument is our unused opaque.
                event = translate(domain.UUIDString(), *arguments[:-1])
                if event is not None and self._live and self._reboots.passes(event):
                    self._emit(event)
            except Exception:
                _log.exception("libvirt.event.failed", translator=translate.__name__)

        return callback

    def end(self) -> None:
        """Drop later events and deregister, as far as the connection still works. Idempotent."""
        self._live = False
        while self._ids:
            number = self._ids.pop()
            try:
                self._connection.domainEventDeregisterAny(number)
            except libvirt.libvirtError:
                # On a dead connection the local half is gone all the same, and that is what frees the socket.
                continue
