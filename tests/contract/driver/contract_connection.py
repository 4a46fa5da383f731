"""The driver contract: settings, connecting, losing the hypervisor, closing."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
from driver_case import (
    NEEDS_DOMAIN,
    Difference,
    DriverCase,
    EventRecorder,
    Instance,
    Verb,
)

from agent.drivers.base import Driver
from agent.errors import (
    InvalidArgument,
    Unavailable,
)


class ConnectionContract:
    """Settings, connecting, losing the hypervisor, closing."""

    def test_constructor_does_no_io_and_names_wrong_settings(self, driver_case: DriverCase, tmp_path: Path) -> None:
        driver_case.make(tmp_path, EventRecorder())
        assert not list(tmp_path.iterdir())
        with pytest.raises(InvalidArgument, match="no_such_setting"):
            driver_case.make(tmp_path, EventRecorder(), no_such_setting=1)

    def test_unconnected_driver_is_unavailable(self, driver_case: DriverCase, tmp_path: Path) -> None:
        driver = driver_case.make(tmp_path, EventRecorder())
        assert not driver.is_connected()
        with pytest.raises(Unavailable):
            driver.recover()
        driver.close()

    def test_connect_and_close_can_be_repeated(self, driver: Driver, events: EventRecorder) -> None:
        assert driver.is_connected()
        driver.connect()
        assert driver.is_connected()
        driver.close()
        driver.close()
        assert not driver.is_connected()
        with pytest.raises(Unavailable):
            driver.get(str(uuid.uuid4()))
        driver.connect()
        assert driver.is_connected()
        instance = Instance(driver).create(start=True)
        events.wait_power(instance.id, "running", "booted")
        assert events.connections == []

    def test_events_of_every_change(self, driver: Driver, instance: Instance, events: EventRecorder) -> None:
        instance.create()
        mark = events.wait_power(instance.id, None, "defined")
        driver.start(instance.id)
        mark = events.wait_power(instance.id, "running", "booted", mark)
        if "instance.pause" in driver.capabilities().verbs:
            driver.pause(instance.id)
            mark = events.wait_power(instance.id, "paused", "paused", mark)
            driver.resume(instance.id)
            mark = events.wait_power(instance.id, "running", "resumed", mark)
        driver.destroy(instance.id)
        mark = events.wait_power(instance.id, "stopped", "destroyed", mark)
        driver.undefine(instance.id)
        events.wait_power(instance.id, None, "undefined", mark)

    def test_lost_hypervisor(
        self, driver: Driver, driver_case: DriverCase, instance: Instance, events: EventRecorder
    ) -> None:
        if driver_case.has(Difference.CANNOT_BE_INTERRUPTED):
            assert driver.is_connected()
            with pytest.raises(NotImplementedError):
                driver_case.interrupt(driver)
            return
        instance.create(start=True)
        driver_case.interrupt(driver)
        mark = events.wait_connection(False)
        assert not driver.is_connected()
        calls: dict[str, Verb] = NEEDS_DOMAIN | {
            "recover": lambda driver, _id: driver.recover(),
            "capacity": lambda driver, _id: driver.capacity(),
            "undefine": lambda driver, uid: driver.undefine(uid),
            "define": lambda driver, uid: driver.define(uid, instance.spec, generation=2),
        }
        for name, call in calls.items():
            with pytest.raises(Unavailable):
                # Neither the instance nor an absent one may be taken for gone.
                pytest.fail(f"{name} returned {call(driver, instance.id)}")
        with pytest.raises(Unavailable):
            driver.get(str(uuid.uuid4()))
        driver_case.restore(driver)
        mark = events.wait_connection(True, mark)
        assert driver.is_connected()
        found = {info.id: info for info in driver.recover()}
        if driver_case.has(Difference.STATE_DIES_WITH_THE_HYPERVISOR):
            assert instance.id not in found
        else:
            assert found[instance.id].power == "running"
            driver.destroy(instance.id)
            events.wait_power(instance.id, "stopped", "destroyed", mark)
        other = Instance(driver).create(start=True)
        events.wait_power(other.id, "running", "booted", mark)
        assert events.connections == [False, True]

    def test_close_does_not_touch_guests(
        self, driver: Driver, driver_case: DriverCase, instance: Instance, events: EventRecorder
    ) -> None:
        instance.create(start=True)
        mark = events.mark()
        driver.close()
        driver.connect()
        info = {info.id: info for info in driver.recover()}.get(instance.id)
        if info is None:
            assert driver_case.has(Difference.STATE_DIES_WITH_THE_DRIVER)
        else:
            assert info.power == "running"
        assert not [event for event in events.all[mark:] if getattr(event, "power", None) == "stopped"]
