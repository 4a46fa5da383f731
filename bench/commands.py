"""(a) Durable no-op commands per second, against the bare consumer and oslo.messaging's RPC server."""

from __future__ import annotations

import concurrent.futures
import statistics
import time
from pathlib import Path

import oslo_messaging
import uvloop

from agent.messages import routing
from bench import servers
from bench.load import Client, Load
from bench.measure import Report, cpu_seconds, percentile, ratio_of_medians
from bench.oslo_server import transport
from devstack.rabbitmq import PrivateBroker

DEPTHS = (1, 50, 500)
TOTALS = {1: 400, 50: 4000, 500: 8000}
OSLO_TOTALS = {1: 200, 50: 800}


def measure(directory: Path, rounds: int) -> Report:
    """Alternate the sides, `rounds` times each, and compare medians."""
    report = Report(
        "Durable no-op commands",
        ("in flight", "server", "commands/s", "p50 ms", "p99 ms", "server CPU µs per command", "ratio to the floor"),
    )
    with PrivateBroker(directory / "broker") as broker:
        broker.start()
        url = broker.url
        config = servers.agent_config(directory / "agent", url)
        with (
            servers.agent(config) as agent_pid,
            servers.bare_consumer(url, "bench.bare", directory / "bare.log") as bare_pid,
        ):
            for depth in DEPTHS:
                uvloop.run(_compare(report, url, depth, rounds, agent_pid, bare_pid))
        with servers.oslo_server(url, directory / "oslo.log") as oslo_pid:
            for depth, total in OSLO_TOTALS.items():
                try:
                    _oslo(report, url, depth, total, oslo_pid)
                except oslo_messaging.MessagingTimeout as exc:
                    report.remarks.append(f"oslo.messaging with {depth} in flight lost a reply: {exc}.")
    report.remarks.append(
        "Floor: aio-pika on uvloop, acknowledging each message and sending a confirmed reply. Every command of the"
        " agent is validated, committed to SQLite with fsync, and answered by a confirmed event."
    )
    return report


async def _compare(report: Report, url: str, depth: int, rounds: int, agent_pid: int, bare_pid: int) -> None:
    sides = {
        "agent": (routing.COMMANDS_EXCHANGE, routing.command_key("host.ping", servers.AGENT_HOST), agent_pid),
        "bare aio-pika": ("", "bench.bare", bare_pid),
    }
    found: dict[str, list[tuple[Load, float]]] = {name: [] for name in sides}
    async with Client(url) as client:
        await client.bind(routing.EVENTS_EXCHANGE)
        for number in range(rounds + 1):
            for name, (exchange, key, pid) in sides.items():
                before = cpu_seconds(pid)
                total = TOTALS[depth] if number else TOTALS[depth] // 4
                load = await client.run(exchange, key, total=total, in_flight=depth)
                if number:  # the first round warms up
                    found[name].append((load, (cpu_seconds(pid) - before) / total * 1e6))
    floor = [load.per_second for load, _ in found["bare aio-pika"]]
    for name, loads in found.items():
        rates = [load.per_second for load, _ in loads]
        latencies = [value for load, _ in loads for value in load.latencies_s]
        report.rows.append(
            (
                str(depth),
                name,
                f"{statistics.median(rates):.0f}",
                f"{percentile(latencies, 50) * 1000:.1f}",
                f"{percentile(latencies, 99) * 1000:.1f}",
                f"{statistics.median(cpu for _, cpu in loads):.0f}",
                f"{ratio_of_medians(rates, floor):.2f}",
            )
        )


def _oslo(report: Report, url: str, depth: int, total: int, pid: int) -> None:
    connected = transport(url)
    client = oslo_messaging.get_rpc_client(connected, oslo_messaging.Target(topic="bench", server="bench-host"))

    def one(_number: int) -> float:
        begun = time.perf_counter()
        client.call({}, "ping", echo="x" * 64)
        return time.perf_counter() - begun

    with concurrent.futures.ThreadPoolExecutor(depth) as pool:
        list(pool.map(one, range(depth)))
        before, begun = cpu_seconds(pid), time.perf_counter()
        latencies = list(pool.map(one, range(total)))
        seconds = time.perf_counter() - begun
    report.rows.append(
        (
            str(depth),
            "oslo.messaging RPC (nova-compute's), client included",
            f"{total / seconds:.0f}",
            f"{percentile(latencies, 50) * 1000:.1f}",
            f"{percentile(latencies, 99) * 1000:.1f}",
            f"{(cpu_seconds(pid) - before) / total * 1e6:.0f}",
            "-",
        )
    )
    connected.cleanup()
