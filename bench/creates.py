"""(h) Many creates at once: from the commands to the running guests, against qemu-img and libvirt by hand.

Each side has a libvirtd of its own, so that the agent has no work with the guests of the other. By hand comes twice:
with as many threads as guests, and with as many as the agent has for changes. Making the XML is not counted.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import libvirt

from agent.config import ThreadsSection
from agent.controller import ComputeClient
from agent.messages.commands import InstanceCreate
from agent.messages.spec import ImageSource
from bench import guests, servers
from bench.measure import Report, percentile, ratio_of_medians
from devstack.libvirtd import PrivateLibvirtd
from devstack.rabbitmq import PrivateBroker

GOAL = 1.2
AT_ONCE = 20
AGENT_THREADS = ThreadsSection().mutate
AGENT = "agent"
HAND = f"by hand, {AT_ONCE} threads"
HAND_FEW = f"by hand, {AGENT_THREADS} threads"


@dataclass
class Side:
    """What one side took: seconds of each round, and of each create in it."""

    totals: list[float] = field(default_factory=list)
    each: list[float] = field(default_factory=list)


def measure(directory: Path, rounds: int) -> Report:
    """The sides in turn; the order turns with each round."""
    report = Report(
        f"{AT_ONCE} creates at once",
        (
            "side",
            "all done s",
            "fastest s",
            "p50 ms",
            "p99 ms",
            "per second",
            *(f"ratio to {side}" for side in (HAND, HAND_FEW)),
        ),
    )
    with (
        PrivateBroker(directory / "broker") as broker,
        PrivateLibvirtd(directory / "host") as host,
        PrivateLibvirtd(directory / "bare") as bare,
    ):
        config = servers.agent_config(
            directory / "agent",
            broker.url,
            driver="libvirt",
            settings={"uri": host.uri},
            image_roots=(directory,),
            extra=guests.OVERCOMMIT,
        )
        with servers.agent(config, guests.installed(directory)) as pid:
            image = guests.base_image(directory)
            hand = guests.ByHand(bare.uri, directory / "hand")
            found, cpu_ms, loads = guests.run(
                _run(broker.url, hand, bare.uri, image, directory / "base.qcow2", pid, rounds)
            )
            hand.close()
    for name, side in found.items():
        total = percentile(side.totals, 50)
        report.rows.append(
            (
                name,
                f"{total:.2f}",
                f"{min(side.totals):.2f}",
                f"{percentile(side.each, 50) * 1000:.0f}",
                f"{percentile(side.each, 99) * 1000:.0f}",
                f"{AT_ONCE / total:.1f}",
                *(f"{ratio_of_medians(side.totals, found[floor].totals):.2f}" for floor in (HAND, HAND_FEW)),
            )
        )
    report.remarks.append(
        f"Goal: all {AT_ONCE} running after at most {GOAL} times by hand. {rounds} rounds per side, in turn. The agent's side"
        f" includes the broker both ways and the journal, {cpu_ms:.0f} ms of its CPU per create. Load of the host over"
        f" the rounds: {min(loads):.1f} to {max(loads):.1f} (this bench is part of it)."
    )
    return report


async def _run(
    url: str, hand: guests.ByHand, uri: str, image: ImageSource, base: Path, pid: int, rounds: int
) -> tuple[dict[str, Side], float, list[float]]:
    found: dict[str, Side] = defaultdict(Side)
    cpu, loads = 0.0, []
    async with guests.controller(url) as client:

        async def by_agent() -> tuple[float, list[float]]:
            nonlocal cpu
            ids = guests.new_ids(AT_ONCE)
            before = guests.cpu_ms(pid)
            times = await _by_agent(client, image, ids)
            cpu += guests.cpu_ms(pid) - before
            await guests.delete_all(client, ids)
            return times

        sides: dict[str, Callable[[], Awaitable[tuple[float, list[float]]]]] = {
            AGENT: by_agent,
            HAND: lambda: _by_hand(hand, uri, base, AT_ONCE),
            HAND_FEW: lambda: _by_hand(hand, uri, base, AGENT_THREADS),
        }
        for call in sides.values():  # the image gets into the cache, connections open
            await call()
        cpu = 0.0
        for number in range(rounds):
            order = list(sides)
            for name in order[number % len(order) :] + order[: number % len(order)]:
                loads.append(os.getloadavg()[0])
                os.sync()  # what one side left to be written is not the other's affair
                total, each = await sides[name]()
                found[name].totals.append(total)
                found[name].each += each
    return {name: found[name] for name in sides}, cpu / rounds / AT_ONCE, loads


async def _by_agent(client: ComputeClient, image: ImageSource, ids: list[str]) -> tuple[float, list[float]]:
    begun = time.perf_counter()

    async def one(key: str) -> float:
        create = InstanceCreate(spec=guests.small_spec(f"b-{key[:13]}", image))
        done = await client.call(create, host=servers.AGENT_HOST, instance_id=key, timeout_s=guests.LIMIT_S)
        assert done.result["observed"] == "running", done
        return time.perf_counter() - begun

    each = await asyncio.gather(*(one(key) for key in ids))
    return time.perf_counter() - begun, list(each)


async def _by_hand(hand: guests.ByHand, uri: str, base: Path, threads: int) -> tuple[float, list[float]]:
    """So many threads, each with a connection of its own, which is open before."""
    bare = [hand.prepare(key, guests.small_spec(f"b-{key[:13]}")) for key in guests.new_ids(AT_ONCE)]
    links = [libvirt.open(uri) for _ in range(threads)]
    idle: list[Any] = list(links)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:

        def one(guest: guests.Bare) -> float:
            link = idle.pop()
            try:
                guest.create(link, base)
            finally:
                idle.append(link)
            return time.perf_counter() - begun

        begun = time.perf_counter()
        each = await asyncio.gather(*(asyncio.wrap_future(pool.submit(one, guest)) for guest in bare))
        total = time.perf_counter() - begun
        await asyncio.gather(*(asyncio.wrap_future(pool.submit(hand.remove, guest.instance_id)) for guest in bare))
    for link in links:
        link.close()
    return total, list(each)
