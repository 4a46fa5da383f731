"""The image family of verbs: the host's image cache."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from agent.messages.spec_disks import ImageSource
from agent.messages.types import Outbound, Sha256
from agent.messages.verb import CommandData


class ImageList(CommandData):
    """List the images in the host's cache and on their way there, by sha256."""

    verb: ClassVar[str] = "image.list"
    subject_required: ClassVar[bool] = False
    limit: Annotated[int, Field(ge=1, le=10_000)] = 1000
    after: Sha256 | None = None


class ImagePrefetch(CommandData):
    """Fetch an image into the host's cache, so that a later create need not wait for it.

    `boot_file`: it is a kernel or an initial ramdisk (`format` raw), whose content is not looked at.
    """

    verb: ClassVar[str] = "image.prefetch"
    subject_required: ClassVar[bool] = False
    image: ImageSource
    boot_file: bool = False


class ImageRemove(CommandData):
    """Remove an image from the host's cache. Refused while an instance or an operation uses it."""

    verb: ClassVar[str] = "image.remove"
    subject_required: ClassVar[bool] = False
    sha256: Sha256


class ImageVerify(CommandData):
    """Read a cached image again and compare it with what was published. A damaged one is fetched anew when it is next
    used.
    """

    verb: ClassVar[str] = "image.verify"
    subject_required: ClassVar[bool] = False
    sha256: Sha256


class ImageView(Outbound):
    """One image of the cache. `sha256` is of the bytes at its source, `format` what it is in the cache (`file`: a boot
    file).

    `size_bytes` is the file's length, or what has come so far; `disk_bytes` the space that it takes. `in_use_by` are
    instances, `wanted_by` operations under way.
    """

    sha256: str
    format: Literal["qcow2", "raw", "file"]
    state: Literal["ready", "damaged", "downloading", "converting"]
    size_bytes: int
    disk_bytes: int
    virtual_size_bytes: int | None = None
    last_used: datetime
    in_use_by: list[str] = Field(default_factory=list)
    wanted_by: list[str] = Field(default_factory=list)


class ImageListResult(Outbound):
    """Images by sha256; `next_after` continues the list where there are more. `disk_bytes` is the whole cache's, and
    `limit_bytes` its quota.
    """

    images: list[ImageView]
    disk_bytes: int
    limit_bytes: int | None = None
    next_after: str | None = None


class ImagePrefetchResult(Outbound):
    """The image is in the cache. `changed` is false where it was there already."""

    sha256: str
    format: Literal["qcow2", "raw"]
    virtual_size_bytes: int
    changed: bool


class ImageRemoveResult(Outbound):
    """The image is gone."""

    sha256: str
    freed_bytes: int


class ImageVerifyResult(Outbound):
    """Whether the image's bytes are those that were published."""

    sha256: str
    intact: bool


COMMANDS: tuple[type[CommandData], ...] = (ImageList, ImagePrefetch, ImageRemove, ImageVerify)
RESULTS: dict[str, type[Outbound]] = {
    "image.list": ImageListResult,
    "image.prefetch": ImagePrefetchResult,
    "image.remove": ImageRemoveResult,
    "image.verify": ImageVerifyResult,
}
"""Verb → result, for the results that this module defines; those that return a shared one are in `results`."""
