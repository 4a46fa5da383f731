"""`computectl instance …`."""

from __future__ import annotations

import uuid
from typing import Any

import click

from agent.controller import render
from agent.controller.client import ComputeClient
from agent.controller.commands_console import instance_console
from agent.controller.inputs import file_type, guest_timeout_option, spec_of
from agent.controller.options import (
    host_option,
    instance_argument,
    instance_uuid,
    json_option,
    sending,
    sending_options,
)
from agent.controller.perform import IMAGE_TIMEOUT_S, perform, perform_on, power, say
from agent.controller.session import Session, pass_session
from agent.messages.commands import (
    InstanceCreate,
    InstanceDelete,
    InstanceList,
    InstancePause,
    InstanceReboot,
    InstanceResume,
    InstanceShow,
    InstanceStart,
    InstanceStop,
)

PAGE = 200
"""Instances per answer: with their specs, a thousand could be more than a broker takes as one message."""


_NAMESPACE = uuid.UUID("5f1c9d1e-7a52-4e0b-9d5c-3b1f0a7c6e24")


@click.group()
def instance() -> None:
    """Make, list, run and remove instances."""


instance.add_command(instance_console)


@instance.command("create")
@click.option(
    "-f",
    "--file",
    "file",
    required=True,
    type=file_type,
    help="The spec, YAML or JSON; - is standard input.",
)
@host_option
@click.option(
    "--id", "instance_id", metavar="UUID", type=instance_uuid, help="The instance's id; a new one by default."
)
@click.option("--start/--no-start", default=True, help="Start it when it is made (the default).")
@sending_options
@json_option
@pass_session
def instance_create(
    session: Session, /, *, file: str, host: str, instance_id: str | None, start: bool, **options: Any
) -> None:
    """Make an instance from a spec file. The file is checked before anything is sent."""
    spec = spec_of(file)
    how = sending(options)
    if instance_id is None:
        # A repeat of the same command has to name the same instance.
        repeatable = how.command_id is not None
        instance_id = str(uuid.uuid5(_NAMESPACE, how.command_id or "") if repeatable else uuid.uuid4())
    data = InstanceCreate(spec=spec, start=start)
    done = perform(session, data, host=host, instance_id=instance_id, how=how, default_timeout_s=IMAGE_TIMEOUT_S)
    if session.as_json:
        return
    if done is None:
        click.echo(f"instance {instance_id}")
    else:
        say(done, instance_id, "created")


@instance.command("ls")
@host_option
@click.option("--all", "include_foreign", is_flag=True, help="Also domains that are not the agent's.")
@json_option
@pass_session
def instance_ls(session: Session, host: str, include_foreign: bool) -> None:
    """List the instances of a host."""

    async def body(client: ComputeClient) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        found: list[dict[str, Any]] = []
        foreign: list[dict[str, Any]] = []
        after = None
        while True:
            data = InstanceList(include_foreign=include_foreign, after=after, limit=PAGE)
            done = await perform_on(client, session, data, host=host, quiet=True)
            result = {} if done is None else done.result
            found += result.get("instances", [])
            foreign = result.get("foreign") or foreign
            after = result.get("next_after")
            if after is None:
                return found, foreign

    instances, foreign = session.run(body)
    if session.as_json:
        document: dict[str, Any] = {"host": host, "instances": instances}
        render.document(document | {"foreign": foreign} if include_foreign else document)
        return
    columns = ["id", "name", "state", "desired", "vcpus", "memory"]
    rows = [_row(item, item.get("spec") or {}, item.get("desired")) for item in instances]
    rows += [_row(item, item, "(foreign)") for item in foreign]
    render.table(columns, rows)


def _row(item: dict[str, Any], size: dict[str, Any], desired: object) -> list[object]:
    return [
        item.get("id"),
        item.get("name"),
        item.get("observed"),
        desired,
        size.get("vcpus"),
        render.mib(size.get("memory_mib")),
    ]


@instance.command("show")
@instance_argument
@host_option
@json_option
@pass_session
def instance_show(session: Session, instance_id: str, host: str) -> None:
    """Show one instance, as the hypervisor has it now."""
    done = perform(session, InstanceShow(), host=host, instance_id=instance_id)
    if done is not None and not session.as_json:
        render.fields(done.result)


@instance.command("start")
@instance_argument
@host_option
@click.option("--discard-saved", is_flag=True, help="Boot a suspended instance anew; its saved memory is lost.")
@sending_options
@json_option
@pass_session
def instance_start(session: Session, /, *, instance_id: str, host: str, discard_saved: bool, **options: Any) -> None:
    """Start a stopped instance, or bring a suspended one back."""
    power(session, InstanceStart(discard_saved=discard_saved), instance_id, host, options, past="started")


@instance.command("stop")
@instance_argument
@host_option
@click.option("--force", is_flag=True, help="End it at once, like pulling the plug.")
@guest_timeout_option()
@sending_options
@json_option
@pass_session
def instance_stop(
    session: Session, /, *, instance_id: str, host: str, force: bool, guest_timeout_s: float, **options: Any
) -> None:
    """Shut an instance down."""
    data = InstanceStop(force=force, timeout_s=guest_timeout_s)
    power(session, data, instance_id, host, options, past="stopped", extra_s=guest_timeout_s)


@instance.command("reboot")
@instance_argument
@host_option
@click.option("--hard", is_flag=True, help="End it and start it anew, without asking the guest.")
@guest_timeout_option(what="before it is rebooted the hard way")
@sending_options
@json_option
@pass_session
def instance_reboot(
    session: Session, /, *, instance_id: str, host: str, hard: bool, guest_timeout_s: float, **options: Any
) -> None:
    """Reboot a running instance."""
    data = InstanceReboot(mode="hard" if hard else "soft", timeout_s=guest_timeout_s)
    power(session, data, instance_id, host, options, past="rebooted", extra_s=guest_timeout_s)


@instance.command("pause")
@instance_argument
@host_option
@sending_options
@json_option
@pass_session
def instance_pause(session: Session, /, *, instance_id: str, host: str, **options: Any) -> None:
    """Stop an instance's vCPUs; its memory stays."""
    power(session, InstancePause(), instance_id, host, options, past="paused")


@instance.command("resume")
@instance_argument
@host_option
@sending_options
@json_option
@pass_session
def instance_resume(session: Session, /, *, instance_id: str, host: str, **options: Any) -> None:
    """Let a paused or suspended instance run on."""
    power(session, InstanceResume(), instance_id, host, options, past="resumed")


@instance.command("rm")
@instance_argument
@host_option
@click.option(
    "--restore-within",
    "restore_within_s",
    metavar="SECONDS",
    type=click.FloatRange(0, 10 * 366 * 86_400, min_open=True),
    help="Only stop it, and remove it after so long unless it is restored.",
)
@guest_timeout_option(what="to shut down before it is ended, with --restore-within; without, it is ended at once")
@click.option("--keep-exports", is_flag=True, help="Of a shelved instance: leave its exports where they are.")
@sending_options
@json_option
@pass_session
def instance_rm(
    session: Session,
    /,
    *,
    instance_id: str,
    host: str,
    restore_within_s: float | None,
    guest_timeout_s: float,
    keep_exports: bool,
    **options: Any,
) -> None:
    """End an instance and remove everything it owns on its host."""
    data = InstanceDelete(restore_within_s=restore_within_s, timeout_s=guest_timeout_s, keep_exports=keep_exports)
    past = "removed" if restore_within_s is None else "deleted, and can be restored"
    power(session, data, instance_id, host, options, past=past, extra_s=guest_timeout_s)
