"""`computectl instance adopt`."""

from __future__ import annotations

from typing import Any

import click

from agent.controller import render
from agent.controller.inputs import file_type, spec_of
from agent.controller.options import host_option, instance_argument, json_option, sending, sending_options
from agent.controller.perform import perform
from agent.controller.session import Session, pass_session
from agent.messages.verbs_host import InstanceAdopt


@click.command("adopt")
@instance_argument
@host_option
@click.option(
    "-f",
    "--file",
    "file",
    type=file_type,
    help="A spec, YAML or JSON, that agrees with the domain; by default it is read from the domain.",
)
@click.option("--own-disks", is_flag=True, help="Let a later `instance rm` remove the domain's disk files too.")
@sending_options
@json_option
@pass_session
def instance_adopt(
    session: Session, /, *, instance_id: str, host: str, file: str | None, own_disks: bool, **options: Any
) -> None:
    """Take a foreign domain as an instance, without touching its guest. `ls --all` shows foreign domains."""
    data = InstanceAdopt(spec=None if file is None else spec_of(file), own_disks=own_disks)
    done = perform(session, data, host=host, instance_id=instance_id, how=sending(options))
    if done is None or session.as_json:
        return
    view = done.result
    adopted = (view.get("life") or {}).get("adopted") or {}
    click.echo(f"{render.clean(view.get('name', instance_id))} adopted; it is {view.get('observed')}")
    for note in adopted.get("kept", []):
        click.echo(f"kept as it is: {render.clean(note)}")
