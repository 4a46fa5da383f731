"""The libvirt driver: the verbs of the driver contract.

Each verb looks up the domain anew, checks that it is ours, and looks before it acts. When libvirt refuses, the
state is read again, because another may have done the same meanwhile. libvirt's errors are translated where the
call's block ends (`Link.call`).
"""

from __future__ import annotations

import contextlib
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
from agent.drivers.libvirt import binding, domains, encryption, errors, xml
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
from agent.errors import FailedPrecondition, Unsupported
from agent.messages.life import ORDINARY, Life
from agent.messages.spec import InstanceSpec

# Each set is tried until libvirt knows all its flags: a domain with one of these leftovers is not undefined
# without the flag, and the simulation or an old daemon refuses flags that it does not know.
_UNDEFINE_FLAGS: Final = (
    ("MANAGED_SAVE", "SNAPSHOTS_METADATA", "CHECKPOINTS_METADATA", "NVRAM", "TPM"),
    ("MANAGED_SAVE", "SNAPSHOTS_METADATA", "CHECKPOINTS_METADATA", "NVRAM"),
    ("MANAGED_SAVE", "SNAPSHOTS_METADATA"),
)


class LibvirtDriver(LibvirtMemory, LibvirtResize, LibvirtSnapshot, LibvirtRebuild, LibvirtHost):
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
        self._link = Link(self._settings, context.emit)
        self._hypervisor = Hypervisor(self._settings, self._link, self._storage)

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
        with self._link.call() as connection:
            return domains.describe_all(connection)

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
        with self._link.call() as connection:
            domains.find(connection, instance_id)
        return self._storage.console_tail(instance_id, max_bytes)

    # --- life -----------------------------------------------------------------------------------------------------

    def create_storage(
        self, instance_id: str, spec: InstanceSpec, images: Mapping[str, PreparedImage], call: CallContext
    ) -> None:
        self._storage.create(instance_id, spec, images, call)

    def delete_storage(self, instance_id: str) -> None:
        seals: list[encryption.Sealed] = []
        with contextlib.suppress(FailedPrecondition):  # a damaged manifest: libvirtd forgets secrets by itself too
            seals = self._storage.seals(instance_id)
        if seals:
            with self._link.call() as connection:
                encryption.withdraw(connection, seals)
        self._storage.delete(instance_id)

    def define(self, instance_id: str, spec: InstanceSpec, *, generation: int, life: Life = ORDINARY) -> None:
        files = self._storage.files(instance_id, spec)
        if life.rescue is not None:
            files = self._with_rescue_disk(files, instance_id, spec)
        with self._link.call() as connection:
            domains.check_free(connection, instance_id, spec.name)
            facts = self._hypervisor.facts(connection)
            document = xml.build(
                instance_id, spec, generation=generation, life=life, host=self._host, facts=facts, files=files
            )
            try:
                connection.defineXML(document)
            except libvirt.libvirtError as exc:
                if not errors.is_lost(exc):
                    # Somebody may have taken the name since we looked; say who.
                    domains.check_free(connection, instance_id, spec.name)
                raise

    def undefine(self, instance_id: str) -> None:
        with self._link.call() as connection:
            try:
                domain = domains.find_owned(connection, instance_id)
                if domain.isActive():
                    raise FailedPrecondition(
                        "the domain runs; destroy it before its definition is removed", code="instance_running"
                    )
                _undefine(domain)
            except libvirt.libvirtError as exc:
                if not errors.is_code(exc, "VIR_ERR_NO_DOMAIN"):
                    raise

    def start(self, instance_id: str) -> None:
        """Start the domain, or restore it if it was saved. Running or paused already: nothing."""
        with self._link.call() as connection:
            domain = domains.find_owned(connection, instance_id)
            if domain.isActive():
                return
            encryption.provide(connection, self._settings.keys_dir, self._storage.seals(instance_id))
            try:
                domain.create()
            except libvirt.libvirtError as exc:
                if errors.is_lost(exc) or not domain.isActive():
                    raise

    def shutdown(self, instance_id: str) -> None:
        """Ask through the guest agent if it answers, else by the ACPI power button."""
        with self._link.call() as connection:
            domain = domains.find_owned(connection, instance_id)
            if not domain.isActive():
                return
            try:
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
            if domain.hasManagedSaveImage():
                domain.managedSaveRemove()

    def reboot(self, instance_id: str) -> None:
        if self._settings.simulated:
            raise Unsupported("libvirt's simulated hypervisor does not prove reboots")
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


def _undefine(domain: Any) -> None:
    for attempt, names in enumerate(_UNDEFINE_FLAGS, start=1):
        numbers = (binding.constant(f"VIR_DOMAIN_UNDEFINE_{name}") for name in names)
        try:
            domain.undefineFlags(sum(number for number in numbers if number is not None))
        except libvirt.libvirtError as exc:
            if attempt == len(_UNDEFINE_FLAGS) or not errors.is_code(exc, "VIR_ERR_INVALID_ARG"):
                raise
        else:
            return
