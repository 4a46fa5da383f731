"""(c) From a change at the hypervisor to a consumer on the bus, against a bare libvirt callback that publishes.

Guests are suspended and resumed from outside the agent, by libvirt-python in this process. An event's time begins
when this process could first know of the change: with its own libvirt callback, or with the return of the call,
whichever came first. So it holds neither libvirt's nor QEMU's work, and not the agent's way round them.
"""

from __future__ import annotations

import asyncio
import random
import sys
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import libvirt

from agent.drivers.libvirt import eventloop
from agent.messages.events import InstanceState
from bench import guests, servers
from bench.measure import Report, percentile, ratio_of_medians
from devstack.libvirtd import PrivateLibvirtd
from devstack.rabbitmq import PrivateBroker

GOAL_P99_MS = 20
GUESTS = 10
EVENTS_PER_ROUND = 120
LEAST_EVENTS = 200
WARM_UP = 20
SPREAD_S = 0.02


class Changer:
    """Suspends and resumes guests, and knows when each change could first be known."""

    def __init__(self, uri: str) -> None:
        eventloop.ensure_running()
        self._link = libvirt.open(uri)
        self._seen: dict[str, float] = {}
        self._lock = threading.Lock()
        self._link.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._on_event, None)

    def ids(self) -> list[str]:
        """The guests there are."""
        return [domain.UUIDString() for domain in self._link.listAllDomains()]

    def close(self) -> None:
        """Let go of the daemon."""
        self._link.close()

    def change(self, key: str) -> tuple[float, float]:
        """Suspend a running guest, resume a paused one. When the call began, and when the change could be known."""
        domain = self._link.lookupByUUIDString(key)
        paused = domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED
        with self._lock:
            self._seen.pop(key, None)
        begun = time.perf_counter()
        (domain.resume if paused else domain.suspend)()
        returned = time.perf_counter()
        with self._lock:
            return begun, min(returned, self._seen.get(key, returned))

    def _on_event(self, _link: Any, domain: Any, *_rest: Any) -> None:
        at = time.perf_counter()
        with self._lock:
            self._seen.setdefault(domain.UUIDString(), at)


@dataclass
class Found:
    """Milliseconds of each event, by side: from the change, and from the call that made it."""

    ms: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    from_call_ms: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    burst_ms: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))


def measure(directory: Path, rounds: int) -> Report:
    """Alternate the sides: each serves alone, `rounds` times."""
    report = Report(
        "Hypervisor events", ("what", "side", "events", "p50 ms", "p99 ms", "from the call p50 ms", "ratio")
    )
    env = guests.installed(directory)
    found = Found()
    with PrivateBroker(directory / "broker") as broker, PrivateLibvirtd(directory / "host") as host:
        config = servers.agent_config(
            directory / "agent",
            broker.url,
            driver="libvirt",
            settings={"uri": host.uri},
            image_roots=(directory,),
            extra=guests.OVERCOMMIT,
        )
        with servers.agent(config, env):
            guests.run(_make(broker.url, directory))
        changer = Changer(host.uri)
        bare = [sys.executable, "-m", "bench.bare_events", broker.url, host.uri]
        events = max(EVENTS_PER_ROUND, -(-LEAST_EVENTS // rounds))
        for _ in range(rounds):
            with servers.agent(config, env):
                guests.run(_round(found, "agent", broker.url, changer, events))
            with servers.process(bare, "ready", log=directory / "bare.log"):
                guests.run(_round(found, "bare callback", broker.url, changer, events))
        changer.close()
    for what, by_side in (("one at a time", found.ms), (f"{GUESTS} guests at once", found.burst_ms)):
        for side, ms in by_side.items():
            from_call = f"{percentile(found.from_call_ms[side], 50):.1f}" if by_side is found.ms else "-"
            report.rows.append(
                (
                    what,
                    side,
                    str(len(ms)),
                    f"{percentile(ms, 50):.1f}",
                    f"{percentile(ms, 99):.1f}",
                    from_call,
                    f"{ratio_of_medians(ms, by_side['bare callback']):.2f}",
                )
            )
    report.remarks.append(
        f"Goal: p99 under {GOAL_P99_MS} ms. Suspend and resume of {GUESTS} QEMU guests by libvirt-python outside the agent."
        " An event's time begins with the consumer's own libvirt callback or the return of its call, whichever was first;"
        " `from the call` begins before the call. The bare side publishes from the callback; the agent reads the state"
        " again before it believes an event, commits it to the journal with fsync, and publishes it with a number."
        " nova-compute 34: 53 ms from suspend or resume to the saved power state, 15 s when a guest is killed."
    )
    return report


async def _make(url: str, directory: Path) -> None:
    image = guests.base_image(directory)
    ids = guests.new_ids(GUESTS)
    async with guests.controller(url) as client:
        await guests.create_all(client, ids, image)
        await guests.pause_all(client, ids)


async def _round(found: Found, side: str, url: str, changer: Changer, events: int) -> None:
    ids = changer.ids()
    async with guests.Watch(url, InstanceState.kind) as watch:
        for number in range(WARM_UP + events):
            key = ids[number % len(ids)]
            # So that changes do not fall in step with anything that waits for the last one.
            await asyncio.sleep(random.uniform(0, SPREAD_S))
            begun, known = await asyncio.to_thread(changer.change, key)
            _key, at = await watch.about((key,))
            if number >= WARM_UP:
                found.ms[side].append((at - known) * 1000)
                found.from_call_ms[side].append((at - begun) * 1000)
        for _ in range(2):
            times = await asyncio.gather(*(asyncio.to_thread(changer.change, key) for key in ids))
            waiting = {key: known for key, (_begun, known) in zip(ids, times, strict=True)}
            while waiting:
                key, at = await watch.about(waiting)
                found.burst_ms[side].append((at - waiting.pop(key)) * 1000)
