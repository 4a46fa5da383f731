"""`computectl instance resize …`: sizes, the balloon's target, limits."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from agent.controller import render
from agent.controller.inputs import checked, guest_timeout_option
from agent.controller.options import host_option, instance_argument, json_option, sending, sending_options
from agent.controller.perform import DEFAULT_TIMEOUT_S, perform
from agent.controller.session import Session, pass_session
from agent.messages.spec_limits import CpuLimits, DiskLimits, NicLimits
from agent.messages.verb import CommandData
from agent.messages.verbs_resize import (
    CONFIRM_WITHIN_S,
    InstanceConfirmResize,
    InstanceResize,
    InstanceRevertResize,
    InstanceSetLimits,
    InstanceSetMemoryTarget,
    NicLimitsChange,
)

_guest_timeout = partial(guest_timeout_option, "--guest-timeout", what="to do its part")


@click.command("resize")
@instance_argument
@host_option
@click.option("--vcpus", type=click.IntRange(min=1), help="New number of vCPUs.")
@click.option("--memory-mib", type=click.IntRange(min=16), help="New memory.")
@click.option(
    "--disk", "disks", metavar="NAME=MIB", multiple=True, help="A disk's new size; the root disk is root. Repeatable."
)
@click.option("--live", is_flag=True, help="Change the running guest, up to its maximum, without stopping it.")
@click.option(
    "--confirm-within",
    metavar="SECONDS|never",
    default=str(int(CONFIRM_WITHIN_S)),
    show_default=True,
    help="A cold resize confirms itself after so long; 0: at once. never: it waits for ever.",
)
@_guest_timeout()
@sending_options
@json_option
@pass_session
def instance_resize(
    session: Session,
    /,
    *,
    instance_id: str,
    host: str,
    vcpus: int | None,
    memory_mib: int | None,
    disks: tuple[str, ...],
    live: bool,
    confirm_within: str,
    guest_timeout_s: float,
    **options: Any,
) -> None:
    """Change an instance's sizes. Without --live it is stopped and started, and waits to be confirmed."""
    sizes = {name: _number(value, "--disk") for name, value in _pairs(disks, "--disk")}
    within: float | str = "never" if confirm_within == "never" else _number(confirm_within, "--confirm-within")
    data = checked(
        InstanceResize,
        vcpus=vcpus,
        memory_mib=memory_mib,
        disks_mib=sizes,
        mode="live" if live else "cold",
        confirm_within_s=within,
        timeout_s=guest_timeout_s,
    )
    _sizes(session, data, instance_id, host, options, past="resized", extra_s=guest_timeout_s)


@click.command("confirm-resize")
@instance_argument
@host_option
@sending_options
@json_option
@pass_session
def instance_confirm_resize(session: Session, /, *, instance_id: str, host: str, **options: Any) -> None:
    """Keep the sizes of a cold resize."""
    _sizes(session, InstanceConfirmResize(), instance_id, host, options, past="confirmed")


@click.command("revert-resize")
@instance_argument
@host_option
@_guest_timeout()
@sending_options
@json_option
@pass_session
def instance_revert_resize(
    session: Session, /, *, instance_id: str, host: str, guest_timeout_s: float, **options: Any
) -> None:
    """Go back to the vCPUs and memory from before a cold resize. Disks keep their size."""
    data = InstanceRevertResize(timeout_s=guest_timeout_s)
    _sizes(session, data, instance_id, host, options, past="reverted", extra_s=guest_timeout_s)


@click.command("set-memory-target")
@instance_argument
@host_option
@click.option("--memory-mib", type=click.IntRange(min=16), required=True, help="What the guest is to have left.")
@_guest_timeout(default_s=30.0)
@sending_options
@json_option
@pass_session
def instance_set_memory_target(
    session: Session, /, *, instance_id: str, host: str, memory_mib: int, guest_timeout_s: float, **options: Any
) -> None:
    """Let a running guest do with less memory, until it is stopped."""
    data = InstanceSetMemoryTarget(memory_mib=memory_mib, timeout_s=guest_timeout_s)
    limit_s = DEFAULT_TIMEOUT_S + guest_timeout_s
    done = perform(session, data, host=host, instance_id=instance_id, how=sending(options), default_timeout_s=limit_s)
    if done is not None and not session.as_json:
        render.fields(done.result)


