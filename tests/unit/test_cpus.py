"""Sets of CPUs, and that no CPU is given to two guests."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.drivers.base import DomainInfo
from agent.drivers.cpuset import assign
from agent.drivers.libvirt.pins import Pins
from agent.errors import ResourceExhausted
from agent.messages.cpus import format_cpus, parse_cpus


@given(st.sets(st.integers(0, 300)))
def test_what_is_written_is_read_back(cpus: set[int]) -> None:
    assert parse_cpus(format_cpus(cpus)) == cpus


@pytest.mark.parametrize(
    ("text", "cpus"), [("", set()), ("3", {3}), ("2-4,7", {2, 3, 4, 7}), (" 1 , 0-1 ,", {0, 1}), ("5-5", {5})]
)
def test_sets_as_operators_write_them(text: str, cpus: set[int]) -> None:
    assert parse_cpus(text) == cpus


@pytest.mark.parametrize("text", ["a", "3-1", "1-2-3", "-1", "1;2", "12345"])
def test_nonsense_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match=text[:2]):
        parse_cpus(text)


def test_a_guest_keeps_the_cpus_it_has() -> None:
    assert assign(3, keep={0: 7, 1: 4}, free=[1, 2, 4, 7]) == {0: 7, 1: 4, 2: 1}
    assert assign(1, keep={0: 7, 1: 4}, free=[]) == {0: 7}
    # Also CPUs that the operator has taken out of the set since.
    assert assign(2, keep={0: 99}, free=[3]) == {0: 99, 1: 3}


def test_a_cell_that_has_just_enough_is_taken_first() -> None:
    cells = [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert assign(2, keep={}, free=[0, 1, 2, 6, 7], cells=cells) == {0: 6, 1: 7}
    assert assign(3, keep={}, free=[0, 1, 2, 6, 7], cells=cells) == {0: 0, 1: 1, 2: 2}
    assert assign(5, keep={}, free=[0, 1, 2, 6, 7], cells=cells) == {0: 0, 1: 1, 2: 2, 3: 6, 4: 7}


def test_the_refusal_says_how_many_are_short() -> None:
    with pytest.raises(ResourceExhausted) as refused:
        assign(4, keep={0: 1}, free=[2])
    assert (refused.value.code, refused.value.details) == ("does_not_fit", {"PCPU": 2})


def test_no_cpu_is_given_twice_at_once() -> None:
    pins, barrier, given_to = Pins(), threading.Barrier(8), {}

    def work(number: int) -> None:
        barrier.wait(10)
        for turn in range(50):
            key = f"{number}-{turn}"
            try:
                given_to[key] = pins.take(key, 2, among=range(40))
            except ResourceExhausted:
                pins.put_back(f"{number}-{turn - 1}", {})
                given_to.pop(f"{number}-{turn - 1}", None)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    held = [cpu for cpus in given_to.values() for cpu in cpus.values()]
    assert len(held) == len(set(held)) <= 40
    assert pins.taken() == set(held)


def info(instance_id: str, *cpus: int) -> DomainInfo:
    return DomainInfo(instance_id, instance_id, "running", "", owned=True, vcpus=1, memory_mib=1, dedicated_cpus=cpus)


def test_a_reading_replaces_what_is_older_and_nothing_that_is_newer() -> None:
    pins = Pins()
    assert not pins.known
    pins.take("gone", 1, among=[1])
    mark = pins.mark()
    pins.take("new", 1, among=[2])  # defined while the domains were read
    pins.put_back("removed", {})  # undefined while they were read
    pins.learn([info("there", 3, 4), info("removed", 5)], mark)
    assert pins.known
    assert pins.taken() == {2, 3, 4}
    assert pins.held_by("there") == {0: 3, 1: 4}
    pins.learn([info("there", 3, 4), info("new", 2)], pins.mark())
    assert pins.taken() == {2, 3, 4}


def test_shrinking_gives_cpus_back_and_growing_takes_more() -> None:
    pins = Pins()
    assert pins.take("a", 3, among=range(4)) == {0: 0, 1: 1, 2: 2}
    assert pins.take("a", 1, among=range(4)) == {0: 0}
    assert pins.take("b", 3, among=range(4)) == {0: 1, 1: 2, 2: 3}
    with pytest.raises(ResourceExhausted):
        pins.take("a", 2, among=range(4))
    assert pins.held_by("a") == {0: 0}


def test_settings_of_sets() -> None:
    from agent.drivers.fake.settings import parse_settings as fake  # noqa: PLC0415
    from agent.drivers.libvirt.settings import parse_settings as libvirt  # noqa: PLC0415
    from agent.errors import InvalidArgument  # noqa: PLC0415

    wrong: list[tuple[Any, dict[str, Any]]] = [
        (fake, {"cpu_dedicated_set": "x"}),
        (libvirt, {"cpu_dedicated_set": "4-2"}),
        (libvirt, {"cpu_dedicated_set": "1-3", "cpu_shared_set": "0-1"}),
        (libvirt, {"shares": {"data": "relative"}}),
        (libvirt, {"shares": {"a/b": "/srv"}}),
        (libvirt, {"firmware_dirs": ["relative"]}),
    ]
    for parse, settings in wrong:
        with pytest.raises(InvalidArgument) as refused:
            parse(settings)
        assert refused.value.code == "bad_driver_settings", settings
