"""The unfinished file of one download: unpacked, inspected and written in one pass, perhaps converted, then renamed.

All methods but `hash` are blocking and run in the download's one worker thread, in the order of their submission;
that is why `abort` may follow a write that is still going on.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path

from agent.drivers.base import PreparedImage
from agent.errors import ImageRejected
from agent.images import qcow2
from agent.images.entry import (
    PARTIAL_PREFIX,
    CacheEntry,
    Kind,
    check_size,
    entry_path,
    image_path,
    prepared,
    storage_error,
)
from agent.images.inspect import HEAD_BYTES, Inspector
from agent.images.policy import RATIO_FREE_BYTES, ImagePolicy
from agent.images.unpack import Unpacker, unpacker
from agent.messages.spec import ImageSource
from agent.messages.types import ImageFormat

_BLOCK = 64 * 1024
_ZEROS = bytes(_BLOCK)
_READ = 4 * 1024 * 1024


class Partial:
    """One download. `open`, then `feed` and `hash` every chunk, `finish`, perhaps `adopt` what was made of the file,
    `commit`; `reset` begins again, `abort` ends it in any state.

    `received` is how many bytes of the source are in it, `written` how much disk space they take; both may be read on
    the loop when no call is under way.
    """

    def __init__(self, directory: Path, source: ImageSource, policy: ImagePolicy, kind: Kind) -> None:
        self.path = directory / f"{PARTIAL_PREFIX}{source.sha256[:16]}-{secrets.token_hex(8)}"
        self.received = 0
        self.written = 0
        self.virtual_bytes = 0
        self._directory = directory
        self._source = source
        self._policy = policy
        self._kind = kind
        self._fd = -1
        self._begin()

    def _begin(self) -> None:
        declared: ImageFormat | None = None if self._kind == "file" else self._source.format
        self.received = self.written = self._size = 0
        self._hash = hashlib.sha256()
        self._inspector = Inspector(declared, self._policy)
        self._unpacker: Unpacker | None = None
        self._stored_hash = hashlib.sha256() if self._source.compression else None

    @property
    def converted_path(self) -> Path:
        """Where a conversion is to write; beside the file."""
        return self.path.with_name(self.path.name + ".qcow2")

    def open(self) -> None:
        """Create the file, readable by the agent alone. Raises as `storage_error` says."""
        self._fd = _create(self.path)

    def reset(self) -> None:
        """Forget all that was fed. Raises as `open`."""
        self._begin()
        try:
            os.ftruncate(self._fd, 0)
            os.lseek(self._fd, 0, os.SEEK_SET)
        except OSError as exc:
            raise storage_error(exc) from exc

    def hash(self, chunk: bytes | bytearray) -> None:
        """Hash the next bytes. May run beside `feed`, in a thread of its own."""
        self._hash.update(chunk)

    def feed(self, chunk: bytes | bytearray) -> None:
        """Unpack, inspect and write the next bytes.

        Raises the unpacker's and the inspector's refusals, `image_too_large`, and `storage_error`s.
        """
        self.received += len(chunk)
        if self._source.compression is None:
            self._take(chunk)
            return
        if self._unpacker is None:
            self._unpacker = unpacker(self._source.compression, self._take_unpacked)
        self._unpacker.feed(chunk)

    def finish(self) -> None:
        """Verify the whole. Raises `ImageRejected` with `image_checksum_mismatch`, and what `feed` raises."""
        digest = self._hash.hexdigest()
        if digest != self._source.sha256:
            raise ImageRejected(
                f"the image's sha256 is {digest}, not {self._source.sha256}",
                code="image_checksum_mismatch",
                expected=self._source.sha256,
                found=digest,
            )
        if self._unpacker is not None:
            self._unpacker.finish()
        try:
            os.ftruncate(self._fd, self._size)  # it may end with a hole
            self.virtual_bytes = self._inspector.finish(self._fd, self._size)
        except OSError as exc:
            raise storage_error(exc) from exc

    def adopt(self) -> None:
        """Take the converted file in place of what was downloaded. Raises `ImageRejected` (`image_corrupt`)."""
        try:
            fd = os.open(self.converted_path, os.O_RDWR | os.O_CLOEXEC)
            os.close(self._fd)
            self._fd = fd
            self.converted_path.rename(self.path)
            status = os.fstat(fd)
            self._size, self.written = status.st_size, status.st_blocks * 512
            header = qcow2.parse_header(os.pread(fd, HEAD_BYTES, 0))
            qcow2.check_tables(header, fd, self._size)
        except OSError as exc:
            raise storage_error(exc) from exc
        if header.virtual_size_bytes != self.virtual_bytes:
            raise qcow2.corrupt(
                f"qemu-img found a virtual size of {header.virtual_size_bytes} bytes in it, not {self.virtual_bytes}"
            )

    def hash_stored(self) -> None:
        """Hash the file as it is now, for a later check of the cache. May run beside `sync`, in a thread of its own."""
        digest, place = hashlib.sha256(), 0
        try:
            while data := os.pread(self._fd, _READ, place):
                digest.update(data)
                place += len(data)
        except OSError as exc:
            raise storage_error(exc) from exc
        self._stored_hash = digest

    def sync(self) -> None:
        """Make the file's bytes durable. Raises `storage_error`s."""
        try:
            os.fchmod(self._fd, 0o444)
            os.fsync(self._fd)
        except OSError as exc:
            raise storage_error(exc) from exc

    def commit(self) -> PreparedImage:
        """Give the finished, synced file its final name; idempotence is the rename's. Raises `storage_error`s."""
        source = self._source
        entry = CacheEntry(
            sha256=source.sha256,
            format="qcow2" if self._kind == "qcow2" else "raw",
            size_bytes=self._size,
            virtual_size_bytes=self.virtual_bytes,
            source_format=source.format,
            compression=source.compression,
            stored_sha256=None if self._stored_hash is None else self._stored_hash.hexdigest(),
            download_bytes=self.received,
        )
        image = image_path(self._directory, source.sha256, self._kind)
        try:
            self._publish(entry, image)
        except OSError as exc:
            raise storage_error(exc) from exc
        return prepared(image, entry)

    def abort(self) -> None:
        """Close and remove the files. Does nothing after `commit` but close. Idempotent; raises nothing."""
        try:
            if self._fd >= 0:
                fd, self._fd = self._fd, -1
                os.close(fd)
        finally:
            self.path.unlink(missing_ok=True)
            self.converted_path.unlink(missing_ok=True)

    # --- inside -----------------------------------------------------------------------------------------------

    def _take_unpacked(self, piece: bytes) -> None:
        size, policy = self._size + len(piece), self._policy
        check_size(size, policy.max_unpacked_bytes)
        if size > RATIO_FREE_BYTES and size > self.received * policy.max_ratio:
            raise ImageRejected(
                f"the image decompresses to more than {policy.max_ratio} times its size, above the host's limit",
                code="image_too_large",
                size_bytes=size,
                limit_ratio=policy.max_ratio,
            )
        if self._stored_hash is not None:
            self._stored_hash.update(piece)
        self._take(piece)

    def _take(self, piece: bytes | bytearray) -> None:
        self._inspector.feed(piece)
        self._size += len(piece)
        try:
            self._write(piece)
        except OSError as exc:
            raise storage_error(exc) from exc

    def _write(self, piece: bytes | bytearray) -> None:
        """Write what is not zeros: an empty part of a disk takes no space."""
        view, begun = memoryview(piece), 0
        for start in range(0, len(piece) - _BLOCK + 1, _BLOCK):
            if not piece.startswith(_ZEROS, start):
                continue
            self._write_run(view[begun:start])
            os.lseek(self._fd, _BLOCK, os.SEEK_CUR)
            begun = start + _BLOCK
        self._write_run(view[begun:])

    def _write_run(self, run: memoryview) -> None:
        if run:
            write_all(self._fd, run)
            self.written += len(run)

    def _publish(self, entry: CacheEntry, image: Path) -> None:
        """Bring image and description under their final names, the image last, and flush the folder."""
        self._write_entry(entry, entry_path(image))
        self.path.rename(image)
        folder = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _write_entry(self, entry: CacheEntry, path: Path) -> None:
        temporary = self.path.with_name(self.path.name + ".json")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            write_all(fd, entry.model_dump_json(exclude_none=True).encode())
            os.fchmod(fd, 0o444)
            os.fsync(fd)
            temporary.rename(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)


def _create(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise storage_error(exc) from exc


def write_all(fd: int, data: bytes | bytearray | memoryview) -> None:
    """Write every byte: a write near the end of a full disk may be short before the next one fails."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]
