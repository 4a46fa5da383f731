"""(e) An idle agent: memory with libvirt loaded, CPU over a minute, and what the memory is made of."""

from __future__ import annotations

import contextlib
import os
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
    ("asyncio, ssl", "asyncio ssl"),
    ("uvloop", "uvloop"),
    ("structlog without rich", "agent.lean"),
    ("click", "click"),
    ("pydantic", "pydantic pydantic.dataclasses pydantic.json_schema"),
    ("pydantic-settings", "pydantic_settings"),
    ("prometheus-client and what it loads of http", "prometheus_client"),
    ("sqlite3", "sqlite3"),
    ("aiormq", "aiormq"),
    ("the agent's own modules and models", "agent.cli agent.config agent.app agent.bus.amqp"),
    ("libvirt's C libraries and binding", "libvirt"),
    ("the libvirt driver", "agent.drivers.libvirt"),
)
"""What the process loads, in the order in which its cost is told: each part counts what those before it did not load."""

_COST = """
import sys, importlib
for name in sys.argv[1:]:
    importlib.import_module(name)
print(next(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("Rss")))
"""


def measure(directory: Path, rounds: int) -> Report:
    """One window of up to a minute for all three agents at once: they are idle, and so do not disturb each other."""
    report = Report("Idle", ("agent", "RSS MiB", "PSS MiB", "threads", "CPU %", "wake-ups per s"))
    window_s = min(WINDOW_S, 15.0 * rounds)
    env = guests.installed(directory)
    with contextlib.ExitStack() as stack:
        broker = stack.enter_context(PrivateBroker(directory / "broker"))
        host = stack.enter_context(PrivateLibvirtd(directory / "host"))
        pids: dict[str, int] = {}
        for name, driver, count in (("libvirt", "libvirt", 0), ("fake", "fake", 0), ("full", "fake", INSTANCES)):
            settings: dict[str, object] = {"uri": host.uri} if driver == "libvirt" else {}
            config = servers.agent_config(directory / name, broker.url, driver=driver, settings=settings)
            pid = stack.enter_context(servers.agent(config, env={**env, "COMPUTE_AGENT_AGENT__HOST": name}))
            if count:
                guests.run(_fill(broker.url, name, count))
            pids[f"{driver}, {count} instances"] = pid
        time.sleep(SETTLE_S)
        before = {name: (guests.cpu_ms(pid), _switches(pid)) for name, pid in pids.items()}
        begun = time.perf_counter()
        time.sleep(window_s)
        seconds = time.perf_counter() - begun
        for name, pid in pids.items():
            cpu_ms, switches = before[name]
            report.rows.append(
                (
                    name,
                    f"{rss_mib(pid):.1f}",
                    f"{pss_mib(pid):.1f}",
                    str(len(list(Path(f"/proc/{pid}/task").iterdir()))),
                    f"{(guests.cpu_ms(pid) - cpu_ms) / 10 / seconds:.2f}",
                    f"{(_switches(pid) - switches) / seconds:.1f}",
                )
            )
    report.remarks.append(
        f"CPU and wake-ups over {seconds:.0f} s, heartbeats every 10 s among them."
        f" Goals: RSS under {RSS_GOAL_MIB} MiB with libvirt loaded, CPU under {CPU_GOAL_PERCENT} %."
        " PSS divides the pages that two processes share; the three agents and libvirtd share libraries."
        " nova-compute 34, idle with libvirt: 162 MiB RSS, 135 MiB PSS; CPU 0.13 % without and 0.43 % with 100 instances."
    )
    costs = _costs(env, min(rounds, 3))
    report.remarks.append(f"Where the memory goes, by import (RSS in MiB, median of {min(rounds, 3)}): {costs}.")
    return report


async def _fill(url: str, host: str, count: int) -> None:
    async with guests.controller(url) as client:
        await guests.create_all(client, guests.new_ids(count), host=host)


def _switches(pid: int) -> int:
    """How often a thread has given way of itself, which it does before each wait."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        for line in (task / "status").read_text().splitlines():
            if line.startswith("voluntary_ctxt_switches"):
                total += int(line.split()[1])
    return total


def _costs(env: dict[str, str], rounds: int) -> str:
    """What each part adds to a process that has loaded the parts before it."""
    loaded: list[str] = []
    last, told = 0.0, []
    for part, modules in PARTS:
        loaded += modules.split()
        command = [sys.executable, "-c", _COST, *loaded]
        found = [
            int(subprocess.run(command, check=True, capture_output=True, env={**os.environ, **env}).stdout) / 1024
            for _ in range(rounds)
        ]
        now = statistics.median(found)
        told.append(f"{part} {now - last:.1f}")
        last = now
    return ", ".join([*told, f"together {last:.1f}; the rest of the running process is connections, threads and data"])
