"""The driver contract: what an instance uses."""

from __future__ import annotations

import time
import uuid
from datetime import UTC, datetime
from pathlib import Path

import pytest
from driver_case import PREFIX, WAIT_S, DriverCase, Instance, make_image, make_spec

from agent.drivers.base import CallContext, Driver
from agent.drivers.verbs.stats import CpuUse, DiskUse, Use
from agent.errors import NotFound, Unsupported
from agent.messages.life import Life, Rescue
from agent.messages.spec import ImageSource

MIB = 1024 * 1024
IMAGE = {"url": "file:///images/any.raw", "sha256": "0" * 64, "format": "raw"}
SOURCE = ImageSource(url="file:///images/rescue.raw", sha256="0" * 64, format="raw")
RESCUED = Life(rescue=Rescue(image=SOURCE, since=datetime(2026, 1, 2, tzinfo=UTC), was_running=True))


class StatsContract:
    """CPU, memory, disks, NICs."""

    def test_stats_of_an_unknown_domain(self, driver: Driver) -> None:
        for ask_guest in (True, False):
            with pytest.raises(NotFound):
                driver.stats(str(uuid.uuid4()), make_spec(), ask_guest)

    def test_stats_of_a_stopped_domain(self, driver: Driver, instance: Instance) -> None:
        """What is known, and no figure of a guest that is not there."""
        instance.spec = make_spec(disks=[{"kind": "data", "name": "data", "size_mib": 8}])
        instance.create()
        for ask_guest in (True, False):
            _check_stopped(driver.stats(instance.id, instance.spec, ask_guest))
        driver.start(instance.id)
        driver.destroy(instance.id)
        _check_stopped(driver.stats(instance.id, instance.spec))
        instance.remove()

    def test_stats_of_a_running_domain(self, driver: Driver, instance: Instance) -> None:
        instance.spec = make_spec(disks=[{"kind": "data", "name": "data", "size_mib": 8}])
        before = datetime.now(UTC)
        instance.create(start=True)
        first = driver.stats(instance.id, instance.spec)
        assert first.power == "running"
        assert first.complete
        assert before <= first.at <= datetime.now(UTC)
        assert (first.cpu.vcpus, first.cpu.max_vcpus) == (1, 1)
        assert first.cpu.cpu_time_ns is not None
        assert first.memory.current_kib == first.memory.maximum_kib == 32 * 1024
        assert [(disk.name, disk.capacity_bytes) for disk in first.disks] == [("root", 16 * MIB), ("data", 8 * MIB)]
        assert [nic.nic for nic in first.nics] == [0]
        second = _later(driver, instance, first)
        for disk, earlier in zip(second.disks, first.disks, strict=True):
            for name in ("read_requests", "read_bytes", "read_time_ns", "write_requests", "write_bytes", "write_time_ns"):
                assert (getattr(disk, name) or 0) >= (getattr(earlier, name) or 0), name
        free = driver.stats(instance.id, instance.spec, False)
        assert (free.power, free.cpu.vcpus, free.memory.current_kib) == ("running", 1, 32 * 1024)
        assert free.cpu.cpu_time_ns is not None
        assert second.cpu.cpu_time_ns is not None
        assert free.cpu.cpu_time_ns >= second.cpu.cpu_time_ns
        instance.remove()

    def test_stats_of_a_paused_and_a_suspended_domain(self, driver: Driver, instance: Instance) -> None:
        instance.create(start=True)
        driver.pause(instance.id)
        paused = driver.stats(instance.id, instance.spec)
        assert (paused.power, paused.complete, paused.cpu.vcpus) == ("paused", True, 1)
        assert paused.cpu.cpu_time_ns is not None
        if "instance.suspend" in driver.capabilities().verbs:
            driver.suspend(instance.id, CallContext())
            saved = driver.stats(instance.id, instance.spec)
            assert (saved.power, saved.complete) == ("suspended", True)
            assert saved.cpu == CpuUse(vcpus=1, max_vcpus=1)
        instance.remove()

    def test_stats_of_a_domain_without_disks(self, driver: Driver, instance: Instance) -> None:
        """As one on the shelf is: a read still answers."""
        instance.create()
        driver.delete_storage(instance.id)
        found = driver.stats(instance.id, instance.spec)
        assert found.power == "stopped"
        assert all(disk.capacity_bytes is None and disk.allocation_bytes is None for disk in found.disks)
        instance.remove()

    def test_stats_name_disks_as_the_spec_does(self, driver: Driver, tmp_path: Path) -> None:
        """Of every kind and bus, whatever order the definition has; also while a rescue disk comes before them."""
        disks = [
            {"kind": "cdrom", "name": "cd", "image": IMAGE},
            {"kind": "data", "name": "filled", "size_mib": 3, "bus": "sata"},
            {"kind": "swap", "name": "swap", "size_mib": 2, "bus": "scsi"},
        ]
        instance = Instance(driver, make_spec(disks=disks, seed={"user_data": "#nothing"}))
        image = make_image(tmp_path / "image.raw", 2)
        driver.create_storage(instance.id, instance.spec, {"cd": image}, CallContext())
        driver.define(instance.id, instance.spec, generation=1)
        wanted = {"root": 16 * MIB, "filled": 3 * MIB, "swap": 2 * MIB}
        for power in ("stopped", "running", "rescued"):
            if power == "rescued":
                driver.destroy(instance.id)
                driver.create_rescue_disk(instance.id, instance.spec, make_image(tmp_path / "rescue.raw", 8), CallContext())
                driver.define(instance.id, instance.spec, generation=2, life=RESCUED)
            if power != "stopped":
                driver.start(instance.id)
            found = driver.stats(instance.id, instance.spec)
            sizes = {disk.name: disk.capacity_bytes for disk in found.disks if disk.name != "cd"}
            assert sizes == wanted, power
            assert list(sizes) == list(wanted), power
            assert len(found.disks) == len({disk.name for disk in found.disks})
            assert all(disk.capacity_bytes in (None, 2 * MIB) for disk in found.disks if disk.name == "cd")
        instance.remove()

    def test_stats_of_an_adopted_domain(self, driver: Driver, driver_case: DriverCase) -> None:
        if "instance.adopt" not in driver.capabilities().verbs:
            with pytest.raises(Unsupported):
                driver.foreign_plan(str(uuid.uuid4()), False)
            return
        foreign = driver_case.add_foreign(driver, f"{PREFIX}counted", disk=True)
        plan = driver.foreign_plan(foreign, False)
        driver.adopt(foreign, plan.spec, generation=1, life=Life(adopted=plan.adoption))
        found = driver.stats(foreign, plan.spec)
        assert (found.power, found.complete) == ("running", True)
        if driver.name == "libvirt":
            assert [(disk.name, disk.capacity_bytes) for disk in found.disks] == [("root", MIB)]
        driver.destroy(foreign)
        assert driver.stats(foreign, plan.spec).power == "stopped"
        driver.undefine(foreign)
        driver.delete_adopted_disks(foreign, plan.adoption.disks)


