"""`computectl`: the root command. Every subcommand is one module; none of them knows how an agent works."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import click
import structlog

from agent import __version__
from agent.controller.commands_adopt import instance_adopt
from agent.controller.commands_events import events
from agent.controller.commands_host import host
from agent.controller.commands_image import image
from agent.controller.commands_instance import instance
from agent.controller.commands_memory import COMMANDS as MEMORY_COMMANDS
from agent.controller.commands_operation import operation
from agent.controller.commands_rebuild import COMMANDS as REBUILD_COMMANDS
from agent.controller.commands_resize import COMMANDS as RESIZE
from agent.controller.commands_snapshot import instance_backup, instance_backups, instance_export, snapshot
from agent.controller.commands_stats import stats
from agent.controller.session import Address, RootGroup, Session

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.group(cls=RootGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="computectl")
@click.option(
    "--amqp",
    metavar="URL",
    envvar="COMPUTECTL_AMQP",
    default="amqp://localhost/",
    help="The broker: amqp:// or amqps://. Put a password into COMPUTECTL_AMQP, where others do not see it.",
)
@click.option("--cafile", type=_FILE, envvar="COMPUTECTL_CAFILE", help="Trust these authorities for amqps.")
@click.option("--certfile", type=_FILE, envvar="COMPUTECTL_CERTFILE", help="Log in with this certificate.")
@click.option("--keyfile", type=_FILE, envvar="COMPUTECTL_KEYFILE", help="The certificate's key.")
@click.option(
    "--timeout",
    "timeout_s",
    metavar="SECONDS",
    type=click.FloatRange(min=0, min_open=True),
    help="Wait so long for an answer; each command has its own limit by default.",
)
@click.pass_context
def cli(
    ctx: click.Context,
    *,
    amqp: str,
    cafile: Path | None,
    certfile: Path | None,
    keyfile: Path | None,
    timeout_s: float | None,
) -> None:
    """Control compute agents through their message broker.

    Exit status: 0 success; 1 refused or failed; 2 wrong usage or an invalid spec; 3 no answer in time or no broker; 130
    interrupted. With --json an error is a document with `error`, too.
    """
    session = ctx.ensure_object(Session)
    session.address = Address(amqp, cafile, certfile, keyfile)
    session.timeout_s = timeout_s


for command in (instance, host, image, operation, events, snapshot, stats):
    cli.add_command(command)
for command in (
    instance_adopt,
    instance_export,
    instance_backup,
    instance_backups,
    *MEMORY_COMMANDS,
    *RESIZE,
    *REBUILD_COMMANDS,
    stats,
):
    instance.add_command(command)


def _log_to_stderr() -> None:
    """Keep logs of the bus out of the output, and quiet unless something is wrong."""

    def factory(*_args: Any) -> structlog.PrintLogger:
        return structlog.PrintLogger(sys.stderr)

    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=factory,
        cache_logger_on_first_use=False,
    )
    # The AMQP library logs each failed attempt to connect; the one error at the end says the same.
    logging.getLogger("aiormq").setLevel(logging.CRITICAL)


def main() -> None:
    """Run `computectl`; the process entry."""
    _log_to_stderr()
    cli.main(prog_name="computectl")
