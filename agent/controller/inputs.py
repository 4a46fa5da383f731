"""What the parts of commands are made of, from flags and files: images, seeds, specs, export targets.

Whatever is wrong with them is a usage error, and nothing was sent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click
from pydantic import BaseModel, ValidationError

from agent.controller.specfile import load, load_spec
from agent.messages.commands import MAX_COMMAND_BYTES
from agent.messages.spec import ImageSource, InstanceSpec, Seed

F = TypeVar("F", bound=Callable[..., Any])
M = TypeVar("M", bound=BaseModel)

file_type = click.Path(exists=True, dir_okay=False, allow_dash=True)


def checked(model: type[M], **values: Any) -> M:
    """Build a model of the contract; None is left to the default. What is wrong with it is a usage error."""
    try:
        return model.model_validate({key: value for key, value in values.items() if value is not None})
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        sentence = str(first["msg"]).removeprefix("Value error, ")
        raise click.UsageError(f"{where}: {sentence}" if where else sentence) from None


# --- images -------------------------------------------------------------------------------------------------------


def image_options(function: F) -> F:
    """Add what `image_source` needs beside the image's address and digest."""
    return _added(
        function,
        click.option(
            "--format",
            "image_format",
            type=click.Choice(["qcow2", "raw", "vmdk", "vhdx"]),
            default="qcow2",
            show_default=True,
            help="Of the decompressed image.",
        ),
        click.option("--compression", type=click.Choice(["gzip", "xz", "zstd"]), help="How the bytes are compressed."),
        click.option("--max-size-mib", type=click.IntRange(min=1), help="Refuse a larger download."),
        click.option("--key", help="Name of the trusted key of --signature."),
        click.option("--signature", help="Ed25519 signature of the sha256's 32 bytes, in base64."),
    )


def named_image_options(function: F) -> F:
    """Add `image_options` and the image's address and digest, for commands that are about something else."""
    return _added(
        image_options(function),
        click.option("--image", "url", metavar="URL", required=True, help="http, https or file."),
        click.option("--sha256", metavar="HEX", required=True, help="Of the bytes at the URL."),
    )


def image_source(options: dict[str, Any], *, url: str, sha256: str) -> ImageSource:
    """Take the values of `image_options` out of `options`, and make an image of them."""
    image_format, key, signature = (options.pop(name) for name in ("image_format", "key", "signature"))
    if (key is None) != (signature is None):
        raise click.UsageError("--key and --signature belong together")
    return checked(
        ImageSource,
        url=url,
        sha256=sha256,
        format=image_format,
        compression=options.pop("compression"),
        max_size_mib=options.pop("max_size_mib"),
        signature=None if key is None else {"key": key, "ed25519": signature},
    )


# --- files --------------------------------------------------------------------------------------------------------


def spec_of(file: str) -> InstanceSpec:
    """Read an instance's spec; - is standard input. Raises `InvalidSpec`."""
    return load_spec(*_read(file))


def seed_of(file: str) -> Seed:
    """Read first-boot data as it is in a spec below `seed`; - is standard input. Raises `InvalidSpec`."""
    return load(Seed, *_read(file), what="a seed")


def _read(file: str) -> tuple[str, bytes]:
    with click.open_file(file, "rb") as stream:
        return ("standard input" if file == "-" else file), stream.read(MAX_COMMAND_BYTES + 1)


# --- guests and exports -------------------------------------------------------------------------------------------


def guest_timeout_option(
    flag: str = "--timeout", *, default_s: float = 60.0, what: str = "to shut down before it is ended"
) -> Callable[[F], F]:
    """Make the option for how long the guest gets; its value is `guest_timeout_s`."""
    return click.option(
        flag,
        "guest_timeout_s",
        metavar="SECONDS",
        type=click.FloatRange(0, 86_400),
        default=default_s,
        show_default=True,
        help=f"Give the guest so long {what}.",
    )


def halting_options(function: F) -> F:
    """Add `--force` and `--timeout`, for what stops a running guest first."""
    return _added(
        function, click.option("--force", is_flag=True, help="End a running guest at once."), guest_timeout_option()
    )


def target_options(function: F) -> F:
    """Add what `export_target` collects."""
    return _added(
        function,
        click.option("--store", metavar="STORE", help="One of the host's export stores; needs --name."),
        click.option("--name", metavar="NAME", help="The file's name in the store, without its ending."),
        click.option("--url", metavar="URL", help="PUT it there instead; with several disks {disk} is in it."),
    )


def export_target(options: dict[str, Any]) -> dict[str, Any]:
    """Take the values of `target_options` out of `options`, as a command's `target` has them."""
    given = {key: options.pop(key) for key in ("store", "name", "url")}
    return {key: value for key, value in given.items() if value is not None}


def _added(function: F, *options: Callable[[F], F]) -> F:
    for option in reversed(options):
        function = option(function)
    return function
