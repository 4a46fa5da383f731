"""`computectl host …`."""

from __future__ import annotations

import time
import uuid
from typing import Any

import click
from pydantic import ValidationError

from agent.controller import render
from agent.controller.client import ComputeClient
from agent.controller.options import host_argument, host_name, json_option
from agent.controller.perform import perform
from agent.controller.session import Session, pass_session
from agent.controller.stream import Gap
from agent.errors import DeadlineExceeded
from agent.messages.commands import HostPing, HostSetEnabled, HostShow
from agent.messages.cpus import format_cpus
from agent.messages.events import Event, HostHeartbeat, Inventory, NumaCell
from agent.messages.verbs_host import HostAudit, HostDrain

LISTEN_S = 12.0
"""A heartbeat's usual interval, its jitter, and a little more."""


@click.group()
def host() -> None:
    """See hosts, and take them out of service."""


@host.command("ls")
@click.option("--wait-s", type=click.FloatRange(0.1, 3600), default=LISTEN_S, show_default=True, help="Listen so long.")
@click.option("--host", "only", metavar="HOST", type=host_name, help="Only this host; ends with its first heartbeat.")
@json_option
@pass_session
def host_ls(session: Session, wait_s: float, only: str | None) -> None:
    """List the hosts whose heartbeats arrive. A host that is silent now is not listed."""

    async def body(client: ComputeClient) -> dict[str, tuple[float, Event]]:
        heard: dict[str, tuple[float, Event]] = {}
        end = time.monotonic() + wait_s
        async with client.heartbeats(only) as stream:
            while (left_s := end - time.monotonic()) > 0 and not (only and heard):
                event = await stream.next(left_s)
                if event is not None and not isinstance(event, Gap):
                    heard[event.host] = (time.monotonic(), event)
        return heard

    if not session.as_json and not only:
        click.echo(f"listening for {wait_s:g} s", err=True)
    heard = session.run(body)
    if not heard:
        raise DeadlineExceeded(
            f"no heartbeat of {only or 'any host'} in {wait_s:g} s; see if the agent runs there, or wait longer",
            code="no_heartbeat",
        )
    if session.as_json:
        events = [event.model_dump(mode="json", exclude_none=True) for _, (_, event) in sorted(heard.items())]
        render.document({"hosts": events})
        return
    columns = ["host", "state", "hypervisor", "vcpus", "memory", "disk", "instances", "age"]
    now = time.monotonic()
    render.table(columns, [_row(name, event, now - at) for name, (at, event) in sorted(heard.items())])


def _row(name: str, event: Event, age_s: float) -> list[object]:
    try:
        beat = HostHeartbeat.model_validate(event.data)
    except ValidationError:
        return [name, "not understood", None, None, None, None, None, render.seconds(age_s)]
    vcpu, memory, disk = (beat.inventory.get(name) for name in ("VCPU", "MEMORY_MB", "DISK_GB"))
    return [
        name,
        host_state(beat),
        f"{beat.hypervisor_type} {beat.hypervisor_version}",
        _used(vcpu, ""),
        _used(memory, " GiB", per_unit=1024),
        _used(disk, " GB"),
        sum(beat.instances.values()),
        render.seconds(age_s),
    ]


def host_state(beat: HostHeartbeat) -> str:
    """Say in one or two words whether a host can be used."""
    if not beat.hypervisor_connected:
        return "no hypervisor"
    if not beat.healthy:
        return "unhealthy"
    return "up" if beat.enabled else "disabled"


def _used(inventory: Inventory | None, unit: str, *, per_unit: int = 1) -> str:
    """Write used of usable, where usable is what admission counts with: overcommitted, less the reserve."""
    if inventory is None:
        return "-"
    usable = (inventory.total - inventory.reserved) * inventory.allocation_ratio
    return f"{inventory.used / per_unit:.4g}/{usable / per_unit:.4g}{unit}"


@host.command("show")
@host_argument
@json_option
@pass_session
def host_show(session: Session, host: str) -> None:
    """Show one host: health, versions, capabilities, capacity."""
    done = perform(session, HostShow(), host=host)
    if done is None or session.as_json:
        return
    beat: dict[str, Any] = dict(done.result.get("heartbeat", done.result))
    inventory, cells = beat.pop("inventory", {}), beat.pop("numa_cells", [])
    render.fields(beat)
    click.echo()
    columns = ["cell", "cpus", "memory", "dedicated", "free dedicated", "pages free/total"]
    render.table(columns, [_cell(NumaCell.model_validate(cell)) for cell in cells])
    click.echo()
    columns = ["total", "reserved", "allocation_ratio", "used"]
    rows = [[name, *(item.get(column) for column in columns)] for name, item in inventory.items()]
    render.table(["resource", *columns], rows)


