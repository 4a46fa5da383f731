"""Placement's arithmetic, and the refusal that says what is short."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.world import new_id, spec

from agent.core.capacity import Capacity, Reservations, disk_gib, free_of
from agent.core.context import now
from agent.drivers.base import DomainInfo, HostCapacity
from agent.errors import ResourceExhausted, Unavailable
from agent.messages.spec import RootDisk
from agent.store.base import InstanceRecord

HOST = HostCapacity("x86_64", "cpu", cpus=8, memory_mib=16_384, disk_total_mib=100 * 1024, disk_free_mib=50 * 1024)


def capacity(host: HostCapacity | None = HOST, **reservations: Any) -> Capacity:
    made = Capacity(Reservations(**reservations))
    made.host = host
    return made


def instance(vcpus: int = 1, memory_mib: int = 1024, disk_mib: int = 1024) -> InstanceRecord:
    at = now()
    made = spec(vcpus=vcpus, memory_mib=memory_mib, root_disk=RootDisk(size_mib=disk_mib))
    return InstanceRecord(new_id(), made, 0, "running", "running", "", "", at, at)


def foreign(power: Any = "running", vcpus: int = 2, memory_mib: int = 2048) -> DomainInfo:
    return DomainInfo(new_id(), "f", power, "", owned=False, vcpus=vcpus, memory_mib=memory_mib)


def test_before_the_host_was_read_nothing_is_promised() -> None:
    assert capacity(None).inventory([], []) == {}
    with pytest.raises(Unavailable) as refused:
        capacity(None).admit(spec(), [], [])
    assert refused.value.code == "capacity_unknown"
    assert refused.value.retryable


def test_the_shape_that_schedulers_read() -> None:
    made = capacity().inventory([instance(2, 2048, 1025)], [foreign()])
    assert made["VCPU"].model_dump() == {
        "total": 8, "reserved": 0, "min_unit": 1, "max_unit": 8, "step_size": 1, "allocation_ratio": 4.0, "used": 4,
    }  # fmt: skip
    assert (made["MEMORY_MB"].total, made["MEMORY_MB"].reserved, made["MEMORY_MB"].used) == (16_384, 512, 4096)
    assert (made["DISK_GB"].total, made["DISK_GB"].reserved, made["DISK_GB"].used) == (100, 1, 2)


def test_disk_is_rounded_up_to_gib() -> None:
    sizes = {1: 1, 1024: 1, 1025: 2, 10 * 1024: 10}
    assert {mib: disk_gib(spec(root_disk=RootDisk(size_mib=mib))) for mib in sizes} == sizes


@pytest.mark.parametrize(("power", "used"), [("running", 2), ("paused", 2), ("stopped", 0), ("crashed", 0)])
def test_a_foreign_domain_counts_while_it_is_in_memory(power: str, used: int) -> None:
    assert capacity().inventory([], [foreign(power)])["VCPU"].used == used


def test_what_fits_to_the_last_unit_is_admitted() -> None:
    made = capacity(cpu_allocation_ratio=1.0)
    made.admit(spec(vcpus=8, memory_mib=16_384 - 512, root_disk=RootDisk(size_mib=99 * 1024)), [], [])
    made.admit(spec(vcpus=3), [instance(5)], [])


@pytest.mark.parametrize(
    ("asked", "short"),
    [
        ({"vcpus": 9}, {"VCPU": 1}),
        ({"memory_mib": 16_384}, {"MEMORY_MB": 512}),
        ({"root_disk": RootDisk(size_mib=101 * 1024)}, {"DISK_GB": 2}),
        ({"vcpus": 10, "memory_mib": 32_768}, {"VCPU": 2, "MEMORY_MB": 32_768 - 15_872}),
    ],
)
def test_the_refusal_says_what_is_short_and_by_how_much(asked: dict[str, Any], short: dict[str, int]) -> None:
    with pytest.raises(ResourceExhausted) as refused:
        capacity().admit(spec(**asked), [], [])
    assert refused.value.code == "does_not_fit"
    assert dict(refused.value.details) == short
    for resource, missing in short.items():
        assert f"{resource}: " in refused.value.message
        assert f"{missing} too many" in refused.value.message


def test_over_commitment_does_not_make_one_instance_larger_than_the_host() -> None:
    made = capacity(cpu_allocation_ratio=16.0)
    made.admit(spec(vcpus=8), [instance(8)] * 15, [])
    with pytest.raises(ResourceExhausted) as refused:
        made.admit(spec(vcpus=9), [], [])
    assert refused.value.details == {"VCPU": 1}
    with pytest.raises(ResourceExhausted):
        made.admit(spec(vcpus=1), [instance(8)] * 16, [])


def test_reserving_more_than_there_is_leaves_nothing_and_no_nonsense() -> None:
    made = capacity(reserved_vcpus=100, reserved_memory_mib=10**9)
    inventory = made.inventory([instance()], [])
    assert inventory["VCPU"].reserved == 8
    assert free_of(inventory["VCPU"]) == free_of(inventory["MEMORY_MB"]) == 0


def test_a_host_that_lost_memory_is_overdrawn_and_admits_nothing() -> None:
    made = capacity(replace(HOST, memory_mib=1024))
    assert free_of(made.inventory([instance(memory_mib=4096)], [])["MEMORY_MB"]) == 0
    with pytest.raises(ResourceExhausted):
        made.admit(spec(), [instance(memory_mib=4096)], [])


@given(
    st.lists(st.tuples(st.integers(1, 8), st.integers(16, 9000)), max_size=30),
    st.floats(0.1, 8, allow_nan=False),
    st.integers(0, 8),
)
def test_what_is_admitted_never_exceeds_what_is_usable(
    wanted: list[tuple[int, int]], ratio: float, reserved: int
) -> None:
    made = capacity(cpu_allocation_ratio=ratio, reserved_vcpus=reserved)
    held: list[InstanceRecord] = []
    for vcpus, memory_mib in wanted:
        one = instance(vcpus, memory_mib)
        try:
            made.admit(one.spec, held, [])
        except ResourceExhausted:
            continue
        held.append(one)
    for inventory in made.inventory(held, []).values():
        assert inventory.used <= (inventory.total - inventory.reserved) * inventory.allocation_ratio
