"""(d) Ready again after a restart, with 1,000 simulated instances and with 50 real, paused ones.

From the start of the process to its first heartbeat on the bus and to `agent.ready`, after an end in good order and
after kill -9. The floor is a process that only loads the agent's modules.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from agent.messages.events import HostHeartbeat, parse_event
from bench import guests, servers
from bench.measure import Report
from devstack.libvirtd import PrivateLibvirtd
from devstack.rabbitmq import PrivateBroker

SIMULATED = 1000
REAL = 50
LIMIT_S = 60.0
WAYS = {"plain": signal.SIGTERM, "kill -9": signal.SIGKILL}


@dataclass
class Found:
    """Seconds from the start of the process, of each start."""

    first_heartbeat: list[float] = field(default_factory=list)
    ready: list[float] = field(default_factory=list)
    stop: list[float] = field(default_factory=list)


class Floor:
    """A process that only loads what an agent with this driver loads."""

    def __init__(self, env: dict[str, str], driver: str) -> None:
        modules = [name for name in guests.AGENT_MODULES if ".drivers." not in name or name.endswith(driver)]
        self._command = [sys.executable, "-c", f"import {', '.join(modules)}"]
        self._env = {**os.environ, **env}
        self._found: list[float] = []

    def run(self) -> None:
        """Run it once."""
        begun = time.perf_counter()
        subprocess.run(self._command, check=True, env=self._env)
        self._found.append(time.perf_counter() - begun)

    @property
    def median(self) -> float:
        """Seconds that it took."""
        return statistics.median(self._found)


class Restarted:
    """An agent that is ended and started again, with a consumer that waits for its heartbeats."""

    def __init__(self, config: Path, env: dict[str, str], watch: guests.Watch) -> None:
        self._config = config
        self._env = {**os.environ, **env, "PYTHONUNBUFFERED": "1"}
        self._watch = watch
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        """What it writes."""
        return self._config.parent / "agent.log"

    async def start(self) -> tuple[float, float]:
        """Start it. Seconds to the first heartbeat on the bus, and to `agent.ready` by its own log."""
        command = [sys.executable, "-m", "agent", "run", "--config", str(self._config)]
        with self.log.open("wb") as log:
            wall, begun = time.time(), time.perf_counter()
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=self._env)
        at, _body = await self._watch.next(lambda body: _started_at(body) > wall)
        ready = await self._ready()
        return at - begun, ready - wall

    async def stop(self, number: signal.Signals) -> float:
        """End it. How many seconds that took."""
        process, begun = self._process, time.perf_counter()
        if process is not None:
            process.send_signal(number)
            await asyncio.to_thread(process.wait, LIMIT_S)
        self._process = None
        return time.perf_counter() - begun

    async def _ready(self) -> float:
        async with asyncio.timeout(LIMIT_S):
            while True:
                for line in self.log.read_text().splitlines():
                    if '"event":"agent.ready"' in line:
                        return datetime.fromisoformat(json.loads(line)["timestamp"]).timestamp()
                await asyncio.sleep(0.01)


def measure(directory: Path, rounds: int) -> Report:
    """Alternate the two ways to end; the same instances are there at each start."""
    columns = ("instances", "ended by", "starts", "first heartbeat s", "ready s", "slowest ready s", "ready, ratio to the imports alone", "end s")
    report = Report("Ready again after a restart", columns)
    env = guests.installed(directory)
    floors = {name: Floor(env, name) for name in ("fake", "libvirt")}
    with PrivateBroker(directory / "broker") as broker:
        config = servers.agent_config(directory / "none", broker.url)
        found = guests.run(_restarts(broker.url, config, env, floors["fake"], 0, None, rounds))
        _tell(report, "none", found, floors["fake"])
        config = servers.agent_config(
            directory / "simulated", broker.url, settings={"persist": True}, extra="[capacity]\ncpu_allocation_ratio = 100.0"
        )
        found = guests.run(_restarts(broker.url, config, env, floors["fake"], SIMULATED, None, rounds))
        _tell(report, f"{SIMULATED} simulated", found, floors["fake"])
        with PrivateLibvirtd(directory / "host") as host:
            config = servers.agent_config(
                directory / "real", broker.url, driver="libvirt", settings={"uri": host.uri}, image_roots=(directory,),
                extra=guests.OVERCOMMIT,
            )
            found = guests.run(_restarts(broker.url, config, env, floors["libvirt"], REAL, directory, rounds))
            _tell(report, f"{REAL} on QEMU, paused", found, floors["libvirt"])
    report.remarks.append(
        "Seconds from the start of the process, medians. Floor: a process that loads the same modules and ends, in turn"
        f" with the starts: {floors['fake'].median:.2f} s, with libvirt {floors['libvirt'].median:.2f} s. The first heartbeat is timed at its consumer. nova-compute 34 (other"
        " machine): ready after 1.77 s without instances and 3.36 s with 100 simulated ones, 2.1 s with libvirt; first"
        " heartbeat after 6.7 to 8.7 s."
    )
    return report


async def _restarts(
    url: str, config: Path, env: dict[str, str], floor: Floor, count: int, image_folder: Path | None, rounds: int
) -> dict[str, Found]:
    found: dict[str, Found] = defaultdict(Found)
    async with guests.Watch(url, HostHeartbeat.kind) as watch:
        agent = Restarted(config, env, watch)
        try:
            await agent.start()
            if count:
                await _fill(url, count, image_folder)
            await agent.stop(signal.SIGTERM)
            for _ in range(rounds):
                await asyncio.to_thread(floor.run)
                for way, number in WAYS.items():
                    await agent.start()
                    stop_s = await agent.stop(number)
                    first, ready = await agent.start()
                    found[way].stop.append(stop_s)
                    found[way].first_heartbeat.append(first)
                    found[way].ready.append(ready)
                    await agent.stop(signal.SIGTERM)
        finally:
            await agent.stop(signal.SIGKILL)
    return found


async def _fill(url: str, count: int, image_folder: Path | None) -> None:
    ids = guests.new_ids(count)
    image = guests.base_image(image_folder) if image_folder else None
    async with guests.controller(url) as client:
        await guests.create_all(client, ids, image)
        if image is not None:
            await guests.pause_all(client, ids)


def _started_at(body: bytes) -> float:
    started: str = parse_event(body).data["started_at"]
    return datetime.fromisoformat(started).timestamp()


def _tell(report: Report, instances: str, found: dict[str, Found], floor: Floor) -> None:
    for way, times in found.items():
        ready = statistics.median(times.ready)
        report.rows.append(
            (
                instances,
                way,
                str(len(times.ready)),
                f"{statistics.median(times.first_heartbeat):.2f}",
                f"{ready:.2f}",
                f"{max(times.ready):.2f}",
                f"{ready / floor.median:.2f}",
                f"{statistics.median(times.stop):.2f}",
            )
        )
