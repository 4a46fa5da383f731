"""(e) An idle agent: memory with libvirt loaded, CPU over a minute, and what the memory is made of."""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import time
from pathlib import Path

from bench import guests, servers
from bench.measure import Report, pss_mib, rss_mib
from devstack.libvirtd import PrivateLibvirtd
from devstack.rabbitmq import PrivateBroker

RSS_GOAL_MIB = 64
CPU_GOAL_PERCENT = 0.2
SETTLE_S = 4.0
WINDOW_S = 60.0
INSTANCES = 100

PARTS = (
    ("interpreter", ""),
    ("asyncio, ssl, uvloop", "asyncio ssl uvloop"),
    ("pydantic, pydantic-settings", "pydantic pydantic.dataclasses pydantic_settings"),
    ("structlog, click, prometheus-client, sqlite3", "structlog click prometheus_client sqlite3"),
    ("aiormq, aio-pika", "aiormq aio_pika"),
    ("the agent's own modules and models", "agent.cli agent.config agent.app agent.bus.amqp agent.drivers.fake"),
    ("libvirt's C library and binding, the driver", "libvirt agent.drivers.libvirt"),
)
"""What the process loads, in the order in which its cost is told: each part counts what those before it did not load."""

_COST = """
import sys, importlib
if sys.argv[1:] == ["none"]:
    sys.argv[1:] = []
for name in sys.argv[1:]:
    importlib.import_module(name)
print(next(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("Rss")))
"""


def measure(directory: Path, rounds: int) -> Report:
    """One window of up to a minute for all three agents at once: they are idle, and so do not disturb each other."""
    report = Report("Idle", ("agent", "RSS MiB", "PSS MiB", "threads", "CPU %", "wake-ups per s"))
    window_s = min(WINDOW_S, 15.0 * rounds)
    with contextlib.ExitStack() as stack:
        broker = stack.enter_context(PrivateBroker(directory / "broker"))
        host = stack.enter_context(PrivateLibvirtd(directory / "host"))
        pids: dict[str, int] = {}
        for name, driver, count in (("libvirt", "libvirt", 0), ("fake", "fake", 0), ("full", "fake", INSTANCES)):
            settings: dict[str, object] = {"uri": host.uri} if driver == "libvirt" else {}
            config = servers.agent_config(directory / name, broker.url, driver=driver, settings=settings)
            pid = stack.enter_context(servers.agent(config, env={"COMPUTE_AGENT_AGENT__HOST": name}))
            if count:
                guests.run(_fill(broker.url, name, count))
            pids[f"{driver}, {count} instances"] = pid
        time.sleep(SETTLE_S)
        before = {name: (_cpu_ns(pid), _switches(pid)) for name, pid in pids.items()}
        begun = time.perf_counter()
        time.sleep(window_s)
        seconds = time.perf_counter() - begun
        for name, pid in pids.items():
            cpu_ns, switches = before[name]
            report.rows.append(
                (
                    name,
                    f"{rss_mib(pid):.1f}",
                    f"{pss_mib(pid):.1f}",
                    str(len(list(Path(f"/proc/{pid}/task").iterdir()))),
                    f"{(_cpu_ns(pid) - cpu_ns) / 1e7 / seconds:.2f}",
                    f"{(_switches(pid) - switches) / seconds:.1f}",
                )
            )
    report.remarks += [
        f"CPU and wake-ups over {seconds:.0f} s, heartbeats every 10 s among them."
        f" Goals: RSS under {RSS_GOAL_MIB} MiB with libvirt loaded, CPU under {CPU_GOAL_PERCENT} %."
        " PSS divides the pages that two processes share; the three agents and libvirtd share libraries."
        " nova-compute 34, idle with libvirt: 162 MiB RSS, 135 MiB PSS; CPU 0.13 % without and 0.43 % with 100 instances.",
        f"Where the memory goes, by import (RSS in MiB, median of {min(rounds, 3)}): {_costs(min(rounds, 3))}.",
    ]
    return report


async def _fill(url: str, host: str, count: int) -> None:
    async with guests.controller(url) as client:
        await guests.create_all(client, guests.new_ids(count), host=host)


def _cpu_ns(pid: int) -> int:
    """Time on a CPU of all threads: finer than the clock ticks of /proc/PID/stat."""
    return sum(int(Path(f"/proc/{pid}/task/{task}/schedstat").read_text().split()[0]) for task in _tasks(pid))


def _switches(pid: int) -> int:
    """How often a thread has given way of itself, which it does before each wait."""
    total = 0
    for task in _tasks(pid):
        for line in Path(f"/proc/{pid}/task/{task}/status").read_text().splitlines():
            if line.startswith("voluntary_ctxt_switches"):
                total += int(line.split()[1])
    return total


def _tasks(pid: int) -> list[str]:
    return [path.name for path in Path(f"/proc/{pid}/task").iterdir()]


def _costs(rounds: int) -> str:
    """What each part adds to a process that has loaded the parts before it."""
    loaded: list[str] = []
    last, told = 0.0, []
    for part, modules in PARTS:
        loaded += modules.split()
        command = [sys.executable, "-c", _COST, *(loaded or ["none"])]
        found = [int(subprocess.run(command, check=True, capture_output=True).stdout) / 1024 for _ in range(rounds)]
        now = statistics.median(found)
        told.append(f"{part} {now - last:.1f}")
        last = now
    return ", ".join([*told, f"together {last:.1f}; the rest of the running process is connections, threads and data"])
