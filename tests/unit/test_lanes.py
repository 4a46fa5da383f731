"""Lanes: order within, parallel beside, limits per class, blocked lanes, draining."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest
from support.world import LIMIT_S, until

from agent.core import lanes as lanes_module
from agent.core.lanes import Lanes, Work

pytestmark = pytest.mark.usefixtures("no_blocking")


def lanes(limit: int = 4) -> Lanes:
    return Lanes({"query": limit, "power": limit, "build": limit})


def job(log: list[str], name: str, gate: asyncio.Event | None = None) -> Work:
    async def work() -> None:
        log.append(f"{name} begins")
        if gate is not None:
            await gate.wait()
        log.append(f"{name} ends")

    return work


async def test_one_at_a_time_in_order_of_arrival() -> None:
    made, log, gate = lanes(), [], asyncio.Event()
    for number in range(5):
        made.put("a", "power", job(log, str(number), gate))
    await until(lambda: log)
    assert log == ["0 begins"]
    gate.set()
    await until(lambda: not made.busy)
    assert log == [f"{n} {what}" for n in range(5) for what in ("begins", "ends")]
    assert made.moved == 5


async def test_lanes_run_beside_each_other_up_to_the_limit_of_their_class() -> None:
    made, log, gate = lanes(2), [], asyncio.Event()
    for key in "abcd":
        made.put(key, "build", job(log, key, gate))
    made.put("e", "power", job(log, "e", gate))
    await until(lambda: len(log) == 3)
    assert log == ["a begins", "b begins", "e begins"]
    gate.set()
    await until(lambda: not made.busy)
    assert len(log) == 10


async def test_work_that_raises_ends_neither_its_lane_nor_its_slot() -> None:
    made, log = lanes(1), []

    async def broken() -> None:
        raise RuntimeError("defect")

    for _ in range(3):
        made.put("a", "power", broken)
    made.put("a", "power", job(log, "after"))
    made.put("b", "power", job(log, "b"))
    await until(lambda: not made.busy)
    assert sorted(log) == ["after begins", "after ends", "b begins", "b ends"]


async def test_a_blocked_lane_holds_no_slot() -> None:
    made, log, unblock = lanes(1), [], asyncio.Event()

    async def blocked(key: str) -> None:
        if key == "stuck":
            await unblock.wait()

    made.blocked = blocked
    made.put("stuck", "power", job(log, "stuck"))
    made.put("free", "power", job(log, "free"))
    await until(lambda: "free ends" in log)
    assert "stuck begins" not in log
    unblock.set()
    await until(lambda: not made.busy)
    assert log[-1] == "stuck ends"


async def test_what_is_put_while_the_last_work_ends_is_not_lost() -> None:
    made, log = lanes(), []

    async def last() -> None:
        asyncio.get_running_loop().call_soon(made.put, "a", "power", job(log, "late"))

    for _ in range(20):
        made.put("a", "power", last)
        await until(lambda: not made.busy)
    assert log.count("late ends") == 20


async def test_an_idle_lane_leaves_nothing_behind() -> None:
    made = lanes()
    for number in range(500):
        made.put(str(number), "query", job([], "x"))
    await until(lambda: not made.busy)
    await asyncio.sleep(0)
    assert not made._queues
    assert not made._tasks


async def test_drain_waits_for_what_runs_and_starts_nothing() -> None:
    made, log, gate = lanes(1), [], asyncio.Event()
    made.put("a", "power", job(log, "runs", gate))
    made.put("a", "power", job(log, "waits in its lane"))
    made.put("b", "power", job(log, "waits for a slot"))
    await until(lambda: log)
    draining = asyncio.ensure_future(made.drain(LIMIT_S))
    await asyncio.sleep(0)
    made.put("c", "power", job(log, "came late"))
    gate.set()
    assert await draining
    assert log == ["runs begins", "runs ends"]
    assert not made.busy


async def test_drain_cancels_what_does_not_end() -> None:
    made, log = lanes(), []
    made.put("a", "power", job(log, "a", asyncio.Event()))
    await until(lambda: log)
    assert not await made.drain(0.01)
    assert log == ["a begins"]
    assert not made.busy


async def test_drain_of_nothing_is_done() -> None:
    assert await lanes().drain(0.01)


async def test_drain_has_a_limit_for_what_holds_out_against_cancelling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes_module, "CANCEL_S", 0.01)
    made, gate, log = lanes(), asyncio.Event(), []

    async def stubborn() -> None:
        log.append("begun")
        while not gate.is_set():
            with suppress(asyncio.CancelledError):
                await gate.wait()

    made.put("a", "power", stubborn)
    await until(lambda: log)
    async with asyncio.timeout(LIMIT_S):
        assert not await made.drain(0.01)
    gate.set()
    await until(lambda: not made.busy)
