"""The driver contract: sizes and limits of guests that run, and of those that do not."""

from __future__ import annotations

import pytest
from driver_case import Difference, DriverCase, Instance, make_spec

from agent.drivers.base import Driver
from agent.errors import FailedPrecondition, InvalidArgument, Unsupported
from agent.messages.life import Life, PendingResize, Sizes
from agent.messages.spec import InstanceSpec
from agent.messages.spec_limits import CpuLimits, DiskLimits

MOST = {"max_vcpus": 3, "max_memory_mib": 64}


class ResizeContract:
    """Sizes and limits."""

    @pytest.mark.parametrize("running", [False, True])
    def test_disks_grow_and_never_shrink(self, driver: Driver, instance: Instance, running: bool) -> None:
        instance.create(start=running)
        assert driver.disk_sizes(instance.id, instance.spec) == {"root": 16}
        for size_mib in (24, 24, 20):
            driver.grow_disk(instance.id, instance.spec, "root", size_mib)
            assert driver.disk_sizes(instance.id, instance.spec) == {"root": 24}
        assert instance.power == ("running" if running else "stopped")

    def test_a_new_definition_is_for_the_next_start(self, driver: Driver) -> None:
        instance = Instance(driver, make_spec(**MOST)).create(start=True)
        larger = instance.spec.model_copy(update={"vcpus": 2, "memory_mib": 48})
        life = Life(resize=PendingResize(old=Sizes(vcpus=1, memory_mib=32, disks_mib={"root": 16})))
        driver.define(instance.id, larger, generation=2, life=life)
        info = driver.get(instance.id)
        assert (info.power, info.spec, info.generation, info.life) == ("running", larger, 2, life)
        if self._live(driver):
            assert driver.guest_sizes(instance.id).vcpus == 1
            assert driver.guest_sizes(instance.id).memory_mib == 32
        driver.destroy(instance.id)
        driver.start(instance.id)
        if self._live(driver):
            sizes = driver.guest_sizes(instance.id)
            assert (sizes.vcpus, sizes.memory_mib) == (2, 48)

    def test_vcpus_are_plugged(self, driver: Driver, driver_case: DriverCase) -> None:
        instance = Instance(driver, make_spec(**MOST)).create(start=True)
        if not self._live(driver):
            with pytest.raises(Unsupported):
                driver.request_vcpus(instance.id, 3)
            return
        for _ in range(2):
            driver.request_vcpus(instance.id, 3)
            assert driver.guest_sizes(instance.id).vcpus == 3
        with pytest.raises(FailedPrecondition) as caught:
            driver.request_vcpus(instance.id, 4)
        assert caught.value.code == "above_maximum"
        if driver_case.has(Difference.VCPUS_ARE_NOT_UNPLUGGED):
            with pytest.raises(FailedPrecondition) as caught:
                driver.request_vcpus(instance.id, 2)
            assert caught.value.code == "vcpu_unplug_unsafe"
        else:
            driver.request_vcpus(instance.id, 2)
            assert driver.guest_sizes(instance.id).vcpus == 2
        assert driver.get(instance.id).spec == instance.spec

    def test_memory_is_plugged_if_the_guest_takes_it(self, driver: Driver, driver_case: DriverCase) -> None:
        instance = Instance(driver, make_spec(**MOST)).create(start=True)
        if not self._live(driver):
            with pytest.raises(Unsupported):
                driver.request_memory(instance.id, 48)
            return
        for _ in range(2):
            driver.request_memory(instance.id, 48)
        # Without an operating system nobody takes it: that is read back, not assumed.
        taken = 32 if driver_case.has(Difference.GUEST_IGNORES_SHUTDOWN) else 48
        assert driver.guest_sizes(instance.id).memory_mib == taken
        for wrong, code in ((66, "above_maximum"), (31, "below_boot_memory")):
            with pytest.raises(FailedPrecondition) as caught:
                driver.request_memory(instance.id, wrong)
            assert caught.value.code == code
        with pytest.raises(InvalidArgument) as step:
            driver.request_memory(instance.id, 33)
        assert step.value.code == "memory_step"
        driver.request_memory(instance.id, 32)
        assert driver.guest_sizes(instance.id).memory_mib == 32

    def test_memory_target(self, driver: Driver, driver_case: DriverCase) -> None:
        instance = Instance(driver, make_spec(**MOST)).create(start=True)
        if not self._live(driver):
            with pytest.raises(Unsupported):
                driver.request_memory_target(instance.id, 24)
            return
        assert driver.guest_sizes(instance.id).balloon_mib == 32
        driver.request_memory_target(instance.id, 24)
        followed = 32 if driver_case.has(Difference.GUEST_IGNORES_SHUTDOWN) else 24
        assert driver.guest_sizes(instance.id).balloon_mib == followed
        with pytest.raises(FailedPrecondition):
            driver.request_memory_target(instance.id, 33)

    def test_what_does_not_run_cannot_be_resized_live(self, driver: Driver, instance: Instance) -> None:
        instance.create()
        if not self._live(driver):
            return
        for call in (driver.request_vcpus, driver.request_memory, driver.request_memory_target):
            with pytest.raises(FailedPrecondition) as caught:
                call(instance.id, 32)
            assert caught.value.code == "instance_not_running"
        with pytest.raises(FailedPrecondition):
            driver.guest_sizes(instance.id)

    def test_disk_limits(self, driver: Driver, instance: Instance) -> None:
        instance.create(start=True)
        limited = _limited(instance.spec, DiskLimits(total_bytes_s=2**20, read_iops=100))
        if not self._live(driver):
            with pytest.raises(Unsupported):
                driver.apply_limits(instance.id, limited)
            return
        for spec in (limited, limited, instance.spec):
            driver.apply_limits(instance.id, spec)
            driver.define(instance.id, spec, generation=1)
        driver.destroy(instance.id)
        driver.apply_limits(instance.id, limited)

    def test_a_user_mode_nic_cannot_be_limited(self, driver: Driver) -> None:
        limited = make_spec(nics=[{"type": "user", "limits": {"inbound_kib_s": 1000}}])
        instance = Instance(driver, limited)
        with pytest.raises(Unsupported) as caught:
            instance.create()
        assert caught.value.code == "nic_limits_unsupported"
        driver.delete_storage(instance.id)
        other = Instance(driver).create()
        spec = other.spec.model_copy(update={"nics": limited.nics})
        with pytest.raises(Unsupported) as again:
            driver.apply_limits(other.id, spec)
        if self._live(driver):
            assert again.value.message == caught.value.message

    def test_cpu_limits_are_defined(self, driver: Driver, instance: Instance) -> None:
        spec = instance.spec.model_copy(update={"cpu_limits": CpuLimits(shares=512, quota_percent=50)})
        Instance(driver, spec, id=instance.id).create()
        assert driver.get(instance.id).spec == spec

    @staticmethod
    def _live(driver: Driver) -> bool:
        return "instance.set-memory-target" in driver.capabilities().verbs


def _limited(spec: InstanceSpec, limits: DiskLimits) -> InstanceSpec:
    root = spec.root_disk.model_copy(update={"limits": limits})
    return spec.model_copy(update={"root_disk": root})