def _check_stopped(found: Use) -> None:
    assert (found.power, found.complete) == ("stopped", True)
    assert found.cpu == CpuUse(vcpus=1, max_vcpus=1)
    assert found.memory.maximum_kib == 32 * 1024
    assert found.memory.rss_kib is None
    assert found.memory.guest_at is None
    assert [(disk.name, disk.capacity_bytes) for disk in found.disks] == [("root", 16 * MIB), ("data", 8 * MIB)]
    sizes = ("name", "device", "capacity_bytes", "allocation_bytes", "physical_bytes")
    counters = [name for name in DiskUse.__dataclass_fields__ if name not in sizes]
    assert all(getattr(disk, name) is None for disk in found.disks for name in counters)
    assert [(nic.nic, nic.rx_bytes, nic.tx_bytes) for nic in found.nics] == [(0, None, None)]


def _later(driver: Driver, instance: Instance, first: Use) -> Use:
    """Read until the guest has used more CPU time. Nothing tells of that but another look."""
    assert first.cpu.cpu_time_ns is not None
    limit = time.monotonic() + WAIT_S
    while True:
        found = driver.stats(instance.id, instance.spec)
        assert found.cpu.cpu_time_ns is not None
        if found.cpu.cpu_time_ns > first.cpu.cpu_time_ns:
            return found
        assert found.cpu.cpu_time_ns == first.cpu.cpu_time_ns
        assert time.monotonic() < limit
        time.sleep(0.05)
