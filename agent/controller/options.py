"""Options and argument types that several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from agent.controller.session import Session
from agent.messages.types import HOST_PATTERN, UUID_PATTERN

F = TypeVar("F", bound=Callable[..., Any])


def host_name(value: str) -> str:
    """Check a host's name."""
    if not re.fullmatch(HOST_PATTERN, value):
        raise click.BadParameter(f"{value!r} is no host name")
    return value


def instance_uuid(value: str) -> str:
    """Check an instance's id and return it as the wire has it, in lower case."""
    if not re.fullmatch(UUID_PATTERN, value.lower()):
        raise click.BadParameter(f"{value!r} is no instance id; an id is a UUID, as instance ls shows it")
    return value.lower()


instance_argument = click.argument("instance_id", metavar="ID", type=instance_uuid)
host_argument = click.argument("host", metavar="HOST", type=host_name)
host_option = click.option(
    "--host",
    metavar="HOST",
    required=True,
    type=host_name,
    envvar="COMPUTECTL_HOST",
    show_envvar=True,
    help="The hypervisor host.",
)


def _set_json(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value:
        ctx.ensure_object(Session).as_json = True


json_option = click.option(
    "--json",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_set_json,
    help="Print JSON: one document, or a line per item of a stream.",
)


@dataclass(frozen=True, slots=True)
class Sending:
    """How a command that changes something is sent."""

    command_id: str | None
    generation: int | None
    expires_in_s: float | None
    wait: bool


def sending_options(function: F) -> F:
    """Add what `sending` collects."""
    for option in reversed(
        (
            click.option("--wait/--no-wait", default=True, help="Wait for the result (the default)."),
            click.option(
                "--command-id", metavar="ID", help="The command's id. Sending the same id again is safe: it runs once."
            ),
            click.option(
                "--generation", type=click.IntRange(min=0), help="Refuse the command if the instance has a newer one."
            ),
            click.option(
                "--expires-in",
                "expires_in_s",
                metavar="SECONDS",
                type=click.FloatRange(min=0),
                help="Refuse the command if work has not begun by then.",
            ),
        )
    ):
        function = option(function)
    return function


def sending(options: dict[str, Any]) -> Sending:
    """Collect the values of `sending_options`."""
    return Sending(**options)
