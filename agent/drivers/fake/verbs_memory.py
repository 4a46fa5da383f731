"""The power and memory family of verbs on the simulated hypervisor."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from agent.drivers.base import CallContext
from agent.drivers.fake.parts import Parts
from agent.drivers.verbs.memory import Dump
from agent.errors import Cancelled, ResourceExhausted
from agent.messages.spec import InstanceSpec
from agent.messages.verbs_memory import DumpFormat


class FakeMemory(Parts):
    """See `agent.drivers.verbs.memory`."""

    def suspend(self, instance_id: str, call: CallContext) -> None:
        with self._call("suspend", instance_id, verb="instance.suspend", context=call), self._hypervisor.lock:
            domain = self._hypervisor.find_owned(instance_id)
            if domain.saved is None:
                self._hypervisor.save(self._active(instance_id, "suspended"))

    def restore(self, instance_id: str, call: CallContext) -> None:
        with self._call("restore", instance_id, verb="instance.suspend", context=call), self._hypervisor.lock:
            domain = self._hypervisor.find_owned(instance_id)
            if domain.saved is not None:
                self._hypervisor.restore(domain)

    def discard_saved(self, instance_id: str) -> None:
        with self._call("discard_saved", instance_id, verb="instance.suspend"), self._hypervisor.lock:
            domain = self._hypervisor.find_owned(instance_id)
            if domain.saved is not None:
                self._hypervisor.stop(domain, "stopped", "destroyed")

    def reset(self, instance_id: str) -> None:
        with self._call("reset", instance_id, verb="instance.reset"), self._hypervisor.lock:
            self._hypervisor.reset(self._active(instance_id, "reset"))

    def inject_nmi(self, instance_id: str) -> None:
        with self._call("inject_nmi", instance_id, verb="instance.trigger-crash-dump"), self._hypervisor.lock:
            self._active(instance_id, "interrupted")
            self._hypervisor.interrupt(instance_id)

    def check_dump_space(self, instance_id: str) -> None:
        with self._call("check_dump_space", instance_id, verb="instance.memory-dump"), self._hypervisor.lock:
            domain = self._hypervisor.find(instance_id)
            free = self._settings.disk_mib - self._hypervisor.disks.used_mib
            if free < domain.memory_mib:
                raise ResourceExhausted(
                    f"the dump needs up to {domain.memory_mib} MiB and {free} MiB are free",
                    code="no_space", free_mib=free, needed_mib=domain.memory_mib,
                )  # fmt: skip

    def memory_dump(self, instance_id: str, name: str, form: DumpFormat, live: bool, call: CallContext) -> Dump:  # noqa: ARG002 - all are alike here
        path = self._dumps / name
        with self._call("memory_dump", instance_id, verb="instance.memory-dump", context=call):
            domain = self._active(instance_id, "dumped")
            data = f"{form} {domain.id} {domain.memory_mib} MiB\n".encode()
            if not path.exists():
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                part = path.with_name(path.name + ".part")
                part.write_bytes(data)
                if call.cancelled():
                    part.unlink()
                    raise Cancelled("cancelled while the memory was dumped")
                part.rename(path)
        call.progress(100.0)
        return Dump(path, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())

    def remove_memory_dump(self, instance_id: str, name: str) -> None:
        with self._call("remove_memory_dump", instance_id, verb="instance.memory-dump"):
            for one in (name, f"{name}.part"):
                (self._dumps / one).unlink(missing_ok=True)

    def room_mib(self, instances: Mapping[str, InstanceSpec]) -> dict[str, int]:
        with self._call("room_mib"):
            return dict.fromkeys(instances, self._hypervisor.room_mib)

    # --- scripting --------------------------------------------------------------------------------------------

    def simulate_panic(self, instance_id: str) -> None:
        """Let the guest panic. Raises `NotFound`."""
        with self._hypervisor.lock:
            self._hypervisor.stop(self._hypervisor.find(instance_id), "crashed", "panicked")

    def simulate_full(self, room_mib: int) -> None:
        """Set how much room there is for the guests' disks to grow."""
        self._hypervisor.room_mib = room_mib

    def simulate_damaged_save(self, instance_id: str) -> None:
        """Damage the saved memory of a suspended guest. Raises `NotFound`."""
        with self._hypervisor.lock:
            domain = self._hypervisor.find(instance_id)
            domain.saved = "damaged"
            self._hypervisor.domains.put(domain)

    @property
    def _dumps(self) -> Path:
        return self._settings.dumps_dir or self._context.state_dir / "fake" / "dumps"
