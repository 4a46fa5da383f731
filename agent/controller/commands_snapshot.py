"""`computectl snapshot …`, `computectl instance export|backup|backups`."""

from __future__ import annotations

from typing import Any

import click

from agent.controller import render
from agent.controller.inputs import checked, export_target, target_options
from agent.controller.options import (
    host_option,
    instance_argument,
    json_option,
    sending,
    sending_options,
)
from agent.controller.perform import LONG_TIMEOUT_S, perform
from agent.controller.session import Session, pass_session
from agent.messages.events import OperationSucceeded
from agent.messages.verb import CommandData
from agent.messages.verbs_snapshot import (
    InstanceBackup,
    InstanceExport,
    InstanceListBackups,
    SnapshotCreate,
    SnapshotDelete,
    SnapshotList,
    SnapshotRevert,
)

SNAPSHOT_TIMEOUT_S = 900.0
"""The memory of a large guest takes a while to be written."""

disk_option = click.option(
    "--disk", "disks", metavar="NAME", multiple=True, help="A disk; can be repeated (default: root)."
)
name_argument = click.argument("name", metavar="NAME")


@click.command("export")
@instance_argument
@host_option
@disk_option
@target_options
@click.option(
    "--format",
    "format_",
    type=click.Choice(["qcow2", "raw"]),
    default="qcow2",
    show_default=True,
    help="What the images are to be.",
)
@click.option("--compress", is_flag=True, help="Compress; qcow2 only.")
@sending_options
@json_option
@pass_session
def instance_export(
    session: Session,
    /,
    *,
    instance_id: str,
    host: str,
    disks: tuple[str, ...],
    format_: str,
    compress: bool,
    **options: Any,
) -> None:
    """Export disks as flattened images; a running guest goes on."""
    target = export_target(options)
    data = checked(InstanceExport, disks=list(disks) or None, target=target, format=format_, compress=compress)
    done = _run(session, data, (instance_id, host), options, LONG_TIMEOUT_S)
    if done is not None:
        _show_disks(done.result.get("disks", []))


@click.command("backup")
@instance_argument
@host_option
@click.option("--series", metavar="SERIES", required=True, help="The series that it becomes one of.")
@click.option("--keep", metavar="N", type=int, required=True, help="How many of the series are kept.")
@click.option("--store", metavar="STORE", required=True, help="One of the host's export stores.")
@disk_option
@click.option("--compress", is_flag=True, help="Compress the images.")
@sending_options
@json_option
@pass_session
def instance_backup(
    session: Session,
    /,
    *,
    instance_id: str,
    host: str,
    series: str,
    keep: int,
    store: str,
    disks: tuple[str, ...],
    compress: bool,
    **options: Any,
) -> None:
    """Make one more backup of a series, and remove the oldest beyond --keep."""
    data = checked(InstanceBackup, series=series, keep=keep, store=store, disks=list(disks) or None, compress=compress)
    done = _run(session, data, (instance_id, host), options, LONG_TIMEOUT_S)
    if done is not None:
        _show_backups(done.result.get("backups", []))
        for removed in done.result.get("removed", []):
            click.echo(f"removed {render.clean(removed)}")


@click.command("backups")
@instance_argument
@host_option
@click.option("--series", metavar="SERIES", help="Only this series.")
@click.option("--store", metavar="STORE", help="Only this store.")
@json_option
@pass_session
def instance_backups(session: Session, instance_id: str, host: str, series: str | None, store: str | None) -> None:
    """List an instance's backups, newest first; also of one that is gone."""
    done = perform(
        session, checked(InstanceListBackups, series=series, store=store), host=host, instance_id=instance_id
    )
    if done is not None and not session.as_json:
        _show_backups(done.result.get("backups", []))


@click.group()
def snapshot() -> None:
    """Take guests back to an earlier moment, with their memory."""


@snapshot.command("create")
@instance_argument
@name_argument
@host_option
@click.option("--memory/--no-memory", default=None, help="Insist on memory, or on none (default: as the guest is).")
@click.option("--description", metavar="TEXT", help="What it is for.")
@sending_options
@json_option
@pass_session
def snapshot_create(
    session: Session,
    /,
    *,
    instance_id: str,
    name: str,
    host: str,
    memory: bool | None,
    description: str | None,
    **options: Any,
) -> None:
    """Take a snapshot; a running guest pauses while its memory is written."""
    data = checked(SnapshotCreate, name=name, memory=memory, description=description)
    done = _run(session, data, (instance_id, host), options, SNAPSHOT_TIMEOUT_S)
    if done is not None:
        _show_snapshots([done.result.get("snapshot", {})])


@snapshot.command("ls")
@instance_argument
@host_option
@json_option
@pass_session
def snapshot_ls(session: Session, instance_id: str, host: str) -> None:
    """List an instance's snapshots, oldest first."""
    done = perform(session, SnapshotList(), host=host, instance_id=instance_id)
    if done is not None and not session.as_json:
        _show_snapshots(done.result.get("snapshots", []))


@snapshot.command("revert")
@instance_argument
@name_argument
@host_option
@click.option("--start/--no-start", default=None, help="Run afterwards, or not (default: as in the snapshot).")
@sending_options
@json_option
@pass_session
def snapshot_revert(
    session: Session, /, *, instance_id: str, name: str, host: str, start: bool | None, **options: Any
) -> None:
    """Go back to a snapshot. What came after it is lost."""
    done = _run(
        session, checked(SnapshotRevert, name=name, start=start), (instance_id, host), options, SNAPSHOT_TIMEOUT_S
    )
    if done is not None:
        click.echo(f"{instance_id} is back at {name}, now {render.clean(done.result.get('observed'))}")


@snapshot.command("rm")
@instance_argument
@name_argument
@host_option
@sending_options
@json_option
@pass_session
def snapshot_rm(session: Session, /, *, instance_id: str, name: str, host: str, **options: Any) -> None:
    """Remove a snapshot; the guest stays as it is."""
    done = _run(session, checked(SnapshotDelete, name=name), (instance_id, host), options, SNAPSHOT_TIMEOUT_S)
    if done is not None:
        click.echo(f"snapshot {name} removed")


def _run(
    session: Session, data: CommandData, where: tuple[str, str], options: dict[str, Any], limit_s: float
) -> OperationSucceeded | None:
    """Perform a command on (instance, host); what it returned, unless JSON was printed or nobody waited."""
    instance_id, host = where
    how = sending(options)
    done = perform(session, data, host=host, instance_id=instance_id, how=how, default_timeout_s=limit_s)
    return None if session.as_json else done


def _show_disks(disks: list[dict[str, Any]]) -> None:
    columns = ("name", "format", "size_bytes", "sha256", "url")
    render.table(("disk", "format", "bytes", "sha256", "url"), [[disk.get(key) for key in columns] for disk in disks])


def _show_backups(backups: list[dict[str, Any]]) -> None:
    rows = [
        [
            item.get("name"),
            item.get("store"),
            item.get("taken_at"),
            sum(disk.get("size_bytes", 0) for disk in item.get("disks", [])),
        ]
        for item in backups
    ]
    render.table(("backup", "store", "taken at", "bytes"), rows)


def _show_snapshots(snapshots: list[dict[str, Any]]) -> None:
    rows = [
        [
            item.get("name"),
            item.get("power"),
            "yes" if item.get("memory") else "no",
            item.get("created_at"),
            item.get("description"),
        ]
        for item in snapshots
    ]
    render.table(("snapshot", "guest", "memory", "created at", "description"), rows)
