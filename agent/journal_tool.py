"""`compute-agent journal`: read the journal, also beside a running agent; ask for a retry; forget what has ended.

Reading opens the file read-only. The two writes are single statements that SQLite serialises with the agent's.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import click

from agent.controller import render
from agent.errors import FailedPrecondition, NotFound
from agent.handlers.operation import operation_view
from agent.store.base import OperationRecord
from agent.store.file import JournalFile


@contextlib.contextmanager
def _opened(path: Path, *, read_only: bool) -> Iterator[JournalFile]:
    if not path.is_file():
        raise NotFound(f"there is no journal at {path}; name the agent's state_dir with --state-dir", code="no_journal")
    file = JournalFile(path, read_only=read_only)
    try:
        yield file
    finally:
        file.close()


def _find(file: JournalFile, operation_id: str) -> OperationRecord:
    record = file.operation(operation_id)
    if record is None:
        raise NotFound(f"the journal has no operation {operation_id}", code="unknown_operation")
    return record


@click.group()
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("/var/lib/compute-agent"),
    show_default=True,
    envvar="COMPUTE_AGENT_AGENT__STATE_DIR",
    help="The agent's state_dir.",
)
@click.pass_context
def journal(context: click.Context, state_dir: Path) -> None:
    """Read and mend the journal of operations."""
    context.obj = state_dir / "journal.sqlite"  # looked for by the commands: their help needs none


@journal.command("ls")
@click.option("--open", "unfinished", is_flag=True, help="Only what has not ended, or left something behind.")
@click.option("--limit", type=click.IntRange(1, 100_000), default=50, show_default=True, help="At most so many.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def list_command(path: Path, unfinished: bool, limit: int, as_json: bool) -> None:
    """List operations, the newest first."""
    with _opened(path, read_only=True) as file:
        views = [operation_view(record, []) for record in file.operations(unfinished=unfinished, limit=limit)]
    if as_json:
        click.echo(json.dumps([view.model_dump(mode="json", exclude={"steps"}) for view in views], indent=2))
        return
    rows = [
        [
            view.id,
            view.verb,
            f"{view.state}{'*' if view.undo_pending else ''}",
            view.accepted_at.strftime("%Y-%m-%dT%H:%M:%SZ"),
            view.instance_id,
        ]
        for view in views
    ]
    render.table(("operation", "verb", "state", "accepted", "instance"), rows)


@journal.command("show")
@click.argument("operation_id")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.pass_obj
def show_command(path: Path, operation_id: str, as_json: bool) -> None:
    """Show one operation with its steps."""
    with _opened(path, read_only=True) as file:
        view = operation_view(_find(file, operation_id), file.steps(operation_id))
    if as_json:
        click.echo(view.model_dump_json(indent=2))
        return
    for key, value in view.model_dump(mode="json", exclude={"steps", "error"}, exclude_none=True).items():
        click.echo(f"{key:18} {value}")
    if view.error is not None:
        click.echo(f"{'error':18} {view.error.code}: {view.error.message}")
    for step in view.steps:
        click.echo(f"{'step':18} {step.index} {step.name}: {step.state}")


@journal.command("retry")
@click.argument("operation_id")
@click.pass_obj
def retry_command(path: Path, operation_id: str) -> None:
    """Try again to take back what an ended operation left behind.

    A running agent does it within seconds.
    """
    with _opened(path, read_only=False) as file:
        record = _find(file, operation_id)
        if not record.undo_pending:
            raise FailedPrecondition(
                f"operation {operation_id} left nothing to take back; send the command again under a new id",
                code="nothing_to_retry",
            )
        file.request_retry(operation_id)
    click.echo(f"asked for a retry of {operation_id}")


@journal.command("forget")
@click.argument("operation_id")
@click.pass_obj
def forget_command(path: Path, operation_id: str) -> None:
    """Forget an ended operation. The same command id would then have its effect again."""
    with _opened(path, read_only=False) as file:
        record = _find(file, operation_id)
        if not record.final:
            raise FailedPrecondition(
                f"operation {operation_id} is {record.state}; cancel it first", code="operation_open"
            )
        if record.undo_pending:
            raise FailedPrecondition(
                f"operation {operation_id} left something that only its record knows of; retry it first",
                code="undo_pending",
            )
        file.forget(operation_id)
    click.echo(f"forgot {operation_id}")