def _cell(cell: NumaCell) -> list[object]:
    pages = " ".join(f"{pool.size_kib} KiB: {pool.free}/{pool.total}" for pool in cell.pages)
    sets = (cell.dedicated_cpus, cell.free_dedicated_cpus)
    return [
        cell.id,
        format_cpus(cell.cpus),
        render.mib(cell.memory_mib),
        *(format_cpus(cpus) or "-" for cpus in sets),
        pages or "-",
    ]


@host.command("enable")
@host_argument
@json_option
@pass_session
def host_enable(session: Session, host: str) -> None:
    """Let a host take new instances again."""
    _set_enabled(session, host, HostSetEnabled(enabled=True), "enabled")


@host.command("disable")
@host_argument
@click.option("--reason", help="Why; shown to whoever looks at the host.")
@json_option
@pass_session
def host_disable(session: Session, host: str, reason: str | None) -> None:
    """Let a host take no new instances. Those it has are not affected."""
    if reason is not None and len(reason) > 256:
        raise click.BadParameter("at most 256 characters", param_hint="--reason")
    _set_enabled(session, host, HostSetEnabled(enabled=False, reason=reason), "disabled")


def _set_enabled(session: Session, host: str, data: HostSetEnabled, past: str) -> None:
    done = perform(session, data, host=host)
    if done is not None and not session.as_json:
        click.echo(f"{host} {past if done.result.get('changed', True) else f'was {past} already'}")


@host.command("audit")
@host_argument
@click.option("--repair", is_flag=True, help="Remove what is provably the agent's and of no instance.")
@json_option
@pass_session
def host_audit(session: Session, host: str, *, repair: bool) -> None:
    """Compare what is on a host with what should be. Without --repair nothing is changed."""
    done = perform(session, HostAudit(repair=repair), host=host, default_timeout_s=600.0)
    if done is None or session.as_json:
        return
    items: list[dict[str, Any]] = list(done.result.get("items", []))
    columns = ["finding", "kind", "name", "proof", "action", "detail"]
    if items:
        render.table(columns, [[item.get(column) for column in columns] for item in items])
    busy, more = done.result.get("busy", []), done.result.get("more", 0)
    click.echo(f"{len(items) + more} found, {done.result.get('removed', 0)} removed, {len(busy)} busy and left out")


@host.command("drain")
@host_argument
@click.option(
    "--timeout-s", type=click.FloatRange(0, 7 * 86_400), default=3600.0, show_default=True, help="Wait so long."
)
@click.option("--stop-instances", is_flag=True, help="Have the guests shut down too.")
@click.option("--stop-timeout-s", type=click.FloatRange(0, 86_400), default=60.0, show_default=True, help="Per guest.")
@click.option("--at-once", type=click.IntRange(1, 64), default=4, show_default=True, help="Guests that stop at a time.")
@click.option("--reason", help="Why; shown to whoever looks at the host.")
@json_option
@pass_session
def host_drain(
    session: Session,
    host: str,
    *,
    timeout_s: float,
    stop_instances: bool,
    stop_timeout_s: float,
    at_once: int,
    reason: str | None,
) -> None:
    """Let a host take no new instances and wait until nothing is under way. `host enable` takes it back."""
    if reason is not None and len(reason) > 200:
        raise click.BadParameter("at most 200 characters", param_hint="--reason")
    data = HostDrain(
        timeout_s=timeout_s,
        stop_instances=stop_instances,
        stop_timeout_s=stop_timeout_s,
        at_once=at_once,
        reason=reason,
    )
    done = perform(session, data, host=host, default_timeout_s=timeout_s + 30.0)
    if done is not None and not session.as_json:
        stopped, running = done.result.get("stopped", []), done.result.get("running", [])
        click.echo(f"{host} is drained: {len(stopped)} guests stopped, {len(running)} still run")


@host.command("ping")
@host_argument
@json_option
@pass_session
def host_ping(session: Session, host: str) -> None:
    """Send a command through the host's whole durable path and back."""
    echo = str(uuid.uuid4())
    begun = time.monotonic()
    done = perform(session, HostPing(echo=echo), host=host, default_timeout_s=10.0)
    if done is not None and not session.as_json:
        took = render.seconds(time.monotonic() - begun)
        click.echo(f"{host} answers: version {render.clean(done.result.get('version', '?'))} ({took})")
