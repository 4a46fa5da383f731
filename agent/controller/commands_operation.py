"""`computectl operation …`."""

from __future__ import annotations

import re

import click

from agent.controller import render
from agent.controller.options import host_option, json_option
from agent.controller.perform import perform
from agent.controller.session import Session, pass_session
from agent.messages.commands import OperationCancel, OperationShow

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")


def _operation_id(_ctx: click.Context, _param: click.Parameter, value: str) -> str:
    if not _ID.fullmatch(value):
        raise click.BadParameter(f"{value!r} is no operation id")
    return value


operation_argument = click.argument("operation_id", metavar="ID", callback=_operation_id)


@click.group()
def operation() -> None:
    """Look into operations and cancel them. An operation's id is the id of its command."""


@operation.command("show")
@operation_argument
@host_option
@json_option
@pass_session
def operation_show(session: Session, operation_id: str, host: str) -> None:
    """Show one operation and its steps, as the host's journal has them."""
    done = perform(session, OperationShow(operation_id=operation_id), host=host)
    if done is None or session.as_json:
        return
    view = dict(done.result)
    steps = view.pop("steps", None) or []
    render.fields({name: value for name, value in view.items() if value is not None})
    if steps:
        click.echo()
        columns = ("index", "name", "state")
        render.table(("#", "step", "state"), [[step.get(column) for column in columns] for step in steps])


@operation.command("cancel")
@operation_argument
@host_option
@json_option
@pass_session
def operation_cancel(session: Session, operation_id: str, host: str) -> None:
    """Cancel an operation: it ends at its next safe point, and what it did is undone."""
    done = perform(session, OperationCancel(operation_id=operation_id), host=host)
    if done is not None and not session.as_json:
        click.echo(f"operation {operation_id} will end as cancelled")
