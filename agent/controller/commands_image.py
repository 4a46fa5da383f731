"""`computectl image …`."""

from __future__ import annotations

import re
from typing import Any

import click

from agent.controller import render
from agent.controller.inputs import image_options, image_source
from agent.controller.options import host_option, json_option, sending, sending_options
from agent.controller.perform import LONG_TIMEOUT_S, perform
from agent.controller.session import Session, pass_session
from agent.messages.verbs_image import ImageList, ImagePrefetch, ImageRemove, ImageVerify


def sha256_digest(value: str) -> str:
    """Check a sha256 and return it as the wire has it, in lower case."""
    if not re.fullmatch(r"[0-9a-f]{64}", value.lower()):
        raise click.BadParameter(f"{value!r} is no sha256; it has 64 hexadecimal digits")
    return value.lower()


sha256_argument = click.argument("sha256", metavar="SHA256", type=sha256_digest)


@click.group()
def image() -> None:
    """See and fill the image cache of a host."""


@image.command("ls")
@host_option
@json_option
@pass_session
def image_ls(session: Session, host: str) -> None:
    """List the images in a host's cache, and those on their way there."""
    images: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    after: str | None = None
    while True:
        done = perform(session, ImageList(after=after), host=host, quiet=True)
        result = dict(done.result) if done is not None else {}
        images += result.get("images", [])
        after = result.get("next_after")
        if after is None:
            break
    if session.as_json:
        render.document({"host": host, **result, "images": images})
        return
    columns = ["sha256", "format", "state", "size", "disk", "virtual", "instances", "last used"]
    render.table(columns, [_row(item) for item in images])
    limit = _mib(result.get("limit_bytes"))
    click.echo(f"{_mib(result.get('disk_bytes'))}{f' of {limit}' if limit else ''} used")


def _row(item: dict[str, Any]) -> list[object]:
    return [
        item.get("sha256"),
        item.get("format"),
        item.get("state"),
        *(_mib(item.get(key)) for key in ("size_bytes", "disk_bytes", "virtual_size_bytes")),
        len(item.get("in_use_by", [])),
        str(item.get("last_used", "-"))[:19],
    ]


def _mib(value: Any) -> str | None:
    return None if value is None else f"{int(value) / 1024**2:.1f} MiB"


@image.command("prefetch")
@click.argument("url")
@click.argument("sha256", metavar="SHA256", type=sha256_digest)
@host_option
@image_options
@click.option("--boot-file", is_flag=True, help="It is a kernel or an initial ramdisk.")
@sending_options
@json_option
@pass_session
def image_prefetch(
    session: Session,
    /,
    url: str,
    sha256: str,
    host: str,
    *,
    boot_file: bool,
    **how: Any,
) -> None:
    """Fetch the image at URL into a host's cache."""
    if boot_file:
        how["image_format"] = "raw"
    source = image_source(how, url=url, sha256=sha256)
    data = ImagePrefetch(image=source, boot_file=boot_file)
    done = perform(session, data, host=host, how=sending(how), default_timeout_s=LONG_TIMEOUT_S)
    if done is not None and not session.as_json:
        click.echo(f"{sha256} {'is' if done.result.get('changed', True) else 'was already'} in the cache of {host}")


@image.command("rm")
@sha256_argument
@host_option
@sending_options
@json_option
@pass_session
def image_rm(session: Session, /, sha256: str, host: str, **how: Any) -> None:
    """Remove an image from a host's cache. Refused while it is in use."""
    done = perform(session, ImageRemove(sha256=sha256), host=host, how=sending(how))
    if done is not None and not session.as_json:
        click.echo(f"removed; {_mib(done.result.get('freed_bytes'))} are free again")


@image.command("verify")
@sha256_argument
@host_option
@json_option
@pass_session
def image_verify(session: Session, sha256: str, host: str) -> None:
    """Read an image of a host's cache again, and compare it with what was published. Exit status 1: damaged."""
    done = perform(session, ImageVerify(sha256=sha256), host=host, default_timeout_s=LONG_TIMEOUT_S)
    intact = done is not None and bool(done.result.get("intact"))
    if not session.as_json:
        click.echo("intact" if intact else "damaged; its next use fetches it again")
    if not intact:
        raise click.exceptions.Exit(1)
