"""`computectl stats`: what an instance uses, once, or again and again with what it does in a second."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import click

from agent.controller import render
from agent.controller.client import ComputeClient
from agent.controller.options import host_option, instance_argument, json_option
from agent.controller.perform import AT_ONCE, answer_document, perform_on
from agent.controller.rates import rates
from agent.controller.session import Session, pass_session
from agent.messages.verbs_stats import InstanceStats

Result = Mapping[str, Any]


@click.command("stats")
@instance_argument
@host_option
@click.option(
    "--watch",
    "watch_s",
    metavar="SECONDS",
    type=click.FloatRange(min=0.1, max=86_400),
    help="Read again and again, so far apart, until interrupted, and print what happened per second.",
)
@json_option
@pass_session
def stats(session: Session, instance_id: str, host: str, watch_s: float | None) -> None:
    """Print what an instance uses: CPU time, memory, disks, NICs."""

    async def body(client: ComputeClient) -> None:
        before: Result | None = None
        while True:
            done = await perform_on(
                client, session, InstanceStats(), host=host, instance_id=instance_id, how=AT_ONCE, quiet=True
            )
            if done is not None and watch_s is None:
                if session.as_json:
                    render.document(answer_document(done, host))
                else:
                    _show(done.result)
            elif done is not None:
                _show_change(session, before, done.result)
                before = done.result
            if watch_s is None:
                return
            await asyncio.sleep(watch_s)

    session.run(body)


def _show(result: Result) -> None:
    cpu, memory = result.get("cpu") or {}, result.get("memory") or {}
    missing = "" if result.get("complete") else "  (the guest's process did not answer; what only it knows is missing)"
    click.echo(f"{result.get('instance_id')} {result.get('power')} at {result.get('at')}{missing}")
    render.table(
        ["cpu time", "user", "system", "vcpus", "of", "memory", "of", "on host", "free", "usable"],
        [
            [
                *(_time(cpu.get(name)) for name in ("cpu_time_ns", "user_time_ns", "system_time_ns")),
                cpu.get("vcpus"),
                cpu.get("max_vcpus"),
                *(
                    _kib(memory.get(name))
                    for name in ("current_kib", "maximum_kib", "rss_kib", "unused_kib", "usable_kib")
                ),
            ]
        ],
    )
    if result.get("disks"):
        render.table(
            ["disk", "device", "read", "reads", "written", "writes", "errors", "size", "on host"],
            [
                [
                    disk.get("name"),
                    disk.get("device"),
                    _bytes(disk.get("read_bytes")),
                    disk.get("read_requests"),
                    _bytes(disk.get("write_bytes")),
                    disk.get("write_requests"),
                    disk.get("errors"),
                    _bytes(disk.get("capacity_bytes")),
                    _bytes(disk.get("allocation_bytes")),
                ]
                for disk in result["disks"]
            ],
        )
    if result.get("nics"):
        render.table(
            ["nic", "device", "mac", "received", "packets", "errors", "drops", "sent", "packets", "errors", "drops"],
            [
                [nic.get("nic"), nic.get("device"), nic.get("mac"), *_traffic(nic, "rx"), *_traffic(nic, "tx")]
                for nic in result["nics"]
            ],
        )


def _traffic(nic: Result, way: str) -> list[object]:
    return [_bytes(nic.get(f"{way}_bytes")), *(nic.get(f"{way}_{name}") for name in ("packets", "errors", "drops"))]


def _show_change(session: Session, before: Result | None, after: Result) -> None:
    changed = None if before is None else rates(before, after)
    if session.as_json:
        render.json_line({"result": after, "rates": changed})
        return
    if changed is None:
        _show(after)
        return
    rows: list[list[object]] = [[after.get("at"), "cpu", _percent(changed["cpu_percent"]), None, None, None]]
    for kind, places, names in (
        ("disk", changed["disks"], ("read_bytes_s", "read_requests_s", "write_bytes_s", "write_requests_s")),
        ("nic", changed["nics"], ("rx_bytes_s", "rx_packets_s", "tx_bytes_s", "tx_packets_s")),
    ):
        for place in places:
            key = place["name"] if kind == "disk" else place["nic"]
            inward, in_count, outward, out_count = (place[name] for name in names)
            rows.append([None, f"{kind} {key}", _bytes(inward), in_count, _bytes(outward), out_count])
    render.table(["at", "per second", "read, received", "requests", "written, sent", "requests"], rows)


def _time(nanoseconds: Any) -> str | None:
    return render.seconds(nanoseconds / 1e9) if isinstance(nanoseconds, int) else None


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{value:g} %"


def _kib(value: Any) -> str | None:
    return render.mib(round(value / 1024, 1)) if isinstance(value, int) else None


def _bytes(value: Any) -> str | None:
    """Write an amount of bytes in the unit that people use for it."""
    if not isinstance(value, int | float):
        return None
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.1f} {unit}" if isinstance(value, float) and unit != "B" else f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
