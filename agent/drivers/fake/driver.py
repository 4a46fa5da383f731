"""The driver contract on top of the simulated hypervisor: latency, faults, a connection that can be lost.

Beside the contract there are hooks for tests, below "scripting". Hooks may be called from any thread.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from typing import ClassVar

from agent import __version__
from agent.drivers.base import (
    OPTIONAL_VERBS,
    CallContext,
    Capabilities,
    ConnectionChanged,
    ConsoleChunk,
    DomainInfo,
    DriverContext,
    DriverEvent,
    HostCapacity,
    InstanceDetails,
    PreparedImage,
)
from agent.drivers.fake.disks import plan_disks
from agent.drivers.fake.domains import Domain
from agent.drivers.fake.faults import FaultPlan
from agent.drivers.fake.hypervisor import Hypervisor
from agent.drivers.fake.settings import Fault, parse_labels, parse_settings
from agent.drivers.fake.verbs_host import FakeHost
from agent.drivers.fake.verbs_memory import FakeMemory
from agent.drivers.fake.verbs_rebuild import FakeRebuild
from agent.drivers.fake.verbs_resize import FakeResize
from agent.drivers.fake.verbs_snapshot import FakeSnapshot
from agent.drivers.fake.verbs_stats import FakeStats
from agent.errors import Cancelled, FailedPrecondition, Unavailable, Unsupported
from agent.messages.events import NumaCell, PagePool
from agent.messages.life import ORDINARY, Life
from agent.messages.spec import InstanceSpec

_FILE_POLL_S = 0.25
_SLICE_S = 0.05


class FakeDriver(FakeMemory, FakeResize, FakeSnapshot, FakeRebuild, FakeHost, FakeStats):
    """A simulated hypervisor with up to thousands of guests. See `settings.FakeSettings` and `settings.Fault`."""

    name: ClassVar[str] = "fake"

    def __init__(self, context: DriverContext) -> None:
        self._settings = parse_settings(context.settings)
        self._context = context
        folder = context.state_dir / "fake" if self._settings.persist else None
        # Faults can be scripted by file without persistence too.
        self._plan = FaultPlan(self._settings.faults, context.state_dir / "fake" / "faults.json")
        self._hypervisor = Hypervisor(self._settings, folder, self._deliver)
        self._open = False
        self._link = True
        self._announced = True

    # --- connection -------------------------------------------------------------------------------------------

    def connect(self) -> None:
        with self._call("connect", connecting=True), self._hypervisor.lock:
            if self._open:
                return
            self._hypervisor.open()
            self._open = True
            self._hypervisor.timers.after(_FILE_POLL_S, self._watch_file)

    def close(self) -> None:
        self._open = False
        self._plan.clear()
        self._hypervisor.close()

    def is_connected(self) -> bool:
        return self._open and self._link_up

    def capabilities(self) -> Capabilities:
        with self._call("capabilities"):
            return Capabilities(
                hypervisor_type="fake",
                hypervisor_version=__version__,
                verbs=OPTIONAL_VERBS - frozenset(self._settings.lacks),
                traits=frozenset({"CUSTOM_FAKE_HYPERVISOR"}),
                events=frozenset({"instance.rebooted", "instance.io-error"}),
            )

    # --- reading ----------------------------------------------------------------------------------------------

    def recover(self) -> list[DomainInfo]:
        with self._call("recover"):
            return self._hypervisor.infos()

    def get(self, instance_id: str) -> DomainInfo:
        with self._call("get", instance_id), self._hypervisor.lock:
            return self._hypervisor.find(instance_id).info()

    def details(self, instance_id: str) -> InstanceDetails:
        with self._call("details", instance_id), self._hypervisor.lock:
            domain = self._hypervisor.find(instance_id)
            spec, disks = domain.spec, self._hypervisor.disks
            if spec is None:
                return InstanceDetails()
            made = disks.all(instance_id).items()
            # A CD takes no space, and is not the instance's.
            paths = (disks.path(instance_id, f"{name}.qcow2") for name, disk in made if disk.size_mib)
            return InstanceDetails(
                vnc_address=_vnc_address(domain) if spec.vnc and domain.active else None,
                console_log=disks.path(instance_id, "console.log"),
                mac_addresses=tuple(nic.mac or _mac(instance_id, index) for index, nic in enumerate(spec.nics)),
                disk_paths=tuple(path for path in paths if path),
                dedicated_cpus=tuple(domain.cpus),
            )

    def capacity(self) -> HostCapacity:
        with self._call("capacity"):
            settings, pinned = self._settings, self._settings.dedicated_cpus
            pools = [
                PagePool(size_kib=size, total=count, free=max(0, count - self._hypervisor.taken_pages(size)))
                for size, count in sorted(settings.pages.items())
            ]
            cell = NumaCell(
                id=0,
                cpus=list(range(settings.cpus)),
                memory_mib=settings.memory_mib,
                pages=pools,
                dedicated_cpus=sorted(pinned),
                free_dedicated_cpus=sorted(pinned - self._hypervisor.taken_cpus),
            )
            return HostCapacity(
                architecture="x86_64",
                cpu_model="fake",
                cpus=settings.cpus,
                memory_mib=settings.memory_mib,
                disk_total_mib=settings.disk_mib,
                disk_free_mib=max(0, settings.disk_mib - self._hypervisor.disks.used_mib),
                numa_cells=(cell,),
                shared_cpus=settings.cpus - len(pinned) if pinned else None,
                dedicated_cpus=len(pinned) or None,
            )

    def check(self, spec: InstanceSpec) -> None:
        with self._call("check", spec=spec):
            settings, page_kib = self._settings, spec.memory_backing.hugepages_kib
            if spec.cpu.placement == "dedicated" and not settings.cpu_dedicated_set:
                raise FailedPrecondition("this fake host has no cpu_dedicated_set", code="no_dedicated_cpus")
            if page_kib is not None and not settings.pages.get(page_kib):
                raise FailedPrecondition(f"this fake host has no pages of {page_kib} KiB", code="hugepages_missing")
            for share in spec.shares:
                if share.source not in settings.shares:
                    raise FailedPrecondition(f"this fake host has no share {share.source}", code="share_unknown")

    def console_log(self, instance_id: str, max_bytes: int) -> ConsoleChunk:
        with self._call("console_log", instance_id, verb="console.log"):
            text = self._hypervisor.console(instance_id)
            return ConsoleChunk(data=text[-max_bytes:], truncated=len(text) > max_bytes)

    # --- life -------------------------------------------------------------------------------------------------

    def create_storage(
        self, instance_id: str, spec: InstanceSpec, images: Mapping[str, PreparedImage], call: CallContext
    ) -> None:
        with self._call("create_storage", instance_id, spec=spec, context=call):
            wanted = plan_disks(spec, images, backends=self._settings.backends, keys=self._settings.keys)
            self._hypervisor.create_disks(instance_id, wanted, seed=spec.seed is not None)
        call.progress(100.0)

    def delete_storage(self, instance_id: str) -> None:
        with self._call("delete_storage", instance_id):
            self._hypervisor.delete_disks(instance_id)

    def define(self, instance_id: str, spec: InstanceSpec, *, generation: int, life: Life = ORDINARY) -> None:
        with self._call("define", instance_id, spec=spec):
            self._hypervisor.define(instance_id, spec, generation, life)

    def undefine(self, instance_id: str) -> None:
        with self._call("undefine", instance_id):
            self._hypervisor.undefine(instance_id)
            self._plan.forget(instance_id)

    def start(self, instance_id: str) -> None:
        with self._call("start", instance_id):
            self._hypervisor.start(instance_id)

    def shutdown(self, instance_id: str) -> None:
        with self._call("shutdown", instance_id):
            self._hypervisor.ask_guest(instance_id, "shutdown")

    def destroy(self, instance_id: str) -> None:
        with self._call("destroy", instance_id), self._hypervisor.lock:
            self._hypervisor.stop(self._hypervisor.find_owned(instance_id), "stopped", "destroyed")

    def reboot(self, instance_id: str) -> None:
        with self._call("reboot", instance_id, verb="instance.reboot"), self._hypervisor.lock:
            self._active(instance_id, "rebooted")
            self._hypervisor.ask_guest(instance_id, "reboot")

    def pause(self, instance_id: str) -> None:
        with self._call("pause", instance_id, verb="instance.pause"), self._hypervisor.lock:
            self._hypervisor.pause(self._active(instance_id, "paused"), "paused")

    def resume(self, instance_id: str) -> None:
        with self._call("resume", instance_id, verb="instance.resume"), self._hypervisor.lock:
            self._hypervisor.resume(self._active(instance_id, "resumed"))

    # --- scripting --------------------------------------------------------------------------------------------

    def inject(self, fault: Fault) -> None:
        """Add a scripted fault."""
        self._plan.inject(fault)

    def clear_faults(self) -> None:
        """Take back the faults of `inject` and of the settings; calls that hang go on at once."""
        self._plan.clear()

    def simulate_crash(self, instance_id: str) -> None:
        """Let the guest crash. Raises `NotFound`."""
        with self._hypervisor.lock:
            self._hypervisor.stop(self._hypervisor.find(instance_id), "crashed", "crashed")

    def simulate_guest_shutdown(self, instance_id: str) -> None:
        """Let the guest power itself off. Raises `NotFound`."""
        with self._hypervisor.lock:
            self._hypervisor.stop(self._hypervisor.find(instance_id), "stopped", "shutdown")

    def simulate_io_error(self, instance_id: str, device: str = "vda", reason: str = "enospc") -> None:
        """Let a disk request fail; the guest is paused. Raises `NotFound`."""
        self._hypervisor.io_error(instance_id, device, reason)

    def add_foreign(self, name: str, vcpus: int = 1, memory_mib: int = 512) -> str:
        """Define and start a domain as somebody else would; returns its id. Raises `AlreadyExists`."""
        return self._hypervisor.add_foreign(name, vcpus, memory_mib)

    def emit(self, event: DriverEvent) -> None:
        """Have any event delivered, after those before it."""
        self._hypervisor.emit(event)

    def disconnect(self) -> None:
        """Lose the hypervisor: calls raise `Unavailable` and events are lost; guests go on. Idempotent."""
        self._link = False
        self._announce("the connection was cut by disconnect()")

    def reconnect(self) -> None:
        """Let the hypervisor be there again. Idempotent."""
        self._link = True
        self._announce("reconnected")

    # --- inside -----------------------------------------------------------------------------------------------

    @property
    def _link_up(self) -> bool:
        return self._link and not self._plan.disconnected

    def _announce(self, detail: str) -> None:
        """Report the state of the connection if it has changed."""
        with self._hypervisor.lock:
            up = self._link_up
            if self._open and up != self._announced:
                self._announced = up
                self._hypervisor.timers.post(self._context.emit, ConnectionChanged(up, detail))

    def _deliver(self, event: DriverEvent) -> None:
        """Queue an event; what happens while the connection is lost is lost, however soon it returns."""
        if self._announced:
            self._hypervisor.timers.post(self._context.emit, event)

    def _watch_file(self) -> None:
        self._plan.refresh()
        self._announce("as faults.json says")
        if self._open:
            self._hypervisor.timers.after(_FILE_POLL_S, self._watch_file)

    def _active(self, instance_id: str, participle: str) -> Domain:
        domain = self._hypervisor.find_owned(instance_id)
        if not domain.active:
            message = f"domain {domain.name} is {domain.power} and cannot be {participle}; start it first"
            raise FailedPrecondition(message, code="instance_not_running")
        return domain

    @contextlib.contextmanager
    def _call(
        self,
        call: str,
        instance_id: str | None = None,
        *,
        verb: str | None = None,
        spec: InstanceSpec | None = None,
        context: CallContext | None = None,
        connecting: bool = False,
    ) -> Iterator[None]:
        """Surround one call of the contract: whether it can be asked, how long it takes, which fault strikes it."""
        if verb is not None and verb in self._settings.lacks:
            raise Unsupported(f"this fake hypervisor has no {verb}", verb=verb)
        self._plan.refresh()
        self._announce("as faults.json says")
        if not self._link_up or not (self._open or connecting):
            raise Unavailable("the fake hypervisor cannot be reached")
        name, labels = self._steering(instance_id, spec)
        _wait(self._settings.latency_of(call), context, self._plan.release)
        struck = self._plan.strike(call, instance_id, name, labels)
        if struck is not None:
            _wait(struck.fault.hang_s or 0.0, context, struck.release)
            if not struck.fault.crash_after:
                _effect(struck.fault, call)
        yield
        if struck is not None and struck.fault.crash_after:
            _effect(struck.fault, call)

    def _steering(self, instance_id: str | None, spec: InstanceSpec | None) -> tuple[str | None, Sequence[Fault]]:
        if spec is not None:
            return spec.name, parse_labels(spec.labels).faults
        domain = None if instance_id is None else self._hypervisor.domains.get(instance_id)
        return (None, ()) if domain is None else (domain.name, domain.steering.faults)


def _wait(seconds: float, context: CallContext | None, release: threading.Event) -> None:
    """Take a time, unless released; a long call tells its progress and stops when it is cancelled."""
    if context is None:
        if seconds > 0:
            release.wait(seconds)
        return
    began, passed = time.monotonic(), 0.0
    while True:
        if context.cancelled():
            raise Cancelled("cancelled while the fake hypervisor was at work")
        if passed >= seconds:
            return
        context.progress(100.0 * passed / seconds)
        if release.wait(min(_SLICE_S, seconds - passed)):
            return
        passed = time.monotonic() - began


def _effect(fault: Fault, call: str) -> None:
    if fault.kill:
        os.kill(os.getpid(), signal.SIGKILL)
    error = fault.exception(call)
    if error is not None:
        raise error


def _mac(instance_id: str, index: int) -> str:
    digest = sha256(f"{instance_id}/{index}".encode()).hexdigest()
    return f"52:54:00:{digest[0:2]}:{digest[2:4]}:{digest[4:6]}"


def _vnc_address(domain: Domain) -> str:
    return f"127.0.0.1:{5900 + zlib.crc32(domain.id.encode()) % 1000}"
