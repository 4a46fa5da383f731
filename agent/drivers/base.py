"""The driver contract: what the agent asks of a hypervisor, and what a hypervisor tells the agent.

All methods are synchronous and are called from worker threads, several at once, never for one instance twice at
the same time except for reads. A driver knows nothing of the bus, the journal or asyncio. It raises only
`agent.errors` classes: every foreign exception is translated inside the driver.

Every mutating method is idempotent: it looks before it acts, and repeating it after a crash at any point inside it
ends in the same state. Removing what is not there succeeds. `NotFound` means that the hypervisor answered and
said there is no such domain; when it cannot be asked the error is `Unavailable`.
"""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from agent.drivers.plain import check_plain
from agent.drivers.verbs import host, memory, rebuild, resize, snapshot, stats
from agent.errors import Unsupported
from agent.messages.events import HypervisorEvent, NumaCell, PowerState
from agent.messages.life import ORDINARY, Life
from agent.messages.spec import InstanceSpec
from agent.messages.types import DiskFormat


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """A verified image in the agent's cache. It never changes while an instance uses it as a backing file."""

    path: Path
    format: DiskFormat
    virtual_size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What this driver can do on this host. `verbs` holds the optional verbs (`OPTIONAL_VERBS`) that work here."""

    hypervisor_type: str
    hypervisor_version: str
    verbs: frozenset[str]
    traits: frozenset[str] = frozenset()
    events: frozenset[str] = frozenset()
    """Kinds (`instance.io-error` …) that this driver can emit."""


OPTIONAL_VERBS: frozenset[str] = frozenset(
    {"instance.pause", "instance.resume", "instance.reboot", "console.log"}
    | memory.VERBS
    | resize.VERBS
    | snapshot.VERBS
    | rebuild.VERBS
    | host.VERBS
    | stats.VERBS
)
"""Verbs that a driver may lack; an unannounced one is refused by name before the driver is called."""


@dataclass(frozen=True, slots=True)
class DomainInfo:
    """What the hypervisor says about one domain. `owned` is true if it carries our ownership marker.

    `spec`, `generation` and `life` come from the domain's own metadata, so that a lost journal can be rebuilt;
    they are None where the domain is foreign. `memory_mib` and `vcpus` are the domain's maximum. `dedicated_cpus`:
    the host CPU that each vCPU has for itself, empty where it has none.
    """

    id: str
    name: str
    power: PowerState
    reason: str
    owned: bool
    vcpus: int
    memory_mib: int
    spec: InstanceSpec | None = None
    generation: int | None = None
    life: Life = ORDINARY
    dedicated_cpus: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class InstanceDetails:
    """What `show` adds to the state: addresses to reach the instance by, and the host CPU that each vCPU has for
    itself (empty where it has none).
    """

    vnc_address: str | None = None
    console_log: str | None = None
    mac_addresses: tuple[str, ...] = ()
    disk_paths: tuple[str, ...] = ()
    dedicated_cpus: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ConsoleChunk:
    """The end of a console log. `truncated` is true if there was more before `data`."""

    data: bytes
    truncated: bool


@dataclass(frozen=True, slots=True)
class HostCapacity:
    """What the host has, read in a bounded number of hypervisor calls whatever the number of domains.

    `cpus` are all that are online. `shared_cpus`: how many of them guests without CPUs of their own run on; None: all.
    `dedicated_cpus`: how many are given to guests one by one; None where the host has no such set. Huge pages are in
    the NUMA cells.
    """

    architecture: str
    cpu_model: str
    cpus: int
    memory_mib: int
    disk_total_mib: int
    disk_free_mib: int
    numa_cells: tuple[NumaCell, ...] = ()
    shared_cpus: int | None = None
    dedicated_cpus: int | None = None


@dataclass(frozen=True, slots=True)
class PowerChanged:
    """A domain's power state changed. A hint: the agent reads the state again before it believes it.

    `reason` is one of `booted shutdown destroyed crashed failed paused resumed io-error watchdog migrated saved
    restored defined undefined unknown`, or what the hypervisor says in lower-case words joined by dashes.
    """

    instance_id: str
    power: PowerState
    reason: str


@dataclass(frozen=True, slots=True)
class ConnectionChanged:
    """The hypervisor went away (`connected` false) or came back. After it is back everything must be re-read."""

    connected: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Reported:
    """A typed event other than a change of power, ready to be published."""

    event: HypervisorEvent


DriverEvent = PowerChanged | ConnectionChanged | Reported
EventSink = Callable[[DriverEvent], None]
"""Takes an event from any thread, at once and without blocking."""


class DriverContext:
    """What a driver is given: its own settings, its folder, and where its events go."""

    def __init__(self, *, host: str, state_dir: Path, settings: Mapping[str, Any], emit: EventSink) -> None:
        self.host = host
        self.state_dir = state_dir
        self.settings = settings
        self.emit = emit


@dataclass(slots=True)
class CallContext:
    """Handed to long calls: they call `progress(percent)` and stop soon after `cancelled()` turns true.

    A call that waits does so on a `threading.Event` that it gives to `waking`: a cancel then ends the wait at once.
    """

    progress: Callable[[float], None] = field(default=lambda _percent: None)
    cancelled: Callable[[], bool] = field(default=lambda: False)
    _waits: set[threading.Event] = field(default_factory=set, init=False, repr=False, compare=False)

    @contextlib.contextmanager
    def waking(self, wait: threading.Event) -> Iterator[None]:
        """Have `wait` set by `wake` while the block runs. Ask `cancelled` inside the block before you wait."""
        self._waits.add(wait)
        try:
            yield
        finally:
            self._waits.discard(wait)

    def wake(self) -> None:
        """Set what the call waits on, once `cancelled()` is true. From any thread, without blocking."""
        for wait in self._waits.copy():
            wait.set()


class Driver(
    memory.MemoryVerbs,
    resize.ResizeVerbs,
    snapshot.SnapshotVerbs,
    rebuild.RebuildVerbs,
    host.HostVerbs,
    stats.StatsVerbs,
    ABC,
):
    """One hypervisor. Constructed with a `DriverContext`; the constructor does no I/O and validates `settings`
    (raising `InvalidArgument` that names the key).
    """

    name: ClassVar[str]

    def __init__(self, context: DriverContext) -> None:
        self.context = context

    # --- connection -------------------------------------------------------------------------------------------

    @abstractmethod
    def connect(self) -> None:
        """Open the hypervisor and begin to emit events. Raises `Unavailable`. Idempotent; also reconnects.

        After a loss the driver emits `ConnectionChanged(False)` once and reconnects by itself, with backoff, on
        a thread of its own; it emits `ConnectionChanged(True)` when calls work and events flow again.
        """

    @abstractmethod
    def close(self) -> None:
        """End events and connections. Running domains are not touched. Idempotent."""

    @abstractmethod
    def is_connected(self) -> bool:
        """Tell, without a call to the hypervisor, whether it can be asked now."""

    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What works here. Cached by the driver until it reconnects."""

    # --- reading ----------------------------------------------------------------------------------------------

    @abstractmethod
    def recover(self) -> list[DomainInfo]:
        """Re-read every domain, owned and foreign, after a start or a reconnect.

        Also takes up again whatever the driver itself watches per domain. A bounded number of calls per domain.
        """

    @abstractmethod
    def get(self, instance_id: str) -> DomainInfo:
        """Read one domain. Raises `NotFound` on positive proof of absence, `Unavailable` if it cannot be asked."""

    @abstractmethod
    def details(self, instance_id: str) -> InstanceDetails:
        """Read what `show` adds. Raises `NotFound`, `Unavailable`."""

    @abstractmethod
    def capacity(self) -> HostCapacity:
        """Read the host's capacity: a bounded number of calls, no external process."""

    def console_log(self, instance_id: str, max_bytes: int) -> ConsoleChunk:  # noqa: ARG002 - for those who can
        """Read the end of the serial console's log; empty if the guest never wrote. Raises `NotFound`."""
        raise Unsupported(f"driver {self.name} keeps no console log")

    def check(self, spec: InstanceSpec) -> None:
        """Refuse what this host can never give an instance, before anything of it is made. Reads only, and briefly.

        Raises `Unsupported`, `FailedPrecondition` or `InvalidArgument` that name the option. How much is free is not
        asked here: that is admission's. A driver that does not say otherwise makes plain machines only.
        """
        check_plain(spec, self.name)

    # --- life -------------------------------------------------------------------------------------------------

    @abstractmethod
    def create_storage(
        self, instance_id: str, spec: InstanceSpec, images: Mapping[str, PreparedImage], call: CallContext
    ) -> None:
        """Make every disk of the spec, the seed ISO, and the instance's own copies of the files it boots from.

        `images` has one entry per image of the spec, under the names of `agent.messages.spec.images_of`; a disk
        without one is empty. What is finished already is kept as it is.

        Raises `ResourceExhausted` without space, `InvalidArgument` where a disk is smaller than its image or the spec
        names a back end that the host lacks, `FailedPrecondition` where the key of an encrypted disk cannot be used.
        """

    @abstractmethod
    def delete_storage(self, instance_id: str) -> None:
        """Remove every volume and file that `create_storage` and the domain's life made, console log included."""

    @abstractmethod
    def define(self, instance_id: str, spec: InstanceSpec, *, generation: int, life: Life = ORDINARY) -> None:
        """Define the persistent domain with spec, generation, life and ownership marker in its metadata; not started.

        A domain that is there is redefined in place: it never loses its definition on the way, and what its guest
        sees of the hardware (machine type, device addresses) stays as it was made. A guest that runs is not touched.
        Raises `AlreadyExists` if the name belongs to another domain, or the id to a foreign one.
        """

    @abstractmethod
    def undefine(self, instance_id: str) -> None:
        """Remove the definition of a stopped domain. A foreign domain is refused with `FailedPrecondition`."""

    @abstractmethod
    def start(self, instance_id: str) -> None:
        """Start a defined domain. Already running: nothing. Returns when the hypervisor says it runs."""

    @abstractmethod
    def shutdown(self, instance_id: str) -> None:
        """Ask the guest to shut down and return at once. Already stopped: nothing."""

    @abstractmethod
    def destroy(self, instance_id: str) -> None:
        """End the domain at once, like pulling the plug; its definition stays. Already stopped: nothing."""

    def reboot(self, instance_id: str) -> None:  # noqa: ARG002 - for those who can
        """Ask the guest to reboot and return at once; a following `instance.rebooted` event proves it."""
        raise Unsupported(f"driver {self.name} cannot reboot")

    def pause(self, instance_id: str) -> None:  # noqa: ARG002 - for those who can
        """Stop the vCPUs. Already paused: nothing."""
        raise Unsupported(f"driver {self.name} cannot pause")

    def resume(self, instance_id: str) -> None:  # noqa: ARG002 - for those who can
        """Let the vCPUs run on. Already running: nothing."""
        raise Unsupported(f"driver {self.name} cannot resume")
