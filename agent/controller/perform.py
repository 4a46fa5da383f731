"""One command from the command line to its result: send, show progress, await."""

from __future__ import annotations

import uuid
from typing import Any

import click

from agent.controller import render
from agent.controller.client import ComputeClient
from agent.controller.options import Sending, sending
from agent.controller.progress import Progress
from agent.controller.session import Session
from agent.messages.events import OperationSucceeded
from agent.messages.verb import CommandData

DEFAULT_TIMEOUT_S = 90.0
"""More than an agent waits for a hypervisor that went away (twice `deadlines.reconnect_s`): its answer says why."""
IMAGE_TIMEOUT_S = 1800.0
"""An image may have to be fetched first."""
LONG_TIMEOUT_S = 4 * 3600.0
"""The bytes of whole disks are on their way."""
AT_ONCE = Sending(command_id=None, generation=None, expires_in_s=None, wait=True)


def perform(
    session: Session,
    data: CommandData,
    *,
    host: str,
    instance_id: str | None = None,
    how: Sending = AT_ONCE,
    default_timeout_s: float = DEFAULT_TIMEOUT_S,
    quiet: bool = False,
) -> OperationSucceeded | None:
    """Run one command on a connection of its own. None if the caller did not want to wait for the result.

    With JSON it prints the answer itself. Raises what `ComputeClient.call` raises.
    """

    async def body(client: ComputeClient) -> OperationSucceeded | None:
        return await perform_on(
            client,
            session,
            data,
            host=host,
            instance_id=instance_id,
            how=how,
            default_timeout_s=default_timeout_s,
            quiet=quiet,
        )

    done = session.run(body)
    if session.as_json and not quiet:
        render.document(answer_document(done, host) if done is not None else _sent(session, data, host, instance_id))
    elif done is None:
        click.echo(f"sent; operation {session.waiting_for}")
    return done


async def perform_on(
    client: ComputeClient,
    session: Session,
    data: CommandData,
    *,
    host: str,
    instance_id: str | None = None,
    how: Sending = AT_ONCE,
    default_timeout_s: float = DEFAULT_TIMEOUT_S,
    quiet: bool = False,
) -> OperationSucceeded | None:
    """Run one command on a connection that is there already; prints nothing but progress."""
    session.waiting_for = command_id = how.command_id or str(uuid.uuid4())
    if not how.wait:
        await client.send(
            data,
            host=host,
            id=command_id,
            instance_id=instance_id,
            generation=how.generation,
            expires_in_s=how.expires_in_s,
        )
        return None
    with Progress(f"{data.verb} on {host}", quiet=quiet or session.as_json) as progress:
        done = await client.call(
            data,
            host=host,
            id=command_id,
            on_event=None if progress.quiet else progress.show,
            timeout_s=session.limit(default_timeout_s),
            instance_id=instance_id,
            generation=how.generation,
            expires_in_s=how.expires_in_s,
        )
    session.waiting_for = None
    return done


def power(
    session: Session,
    data: CommandData,
    instance_id: str,
    host: str,
    options: dict[str, Any],
    *,
    past: str,
    extra_s: float = 0.0,
) -> None:
    """Perform a command on one instance and say what became of it. `extra_s` is waited on top of our own time."""
    how = sending(options)
    limit_s = DEFAULT_TIMEOUT_S + extra_s
    done = perform(session, data, host=host, instance_id=instance_id, how=how, default_timeout_s=limit_s)
    if done is not None and not session.as_json:
        say(done, instance_id, past)


def say(done: OperationSucceeded, instance_id: str, past: str) -> None:
    """Say in one line what became of the instance."""
    observed = done.result.get("observed")
    parts = [f"{instance_id} {past if done.result.get('changed', True) else 'unchanged'}"]
    if observed is not None:
        parts.append(f"now {render.clean(observed)}")
    if done.result.get("forced"):
        parts.append("forced")
    click.echo(f"{', '.join(parts)} ({render.seconds(done.duration_ms / 1000)})")


def answer_document(done: OperationSucceeded, host: str) -> dict[str, Any]:
    """Describe a success as JSON."""
    return {
        "operation_id": done.operation_id,
        "host": host,
        "instance_id": done.instance_id,
        "verb": done.verb,
        "duration_ms": done.duration_ms,
        "result": done.result,
    }


def _sent(session: Session, data: CommandData, host: str, instance_id: str | None) -> dict[str, Any]:
    return {"operation_id": session.waiting_for, "host": host, "instance_id": instance_id, "verb": data.verb}
