"""Images from a local file, below the allowed roots only.

Files are opened and read in one worker thread per stream, so that a hanging network mount holds up neither
the event loop nor another download.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

from agent.errors import ComputeError, ImageRejected, Unavailable
from agent.images.policy import ImagePolicy, forbidden, local_path
from agent.images.stream import CHUNK, Resume, Stream, stalled, truncated


@asynccontextmanager
async def open_file(url: str, policy: ImagePolicy, resume: Resume | None = None) -> AsyncIterator[Stream]:
    """Open the file below one of the policy's roots. Errors as of `fetch.open_source`."""
    loop = asyncio.get_running_loop()
    executor = ThreadPoolExecutor(1, thread_name_prefix="image-read")
    source = _FileSource(url, policy, resume)
    done = 0

    async def read() -> bytes:
        nonlocal done
        try:
            async with asyncio.timeout(policy.stall_timeout_s):
                chunk = await loop.run_in_executor(executor, source.read)
        except TimeoutError as exc:
            raise stalled(url, policy.stall_timeout_s) from exc
        done += len(chunk)
        if not chunk and done != source.size:
            raise truncated(url, done, source.size)
        return chunk

    try:
        try:
            async with asyncio.timeout(policy.connect_timeout_s):
                await loop.run_in_executor(executor, source.open)
        except TimeoutError as exc:
            raise stalled(url, policy.connect_timeout_s) from exc
        done = source.offset
        yield Stream(source.size, read, source.offset, source.validator)
    finally:
        # Queued behind a read that may still hang: the thread closes the file when it comes back.
        executor.submit(source.close)
        executor.shutdown(wait=False)


class _FileSource:
    """A local image file; all methods run in the stream's thread."""

    def __init__(self, url: str, policy: ImagePolicy, resume: Resume | None) -> None:
        self.size = 0
        self.offset = 0
        self.validator = ""
        self._resume = resume
        self._url = url
        self._policy = policy
        self._path = Path()
        self._fd = -1

    def open(self) -> None:
        self._path = local_path(self._policy, self._url)
        try:
            self._fd = _open_without_symlinks(self._path)
            status = os.fstat(self._fd)
            self.validator = f"{status.st_dev}-{status.st_ino}-{status.st_size}-{status.st_mtime_ns}"
            if self._resume is not None and self._resume.validator == self.validator:
                self.offset = os.lseek(self._fd, self._resume.offset, os.SEEK_SET)
        except OSError as exc:
            raise _translate(self._path, exc) from exc
        if not stat.S_ISREG(status.st_mode):
            raise forbidden(f"{self._path} is not a regular file")
        self.size = status.st_size

    def read(self) -> bytes:
        try:
            return os.read(self._fd, CHUNK)
        except OSError as exc:
            raise _translate(self._path, exc) from exc

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _open_without_symlinks(path: Path) -> int:
    """Open a resolved path for reading, component by component.

    The check against the roots was of this very path; a symlink put in its way since then is not followed.
    O_NONBLOCK keeps a FIFO from hanging the open; regular files ignore it.
    """
    folder = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in path.parts[1:-1]:
            flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            below = os.open(part, flags, dir_fd=folder)
            os.close(folder)
            folder = below
        return os.open(path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    finally:
        os.close(folder)


def _translate(path: Path, exc: OSError) -> ComputeError:
    reason = exc.strerror or type(exc).__name__
    if exc.errno == errno.ENOENT:
        return ImageRejected(f"there is no image at {path}", code="image_missing")
    if exc.errno in {errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO}:
        return forbidden(f"{path} is not a regular file ({reason})")
    if exc.errno in {errno.EACCES, errno.EPERM}:
        return ImageRejected(f"the agent may not read {path} ({reason})", code="image_source_denied")
    return Unavailable(f"{path} cannot be read now ({reason})", code="image_unavailable")
