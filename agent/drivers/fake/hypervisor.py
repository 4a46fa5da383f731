"""The simulated hypervisor: domains that change their power, guests that react after a while, disks.

It always works: latency, faults and the lost connection are the driver's. One lock guards all state and is held for
no longer than a small file takes to write; guests act and events are delivered on one thread (`timers`).
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from agent.drivers.base import DomainInfo, DriverEvent, PowerChanged, Reported
from agent.drivers.cpuset import assign
from agent.drivers.fake.disks import RESCUE, Disk, Disks
from agent.drivers.fake.domains import Domain, Domains
from agent.drivers.fake.live import Live, check_nics
from agent.drivers.fake.settings import FakeSettings
from agent.drivers.fake.timers import Timers
from agent.drivers.verbs.host import check_adopted_spec
from agent.errors import AlreadyExists, FailedPrecondition, NotFound, ResourceExhausted
from agent.messages.events import InstanceIoError, InstanceRebooted, PowerState
from agent.messages.life import ORDINARY, Life
from agent.messages.spec import InstanceSpec

UP_LINE = b"compute-agent guest is up\n"
NMI_LINE = b"NMI received for unknown reason\n"


class Hypervisor:
    """A host full of simulated guests. `deliver` gets the events as they happen, and must not block."""

    def __init__(self, settings: FakeSettings, folder: Path | None, deliver: Callable[[DriverEvent], None]) -> None:
        self._settings = settings
        self._deliver = deliver
        self.lock = threading.RLock()
        self.timers = Timers("fake-hypervisor")
        self.domains = Domains(folder and folder / "domains")
        self.disks = Disks(folder and folder / "instances")
        self._room_file = folder and folder / "room_mib"
        self._room_mib = settings.disk_mib
        self._loaded = False

    def open(self) -> None:
        """Load what an earlier process left, let the time pass that it was away, and begin. Idempotent."""
        with self.lock:
            if self._loaded:
                return
            self._loaded = True
            self.domains.load()
            self.disks.load()
            now = time.time()
            for domain in self.domains:
                for act, at in sorted(domain.pending.items(), key=lambda item: item[1]):
                    if at <= now and domain.power == "running":
                        self._guest_acts(domain.id, act, at)
            # Only now does anybody listen: events of the time before are lost, as with a real hypervisor.
            self.timers.start()
            for domain in self.domains:
                self._schedule_all(domain)

    def close(self) -> None:
        """End the thread. Guests go on: their acts to come are done by the next `open`."""
        self.timers.stop()
        with self.lock:
            self._loaded = False
            if self._persistent:
                self.domains = Domains(self.domains.folder)
                self.disks = Disks(self.disks.folder)

    @property
    def _persistent(self) -> bool:
        return self.domains.folder is not None

    # --- domains ----------------------------------------------------------------------------------------------

    def find(self, instance_id: str) -> Domain:
        """The domain. Raises `NotFound`."""
        domain = self.domains.get(instance_id)
        if domain is None:
            raise NotFound(f"the hypervisor has no domain {instance_id}")
        return domain

    def find_owned(self, instance_id: str) -> Domain:
        """The domain, which must be ours. Raises `NotFound`, `FailedPrecondition` if it is foreign."""
        domain = self.find(instance_id)
        if not domain.owned:
            raise FailedPrecondition(
                f"domain {domain.name} ({instance_id}) was not made by this agent", code="foreign_domain"
            )
        return domain

    def infos(self) -> list[DomainInfo]:
        with self.lock:
            return [domain.info() for domain in self.domains]

    def define(self, instance_id: str, spec: InstanceSpec, generation: int, life: Life = ORDINARY) -> None:
        check_nics(spec)
        with self.lock:
            holder = self.domains.owner_of(spec.name)
            if holder not in {None, instance_id}:
                raise AlreadyExists(f"the name {spec.name!r} belongs to domain {holder}")
            domain = self.domains.get(instance_id)
            if domain is not None and not domain.owned:
                raise AlreadyExists(f"id {instance_id} belongs to the foreign domain {domain.name}")
            if domain is not None and domain.name != spec.name:
                raise AlreadyExists(f"domain {instance_id} has the name {domain.name!r}; a name cannot be changed")
            if domain is not None and life.adopted is not None and domain.spec is not None:
                check_adopted_spec(domain.name, domain.spec, spec)
            if domain is None:
                domain = Domain(id=instance_id, name=spec.name, vcpus=spec.vcpus, memory_mib=spec.memory_mib)
            cpus = self._dedicated(domain, spec)
            domain.set_spec(spec, generation, life)
            domain.cpus = cpus
            self.domains.put(domain)
            # As with libvirt, a definition says nothing about power.
            self.emit(PowerChanged(instance_id, "unknown", "defined"))

    def _dedicated(self, domain: Domain, spec: InstanceSpec) -> list[int]:
        """CPUs of its own for each vCPU, those it has first. Raises `ResourceExhausted`."""
        if spec.cpu.placement != "dedicated":
            return []
        others = {cpu for other in self.domains if other.id != domain.id for cpu in other.cpus}
        free = self._settings.dedicated_cpus - others
        given = assign(spec.vcpus, keep=dict(enumerate(domain.cpus)), free=free)
        return [given[vcpu] for vcpu in range(spec.vcpus)]

    @property
    def taken_cpus(self) -> set[int]:
        """CPUs that guests have for themselves."""
        with self.lock:
            return {cpu for domain in self.domains for cpu in domain.cpus}

    def taken_pages(self, size_kib: int) -> int:
        """Huge pages of this size that guests in memory have."""
        with self.lock:
            specs = [domain.spec for domain in self.domains if domain.active]
        sizes = [s.memory_mib for s in specs if s is not None and s.memory_backing.hugepages_kib == size_kib]
        return sum(sizes) * 1024 // size_kib

    def undefine(self, instance_id: str) -> None:
        with self.lock:
            if self.domains.get(instance_id) is None:
                return
            domain = self.find_owned(instance_id)
            if domain.active:
                raise FailedPrecondition(
                    f"domain {domain.name} is {domain.power}; stop it first", code="instance_running"
                )
            self.domains.remove(domain)
            self.emit(PowerChanged(instance_id, "unknown", "undefined"))

    def add_foreign(self, name: str, vcpus: int, memory_mib: int) -> str:
        """Define and start a domain as somebody else would. Returns its id."""
        with self.lock:
            if self.domains.owner_of(name) is not None:
                raise AlreadyExists(f"the name {name!r} is taken")
            domain = Domain(str(uuid.uuid4()), name, vcpus, memory_mib, owned=False)
            self.set_power(domain, "running", "booted")
            return domain.id

    # --- power ------------------------------------------------------------------------------------------------

    def start(self, instance_id: str) -> None:
        with self.lock:
            domain = self.find_owned(instance_id)
            if domain.active:
                return
            if domain.saved is not None:
                self.restore(domain)
                return
            if self.disks.get(instance_id) is None and domain.life.adopted is None:
                raise FailedPrecondition(f"domain {domain.name} has no root disk", code="disk_missing")
            if domain.life.rescue is not None and self.disks.get(instance_id, RESCUE) is None:
                raise FailedPrecondition(f"domain {domain.name} has no rescue disk", code="disk_missing")
            self.disks.touch_console(instance_id)
            self._boot(domain)
            steering = domain.steering
            for act, delay in (
                ("crash", steering.crash_after_s),
                ("stop", steering.stop_after_s),
                ("io-error", steering.io_error_after_s),
            ):
                if delay is not None:
                    domain.pending[act] = time.time() + delay
            self.set_power(domain, "running", "booted")
            self._schedule_all(domain)

    def ask_guest(self, instance_id: str, act: str) -> None:
        """Ask the guest to `shutdown` or `reboot`; it acts later, or never."""
        with self.lock:
            domain = self.find_owned(instance_id)
            steering, delay = domain.steering, self._settings.guest_shutdown_s
            if steering.guest_shutdown_s is not None or steering.ignores_acpi:
                delay = steering.guest_shutdown_s
            # As with a real guest, a key that is pressed while nobody looks at it yet is lost.
            if delay is None or not domain.active or not self._booted(domain) or act in domain.pending:
                return
            now = time.time() if domain.paused_at is None else domain.paused_at
            domain.pending[act] = now + delay
            self.domains.put(domain)
            self._schedule_all(domain)

    def stop(self, domain: Domain, power: PowerState, reason: str) -> None:
        """Take the guest out of memory, whatever the cause. Already stopped: nothing."""
        with self.lock:
            if domain.active or domain.saved is not None:
                domain.boots += self._booted(domain)
                domain.started_at = domain.paused_at = domain.saved = None
                domain.pending.clear()
                self.set_power(domain, power, reason)

    def pause(self, domain: Domain, reason: str) -> None:
        """Stop the guest's time."""
        with self.lock:
            if domain.power == "running":
                domain.paused_at = time.time()
                self.set_power(domain, "paused", reason)

    def resume(self, domain: Domain, reason: str = "resumed") -> None:
        """Let the guest's time run on, where it stopped."""
        with self.lock:
            if domain.power == "paused":
                lost = time.time() - (domain.paused_at or 0.0)
                domain.paused_at = None
                domain.started_at = (domain.started_at or 0.0) + lost
                domain.process_at = (domain.process_at or domain.started_at) + lost
                domain.pending = {act: at + lost for act, at in domain.pending.items()}
                self.set_power(domain, "running", reason)
                self._schedule_all(domain)

    def save(self, domain: Domain) -> None:
        """Put the guest's memory aside and end it; its time stands."""
        with self.lock:
            domain.saved = domain.power
            domain.paused_at = domain.paused_at or time.time()
            self.set_power(domain, "suspended", "saved")

    def restore(self, domain: Domain) -> None:
        """Take the saved memory back; the guest goes on, or is paused, as it was."""
        with self.lock:
            if domain.saved == "damaged":
                raise FailedPrecondition(
                    "the guest's saved memory is damaged; start it with discard_saved to boot it anew without it",
                    code="saved_state_damaged",
                )
            was, domain.saved = domain.saved, None
            self.set_power(domain, "paused", "restored")
            if was == "running":
                self.resume(domain, "restored")

    def reset(self, domain: Domain) -> None:
        """Press the reset button; a paused guest stays paused."""
        with self.lock:
            domain.boots += self._booted(domain)
            domain.started_at = time.time()
            domain.paused_at = None if domain.paused_at is None else domain.started_at
            self.domains.put(domain)
            self.emit(Reported(InstanceRebooted(instance_id=domain.id)))

    def interrupt(self, instance_id: str) -> None:
        """Send the guest a non-maskable interrupt, which it only reports."""
        with self.lock:
            domain = self.find(instance_id)
            domain.nmis += 1
            self.domains.put(domain)

    def io_error(self, instance_id: str, device: str, reason: str) -> None:
        """Let a disk request fail: the guest is paused, as QEMU does by default."""
        with self.lock:
            domain = self.find(instance_id)
            path = self.disks.path(instance_id, "root.qcow2")
            self.emit(
                Reported(
                    InstanceIoError(instance_id=instance_id, device=device, path=path, reason=reason, action="pause")
                )
            )
            self.pause(domain, "io-error")

    @property
    def room_mib(self) -> int:
        """How much room there is for the guests' disks to grow; kept with the domains, where these are kept."""
        with self.lock:
            if self._room_file is not None and self._room_file.exists():
                return int(self._room_file.read_text())
            return self._room_mib

    @room_mib.setter
    def room_mib(self, room_mib: int) -> None:
        with self.lock:
            self._room_mib = room_mib
            if self._room_file is not None:
                self._room_file.write_text(str(room_mib))

    def emit(self, event: DriverEvent) -> None:
        """Have an event delivered after those before it."""
        self._deliver(event)

    def set_power(self, domain: Domain, power: PowerState, reason: str) -> None:
        """Change it, keep it, tell it."""
        domain.power, domain.reason = power, reason
        self.domains.put(domain)
        self.emit(PowerChanged(domain.id, power, reason))

    def _boot(self, domain: Domain) -> None:
        domain.started_at = domain.process_at = time.time()
        domain.paused_at = None
        domain.pending.clear()
        if (spec := domain.spec) is not None:
            domain.live = Live.booted(spec)

    def _booted(self, domain: Domain) -> bool:
        if domain.started_at is None:
            return False
        boot_s = self._settings.boot_s if domain.steering.boot_s is None else domain.steering.boot_s
        return (domain.paused_at or time.time()) - domain.started_at >= boot_s

    # --- guests -----------------------------------------------------------------------------------------------

    def _schedule_all(self, domain: Domain) -> None:
        if domain.power == "running":
            now = time.time()
            for act, at in domain.pending.items():
                self.timers.after(at - now, partial(self._guest_acts, domain.id, act, at))

    def _guest_acts(self, instance_id: str, act: str, at: float) -> None:
        """Do what a guest set out to do at the time `at`, unless something came between."""
        with self.lock:
            domain = self.domains.get(instance_id)
            if domain is None or domain.power != "running" or domain.pending.get(act) != at:
                return
            del domain.pending[act]
            if act == "reboot":
                domain.boots += self._booted(domain)
                domain.started_at = time.time()
                self.domains.put(domain)
                self.emit(Reported(InstanceRebooted(instance_id=instance_id)))
            elif act == "io-error":
                self.io_error(instance_id, "vda", "enospc")
            elif act == "crash":
                self.stop(domain, "crashed", "crashed")
            else:
                self.stop(domain, "stopped", "shutdown")

    def console(self, instance_id: str) -> bytes:
        """All that the guest has written since its storage was made."""
        with self.lock:
            domain = self.find(instance_id)
            begin = f"booting {domain.name}\n".encode()
            text = (begin + UP_LINE) * domain.boots
            if domain.started_at is not None:
                text += begin + (UP_LINE if self._booted(domain) else b"")
            return text + NMI_LINE * domain.nmis

    # --- storage ----------------------------------------------------------------------------------------------

    def create_disks(self, instance_id: str, disks: Mapping[str, Disk], *, seed: bool) -> None:
        """Make an instance's disks, all or none. Those that are there as they should be are kept."""
        with self.lock:
            old = self.disks.all(instance_id)
            if old == disks:
                return
            needed = sum(disk.size_mib for disk in disks.values())
            free = self._settings.disk_mib - self.disks.used_mib + sum(disk.size_mib for disk in old.values())
            if needed > free:
                raise ResourceExhausted(
                    f"the disks need {needed} MiB and {free} MiB are free", requested_mib=needed, free_mib=free
                )
            self.disks.put(instance_id, disks, seed=seed)

    def delete_disks(self, instance_id: str) -> None:
        with self.lock:
            self.disks.remove(instance_id)
            domain = self.domains.get(instance_id)
            if domain is not None and domain.owned and domain.boots:
                domain.boots = 0
                self.domains.put(domain)
