"""What the driver contract needs of a driver under test, and what its tests share.

A driver from elsewhere runs the suite by giving a fixture `driver_case` that returns its own `DriverCase`.
"""

from __future__ import annotations

import atexit
import functools
import sys
import tempfile
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

from agent.drivers.base import (
    OPTIONAL_VERBS,
    CallContext,
    ConnectionChanged,
    Driver,
    DriverEvent,
    PowerChanged,
    PreparedImage,
)
from agent.drivers.fake.verbs_snapshot import empty_qcow2
from agent.drivers.verbs.rebuild import ImportedDisk
from agent.drivers.verbs.snapshot import ExportRequest, RevertRequest, SnapshotRequest
from agent.errors import Unsupported
from agent.messages.events import PowerState
from agent.messages.life import ORDINARY
from agent.messages.spec import InstanceSpec

WAIT_S = 60.0
"""Limit of every wait; a passing test never reaches it."""

PREFIX = "contract-"
"""Names of all domains that the suite makes begin so; a case removes what is left of them."""


class Difference(Enum):
    """Ways in which a driver may differ from the others. A test asserts the different behaviour, by name."""

    GUEST_IGNORES_SHUTDOWN = "no operating system runs in the guest, so a shutdown or reboot has no effect"
    STATE_DIES_WITH_THE_DRIVER = "domains live in the agent's process, so the next driver does not find them"
    STATE_DIES_WITH_THE_HYPERVISOR = "a restart of the hypervisor loses the domains"
    CANNOT_BE_INTERRUPTED = "the hypervisor is in the agent's process and cannot go away"
    PLAIN_MACHINES_ONLY = "the hypervisor is simulated and refuses what concerns real hardware"
    A_RESTORED_GUEST_RUNS = "a guest that was paused when its memory was saved runs when it is restored"
    VCPUS_ARE_NOT_UNPLUGGED = "guests are emulated, and QEMU without KVM crashes after a vCPU was unplugged"
    PLUGGED_VCPUS_HAVE_NO_SNAPSHOT = "QEMU cannot load the memory of a guest with vCPUs that can be unplugged"
    DISKS_ARE_NOT_FILES = "disks are kept in memory and details name no path"


class DriverCase(ABC):
    """One driver in one setting."""

    differences: ClassVar[frozenset[Difference]] = frozenset()

    def has(self, difference: Difference) -> bool:
        return difference in self.differences

    @abstractmethod
    def make(self, state_dir: Path, emit: Callable[[DriverEvent], None], **settings: Any) -> Driver:
        """Construct the driver; not connected."""

    @abstractmethod
    def add_foreign(self, driver: Driver, name: str, *, disk: bool = False) -> str:
        """Define and start a domain that is not the agent's, with a disk if there is to be one; return its id."""

    def interrupt(self, driver: Driver) -> None:
        """Take the hypervisor away from the driver."""
        raise NotImplementedError

    def restore(self, driver: Driver) -> None:  # noqa: B027
        """Bring it back. Idempotent."""

    def clean(self) -> None:  # noqa: B027
        """Remove all domains that a test left."""


class EventRecorder:
    """A sink that remembers, and lets a test wait for what it expects."""

    def __init__(self) -> None:
        self._events: list[DriverEvent] = []
        self._changed = threading.Condition()

    def __call__(self, event: DriverEvent) -> None:
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()

    @property
    def all(self) -> list[DriverEvent]:
        with self._changed:
            return list(self._events)

    def mark(self) -> int:
        """The position behind the newest event."""
        with self._changed:
            return len(self._events)

    def wait(self, match: Callable[[DriverEvent], bool], what: object, since: int = 0) -> int:
        """Wait for an event from position `since` on that matches; return the position behind it."""
        limit = time.monotonic() + WAIT_S
        with self._changed:
            position = since
            while True:
                while position < len(self._events):
                    position += 1
                    if match(self._events[position - 1]):
                        return position
                if not self._changed.wait(limit - time.monotonic()):
                    raise AssertionError(f"no {what} among {self._events[since:]}")

    def wait_power(self, instance_id: str, power: PowerState | None, reason: str, since: int = 0) -> int:
        """Wait for a change of power; `power` None takes any, for reasons that say nothing about it."""

        def match(event: DriverEvent) -> bool:
            return (
                isinstance(event, PowerChanged)
                and (event.instance_id, event.reason) == (instance_id, reason)
                and power in {None, event.power}
            )

        return self.wait(match, f"{power}/{reason} of {instance_id}", since)

    def wait_connection(self, connected: bool, since: int = 0) -> int:
        def match(event: DriverEvent) -> bool:
            return isinstance(event, ConnectionChanged) and event.connected is connected

        return self.wait(match, f"ConnectionChanged({connected})", since)

    @property
    def connections(self) -> list[bool]:
        return [event.connected for event in self.all if isinstance(event, ConnectionChanged)]


def make_spec(**changes: Any) -> InstanceSpec:
    """The smallest guest that every hypervisor takes: nothing boots from its empty disk."""
    data: dict[str, Any] = {
        "name": f"{PREFIX}{uuid.uuid4().hex[:12]}",
        "vcpus": 1,
        "memory_mib": 32,
        "root_disk": {"size_mib": 16},
        "nics": [{"type": "user"}],
        "rng": False,
        "guest_agent": False,
    }
    return InstanceSpec.model_validate(data | changes)


def make_image(path: Path, size_mib: int) -> PreparedImage:
    """A raw image of zeros."""
    with path.open("xb") as file:
        file.truncate(size_mib * 1024 * 1024)
    return PreparedImage(path=path, format="raw", virtual_size_bytes=size_mib * 1024 * 1024, sha256="0" * 64)


