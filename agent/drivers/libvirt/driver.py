"""The libvirt driver: the verbs of the driver contract.

Each verb looks up the domain anew, checks that it is ours, and looks before it acts. When libvirt refuses, the
state is read again, because another may have done the same meanwhile. libvirt's errors are translated where the
call's block ends (`Link.call`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from typing import Any, ClassVar, Final

from agent.drivers.base import (
    CallContext,
    Capabilities,
    ConsoleChunk,
    DomainInfo,
    DriverContext,
    HostCapacity,
    InstanceDetails,
    PreparedImage,
)
from agent.drivers.libvirt import adoption, binding, domains, encryption, errors, saved, xml, xml_container
from agent.drivers.libvirt.binding import libvirt
from agent.drivers.libvirt.connection import Link
from agent.drivers.libvirt.host import Hypervisor
from agent.drivers.libvirt.settings import parse_settings
from agent.drivers.libvirt.storage import Storage
from agent.drivers.libvirt.verbs_host import LibvirtHost
from agent.drivers.libvirt.verbs_memory import LibvirtMemory
from agent.drivers.libvirt.verbs_rebuild import LibvirtRebuild
from agent.drivers.libvirt.verbs_resize import LibvirtResize
from agent.drivers.libvirt.verbs_snapshot import LibvirtSnapshot
from agent.drivers.libvirt.verbs_stats import MOST_ASKING, LibvirtStats
from agent.drivers.verbs.host import check_adopted_spec
from agent.errors import FailedPrecondition, Unsupported
from agent.messages.life import ORDINARY, Adoption, Life
from agent.messages.spec import InstanceSpec

# Each set is tried until libvirt knows all its flags: a domain with one of these leftovers is not undefined
# without the flag, and the simulation or an old daemon refuses flags that it does not know.
_UNDEFINE_FLAGS: Final = (
    ("MANAGED_SAVE", "SNAPSHOTS_METADATA", "CHECKPOINTS_METADATA", "NVRAM", "TPM"),
    ("MANAGED_SAVE", "SNAPSHOTS_METADATA", "CHECKPOINTS_METADATA", "NVRAM"),
    ("MANAGED_SAVE", "SNAPSHOTS_METADATA"),
    (),
)


class LibvirtDriver(LibvirtMemory, LibvirtResize, LibvirtSnapshot, LibvirtRebuild, LibvirtHost, LibvirtStats):
    """Runs instances through a libvirt daemon on this host. Settings: `agent.drivers.libvirt.settings`.

    Domains without our marker in their metadata are listed as foreign and refused by every mutating verb.
    """

    name: ClassVar[str] = "libvirt"

    def __init__(self, context: DriverContext) -> None:
        """Validate the settings; no I/O. Raises `InvalidArgument`, or `LibvirtMissing` without the binding."""
        binding.require()
        self._settings = parse_settings(context.settings)
        self._host = context.host
        self._storage = Storage(self._settings, context.state_dir)
        if self._settings.containers:
            xml_container.check_folder(self._storage.root)
        self._link = Link(self._settings, context.emit)
        self._hypervisor = Hypervisor(self._settings, self._link, self._storage)
        self._asking = threading.BoundedSemaphore(MOST_ASKING)

    # --- connection -----------------------------------------------------------------------------------------------

    def connect(self) -> None:
        self._link.open()

    def close(self) -> None:
        self._link.close()

    def is_connected(self) -> bool:
        return self._link.connected

    def capabilities(self) -> Capabilities:
        return self._hypervisor.capabilities()

    # --- reading --------------------------------------------------------------------------------------------------

    def recover(self) -> list[DomainInfo]:
        mark = self._hypervisor.pins.mark()
        with self._link.call() as connection:
            found = domains.describe_all(connection)
        self._hypervisor.pins.learn(found, mark)
        return found

    def get(self, instance_id: str) -> DomainInfo:
        with self._link.call() as connection:
            return domains.describe(domains.find(connection, instance_id))

    def details(self, instance_id: str) -> InstanceDetails:
        console = self._storage.console_log(instance_id)
        with self._link.call() as connection:
            domain = domains.find(connection, instance_id)
            kept = not self._settings.simulated and console.exists()
            return domains.details(domain, str(console) if kept else None)

    def capacity(self) -> HostCapacity:
        return self._hypervisor.capacity()

    def console_log(self, instance_id: str, max_bytes: int) -> ConsoleChunk:
        if self._settings.simulated:
            raise Unsupported("libvirt's simulated hypervisor has no console")
        if self._settings.containers:
            raise Unsupported("libvirt keeps no log of a container's console")
        with self._link.call() as connection:
            domains.find(connection, instance_id)
        return self._storage.console_tail(instance_id, max_bytes)

    def check(self, spec: InstanceSpec) -> None:
        if self._settings.containers:
            xml_container.check(spec)
        else:
            self._hypervisor.check(spec)
        self._storage.check(spec)

    # --- life -----------------------------------------------------------------------------------------------------

    def create_storage(
        self, instance_id: str, spec: InstanceSpec, images: Mapping[str, PreparedImage], call: CallContext
    ) -> None:
        self._storage.create(instance_id, spec, images, call)

    def delete_storage(self, instance_id: str) -> None:
        self._remove_storage(instance_id, keep_variables=False)

    def _remove_storage(self, instance_id: str, *, keep_variables: bool) -> None:
        seals: list[encryption.Sealed] = []
        with contextlib.suppress(FailedPrecondition):  # a damaged manifest: libvirtd forgets secrets by itself too
            seals = self._storage.seals(instance_id)
        if seals:
            with self._link.call() as connection:
                encryption.withdraw(connection, seals)
        self._storage.delete(instance_id, keep_variables=keep_variables)

    def define(self, instance_id: str, spec: InstanceSpec, *, generation: int, life: Life = ORDINARY) -> None:
        files = self._storage.files(instance_id, spec)
        if life.rescue is not None:
            files = self._with_rescue_disk(files, instance_id, spec)
        with self._link.call() as connection:
            present = domains.check_free(connection, instance_id, spec.name)
            if life.adopted is not None:
                self._redefine_adopted(domains.find_owned(connection, instance_id), spec, generation, life)
                return
            facts = self._hypervisor.facts(connection)
            with self._hypervisor.dedicated(connection, instance_id, spec) as cpus:
                document = xml.build(
                    instance_id,
                    spec,
                    generation=generation,
                    life=life,
                    host=self._host,
                    facts=facts,
                    files=files,
                    cpus=cpus,
                    present=present,
                )
                try:
                    connection.defineXML(document)
                except libvirt.libvirtError as exc:
                    if not errors.is_lost(exc):
                        # Somebody may have taken the name since we looked; say who.
                        domains.check_free(connection, instance_id, spec.name)
                    raise

    def _redefine_adopted(self, domain: Any, spec: InstanceSpec, generation: int, life: Life) -> None:
        """Only our element changes: the rest came from somebody else and cannot be built from a spec."""
        known = domains.describe(domain, managed_save=False).spec
        if known is not None:
            check_adopted_spec(domain.name(), known, spec)
        adoption.write(domain, spec, generation=generation, host=self._host, life=life)

    def undefine(self, instance_id: str) -> None:
        with self._link.call() as connection:
            try:
                domain = domains.find_owned(connection, instance_id)
                if domain.isActive():
                    raise FailedPrecondition(
                        "the domain runs; destroy it before its definition is removed", code="instance_running"
                    )
                _undefine(domain, keep=domains.describe(domain, managed_save=False).life.adopted)
            except libvirt.libvirtError as exc:
                if not errors.is_code(exc, "VIR_ERR_NO_DOMAIN"):
                    raise
        self._hypervisor.pins.put_back(instance_id, {})

    def start(self, instance_id: str) -> None:
        """Start the domain, or restore it if it was saved. Running or paused already: nothing."""
        with self._link.call() as connection:
            domain = domains.find_owned(connection, instance_id)
            if domain.isActive() and _state(domain) == libvirt.VIR_DOMAIN_CRASHED:
                # It panicked, and libvirt is about to end it: what is to be started is a new life.
                with contextlib.suppress(libvirt.libvirtError):
                    domain.destroy()
            if not domain.isActive():
                encryption.provide(connection, self._settings.keys_dir, self._storage.seals(instance_id))
                saved.create(domain)

    def shutdown(self, instance_id: str) -> None:
        """Ask through the guest agent if it answers, else by the ACPI power button."""
        with self._link.call() as connection:
            domain = domains.find_owned(connection, instance_id)
            if not domain.isActive():
                return
            try:
                if self._settings.containers:
                    # By default libvirt looks for the pipe of an old init, and says that it asked where none read it.
                    domain.shutdownFlags(libvirt.VIR_DOMAIN_SHUTDOWN_SIGNAL)
                else:
                    domain.shutdown()
            except libvirt.libvirtError as exc:
                if errors.is_lost(exc) or domain.isActive():
                    raise

    def destroy(self, instance_id: str) -> None:
        """End the domain; a saved state is dropped too, since it would bring the guest back."""
        with self._link.call() as connection:
            domain = domains.find_owned(connection, instance_id)
            if domain.isActive():
                try:
                    domain.destroy()
                except libvirt.libvirtError as exc:
                    if errors.is_lost(exc) or domain.isActive():
                        raise
            if saved.is_saved(domain):
                domain.managedSaveRemove()

    def reboot(self, instance_id: str) -> None:
        if self._settings.simulated:
            raise Unsupported("libvirt's simulated hypervisor does not prove reboots")
        if self._settings.containers:
            raise Unsupported("libvirt tells nothing of a container's reboots")
        with self._link.call() as connection:
            domain = domains.find_owned(connection, instance_id)
            _require_active(domain)
            domain.reboot()

    def pause(self, instance_id: str) -> None:
        with self._link.call() as connection:
            domain = domains.find_owned(connection, instance_id)
            _require_active(domain)
            if _state(domain) == libvirt.VIR_DOMAIN_PAUSED:
                return
            try:
                domain.suspend()
            except libvirt.libvirtError as exc:
                if errors.is_lost(exc) or _state(domain) != libvirt.VIR_DOMAIN_PAUSED:
                    raise

    def resume(self, instance_id: str) -> None:
        """Let the vCPUs run on; a guest that sleeps (suspended to memory) is woken."""
        with self._link.call() as connection:
            domain = domains.find_owned(connection, instance_id)
            _require_active(domain)
            state = _state(domain)
            if state == libvirt.VIR_DOMAIN_RUNNING:
                return
            try:
                if state == libvirt.VIR_DOMAIN_PMSUSPENDED:
                    domain.pMWakeup()
                else:
                    domain.resume()
            except libvirt.libvirtError as exc:
                if errors.is_lost(exc) or _state(domain) != libvirt.VIR_DOMAIN_RUNNING:
                    raise


def _state(domain: Any) -> int:
    return int(domain.state()[0])


def _require_active(domain: Any) -> None:
    if not domain.isActive():
        raise FailedPrecondition("the instance does not run; start it first", code="instance_not_running")


def _undefine(domain: Any, *, keep: Adoption | None) -> None:
    # An adopted guest's NVRAM and TPM are of no use without its disks, and go or stay with them.
    kept = keep is not None and not keep.own_disks
    for attempt, flags in enumerate(_UNDEFINE_FLAGS, start=1):
        names = tuple(f"KEEP_{name}" if kept and name in ("NVRAM", "TPM") else name for name in flags)
        numbers = (binding.constant(f"VIR_DOMAIN_UNDEFINE_{name}") for name in names)
        try:
            domain.undefineFlags(sum(number for number in numbers if number is not None))
        except libvirt.libvirtError as exc:
            if attempt == len(_UNDEFINE_FLAGS) or not errors.is_code(exc, "VIR_ERR_INVALID_ARG"):
                raise
        else:
            return
