"""(b) Create: from the command to the running guest, against qemu-img and libvirt by hand with the same XML.

Both sides make the guest on the same libvirtd in turn, and it is removed before the next. Also many at once.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import libvirt

from agent.controller import ComputeClient
from agent.messages.commands import InstanceCreate
from agent.messages.events import Event
from agent.messages.spec import ImageSource
from bench import guests, servers
from bench.measure import Report, percentile, ratio_of_medians
from devstack.libvirtd import PrivateLibvirtd
from devstack.rabbitmq import PrivateBroker

GOAL = 1.15
PAIRS_PER_ROUND = 6
TOLD_PER_ROUND = 2
BURST_REAL = 10
BURST_FAKE = 100


@dataclass
class Found:
    """Seconds of each create, by side, and of each of its phases."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    phases: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    hand: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    bursts: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    in_burst: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))


def measure(directory: Path, rounds: int) -> Report:
    """One at a time and ten at once on real QEMU, a hundred at once on the simulated driver."""
    report = Report("Create", ("what", "side", "p50 ms", "p99 ms", "per second", "ratio to by hand"))
    env = guests.installed(directory)
    with PrivateBroker(directory / "broker") as broker:
        with PrivateLibvirtd(directory / "host") as host:
            config = servers.agent_config(
                directory / "agent",
                broker.url,
                driver="libvirt",
                settings={"uri": host.uri},
                image_roots=(directory,),
                extra=guests.OVERCOMMIT,
            )
            with servers.agent(config, env) as pid:
                image = guests.base_image(directory)
                hand = guests.ByHand(host.uri, directory / "hand")
                found, cpu_ms = guests.run(_real(broker.url, hand, image, directory / "base.qcow2", pid, rounds))
                hand.close()
        _tell(report, found)
        config = servers.agent_config(directory / "simulated", broker.url)
        with servers.agent(config, env) as pid:
            guests.run(_simulated(report, broker.url, pid, rounds))
    report.remarks += [_breakdown(found, cpu_ms), _reference()]
    return report


async def _real(
    url: str, hand: guests.ByHand, image: ImageSource, base: Path, pid: int, rounds: int
) -> tuple[Found, float]:
    found = Found()
    async with guests.controller(url) as client:
        await _by_agent(client, image)  # the image gets into the cache, the threads open their connections
        await _by_hand(hand, base)
        cpu, made = 0.0, 0
        for _ in range(rounds):
            for _ in range(PAIRS_PER_ROUND):
                before = guests.cpu_ms(pid)
                found.seconds["agent"].append(await _by_agent(client, image))
                cpu, made = cpu + guests.cpu_ms(pid) - before, made + 1
                seconds, steps = await _by_hand(hand, base)
                found.seconds["by hand"].append(seconds)
                for name, step_s in steps.items():
                    found.hand[name].append(step_s)
            for _ in range(TOLD_PER_ROUND):
                for name, phase_s in (await _told(client, image)).items():
                    found.phases[name].append(phase_s)
            for side in ("agent", "by hand"):
                total, each = await (_agent_burst(client, image) if side == "agent" else _hand_burst(hand, base))
                found.bursts[side].append(total)
                found.in_burst[side] += each
    return found, cpu / made


async def _create(client: ComputeClient, key: str, image: ImageSource | None, **options: Any) -> float:
    begun = time.perf_counter()
    spec = guests.small_spec(f"b-{key[:13]}", image)
    done = await client.call(
        InstanceCreate(spec=spec), host=servers.AGENT_HOST, instance_id=key, timeout_s=guests.LIMIT_S, **options
    )
    seconds = time.perf_counter() - begun
    assert done.result["observed"] == "running", done
    return seconds


async def _by_agent(client: ComputeClient, image: ImageSource) -> float:
    ids = guests.new_ids(1)
    seconds = await _create(client, ids[0], image)
    await guests.delete_all(client, ids)
    return seconds


async def _by_hand(hand: guests.ByHand, base: Path) -> tuple[float, dict[str, float]]:
    key = guests.new_ids(1)[0]
    spec = guests.small_spec(f"b-{key[:13]}")
    steps = await asyncio.to_thread(hand.create, key, spec, base)
    await asyncio.to_thread(hand.remove, key)
    return sum(steps.values()), steps


async def _told(client: ComputeClient, image: ImageSource) -> dict[str, float]:
    """The phases of one create, by the times that its events carry."""
    events: list[Event] = []
    ids = guests.new_ids(1)
    sent = time.time()
    seconds = await _create(client, ids[0], image, progress=True, on_event=events.append)
    await guests.delete_all(client, ids)
    marks: list[tuple[str, float]] = [("to the agent", sent)]
    for event in sorted(events, key=lambda e: e.time):
        if event.kind == "operation.accepted":
            marks.append(("into its lane", event.time.timestamp()))
        elif event.kind == "operation.progress" and event.data.get("percent") is None:
            # The report of `image` is left out where that of `claim` is still on its way.
            name = "claim and image" if event.data["phase"] in ("claim", "image") else event.data["phase"]
            if name != marks[-1][0]:
                marks.append((name, event.time.timestamp()))
        elif event.kind == "operation.succeeded":
            marks.append(("result to the controller", event.time.timestamp()))
    marks.append(("", sent + seconds))
    return {name: after - at for (name, at), (_, after) in itertools.pairwise(marks)}


