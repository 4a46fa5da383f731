"""The driver contract: capabilities, capacity, details, console."""

from __future__ import annotations

from pathlib import Path

import pytest
from driver_case import (
    OPTIONAL,
    Difference,
    DriverCase,
    EventRecorder,
    Instance,
    count_calls,
    make_spec,
)

from agent.drivers.base import OPTIONAL_VERBS, Driver, DriverEvent, Reported
from agent.errors import (
    ComputeError,
    Unsupported,
)
from agent.messages.events import EVENTS


class ReadingContract:
    """Capabilities, capacity, details, console."""

    def test_announcements_agree_with_behaviour(self, driver: Driver, instance: Instance) -> None:
        capabilities = driver.capabilities()
        assert capabilities.hypervisor_type
        assert capabilities.hypervisor_version
        assert capabilities.verbs <= OPTIONAL_VERBS
        assert capabilities.events <= {event.kind for event in EVENTS}
        assert driver.capabilities() == capabilities
        instance.create(start=True)
        for verb, call in OPTIONAL.items():
            if verb in capabilities.verbs:
                try:
                    call(driver, instance.id)
                except Unsupported:
                    raise
                except ComputeError:
                    continue  # what it was asked cannot be done to this instance; that it can be asked is what matters
            else:
                with pytest.raises(Unsupported):
                    call(driver, instance.id)

    def test_reboot_keeps_the_domain(
        self, driver: Driver, driver_case: DriverCase, instance: Instance, events: EventRecorder
    ) -> None:
        capabilities = driver.capabilities()
        instance.create(start=True)
        if "instance.reboot" not in capabilities.verbs:
            with pytest.raises(Unsupported):
                driver.reboot(instance.id)
            return
        assert "instance.rebooted" in capabilities.events
        driver.reboot(instance.id)
        if not driver_case.has(Difference.GUEST_IGNORES_SHUTDOWN):

            def match(event: DriverEvent) -> bool:
                return isinstance(event, Reported) and event.event.kind == "instance.rebooted"

            events.wait(match, "instance.rebooted")
        assert instance.power == "running"

    def test_capacity_is_sane_and_costs_the_same_for_many_domains(self, driver: Driver) -> None:
        Instance(driver).create()
        driver.capacity()
        with count_calls() as before:
            capacity = driver.capacity()
        assert capacity.architecture
        assert capacity.cpu_model
        assert capacity.cpus >= 1
        assert capacity.memory_mib >= 64
        assert 0 < capacity.disk_free_mib <= capacity.disk_total_mib
        if capacity.numa_cells:
            assert sum(len(cell.cpus) for cell in capacity.numa_cells) <= capacity.cpus
        for _ in range(6):
            Instance(driver).create()
        with count_calls() as after:
            again = driver.capacity()
        assert (again.cpus, again.memory_mib) == (capacity.cpus, capacity.memory_mib)
        assert after["calls"] == before["calls"]
        assert after["processes"] == before["processes"] == 0

    def test_details(self, driver: Driver, driver_case: DriverCase, tmp_path: Path) -> None:
        nics = [{"type": "user", "mac": "52:54:00:12:34:56"}, {"type": "user"}]
        instance = Instance(driver, make_spec(nics=nics)).create()
        stopped = driver.details(instance.id)
        assert len(stopped.mac_addresses) == 2
        assert stopped.mac_addresses[0] == "52:54:00:12:34:56"
        driver.start(instance.id)
        running = driver.details(instance.id)
        assert running.mac_addresses == stopped.mac_addresses
        assert running.vnc_address is None
        if driver_case.has(Difference.DISKS_ARE_NOT_FILES):
            assert not running.disk_paths
        else:
            assert len(running.disk_paths) == 1
            assert Path(running.disk_paths[0]).is_relative_to(tmp_path)
            assert Path(running.disk_paths[0]).is_file()

    def test_mac_is_the_same_after_a_redefinition(self, driver: Driver, instance: Instance) -> None:
        instance.create()
        before = driver.details(instance.id).mac_addresses
        driver.define(instance.id, instance.spec, generation=2)
        assert driver.details(instance.id).mac_addresses == before
        driver.undefine(instance.id)
        driver.define(instance.id, instance.spec, generation=3)
        assert driver.details(instance.id).mac_addresses == before

    def test_console_log(self, driver: Driver, instance: Instance) -> None:
        instance.create()
        if "console.log" not in driver.capabilities().verbs:
            with pytest.raises(Unsupported):
                driver.console_log(instance.id, 100)
            return
        empty = driver.console_log(instance.id, 100)
        assert (empty.data, empty.truncated) == (b"", False)
        driver.start(instance.id)
        chunk = driver.console_log(instance.id, 10)
        assert len(chunk.data) <= 10
        driver.destroy(instance.id)
        whole = driver.console_log(instance.id, 1024 * 1024)
        assert not whole.truncated
        assert driver.console_log(instance.id, 1).truncated == (len(whole.data) > 1)
