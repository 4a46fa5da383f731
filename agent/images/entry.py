"""What a finished image looks like in the cache folder, and how it is found again.

An entry is two files: `<sha256>.<format>` and beside it `<sha256>.<format>.json`. The second is written
first, so that an image under its final name always has its description. All functions do file I/O: run them
in a thread.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from agent.drivers.base import PreparedImage
from agent.errors import ComputeError, ImageRejected, ResourceExhausted, Unavailable
from agent.images.inspect import check_virtual_size
from agent.images.policy import ImagePolicy
from agent.messages.spec import ImageSource
from agent.messages.types import ImageFormat, Sha256

PARTIAL_PREFIX = ".partial-"
FORMATS: tuple[ImageFormat, ...] = get_args(ImageFormat)


class CacheEntry(BaseModel):
    """The description beside a cached image."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    sha256: Sha256
    format: ImageFormat
    size_bytes: int
    virtual_size_bytes: int


def image_path(directory: Path, sha256: str, image_format: ImageFormat) -> Path:
    """Return where the image is, or would be."""
    return directory / f"{sha256}.{image_format}"


def entry_path(image: Path) -> Path:
    """Return where the description of `image` is, or would be."""
    return image.with_name(image.name + ".json")


def load(directory: Path, sha256: str, image_format: ImageFormat) -> CacheEntry | None:
    """Return the entry if its image is there with the recorded size, else None.

    A damaged entry counts as absent: the next download replaces it in one rename. It is not removed here,
    because a running guest may have it open. Raises `Unavailable` if the folder cannot be read.
    """
    image = image_path(directory, sha256, image_format)
    try:
        status = image.lstat()
        text = entry_path(image).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise storage_error(exc) from exc
    try:
        entry = CacheEntry.model_validate_json(text)
    except ValidationError:
        return None
    same = entry.sha256 == sha256 and entry.format == image_format and entry.size_bytes == status.st_size
    return entry if same and stat.S_ISREG(status.st_mode) else None


def find(directory: Path, source: ImageSource, policy: ImagePolicy) -> PreparedImage | None:
    """Return the cached image for `source`, or None. Today's limits hold for yesterday's images as well.

    Raises `ImageRejected`: `image_format_mismatch` if these bytes are cached as the other format,
    `image_too_large`.
    """
    for other in FORMATS:
        if other != source.format and load(directory, source.sha256, other):
            raise ImageRejected(
                f"the image is declared as {source.format}, but these very bytes are {other}",
                code="image_format_mismatch",
                declared=source.format,
                found=other,
            )
    entry = load(directory, source.sha256, source.format)
    if entry is None:
        return None
    check_size(entry.size_bytes, policy.max_bytes(source.max_size_mib))
    check_virtual_size(entry.virtual_size_bytes, policy)
    return PreparedImage(
        path=image_path(directory, source.sha256, source.format),
        format=entry.format,
        virtual_size_bytes=entry.virtual_size_bytes,
        sha256=entry.sha256,
    )


def check_size(size_bytes: int, limit_bytes: int) -> None:
    """Refuse more bytes than the limit: `ImageRejected` with code `image_too_large`."""
    if size_bytes > limit_bytes:
        raise ImageRejected(
            f"the image has {size_bytes} bytes or more, above the limit of {limit_bytes}",
            code="image_too_large",
            size_bytes=size_bytes,
            limit_bytes=limit_bytes,
        )


def make_directory(directory: Path) -> None:
    """Make the folder, readable for all: QEMU may run as another user. Idempotent."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if stat.S_IMODE(directory.stat().st_mode) != 0o755:
            directory.chmod(0o755)
    except OSError as exc:
        raise storage_error(exc) from exc


def remove_partials(directory: Path) -> int:
    """Remove what a killed process left: unfinished downloads, and descriptions whose image never came.

    Images under their final name are never touched; instances may live on them. Returns how many files went.
    """
    removed = 0
    try:
        for path in list(directory.iterdir()):
            orphan = path.name.endswith(".json") and not path.with_suffix("").exists()
            if path.name.startswith(PARTIAL_PREFIX) or orphan:
                path.unlink(missing_ok=True)
                removed += 1
    except OSError as exc:
        raise storage_error(exc) from exc
    return removed


def check_space(directory: Path, needed: int, promised: int) -> None:
    """Refuse a download that cannot fit beside the `promised` bytes which running ones have still to write.

    Raises `ResourceExhausted` with code `no_space`.
    """
    try:
        status = os.statvfs(directory)
    except OSError as exc:
        raise storage_error(exc) from exc
    free = status.f_bavail * status.f_frsize - promised
    if needed > free:
        raise ResourceExhausted(
            f"the image needs {needed} bytes in the cache, and {max(free, 0)} are free",
            code="no_space",
            needed_bytes=needed,
            free_bytes=max(free, 0),
        )


def storage_error(exc: OSError) -> ComputeError:
    """Translate an error of the cache's own folder: `no_space`, or `image_cache_unavailable`."""
    reason = exc.strerror or type(exc).__name__
    if exc.errno in {errno.ENOSPC, errno.EDQUOT}:
        return ResourceExhausted(f"the image cache is full ({reason})", code="no_space")
    return Unavailable(f"the image cache cannot be used ({reason})", code="image_cache_unavailable")
