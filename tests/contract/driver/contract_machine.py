"""The driver contract: what a host refuses beforehand, and CPUs that guests have for themselves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from driver_case import Difference, DriverCase, EventRecorder, Instance, make_spec

from agent.drivers.base import Driver
from agent.errors import ComputeError, ResourceExhausted

DEDICATED: dict[str, Any] = {"cpu": {"placement": "dedicated"}}


class MachineContract:
    """What a host refuses beforehand, and CPUs that guests have for themselves."""

    @pytest.fixture
    def pinning(self, driver_case: DriverCase, tmp_path: Path) -> Iterator[Driver]:
        """A driver with CPU 0 for dedicated guests, where it can have such."""
        plain = driver_case.has(Difference.PLAIN_MACHINES_ONLY)
        made = driver_case.make(tmp_path, EventRecorder(), **({} if plain else {"cpu_dedicated_set": "0"}))
        made.connect()
        yield made
        driver_case.clean()
        made.close()

    def test_check_passes_what_is_plain_and_makes_nothing(self, driver: Driver) -> None:
        before = driver.recover()
        driver.check(make_spec())
        assert driver.recover() == before

    @pytest.mark.parametrize(
        ("fields", "code"),
        [
            (DEDICATED, "no_dedicated_cpus"),
            ({"memory_backing": {"hugepages_kib": 64}}, "hugepages_missing"),
            ({"shares": [{"source": "nothing", "tag": "x"}]}, "share_unknown"),
        ],
        ids=["dedicated", "hugepages", "share"],
    )
    def test_check_refuses_what_the_host_never_has(
        self, driver: Driver, driver_case: DriverCase, fields: dict[str, Any], code: str
    ) -> None:
        before = driver.recover()
        with pytest.raises(ComputeError) as refused:
            driver.check(make_spec(**fields))
        assert refused.value.code == ("option_unsupported" if driver_case.has(Difference.PLAIN_MACHINES_ONLY) else code)
        assert not refused.value.retryable
        assert driver.recover() == before

    def test_a_dedicated_cpu_belongs_to_one_guest(self, pinning: Driver, driver_case: DriverCase) -> None:
        if driver_case.has(Difference.PLAIN_MACHINES_ONLY):
            with pytest.raises(ComputeError) as unsupported:
                pinning.check(make_spec(**DEDICATED))
            assert unsupported.value.code == "option_unsupported"
            return
        first, second = (Instance(pinning, make_spec(**DEDICATED)) for _ in range(2))
        pinning.check(first.spec)
        first.create(start=True)
        capacity = pinning.capacity()
        assert (capacity.dedicated_cpus, capacity.shared_cpus) == (1, capacity.cpus - 1)
        assert [cell.dedicated_cpus for cell in capacity.numa_cells if cell.dedicated_cpus] == [[0]]
        assert not any(cell.free_dedicated_cpus for cell in capacity.numa_cells)
        assert pinning.details(first.id).dedicated_cpus == pinning.get(first.id).dedicated_cpus == (0,)
        with pytest.raises(ResourceExhausted) as refused:
            second.create()
        assert (refused.value.code, refused.value.details) == ("does_not_fit", {"PCPU": 1})
        pinning.define(first.id, first.spec, generation=2)
        assert pinning.get(first.id).dedicated_cpus == (0,)
        first.remove()
        second.create()
        assert pinning.get(second.id).dedicated_cpus == (0,)
        shared = second.spec.model_copy(update={"cpu": make_spec().cpu})
        pinning.define(second.id, shared, generation=2)
        assert pinning.get(second.id).dedicated_cpus == ()
        first.create()
        assert pinning.get(first.id).dedicated_cpus == (0,)

    def test_a_host_without_such_a_set_offers_none(self, driver: Driver) -> None:
        capacity = driver.capacity()
        assert (capacity.dedicated_cpus, capacity.shared_cpus) == (None, None)
        assert not any(cell.dedicated_cpus for cell in capacity.numa_cells)
