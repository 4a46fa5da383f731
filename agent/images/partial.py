"""The unfinished file of one download: written, hashed and inspected in one pass, then renamed.

All methods are blocking and run in the download's one worker thread, in the order of their submission; that
is why `abort` may follow a write that is still going on.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path

from agent.drivers.base import PreparedImage
from agent.errors import ImageRejected
from agent.images.entry import PARTIAL_PREFIX, CacheEntry, entry_path, image_path, storage_error
from agent.images.inspect import Inspector
from agent.images.policy import ImagePolicy
from agent.messages.spec import ImageSource


class Partial:
    """One attempt at a download. `open`, `feed` every chunk, then `commit`; `abort` in any state."""

    def __init__(self, directory: Path, source: ImageSource, policy: ImagePolicy) -> None:
        self._directory = directory
        self._source = source
        self._path = directory / f"{PARTIAL_PREFIX}{source.sha256[:16]}-{secrets.token_hex(8)}"
        self._fd = -1
        self._size = 0
        self._hash = hashlib.sha256()
        self._inspector = Inspector(source.format, policy)

    def open(self) -> None:
        """Create the file, readable by the agent alone. Raises as `storage_error` says."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            self._fd = os.open(self._path, flags, 0o600)
        except OSError as exc:
            raise storage_error(exc) from exc

    def feed(self, chunk: bytes | bytearray) -> None:
        """Inspect, hash and write the next bytes. Raises the inspector's refusals and `storage_error`s."""
        self._inspector.feed(chunk)
        self._hash.update(chunk)
        self._size += len(chunk)
        try:
            write_all(self._fd, chunk)
        except OSError as exc:
            raise storage_error(exc) from exc

    def commit(self) -> PreparedImage:
        """Verify the whole, make it durable, and give it its final name; idempotence is the rename's.

        Raises `ImageRejected` with `image_checksum_mismatch`, the inspector's refusals, `storage_error`s.
        """
        digest = self._hash.hexdigest()
        if digest != self._source.sha256:
            raise ImageRejected(
                f"the image's sha256 is {digest}, not {self._source.sha256}",
                code="image_checksum_mismatch",
                expected=self._source.sha256,
                found=digest,
            )
        try:
            entry = CacheEntry(
                sha256=digest,
                format=self._source.format,
                size_bytes=self._size,
                virtual_size_bytes=self._inspector.finish(self._fd, self._size),
            )
            image = self._publish(entry)
        except OSError as exc:
            raise storage_error(exc) from exc
        return PreparedImage(
            path=image, format=entry.format, virtual_size_bytes=entry.virtual_size_bytes, sha256=entry.sha256
        )

    def abort(self) -> None:
        """Close and remove the file. Does nothing after `commit` but close. Idempotent; raises nothing."""
        try:
            if self._fd >= 0:
                fd, self._fd = self._fd, -1
                os.close(fd)
        finally:
            self._path.unlink(missing_ok=True)

    def _publish(self, entry: CacheEntry) -> Path:
        """Bring image and description under their final names, the image last, and flush the folder."""
        image = image_path(self._directory, entry.sha256, entry.format)
        os.fchmod(self._fd, 0o444)
        os.fsync(self._fd)
        self._write_entry(entry, entry_path(image))
        self._path.rename(image)
        folder = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return image

    def _write_entry(self, entry: CacheEntry, path: Path) -> None:
        temporary = self._path.with_name(self._path.name + ".json")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            write_all(fd, entry.model_dump_json().encode())
            os.fchmod(fd, 0o444)
            os.fsync(fd)
            temporary.rename(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)


def write_all(fd: int, data: bytes | bytearray) -> None:
    """Write every byte: a write near the end of a full disk may be short before the next one fails."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]
