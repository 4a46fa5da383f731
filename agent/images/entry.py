"""What a finished image looks like in the cache folder, and how it is found again.

An entry is two files: `<sha256>.<kind>` and beside it `<sha256>.<kind>.json`, where the sha256 is of the bytes at
the source and the kind is what they became: `qcow2`, `raw`, or `file` for what is no disk image. The second is
written first, so that an image under its final name always has its description; its time of change is when the image
was last used. All functions do file I/O: run them in a thread.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from agent.drivers.base import PreparedImage
from agent.errors import ComputeError, ImageRejected, ResourceExhausted, Unavailable
from agent.images.inspect import check_virtual_size
from agent.images.policy import ImagePolicy
from agent.messages.spec import ImageSource
from agent.messages.types import DiskFormat, ImageFormat, Sha256

Kind = Literal["qcow2", "raw", "file"]
PARTIAL_PREFIX = ".partial-"
KINDS: tuple[Kind, ...] = get_args(Kind)
_NAME = re.compile(r"([0-9a-f]{64})\.(qcow2|raw|file)", re.ASCII)


class CacheEntry(BaseModel):
    """The description beside a cached image.

    `source_format` and `compression` are what the source was declared, and found, to be; None: the same as `format`,
    and not compressed. `stored_sha256` is of the file in the cache, `download_bytes` the length at the source; None:
    `sha256`, `size_bytes`.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    sha256: Sha256
    format: DiskFormat
    size_bytes: int
    virtual_size_bytes: int
    source_format: ImageFormat | None = None
    compression: Literal["gzip", "xz", "zstd"] | None = None
    stored_sha256: Sha256 | None = None
    download_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Stored:
    """One image in the cache folder. `entry` is None where the image is damaged: without a description that fits.

    `disk_bytes` is the space it takes, `last_used` seconds since 1970.
    """

    path: Path
    sha256: str
    kind: Kind
    entry: CacheEntry | None
    size_bytes: int
    disk_bytes: int
    last_used: float


def kind_of(source: ImageSource, *, boot_file: bool) -> Kind:
    """Return what a source becomes in the cache."""
    if boot_file:
        return "file"
    return "raw" if source.format == "raw" else "qcow2"


def image_path(directory: Path, sha256: str, kind: Kind) -> Path:
    """Return where the image is, or would be."""
    return directory / f"{sha256}.{kind}"


def entry_path(image: Path) -> Path:
    """Return where the description of `image` is, or would be."""
    return image.with_name(image.name + ".json")


def load(directory: Path, sha256: str, kind: Kind) -> CacheEntry | None:
    """Return the entry if its image is there with the recorded size, else None.

    A damaged entry counts as absent: the next download replaces it in one rename. It is not removed here,
    because a running guest may have it open. Raises `Unavailable` if the folder cannot be read.
    """
    stored = look(image_path(directory, sha256, kind))
    return stored.entry if stored is not None else None


def look(image: Path) -> Stored | None:
    """Look at one file of the cache; None where it is not there or its name is no image's. Raises as `load`."""
    name = _NAME.fullmatch(image.name)
    if name is None:
        return None
    entry: CacheEntry | None = None
    try:
        status = image.lstat()
        used = status.st_mtime
        try:
            description = entry_path(image)
            used = description.stat().st_mtime
            entry = CacheEntry.model_validate_json(description.read_bytes())
        except (FileNotFoundError, ValidationError):
            pass
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise storage_error(exc) from exc
    kind = next(kind for kind in KINDS if kind == name[2])
    wanted = (name[1], "raw" if kind == "file" else kind, status.st_size)
    if entry is not None and (entry.sha256, entry.format, entry.size_bytes) != wanted:
        entry = None
    if not stat.S_ISREG(status.st_mode):
        entry = None
    return Stored(image, name[1], kind, entry, status.st_size, status.st_blocks * 512, used)


def scan(directory: Path) -> list[Stored]:
    """Look at every image in the cache, by name. Raises as `load`."""
    try:
        paths = sorted(directory.iterdir())
    except FileNotFoundError:
        return []
    except OSError as exc:
        raise storage_error(exc) from exc
    return [stored for path in paths if (stored := look(path)) is not None]


def find(directory: Path, source: ImageSource, policy: ImagePolicy, *, boot_file: bool = False) -> PreparedImage | None:
    """Return the cached image for `source`, or None. Today's limits hold for yesterday's images as well.

    Raises `ImageRejected`: `image_format_mismatch` if these bytes are cached as something else, `image_too_large`.
    """
    kind = kind_of(source, boot_file=boot_file)
    beside: tuple[Kind, ...] = ("file",) if boot_file else ("qcow2", "raw")
    for other in beside:
        entry = load(directory, source.sha256, other)
        if entry is None:
            continue
        found = (entry.source_format or entry.format, entry.compression)
        if found != (source.format, source.compression):
            raise _mismatch(source, *found)
    entry = load(directory, source.sha256, kind)
    if entry is None:
        return None
    check_size(entry.download_bytes or entry.size_bytes, policy.max_bytes(source.max_size_mib))
    check_virtual_size(entry.virtual_size_bytes, policy)
    image = image_path(directory, source.sha256, kind)
    touch(image)
    return prepared(image, entry)


def prepared(image: Path, entry: CacheEntry) -> PreparedImage:
    """Return an entry as the agent uses it."""
    return PreparedImage(
        path=image, format=entry.format, virtual_size_bytes=entry.virtual_size_bytes, sha256=entry.sha256
    )


def touch(image: Path) -> None:
    """Note that the image is used now. That it cannot be noted is no reason not to use it."""
    with contextlib.suppress(OSError):
        os.utime(entry_path(image))


def discard(images: Sequence[Path]) -> int:
    """Remove images with their descriptions, and return the bytes that they took. What is not there is removed.

    The description goes last: an image without one counts as damaged, a description without image is removed at
    the next start. Raises as `load`.
    """
    freed = 0
    for image in images:
        try:
            with contextlib.suppress(FileNotFoundError):
                freed += image.lstat().st_blocks * 512
                image.unlink()
            entry_path(image).unlink(missing_ok=True)
        except OSError as exc:
            raise storage_error(exc) from exc
    return freed


def _mismatch(source: ImageSource, found: str, compression: str | None) -> ImageRejected:
    def words(name: str, packed: str | None) -> str:
        return f"{name} in {packed}" if packed else name

    declared = words(source.format, source.compression)
    return ImageRejected(
        f"the image is declared as {declared}, but these very bytes are {words(found, compression)}",
        code="image_format_mismatch",
        declared=declared,
        found=words(found, compression),
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
