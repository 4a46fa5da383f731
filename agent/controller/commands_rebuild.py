"""`computectl instance rebuild|rescue|unrescue|shelve|unshelve|restore`."""

from __future__ import annotations

from typing import Any

import click

from agent.controller.inputs import (
    checked,
    export_target,
    file_type,
    halting_options,
    image_source,
    named_image_options,
    seed_of,
    target_options,
)
from agent.controller.options import host_option, instance_argument, json_option, sending_options
from agent.controller.perform import IMAGE_TIMEOUT_S, LONG_TIMEOUT_S, power
from agent.controller.session import Session, pass_session
from agent.messages.verbs_rebuild import (
    InstanceRebuild,
    InstanceRescue,
    InstanceRestore,
    InstanceShelve,
    InstanceUnrescue,
    InstanceUnshelve,
)


@click.command("rebuild")
@instance_argument
@host_option
@named_image_options
@click.option("--seed", metavar="FILE", type=file_type, help="New first-boot data, YAML or JSON (default: as it was).")
@halting_options
@sending_options
@json_option
@pass_session
def instance_rebuild(
    session: Session,
    /,
    *,
    instance_id: str,
    host: str,
    url: str,
    sha256: str,
    seed: str | None,
    force: bool,
    guest_timeout_s: float,
    **options: Any,
) -> None:
    """Make an instance anew from another image; its data disks are kept."""
    image = image_source(options, url=url, sha256=sha256)
    new_seed = None if seed is None else seed_of(seed)
    data = checked(InstanceRebuild, image=image, seed=new_seed, force=force, timeout_s=guest_timeout_s)
    power(session, data, instance_id, host, options, past="rebuilt", extra_s=IMAGE_TIMEOUT_S + guest_timeout_s)


@click.command("rescue")
@instance_argument
@host_option
@named_image_options
@halting_options
@sending_options
@json_option
@pass_session
def instance_rescue(
    session: Session,
    /,
    *,
    instance_id: str,
    host: str,
    url: str,
    sha256: str,
    force: bool,
    guest_timeout_s: float,
    **options: Any,
) -> None:
    """Boot an instance from a rescue image, its own disks behind it."""
    image = image_source(options, url=url, sha256=sha256)
    data = checked(InstanceRescue, image=image, force=force, timeout_s=guest_timeout_s)
    power(session, data, instance_id, host, options, past="rescued", extra_s=IMAGE_TIMEOUT_S + guest_timeout_s)


@click.command("unrescue")
@instance_argument
@host_option
@halting_options
@sending_options
@json_option
@pass_session
def instance_unrescue(
    session: Session, /, *, instance_id: str, host: str, force: bool, guest_timeout_s: float, **options: Any
) -> None:
    """Boot an instance from its own disks again."""
    data = checked(InstanceUnrescue, force=force, timeout_s=guest_timeout_s)
    power(session, data, instance_id, host, options, past="unrescued", extra_s=60.0 + guest_timeout_s)


@click.command("shelve")
@instance_argument
@host_option
@target_options
@halting_options
@sending_options
@json_option
@pass_session
def instance_shelve(
    session: Session,
    /,
    *,
    instance_id: str,
    host: str,
    force: bool,
    guest_timeout_s: float,
    **options: Any,
) -> None:
    """Stop an instance, export its disks and remove them from the host."""
    data = checked(InstanceShelve, target=export_target(options), force=force, timeout_s=guest_timeout_s)
    power(session, data, instance_id, host, options, past="shelved", extra_s=LONG_TIMEOUT_S + guest_timeout_s)


@click.command("unshelve")
@instance_argument
@host_option
@click.option("--keep-exports", is_flag=True, help="Leave the exports where they are.")
@click.option("--url", metavar="URL", help="Fetch the disks from here, with {disk} for a disk's name.")
@sending_options
@json_option
@pass_session
def instance_unshelve(
    session: Session, /, *, instance_id: str, host: str, keep_exports: bool, url: str | None, **options: Any
) -> None:
    """Bring a shelved instance back."""
    data = checked(InstanceUnshelve, keep_exports=keep_exports, url=url)
    power(session, data, instance_id, host, options, past="unshelved", extra_s=LONG_TIMEOUT_S)


@click.command("restore")
@instance_argument
@host_option
@sending_options
@json_option
@pass_session
def instance_restore(session: Session, /, *, instance_id: str, host: str, **options: Any) -> None:
    """Bring back an instance that was removed with --restore-within."""
    power(session, InstanceRestore(), instance_id, host, options, past="restored", extra_s=60.0)


COMMANDS = (
    instance_rebuild,
    instance_rescue,
    instance_unrescue,
    instance_shelve,
    instance_unshelve,
    instance_restore,
)
"""Subcommands of `instance`."""
