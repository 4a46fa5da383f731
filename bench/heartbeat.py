"""(f) What a heartbeat costs: hypervisor calls and CPU time, which may not grow with the number of instances."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from agent import config as agent_config
from agent import log
from agent.app import Agent
from agent.bus.memory import MemoryBroker, MemoryBus
from agent.controller import ComputeClient
from agent.drivers.fake import FakeDriver
from agent.messages.events import HostHeartbeat
from bench import guests, servers
from bench.measure import Report
from devstack.libvirtd import PrivateLibvirtd
from devstack.rabbitmq import PrivateBroker

SIMULATED = (1, 50, 500)
REAL = (1, 30)
INTERVAL_S = 0.05
PER_ROUND = 50
COUNTED = 20
QUIET = {"COMPUTE_AGENT_PERIODIC__RECONCILE_S": "3600"}
"""Reconciliation reads every domain, by its own clock: its calls are not a heartbeat's."""


def measure(directory: Path, rounds: int) -> Report:
    """Heartbeats far more often than anyone would have them, so that they are nearly all that the agent does."""
    columns = (
        "driver",
        "instances",
        "hypervisor calls per heartbeat",
        "CPU ms per heartbeat",
        "bytes",
        "ratio to 1 instance",
    )
    report = Report("Heartbeats", columns)
    env = {**guests.installed(directory), **QUIET}
    calls = {count: asyncio.run(_calls_of_fake(directory / f"calls-{count}", count)) for count in SIMULATED}
    with PrivateBroker(directory / "broker") as broker:
        found: dict[int, tuple[float, float]] = {}
        config = servers.agent_config(
            directory / "fake", broker.url, heartbeat_s=INTERVAL_S, settings={"persist": True}, extra=guests.OVERCOMMIT
        )
        for count in SIMULATED:
            found[count] = _cost(config, env, broker.url, count, None, rounds)
        _tell(report, "fake", found, calls)
        with PrivateLibvirtd(directory / "host") as host:
            config = servers.agent_config(
                directory / "libvirt",
                broker.url,
                driver="libvirt",
                settings={"uri": host.uri},
                image_roots=(directory,),
                heartbeat_s=INTERVAL_S,
                extra=guests.OVERCOMMIT,
            )
            found, calls = {}, {}
            for count in REAL:
                found[count] = _cost(config, env, broker.url, count, directory, rounds)
                calls[count] = _calls_of_libvirt(config, env, broker.url)
        _tell(report, "libvirt", found, calls)
    report.remarks.append(
        f"A heartbeat every {INTERVAL_S} s here (10 s by default); CPU of the whole agent over {PER_ROUND * rounds}"
        " heartbeats, with its metrics' gauges. Calls: for fake the driver's methods, for libvirt the messages that the"
        " agent sends to libvirtd, keepalive not counted. nova-compute 34 reads every domain in its audit, 0.8 s with 100"
        " instances every 60 s, while it holds the lock that a create needs."
    )
    return report


def _tell(report: Report, driver: str, found: dict[int, tuple[float, float]], calls: dict[int, float]) -> None:
    least = found[min(found)][0]
    for count, (cpu_ms, size) in found.items():
        cells = (f"{calls[count]:.1f}", f"{cpu_ms:.2f}", f"{size:.0f}", f"{cpu_ms / least:.2f}")
        report.rows.append((driver, str(count), *cells))


def _cost(
    config: Path, env: dict[str, str], url: str, count: int, image_folder: Path | None, rounds: int
) -> tuple[float, float]:
    with servers.agent(config, env) as pid:
        return guests.run(_cpu(url, pid, count, image_folder, rounds))


async def _cpu(url: str, pid: int, count: int, image_folder: Path | None, rounds: int) -> tuple[float, float]:
    """CPU of a heartbeat in ms, and its size, with so many instances, which are made up to that number."""
    async with guests.Watch(url, HostHeartbeat.kind) as watch:
        async with guests.controller(url) as client:
            await _fill(client, count, image_folder)
        await asyncio.sleep(1.0)
        found, size = [], 0
        for _ in range(rounds):
            watch.forget()
            await watch.next()
            before = guests.cpu_ms(pid)
            for _ in range(PER_ROUND):
                size = len((await watch.next())[1])
            found.append((guests.cpu_ms(pid) - before) / PER_ROUND)
    return statistics.median(found), size


async def _fill(client: ComputeClient, count: int, image_folder: Path | None) -> None:
    there = (await guests.listed(client))["instances"]
    ids = guests.new_ids(count - len(there))
    image = guests.base_image(image_folder) if image_folder else None
    await guests.create_all(client, ids, image)
    if image is not None:
        await guests.pause_all(client, ids)


def _calls_of_libvirt(config: Path, env: dict[str, str], url: str) -> float:
    """Messages to libvirtd per heartbeat, as libvirt's own library logs them."""
    trace = config.parent / "rpc.log"
    trace.unlink(missing_ok=True)
    logged = {"LIBVIRT_LOG_FILTERS": "2:rpc.netclient", "LIBVIRT_LOG_OUTPUTS": f"2:file:{trace}"}

    async def count() -> float:
        async with guests.Watch(url, HostHeartbeat.kind) as watch:
            await asyncio.sleep(2.0)
            watch.forget()
            await watch.next()
            before = _sent(trace)
            for _ in range(COUNTED):
                await watch.next()
            return (_sent(trace) - before) / COUNTED

    with servers.agent(config, {**env, **logged}):
        return guests.run(count())


def _sent(trace: Path) -> int:
    return sum("RPC_CLIENT_MSG_TX_QUEUE" in line for line in trace.read_text(errors="replace").splitlines())


async def _calls_of_fake(directory: Path, count: int) -> float:
    """Calls of the driver's methods per heartbeat, counted in an agent in this process."""
    log.configure("error")
    settings = agent_config.Settings.model_validate(
        {
            "agent": {"host": servers.AGENT_HOST, "state_dir": directory, "drain_timeout_s": 5},
            "bus": {"url": "amqp://unused/"},
            "driver": {"name": "fake"},
            "health": {"listen": ""},
            "capacity": {"cpu_allocation_ratio": 64.0},
            "periodic": {"heartbeat_s": INTERVAL_S, "reconcile_s": 3600.0},
        }
    )
    broker = MemoryBroker()
    agent = Agent(settings, MemoryBus(broker, name="agent"))
    await agent.start()
    try:
        await agent.wait_ready(guests.LIMIT_S)
        async with ComputeClient(MemoryBus(broker, name="controller"), source="/bench") as client:
            await _fill(client, count, None)
            await asyncio.sleep(0.5)
            async with client.heartbeats(servers.AGENT_HOST) as beats:
                await anext(beats)
                with _counted() as calls:
                    for _ in range(COUNTED):
                        await anext(beats)
                    return len(calls) / COUNTED
    finally:
        await agent.stop()


@contextlib.contextmanager
def _counted() -> Iterator[list[str]]:
    calls: list[str] = []
    surround = FakeDriver._call

    def call(self: FakeDriver, name: str, *args: Any, **kwargs: Any) -> contextlib.AbstractContextManager[None]:
        calls.append(name)
        return surround(self, name, *args, **kwargs)

    with mock.patch.object(FakeDriver, "_call", call):
        yield calls