async def _agent_burst(client: ComputeClient, image: ImageSource) -> tuple[float, list[float]]:
    ids = guests.new_ids(BURST_REAL)
    begun = time.perf_counter()
    each = await asyncio.gather(*(_create(client, key, image) for key in ids))
    total = time.perf_counter() - begun
    await guests.delete_all(client, ids)
    return total, list(each)


async def _hand_burst(hand: guests.ByHand, base: Path) -> tuple[float, list[float]]:
    """The same by as many threads, each with a connection of its own, which is open before."""
    ids = guests.new_ids(BURST_REAL)
    links = [libvirt.open(hand.connection.getURI()) for _ in ids]
    with concurrent.futures.ThreadPoolExecutor(BURST_REAL) as pool:
        begun = time.perf_counter()

        def one(key: str, link: Any) -> float:
            hand.create(key, guests.small_spec(f"b-{key[:13]}"), base, link)
            return time.perf_counter() - begun

        work = [asyncio.wrap_future(pool.submit(one, key, link)) for key, link in zip(ids, links, strict=True)]
        each = await asyncio.gather(*work)
        total = time.perf_counter() - begun
        await asyncio.gather(*(asyncio.wrap_future(pool.submit(hand.remove, key)) for key in ids))
    for link in links:
        link.close()
    return total, list(each)


async def _simulated(report: Report, url: str, pid: int, rounds: int) -> None:
    totals, each, cpu = [], [], []
    async with guests.controller(url) as client:
        for number in range(rounds + 1):
            ids = guests.new_ids(BURST_FAKE)
            before, begun = guests.cpu_ms(pid), time.perf_counter()
            latencies = await asyncio.gather(*(_create(client, key, None) for key in ids))
            total = time.perf_counter() - begun
            if number:  # the first round warms up
                totals.append(total)
                each += latencies
                cpu.append((guests.cpu_ms(pid) - before) / BURST_FAKE)
            await guests.delete_all(client, ids)
    report.rows.append(
        (
            f"{BURST_FAKE} at once, simulated",
            "agent",
            f"{percentile(each, 50) * 1000:.0f}",
            f"{percentile(each, 99) * 1000:.0f}",
            f"{BURST_FAKE / statistics.median(totals):.0f}",
            "-",
        )
    )
    report.remarks.append(f"Simulated: {statistics.median(cpu):.1f} ms of the agent's CPU per create.")


def _tell(report: Report, found: Found) -> None:
    for side, seconds in found.seconds.items():
        report.rows.append(
            (
                "one at a time, QEMU",
                side,
                f"{percentile(seconds, 50) * 1000:.0f}",
                f"{percentile(seconds, 99) * 1000:.0f}",
                f"{1 / statistics.median(seconds):.1f}",
                f"{ratio_of_medians(seconds, found.seconds['by hand']):.2f}",
            )
        )
    for side, totals in found.bursts.items():
        report.rows.append(
            (
                f"{BURST_REAL} at once, QEMU",
                side,
                f"{percentile(found.in_burst[side], 50) * 1000:.0f}",
                f"{percentile(found.in_burst[side], 99) * 1000:.0f}",
                f"{BURST_REAL / statistics.median(totals):.1f}",
                f"{ratio_of_medians(totals, found.bursts['by hand']):.2f}",
            )
        )


def _breakdown(found: Found, cpu_ms: float) -> str:
    agent = ", ".join(f"{name} {statistics.median(seconds) * 1000:.1f}" for name, seconds in found.phases.items())
    hand = ", ".join(f"{name} {statistics.median(seconds) * 1000:.1f}" for name, seconds in found.hand.items())
    return (
        f"Goal: at most {GOAL} times by hand. Where the time goes, medians in ms, agent (with progress events): {agent};"
        f" by hand: {hand}. {cpu_ms:.0f} ms of the agent's CPU per create on QEMU. By hand nothing is synced to disk,"
        " journaled, checked or told; ten at once by hand are ten threads with a connection each, the agent's are"
        " bounded by `lanes.build` (8) and `threads.mutate` (8)."
    )


def _reference() -> str:
    return (
        "nova-compute 34 (other machine, with its conductor and placement): one at a time on libvirt p50 771 ms, p99"
        " 1 010 ms, of which libvirt's part 277 ms, and 131-146 ms of its CPU; ten at once 1.68 per s; 100 at once on its"
        " fake driver 1.26 per s, p50 36 s, p99 68 s (4.6 per s without its placement scan)."
    )
