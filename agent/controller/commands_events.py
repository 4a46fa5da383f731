"""`computectl events`: what hosts publish, as it happens."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import click

from agent.controller import render
from agent.controller.client import ComputeClient
from agent.controller.options import host_name, instance_uuid, json_option
from agent.controller.session import Session, pass_session
from agent.controller.stream import Gap
from agent.errors import DeadlineExceeded
from agent.messages.events import Event, HostHeartbeat

LISTEN_S = 30.0
_FOREVER_S = 3600.0
_TOLD = ("operation_id", "instance_id", "resync")
"""Fields that a line shows elsewhere, or not at all."""


@click.command("events")
@click.option("--follow", is_flag=True, help="Until interrupted, instead of for --timeout seconds.")
@click.option("--host", metavar="HOST", type=host_name, help="Only of this host.")
@click.option("--instance", "instance_id", metavar="ID", type=instance_uuid, help="Only about this instance.")
@click.option("--kind", "kinds", multiple=True, metavar="KIND", help="E.g. instance.state or 'instance.*'. Repeatable.")
@click.option("--count", type=click.IntRange(min=1), help="End after so many events.")
@json_option
@pass_session
def events(
    session: Session,
    *,
    follow: bool,
    host: str | None,
    instance_id: str | None,
    kinds: Sequence[str],
    count: int | None,
) -> None:
    """Print events as they are published; there is no history.

    Without --kind heartbeats are left out, and gaps in a host's sequence are marked.
    """
    printed = 0

    async def body(client: ComputeClient) -> None:
        nonlocal printed
        end = time.monotonic() + session.limit(LISTEN_S)
        async with client.events(kinds, host=host, instance_id=instance_id) as stream:
            while count is None or printed < count:
                left_s = _FOREVER_S if follow else end - time.monotonic()
                if left_s <= 0:
                    return
                item = await stream.next(left_s)
                if item is None or (not kinds and isinstance(item, Event) and item.kind == HostHeartbeat.kind):
                    continue
                _print(item, as_json=session.as_json)
                printed += not isinstance(item, Gap)

    session.run(body)
    if count is not None and printed < count:
        raise DeadlineExceeded(f"{printed} of {count} events came in time", code="too_few_events")


def _print(item: Event | Gap, *, as_json: bool) -> None:
    if isinstance(item, Gap):
        if as_json:
            render.json_line({"gap": dataclasses.asdict(item)})
        else:
            click.echo(f"-- {item.sentence}")
        return
    if as_json:
        render.json_line(item.model_dump(mode="json", exclude_none=True))
        return
    parts = [
        item.time.astimezone().strftime("%H:%M:%S.%f")[:-3],
        item.host,
        item.kind,
        item.subject or item.data.get("instance_id") or "-",
        summary(item.data),
    ]
    click.echo("  ".join(render.clean(part).replace("\n", " ") for part in parts))


def summary(data: dict[str, Any]) -> str:
    """Say in a few words what an event holds."""
    words = []
    for name, value in data.items():
        if name in _TOLD and value is not True:
            continue
        if name == "error" and isinstance(value, dict):
            words.append(f"error={value.get('code')}: {value.get('message')}")
        elif not isinstance(value, dict | list):
            words.append(f"{name}={value}")
    if "operation_id" in data:
        words.append(f"operation={data['operation_id']}")
    return " ".join(words)