@dataclass
class Instance:
    """One instance of a test, with the driver's calls bound to its id."""

    driver: Driver
    spec: InstanceSpec = field(default_factory=make_spec)
    id: str = field(default_factory=lambda: str(uuid.uuid4()))

    def create(self, *, generation: int = 1, start: bool = False) -> Instance:
        self.driver.create_storage(self.id, self.spec, {}, CallContext())
        self.driver.define(self.id, self.spec, generation=generation)
        if start:
            self.driver.start(self.id)
        return self

    def remove(self) -> None:
        self.driver.destroy(self.id)
        self.driver.undefine(self.id)
        self.driver.delete_storage(self.id)

    @property
    def power(self) -> PowerState:
        return self.driver.get(self.id).power


@contextmanager
def count_calls() -> Iterator[dict[str, int]]:
    """Count the functions called in this thread, and those among them that start a process."""
    counts = {"calls": 0, "processes": 0}

    def profile(_frame: FrameType, event: str, argument: Any) -> None:
        if event in {"call", "c_call"}:
            counts["calls"] += 1
        if event == "c_call" and argument.__name__ in {"fork_exec", "posix_spawn", "fork", "system"}:
            counts["processes"] += 1

    sys.setprofile(profile)
    try:
        yield counts
    finally:
        sys.setprofile(None)


@functools.cache
def small_image() -> PreparedImage:
    """An empty qcow2 image of the size of `make_spec`'s root disk, of which nothing is left in the end."""
    folder = tempfile.TemporaryDirectory(prefix="contract-image-")
    atexit.register(folder.cleanup)
    path = Path(folder.name) / "image.qcow2"
    path.write_bytes(empty_qcow2(16 * 1024 * 1024))
    return PreparedImage(path=path, format="qcow2", virtual_size_bytes=16 * 1024 * 1024, sha256="0" * 64)


Verb = Callable[[Driver, str], object]

NO_EXPORT = ExportRequest({"root": Path("/nonexistent/root.qcow2")}, "qcow2")
NO_REVERT = RevertRequest("s", 1, ORDINARY, None, "mark")

OPTIONAL: dict[str, Verb] = {
    "instance.pause": lambda driver, uid: driver.pause(uid),
    "instance.resume": lambda driver, uid: driver.resume(uid),
    "instance.reboot": lambda driver, uid: driver.reboot(uid),
    "console.log": lambda driver, uid: driver.console_log(uid, 1024),
    "instance.rebuild": lambda driver, uid: driver.prepare_rebuild(uid, make_spec(), small_image(), CallContext()),
    "instance.rescue": lambda driver, uid: driver.create_rescue_disk(uid, make_spec(), small_image(), CallContext()),
    "instance.unrescue": lambda driver, uid: driver.create_rescue_disk(uid, make_spec(), small_image(), CallContext()),
    "instance.shelve": lambda driver, uid: driver.import_disk(
        uid, make_spec(), ImportedDisk("root", small_image().path, None), CallContext()
    ),
    "instance.unshelve": lambda driver, uid: driver.import_disk(
        uid, make_spec(), ImportedDisk("root", small_image().path, None), CallContext()
    ),
    "instance.export": lambda driver, uid: driver.export_disks(uid, make_spec(), NO_EXPORT, CallContext()),
    "instance.backup": lambda driver, uid: driver.export_disks(uid, make_spec(), NO_EXPORT, CallContext()),
    "snapshot.create": lambda driver, uid: driver.create_snapshot(uid, make_spec(), SnapshotRequest("s"), CallContext()),
    "snapshot.list": lambda driver, uid: driver.list_snapshots(uid),
    "snapshot.revert": lambda driver, uid: driver.revert_snapshot(uid, make_spec(), NO_REVERT, CallContext()),
    "snapshot.delete": lambda driver, uid: driver.delete_snapshot(uid, make_spec(), "s", CallContext()),
    "instance.reset": lambda driver, uid: driver.reset(uid),
    "instance.trigger-crash-dump": lambda driver, uid: driver.inject_nmi(uid),
    "instance.memory-dump": lambda driver, uid: driver.memory_dump(uid, "one.elf", "elf", True, CallContext()),
    "instance.suspend": lambda driver, uid: driver.suspend(uid, CallContext()),
    "instance.resize": lambda driver, uid: driver.grow_disk(uid, make_spec(), "root", 17),
    "instance.set-memory-target": lambda driver, uid: driver.request_memory_target(uid, 32),
    "instance.set-limits": lambda driver, uid: driver.apply_limits(uid, make_spec()),
    "instance.stats": lambda driver, uid: driver.stats(uid, make_spec()),
}
OF_THE_HOST = {"host.audit", "instance.adopt"}
"""Optional verbs that are about no domain, or about a foreign one."""
assert set(OPTIONAL) | OF_THE_HOST == OPTIONAL_VERBS

NEEDS_DOMAIN: dict[str, Verb] = {
    "get": lambda driver, uid: driver.get(uid),
    "details": lambda driver, uid: driver.details(uid),
    "start": lambda driver, uid: driver.start(uid),
    "shutdown": lambda driver, uid: driver.shutdown(uid),
    "destroy": lambda driver, uid: driver.destroy(uid),
}


def files_of(folder: Path, instance_id: str) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if instance_id in str(path.relative_to(folder)))


def must(announced: bool, error: type[Exception]) -> type[Exception]:
    return error if announced else Unsupported
