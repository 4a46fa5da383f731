"""The driver contract: suspend to disk, reset, interrupt, memory dump."""

from __future__ import annotations

import hashlib
import threading

import pytest
from driver_case import WAIT_S, Difference, DriverCase, EventRecorder, Instance, make_spec

from agent.drivers.base import CallContext, Driver, DriverEvent, Reported
from agent.errors import Cancelled, FailedPrecondition, NotFound, ResourceExhausted, Unsupported

MIB = 1024 * 1024


class MemoryContract:
    """Suspend to disk, reset, interrupt, memory dump."""

    @pytest.mark.parametrize("was", ["running", "paused"])
    def test_suspend_and_restore(
        self, driver: Driver, driver_case: DriverCase, instance: Instance, events: EventRecorder, was: str
    ) -> None:
        instance.create(start=True)
        if was == "paused":
            driver.pause(instance.id)
        mark = events.mark()
        for _ in range(2):
            driver.suspend(instance.id, CallContext())
            assert driver.get(instance.id).power == "suspended"
        events.wait_power(instance.id, "suspended", "saved", mark)
        assert driver.get(instance.id).reason == "saved"
        assert {info.id: info.power for info in driver.recover()}[instance.id] == "suspended"
        for _ in range(2):
            driver.restore(instance.id, CallContext())
            assert instance.power == ("running" if driver_case.has(Difference.A_RESTORED_GUEST_RUNS) else was)
        instance.remove()

    def test_suspended_is_started_destroyed_and_removed(self, driver: Driver, instance: Instance) -> None:
        instance.create(start=True)
        driver.suspend(instance.id, CallContext())
        driver.start(instance.id)
        assert instance.power == "running"
        driver.suspend(instance.id, CallContext())
        driver.destroy(instance.id)
        assert instance.power == "stopped"
        driver.restore(instance.id, CallContext())
        assert instance.power == "stopped"
        driver.start(instance.id)
        driver.suspend(instance.id, CallContext())
        for _ in range(2):
            driver.discard_saved(instance.id)
            assert instance.power == "stopped"
        driver.start(instance.id)
        driver.discard_saved(instance.id)
        assert instance.power == "running"
        driver.suspend(instance.id, CallContext())
        driver.undefine(instance.id)
        with pytest.raises(NotFound):
            driver.get(instance.id)
        driver.delete_storage(instance.id)

    def test_redefined_while_suspended(self, driver: Driver, instance: Instance) -> None:
        """A new definition loses no saved memory, and the domain has it when its guest is back."""
        instance.create(start=True)
        driver.suspend(instance.id, CallContext())
        changed = instance.spec.model_copy(update={"labels": {"colour": "red"}})
        driver.define(instance.id, changed, generation=2)
        assert instance.power == "suspended"
        driver.restore(instance.id, CallContext())
        info = driver.get(instance.id)
        assert (info.power, info.spec, info.generation) == ("running", changed, 2)
        instance.remove()

    def test_a_cancelled_suspend_leaves_the_guest_running(self, driver: Driver, instance: Instance) -> None:
        instance.create(start=True)
        with pytest.raises(Cancelled):
            driver.suspend(instance.id, CallContext(cancelled=lambda: True))
        assert instance.power == "running"
        instance.remove()

    def test_stopped_domain_has_no_memory(self, driver: Driver, instance: Instance) -> None:
        instance.create()
        verbs = driver.capabilities().verbs
        calls = {
            "instance.suspend": lambda: driver.suspend(instance.id, CallContext()),
            "instance.reset": lambda: driver.reset(instance.id),
            "instance.trigger-crash-dump": lambda: driver.inject_nmi(instance.id),
            "instance.memory-dump": lambda: driver.memory_dump(instance.id, "a.elf", "elf", True, CallContext()),
        }
        for verb, call in calls.items():
            if verb not in verbs:
                with pytest.raises(Unsupported):
                    call()
                continue
            with pytest.raises(FailedPrecondition) as caught:
                call()
            assert caught.value.code == "instance_not_running"
        assert instance.power == "stopped"
        driver.restore(instance.id, CallContext())
        driver.discard_saved(instance.id)
        assert instance.power == "stopped"

    def test_reset_is_proven_by_an_event(self, driver: Driver, instance: Instance, events: EventRecorder) -> None:
        if "instance.reset" not in driver.capabilities().verbs:
            with pytest.raises(Unsupported):
                driver.reset(instance.id)
            return

        def match(event: DriverEvent) -> bool:
            return isinstance(event, Reported) and event.event.kind == "instance.rebooted"

        instance.create(start=True)
        driver.reset(instance.id)
        events.wait(match, "instance.rebooted")
        assert instance.power == "running"
        instance.remove()

    @pytest.mark.parametrize("form", ["elf", "kdump-zlib", "raw"])
    def test_memory_dump(self, driver: Driver, instance: Instance, form: str) -> None:
        if "instance.memory-dump" not in driver.capabilities().verbs:
            with pytest.raises(Unsupported):
                driver.check_dump_space(instance.id)
            with pytest.raises(Unsupported):
                driver.memory_dump(instance.id, "one.elf", "elf", True, CallContext())
            return
        instance.create(start=True)
        driver.check_dump_space(instance.id)
        made = [
            driver.memory_dump(instance.id, f"one.{form}", form, form == "raw", CallContext())  # type: ignore[arg-type]
            for _ in range(2)
        ]
        assert made[0] == made[1]
        data = made[0].path.read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (made[0].size_bytes, made[0].sha256)
        assert [path.name for path in made[0].path.parent.iterdir()] == [f"one.{form}"]
        if driver.name == "libvirt":
            assert data[:4] == {"elf": b"\x7fELF", "kdump-zlib": b"make", "raw": b"QEVM"}[form]
            assert form != "elf" or len(data) > 32 * MIB
            assert made[0].path.stat().st_mode & 0o777 == 0o600
        assert instance.power == "running"
        for _ in range(2):
            driver.remove_memory_dump(instance.id, f"one.{form}")
        assert list(made[0].path.parent.iterdir()) == []
        instance.remove()

    def test_a_cancelled_dump_leaves_no_file(self, driver: Driver, instance: Instance) -> None:
        if "instance.memory-dump" not in driver.capabilities().verbs:
            with pytest.raises(Unsupported):
                driver.remove_memory_dump(instance.id, "one.raw")
            return
        instance.create(start=True)
        kept = driver.memory_dump(instance.id, "kept.raw", "raw", True, CallContext())
        asked = threading.Event()

        def cancelled() -> bool:
            # True from the second question on: the dump is under way then.
            seen = asked.is_set()
            asked.set()
            return seen

        with pytest.raises(Cancelled):
            driver.memory_dump(instance.id, "one.raw", "raw", True, CallContext(cancelled=cancelled))
        assert asked.wait(WAIT_S)
        assert list(kept.path.parent.iterdir()) == [kept.path]
        assert instance.power == "running"
        instance.remove()

    def test_a_dump_that_does_not_fit(self, driver: Driver, instance: Instance) -> None:
        verbs = driver.capabilities().verbs
        instance.spec = make_spec(memory_mib=8 * 1024 * 1024)  # eight terabytes, in a guest that is never started
        instance.driver.define(instance.id, instance.spec, generation=1)
        with pytest.raises(ResourceExhausted if "instance.memory-dump" in verbs else Unsupported):
            driver.check_dump_space(instance.id)
        driver.undefine(instance.id)

    def test_room_for_disks(self, driver: Driver, instance: Instance) -> None:
        instance.create()
        assert driver.room_mib({}) == {}
        found = driver.room_mib({instance.id: instance.spec})
        assert list(found) == [instance.id]
        assert found[instance.id] > 0
