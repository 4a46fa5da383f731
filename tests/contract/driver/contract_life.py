"""The driver contract: defining, starting, stopping, removing."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from driver_case import (
    NEEDS_DOMAIN,
    OPTIONAL,
    Difference,
    DriverCase,
    EventRecorder,
    Instance,
    must,
)

from agent.drivers.base import CallContext, Driver
from agent.errors import (
    FailedPrecondition,
    NotFound,
    Unsupported,
)


class LifeContract:
    """Defining, starting, stopping, removing."""

    def test_whole_life(
        self, driver: Driver, driver_case: DriverCase, instance: Instance, events: EventRecorder
    ) -> None:
        verbs = driver.capabilities().verbs
        instance.create(generation=7)
        info = driver.get(instance.id)
        assert (info.id, info.name, info.power, info.owned) == (instance.id, instance.spec.name, "stopped", True)
        assert (info.vcpus, info.memory_mib, info.spec, info.generation) == (1, 32, instance.spec, 7)
        driver.start(instance.id)
        assert instance.power == "running"
        if "instance.pause" in verbs:
            driver.pause(instance.id)
            assert instance.power == "paused"
            driver.resume(instance.id)
            assert instance.power == "running"
        mark = events.mark()
        driver.shutdown(instance.id)
        if driver_case.has(Difference.GUEST_IGNORES_SHUTDOWN):
            assert instance.power == "running"
            driver.destroy(instance.id)
        else:
            events.wait_power(instance.id, "stopped", "shutdown", mark)
        assert instance.power == "stopped"
        driver.start(instance.id)
        driver.destroy(instance.id)
        assert instance.power == "stopped"
        assert driver.get(instance.id).reason == "destroyed"
        driver.undefine(instance.id)
        with pytest.raises(NotFound):
            driver.get(instance.id)
        driver.delete_storage(instance.id)

    def test_every_verb_can_be_repeated(self, driver: Driver, instance: Instance, events: EventRecorder) -> None:
        verbs = driver.capabilities().verbs

        def twice(verb: Callable[[], object]) -> None:
            verb()
            before = instance.power
            verb()
            assert instance.power == before

        driver.create_storage(instance.id, instance.spec, {}, CallContext())
        driver.create_storage(instance.id, instance.spec, {}, CallContext())
        twice(lambda: driver.define(instance.id, instance.spec, generation=1))
        twice(lambda: driver.start(instance.id))
        if "instance.pause" in verbs:
            twice(lambda: driver.pause(instance.id))
            twice(lambda: driver.resume(instance.id))
        twice(lambda: driver.destroy(instance.id))
        twice(lambda: driver.shutdown(instance.id))
        for _ in range(2):
            driver.undefine(instance.id)
            driver.delete_storage(instance.id)
        with pytest.raises(NotFound):
            driver.get(instance.id)

    def test_shutdown_returns_at_once_when_repeated(self, driver: Driver, instance: Instance) -> None:
        instance.create(start=True)
        driver.shutdown(instance.id)
        driver.shutdown(instance.id)

    def test_absent_domain(self, driver: Driver) -> None:
        absent = str(uuid.uuid4())
        for name, call in NEEDS_DOMAIN.items():
            with pytest.raises(NotFound):
                pytest.fail(f"{name} returned {call(driver, absent)}")
        verbs = driver.capabilities().verbs
        for verb, call in OPTIONAL.items():
            with pytest.raises(must(verb in verbs, NotFound)):
                call(driver, absent)
        driver.undefine(absent)
        driver.delete_storage(absent)

    def test_running_domain_is_not_undefined(self, driver: Driver, instance: Instance) -> None:
        instance.create(start=True)
        with pytest.raises(FailedPrecondition) as caught:
            driver.undefine(instance.id)
        assert caught.value.code == "instance_running"
        assert instance.power == "running"

    def test_stopped_domain_is_not_paused_resumed_rebooted(self, driver: Driver, instance: Instance) -> None:
        instance.create()
        verbs = driver.capabilities().verbs
        for verb in ("instance.pause", "instance.resume", "instance.reboot"):
            with pytest.raises(must(verb in verbs, FailedPrecondition)) as caught:
                OPTIONAL[verb](driver, instance.id)
            if verb in verbs:
                assert getattr(caught.value, "code", None) == "instance_not_running"
        assert instance.power == "stopped"

    def test_paused_domain_can_be_destroyed(self, driver: Driver, instance: Instance) -> None:
        if "instance.pause" not in driver.capabilities().verbs:
            with pytest.raises(Unsupported):
                driver.pause(instance.id)
            return
        instance.create(start=True)
        driver.pause(instance.id)
        instance.remove()

    def test_eight_instances_at_once(self, driver: Driver, events: EventRecorder) -> None:
        def live(_number: int) -> str:
            instance = Instance(driver).create(start=True)
            assert driver.get(instance.id).power == "running"
            driver.details(instance.id)
            driver.capacity()
            instance.remove()
            with pytest.raises(NotFound):
                driver.get(instance.id)
            return instance.id

        with ThreadPoolExecutor(8) as threads:
            ids = list(threads.map(live, range(8), timeout=100))
        for instance_id in ids:
            mark = events.wait_power(instance_id, "running", "booted")
            events.wait_power(instance_id, "stopped", "destroyed", mark)
        assert not {info.id for info in driver.recover()} & set(ids)
