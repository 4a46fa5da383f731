"""The power and memory family of verbs over libvirt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from agent.drivers.base import CallContext
from agent.drivers.libvirt import domains, errors, jobs, saved
from agent.drivers.libvirt.binding import libvirt
from agent.drivers.libvirt.dumps import Dumps
from agent.drivers.libvirt.parts import Parts
from agent.drivers.libvirt.volumes import ROOT
from agent.drivers.verbs.memory import Dump
from agent.errors import Cancelled, ComputeError, FailedPrecondition, Unsupported
from agent.messages.spec import InstanceSpec
from agent.messages.verbs_memory import DumpFormat

_NEVER: Final = CallContext()


class LibvirtMemory(Parts):
    """See `agent.drivers.verbs.memory`."""

    # --- suspend to disk ------------------------------------------------------------------------------------------

    def suspend(self, instance_id: str, call: CallContext) -> None:
        jobs.wait_ended(self._link, instance_id, call)
        with self._link.call() as connection:
            domain = domains.find_owned(connection, instance_id)
            if _is_saved(domain):
                return
            jobs.require_active(domain)
            if domain.state()[0] == libvirt.VIR_DOMAIN_PMSUSPENDED:
                raise FailedPrecondition("the guest sleeps; resume it first", code="instance_suspended")
            if domain.hasManagedSaveImage():
                domain.managedSaveRemove()  # of a saving that was cut off
            if call.cancelled():
                raise Cancelled("cancelled before the guest's memory was saved")
            with jobs.watched(self._link, instance_id, call):
                try:
                    domain.managedSave(0)
                except libvirt.libvirtError as exc:
                    if errors.is_lost(exc):
                        raise
                    if call.cancelled() and errors.is_code(exc, "VIR_ERR_OPERATION_ABORTED"):
                        raise Cancelled("cancelled while the guest's memory was saved") from exc
                    if domain.isActive() or not domain.hasManagedSaveImage():
                        raise

    def restore(self, instance_id: str, call: CallContext) -> None:
        jobs.wait_ended(self._link, instance_id, call)
        with self._link.call() as connection:
            domain = domains.find_owned(connection, instance_id)
            if not domain.hasManagedSaveImage():
                return
            if domain.isActive():
                domain.managedSaveRemove()  # of a saving that was cut off: the guest has gone on since
                return
            saved.create(domain)

    def discard_saved(self, instance_id: str) -> None:
        with self._link.call() as connection:
            domain = domains.find_owned(connection, instance_id)
            if not domain.isActive() and domain.hasManagedSaveImage():
                domain.managedSaveRemove()

    # --- buttons --------------------------------------------------------------------------------------------------

    def reset(self, instance_id: str) -> None:
        self._refuse_simulated("resets")
        with self._link.call() as connection:
            domain = domains.find_owned(connection, instance_id)
            jobs.require_active(domain)
            domain.reset(0)

    def inject_nmi(self, instance_id: str) -> None:
        self._refuse_simulated("interrupts")
        with self._link.call() as connection:
            domain = domains.find_owned(connection, instance_id)
            jobs.require_active(domain)
            domain.injectNMI(0)

    # --- memory dump ----------------------------------------------------------------------------------------------

    def check_dump_space(self, instance_id: str) -> None:
        self._refuse_simulated("memory")
        with self._link.call() as connection:
            memory_mib = domains.find(connection, instance_id).maxMemory() // 1024
        self._dumps.check_space(memory_mib)

    def memory_dump(self, instance_id: str, name: str, form: DumpFormat, live: bool, call: CallContext) -> Dump:
        self._refuse_simulated("memory")
        found = self._dumps.find(name, call)
        if found is not None:
            return found
        jobs.wait_ended(self._link, instance_id, call)
        try:
            with self._link.call() as connection:
                domain = domains.find_owned(connection, instance_id)
                jobs.require_active(domain)
                if call.cancelled():
                    raise Cancelled("cancelled before the memory was dumped")
                part = self._dumps.begin(name)
                with jobs.watched(self._link, instance_id, call):
                    _dump(domain, str(part), form, live, call)
            return self._dumps.finish(name, call)
        except BaseException:
            self._dumps.drop_part(name)
            raise

    def remove_memory_dump(self, instance_id: str, name: str) -> None:
        self._refuse_simulated("memory")
        jobs.wait_ended(self._link, instance_id, _NEVER)
        self._dumps.remove(name)

    # --- policy ---------------------------------------------------------------------------------------------------

    def room_mib(self, instances: Mapping[str, InstanceSpec]) -> dict[str, int]:
        free: dict[int, int] = {}
        found: dict[str, int] = {}
        for instance_id, spec in instances.items():
            backends = [self._storage.backend(spec, name) for name in (ROOT, *(disk.name for disk in spec.disks))]
            try:
                for backend in backends:
                    if id(backend) not in free:
                        free[id(backend)] = backend.space_mib()[1]
            except ComputeError:
                continue  # what waits for space is then tried now and then
            found[instance_id] = min(free[id(backend)] for backend in backends)
        return found

    # --- inside ---------------------------------------------------------------------------------------------------

    @property
    def _dumps(self) -> Dumps:
        return Dumps(self._storage.dumps_root, self._settings.min_free_mib)

    def _refuse_simulated(self, what: str) -> None:
        if self._settings.simulated:
            raise Unsupported(f"libvirt's simulated hypervisor has no {what}")


def _is_saved(domain: Any) -> bool:
    """Whether the memory is saved. What a saving left that was cut off, with the guest, is removed."""
    if domain.isActive() or not domain.hasManagedSaveImage():
        return False
    if saved.is_incomplete(domain):
        domain.managedSaveRemove()
        return False
    return True


def _dump(domain: Any, path: str, form: DumpFormat, live: bool, call: CallContext) -> None:
    kinds = {
        "elf": libvirt.VIR_DOMAIN_CORE_DUMP_FORMAT_RAW,
        "kdump-zlib": libvirt.VIR_DOMAIN_CORE_DUMP_FORMAT_KDUMP_ZLIB,
        "raw": libvirt.VIR_DOMAIN_CORE_DUMP_FORMAT_RAW,
    }
    flags = libvirt.VIR_DUMP_LIVE if live else 0
    if form != "raw":
        flags |= libvirt.VIR_DUMP_MEMORY_ONLY
    try:
        domain.coreDumpWithFormat(path, kinds[form], flags)
    except libvirt.libvirtError as exc:
        if call.cancelled() and errors.is_code(exc, "VIR_ERR_OPERATION_ABORTED"):
            raise Cancelled("cancelled while the memory was dumped") from exc
        raise
    if call.cancelled():
        raise Cancelled("cancelled while the memory was dumped")
