"""`compute-agent`: run, demo, journal, asyncapi, support-matrix, config. The process: loop, signals, exit status."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import click

from agent import __version__, lean  # noqa: F401 - before whatever imports structlog
from agent.errors import ComputeError
from agent.journal_tool import journal

EXIT_CONFIG = 3
"""Start-up failed in a way that a restart does not cure."""


class _Group(click.Group):
    """Turns the agent's errors into one line on stderr and an exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        as_json = "--json" in ctx.args
        try:
            return super().invoke(ctx)
        except ComputeError as exc:
            if as_json:
                told = {"code": exc.code, "message": exc.message, "retryable": exc.retryable, "details": exc.details}
                click.echo(json.dumps({"error": told}, indent=2, default=str))
            else:
                click.echo(f"error: {exc.code}: {exc.message}", err=True)
            ctx.exit(EXIT_CONFIG if not exc.retryable else 1)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="compute-agent")
def main() -> None:
    """One agent per hypervisor host: lifecycle commands in, results, events and heartbeats out.

    Exit status: 0 success; 1 failed, and a later try can succeed; 2 wrong usage; 3 somebody has to change something
    first.
    """


@main.command()
@click.option("--config", "path", type=click.Path(path_type=Path), required=True, help="TOML file.")
def run(path: Path) -> None:
    """Run the agent until SIGTERM or SIGINT."""
    from agent import config, log  # noqa: PLC0415 - `--help` and the journal tool stay quick
    from agent.identity import hold  # noqa: PLC0415

    settings = config.load(path)
    log.configure(settings.log.level)
    hold(settings.agent.state_dir)
    _run_loop(_serve(settings, path))


@main.command()
@click.option("--instances", type=click.IntRange(1, 50), default=3, show_default=True, help="How many to create.")
def demo(instances: int) -> None:
    """Make, stop and delete instances in this one process.

    It has a memory bus, a SQLite journal and the simulated hypervisor.
    """
    from agent.demo import run_demo  # noqa: PLC0415

    sys.exit(_run_loop(run_demo(instances)))


@main.command("asyncapi")
def asyncapi_command() -> None:
    """Print the wire contract as an AsyncAPI 3 document."""
    from agent.messages.asyncapi import render  # noqa: PLC0415

    click.echo(render(), nl=False)


@main.command("support-matrix")
def support_matrix_command() -> None:
    """Print which verb works on which hypervisor, as a page of the documentation."""
    from agent.support_matrix import render  # noqa: PLC0415

    click.echo(render(), nl=False)


@main.command("config")
def config_command() -> None:
    """Print every configuration key with its default, as a commented TOML file."""
    from agent import config  # noqa: PLC0415

    click.echo(config.document(), nl=False)


main.add_command(journal)


def _run_loop(work: Coroutine[Any, Any, Any]) -> Any:
    """Run on uvloop where it is there."""
    try:
        import uvloop  # noqa: PLC0415
    except ImportError:
        return asyncio.run(work)
    return uvloop.run(work)


async def _serve(settings: Any, path: Path) -> None:
    import structlog  # noqa: PLC0415

    from agent import config, log  # noqa: PLC0415
    from agent.app import Agent  # noqa: PLC0415
    from agent.bus.amqp import AmqpBus  # noqa: PLC0415

    host = settings.agent.host
    structlog.contextvars.bind_contextvars(host=host)
    agent = Agent(settings, AmqpBus(settings.bus, name=f"compute-agent {host}"))
    loop = asyncio.get_running_loop()
    received: list[signal.Signals] = []

    def stop(number: signal.Signals) -> None:
        if received:
            os._exit(128 + number)  # asked twice: the journal is safe against this at any time
        received.append(number)
        agent.ask_to_stop()

    def reload() -> None:
        """SIGHUP: the log level is taken anew; other keys need a restart, and a wrong file changes nothing."""
        logger = structlog.get_logger("agent")
        try:
            log.configure(config.load(path).log.level)
            logger.info("agent.reloaded")
        except ComputeError as exc:
            logger.error("agent.reload_refused", error=exc.message)  # noqa: TRY400 - the sentence says it all

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    loop.add_signal_handler(signal.SIGHUP, reload)
    await agent.start()
    try:
        await agent.wait()
    finally:
        await agent.stop()
