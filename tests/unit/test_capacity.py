"""Placement's arithmetic, and the refusal that says what is short."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.world import new_id, spec

from agent.core.capacity import Capacity, Reservations, claim_of, disk_gib, free_of
from agent.core.context import now
from agent.drivers.base import DomainInfo, HostCapacity
from agent.errors import ResourceExhausted, Unavailable
from agent.messages.events import NumaCell, PagePool
from agent.messages.life import ORDINARY, Life, PendingResize, Shelf, Sizes, SoftDelete
from agent.messages.spec import ImageSource, RootDisk
from agent.messages.spec_disks import CdromDisk, DataDisk, SwapDisk
from agent.messages.spec_machine import Cpu, MemoryBacking
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


POOLS = [PagePool(size_kib=2048, total=512, free=500), PagePool(size_kib=1048576, total=2, free=2)]
LARGE = replace(
    HOST, shared_cpus=4, dedicated_cpus=4, numa_cells=(NumaCell(id=0, cpus=[], memory_mib=16_384, pages=POOLS),)
)
PAGED = MemoryBacking(hugepages_kib=2048)


def held(life: Life = ORDINARY, **fields: Any) -> InstanceRecord:
    return replace(instance(), spec=spec(**fields), life=life)


def test_the_shape_of_dedicated_cpus_and_pages() -> None:
    made = capacity(LARGE, reserved_pcpus=1, reserved_pages={2048: 12}).inventory(
        [held(vcpus=2, cpu=Cpu(placement="dedicated")), held(vcpus=3, memory_backing=PAGED, memory_mib=256)], []
    )
    shown = {name: (i.total, i.reserved, i.allocation_ratio, i.used) for name, i in made.items()}
    assert shown == {
        "VCPU": (4, 0, 4.0, 3),
        # Memory in the pools is not there for others: 3 GiB of it.
        "MEMORY_MB": (16_384, 512 + 3072, 1.0, 256),
        "DISK_GB": (100, 1, 1.0, 2),
        "PCPU": (4, 1, 1.0, 2),
        "CUSTOM_MEMORY_PAGE_2048": (512, 12, 1.0, 128),
        "CUSTOM_MEMORY_PAGE_1048576": (2, 0, 1.0, 0),
    }


@pytest.mark.parametrize(
    ("asked", "short"),
    [
        ({"vcpus": 3, "cpu": Cpu(placement="dedicated")}, {"PCPU": 1}),
        ({"vcpus": 5}, {"VCPU": 1}),
        ({"memory_mib": 1024, "memory_backing": PAGED}, {"CUSTOM_MEMORY_PAGE_2048": 128}),
        ({"memory_mib": 1024, "memory_backing": MemoryBacking(hugepages_kib=64)}, {"CUSTOM_MEMORY_PAGE_64": 16_384}),
    ],
    ids=["dedicated", "shared", "pages", "pages-of-another-size"],
)
def test_dedicated_cpus_and_pages_are_refused_when_they_are_short(asked: dict[str, Any], short: dict[str, int]) -> None:
    there = [held(vcpus=2, cpu=Cpu(placement="dedicated")), held(memory_mib=256, memory_backing=PAGED)]
    with pytest.raises(ResourceExhausted) as refused:
        capacity(LARGE).admit(spec(**asked), there, [])
    assert dict(refused.value.details) == short


def test_all_disks_are_claimed() -> None:
    disks = [
        DataDisk(kind="data", name="data", size_mib=1500),
        SwapDisk(kind="swap", name="swap", size_mib=500),
        CdromDisk(kind="cdrom", name="cd", image=ImageSource(url="file:///x", sha256="0" * 64, format="raw")),
    ]
    assert disk_gib(spec(root_disk=RootDisk(size_mib=1024), disks=disks)) == 3


def test_a_resize_to_be_confirmed_claims_the_larger_of_both() -> None:
    old = Sizes(vcpus=4, memory_mib=512, disks_mib={"root": 1024, "data": 4096})
    disks = [DataDisk(kind="data", name="data", size_mib=8192)]
    fields: dict[str, Any] = {"vcpus": 2, "memory_mib": 1024, "root_disk": RootDisk(size_mib=2048), "disks": disks}
    resized = held(Life(resize=PendingResize(old=old)), **fields)
    assert claim_of(resized) == {"VCPU": 4, "MEMORY_MB": 1024, "DISK_GB": 10}
    paged = held(Life(resize=PendingResize(old=old)), memory_mib=256, memory_backing=PAGED)
    assert claim_of(paged)["CUSTOM_MEMORY_PAGE_2048"] == 256


def test_the_shelf_claims_nothing_and_a_soft_delete_everything() -> None:
    at = now()
    assert claim_of(held(Life(shelf=Shelf(disks=[], since=at, was_running=True)), vcpus=4)) == {}
    deleted = held(Life(soft_delete=SoftDelete(restore_until=at, was_running=True)), vcpus=4)
    assert claim_of(deleted) == claim_of(held(vcpus=4))


def test_a_growing_claim_is_admitted_without_its_own_old_one() -> None:
    made, small, other = capacity(LARGE), held(vcpus=8), held(vcpus=4)
    made.admit_claim({"VCPU": 4}, [small, other], [])
    with pytest.raises(ResourceExhausted) as refused:
        made.admit_claim({"VCPU": 5}, [small, other], [])
    assert refused.value.details == {"VCPU": 1}
