"""`computectl instance rebuild|rescue|unrescue|shelve|unshelve|restore`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click
from pydantic import ValidationError

from agent.controller import render
from agent.controller.options import host_option, instance_argument, json_option, sending, sending_options
from agent.controller.perform import perform
from agent.controller.session import Session, pass_session
from agent.messages.verb import CommandData
from agent.messages.verbs_rebuild import (
    InstanceRebuild,
    InstanceRescue,
    InstanceRestore,
    InstanceShelve,
    InstanceUnrescue,
    InstanceUnshelve,
)

IMAGE_TIMEOUT_S = 1800.0
"""An image may have to be fetched first."""
EXPORT_TIMEOUT_S = 4 * 3600.0

F = TypeVar("F", bound=Callable[..., Any])
C = TypeVar("C", bound=CommandData)


def _image_options(function: F) -> F:
    for option in reversed(
        (
            click.option("--image", "url", metavar="URL", required=True, help="http, https or file."),
            click.option("--sha256", metavar="HEX", required=True, help="Of the bytes at the URL."),
            click.option(
                "--format",
                "format_",
                type=click.Choice(["qcow2", "raw", "vmdk", "vhdx"]),
                default="qcow2",
                show_default=True,
                help="Of the image.",
            ),
        )
    ):
        function = option(function)
    return function


def _halting_options(function: F) -> F:
    for option in reversed(
        (
            click.option("--force", is_flag=True, help="End a running guest at once."),
            click.option(
                "--timeout",
                "guest_timeout_s",
                metavar="SECONDS",
                type=click.FloatRange(0, 86_400),
                default=60.0,
                show_default=True,
                help="Give the guest so long to shut down before it is ended.",
            ),
        )
    ):
        function = option(function)
    return function


def _data(model: type[C], **values: Any) -> C:
    """Build a command; what is wrong with it is a usage error."""
    try:
        return model.model_validate({key: value for key, value in values.items() if value is not None})
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise click.UsageError(f"{where}: {first['msg']}" if where else str(first["msg"])) from None


def _run(
    session: Session,
    data: CommandData,
    instance_id: str,
    host: str,
    options: dict[str, Any],
    *,
    past: str,
    limit_s: float,
) -> None:
    how = sending(options)
    done = perform(session, data, host=host, instance_id=instance_id, how=how, default_timeout_s=limit_s)
    if done is not None and not session.as_json:
        observed = render.clean(done.result.get("observed", "unknown"))
        click.echo(f"{instance_id} {past}, now {observed} ({render.seconds(done.duration_ms / 1000)})")


@click.command("rebuild")
@instance_argument
@host_option
@_image_options
@_halting_options
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
    format_: str,
    force: bool,
    guest_timeout_s: float,
    **options: Any,
) -> None:
    """Make an instance anew from another image; its data disks are kept."""
    image = {"url": url, "sha256": sha256, "format": format_}
    data = _data(InstanceRebuild, image=image, force=force, timeout_s=guest_timeout_s)
    _run(session, data, instance_id, host, options, past="rebuilt", limit_s=IMAGE_TIMEOUT_S + guest_timeout_s)


@click.command("rescue")
@instance_argument
@host_option
@_image_options
@_halting_options
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
    format_: str,
    force: bool,
    guest_timeout_s: float,
    **options: Any,
) -> None:
    """Boot an instance from a rescue image, its own disks behind it."""
    image = {"url": url, "sha256": sha256, "format": format_}
    data = _data(InstanceRescue, image=image, force=force, timeout_s=guest_timeout_s)
    _run(session, data, instance_id, host, options, past="rescued", limit_s=IMAGE_TIMEOUT_S + guest_timeout_s)


@click.command("unrescue")
@instance_argument
@host_option
@_halting_options
@sending_options
@json_option
@pass_session
def instance_unrescue(
    session: Session, /, *, instance_id: str, host: str, force: bool, guest_timeout_s: float, **options: Any
) -> None:
    """Boot an instance from its own disks again."""
    data = _data(InstanceUnrescue, force=force, timeout_s=guest_timeout_s)
    _run(session, data, instance_id, host, options, past="unrescued", limit_s=120.0 + guest_timeout_s)


@click.command("shelve")
@instance_argument
@host_option
@click.option("--store", metavar="STORE", help="One of the host's export stores; needs --name.")
@click.option("--name", metavar="NAME", help="The file's name in the store, without its ending.")
@click.option("--url", metavar="URL", help="PUT the disks there instead; with several disks {disk} is in it.")
@_halting_options
@sending_options
@json_option
@pass_session
def instance_shelve(
    session: Session,
    /,
    *,
    instance_id: str,
    host: str,
    store: str | None,
    name: str | None,
    url: str | None,
    force: bool,
    guest_timeout_s: float,
    **options: Any,
) -> None:
    """Stop an instance, export its disks and remove them from the host."""
    target = {key: value for key, value in (("store", store), ("name", name), ("url", url)) if value is not None}
    data = _data(InstanceShelve, target=target, force=force, timeout_s=guest_timeout_s)
    _run(session, data, instance_id, host, options, past="shelved", limit_s=EXPORT_TIMEOUT_S + guest_timeout_s)


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
    data = _data(InstanceUnshelve, keep_exports=keep_exports, url=url)
    _run(session, data, instance_id, host, options, past="unshelved", limit_s=EXPORT_TIMEOUT_S)


@click.command("restore")
@instance_argument
@host_option
@sending_options
@json_option
@pass_session
def instance_restore(session: Session, /, *, instance_id: str, host: str, **options: Any) -> None:
    """Bring back an instance that was removed with --restore-within."""
    _run(session, InstanceRestore(), instance_id, host, options, past="restored", limit_s=120.0)


COMMANDS = (
    instance_rebuild,
    instance_rescue,
    instance_unrescue,
    instance_shelve,
    instance_unshelve,
    instance_restore,
)
"""Subcommands of `instance`."""