@click.command("set-limits")
@instance_argument
@host_option
@click.option("--cpu", metavar="KEY=N,…", help="shares, quota_percent; empty lifts all.")
@click.option(
    "--disk",
    "disks",
    metavar="NAME:KEY=N,…",
    multiple=True,
    help="total_, read_, write_ with bytes_s or iops; nothing behind the colon lifts all.",
)
@click.option(
    "--nic", "nics", metavar="PLACE:KEY=N,…", multiple=True, help="inbound_kib_s, outbound_kib_s; places begin with 0."
)
@sending_options
@json_option
@pass_session
def instance_set_limits(
    session: Session,
    /,
    *,
    instance_id: str,
    host: str,
    cpu: str | None,
    disks: tuple[str, ...],
    nics: tuple[str, ...],
    **options: Any,
) -> None:
    """Set limits of CPU time, disks and NICs at once and for good. What is given replaces all limits of that thing."""
    data = checked(
        InstanceSetLimits,
        cpu=None if cpu is None else checked(CpuLimits, **_amounts(cpu, "--cpu")),
        disks={
            name: checked(DiskLimits, **_amounts(text, "--disk")) if text else None
            for name, text in _pairs(disks, "--disk", separator=":")
        },
        nics=[
            checked(
                NicLimitsChange,
                nic=_number(place, "--nic"),
                limits=checked(NicLimits, **_amounts(text, "--nic")) if text else None,
            )
            for place, text in _pairs(nics, "--nic", separator=":")
        ],
    )
    done = perform(session, data, host=host, instance_id=instance_id, how=sending(options))
    if done is not None and not session.as_json:
        render.fields(done.result)


COMMANDS: tuple[click.Command, ...] = (
    instance_resize,
    instance_confirm_resize,
    instance_revert_resize,
    instance_set_memory_target,
    instance_set_limits,
)


# --- inside -------------------------------------------------------------------------------------------------------


def _sizes(
    session: Session,
    data: CommandData,
    instance_id: str,
    host: str,
    options: dict[str, Any],
    *,
    past: str,
    extra_s: float = 0.0,
) -> None:
    limit_s = DEFAULT_TIMEOUT_S + extra_s
    done = perform(session, data, host=host, instance_id=instance_id, how=sending(options), default_timeout_s=limit_s)
    if done is None or session.as_json:
        return
    result = done.result
    click.echo(f"{instance_id} {past if result.get('changed', True) else 'unchanged'}")
    render.table(
        ["vcpus", "memory", "disks", "state", "confirms itself"],
        [
            [
                result.get("vcpus"),
                render.mib(result.get("memory_mib")),
                ", ".join(f"{name} {render.mib(size)}" for name, size in result.get("disks_mib", {}).items()),
                result.get("observed"),
                (result.get("confirm_by") or "never") if result.get("pending") else "-",
            ]
        ],
    )


def _pairs(values: tuple[str, ...], option: str, separator: str = "=") -> list[tuple[str, str]]:
    found = []
    for value in values:
        name, middle, rest = value.partition(separator)
        if not name or not middle:
            raise click.BadParameter(f"{value!r} is not of the form NAME{separator}…", param_hint=option)
        found.append((name, rest))
    return found


def _amounts(text: str, option: str) -> dict[str, int]:
    pairs = _pairs(tuple(part for part in text.split(",") if part), option)
    return {name: int(_number(value, option)) for name, value in pairs}


def _number(text: str, option: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is no whole number", param_hint=option) from None
