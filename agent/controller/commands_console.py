"""`computectl instance console`: the serial console's log, once or as it grows."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import click

from agent.controller import render
from agent.controller.client import ComputeClient
from agent.controller.console import ConsoleTail
from agent.controller.options import host_option, instance_argument, json_option
from agent.controller.perform import AT_ONCE, answer_document, perform_on
from agent.controller.session import Session, pass_session
from agent.messages.commands import ConsoleLog
from agent.messages.events import OperationSucceeded

POLL_S = 1.0
MAX_BYTES = 512 * 1024


@click.command("console")
@instance_argument
@host_option
@click.option(
    "--bytes",
    "max_bytes",
    type=click.IntRange(1, MAX_BYTES),
    default=64 * 1024,
    show_default=True,
    help="Read at most so much of its end.",
)
@click.option("--follow", is_flag=True, help="Go on printing what the guest writes, until interrupted.")
@json_option
@pass_session
def instance_console(session: Session, instance_id: str, host: str, max_bytes: int, follow: bool) -> None:
    """Print the end of an instance's console log."""
    tail = ConsoleTail()

    async def body(client: ComputeClient) -> None:
        while True:
            data = ConsoleLog(max_bytes=max_bytes)
            done = await perform_on(client, session, data, host=host, instance_id=instance_id, how=AT_ONCE, quiet=True)
            if done is not None:
                _show(session, tail, done, host, follow=follow)
            if not follow:
                return
            await asyncio.sleep(POLL_S)

    session.run(body)


def _show(session: Session, tail: ConsoleTail, done: OperationSucceeded, host: str, *, follow: bool) -> None:
    if session.as_json and not follow:
        render.document(answer_document(done, host))
        return
    result: dict[str, Any] = done.result
    new = tail.feed(str(result.get("text", "")), truncated=bool(result.get("truncated")))
    if session.as_json:
        if new:
            render.json_line({"text": new, "lost": tail.lost})
        return
    if tail.lost:
        click.echo("computectl: the guest wrote more than could be read; text is missing here", err=True)
    if new:
        # To a file or pipe it goes as it is; on a terminal the guest must not steer it.
        click.echo(render.printable(new) if sys.stdout.isatty() else new, nl=False, color=True)
        sys.stdout.flush()
