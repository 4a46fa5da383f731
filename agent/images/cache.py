"""The host's image cache: who waits for which image, and what is here already.

Content-addressed, so one entry serves every URL that leads to the same bytes. Lives on the event loop and
belongs to one loop; files are touched in threads only. Nothing is evicted: an image may be the backing file
of an instance.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import structlog

from agent.drivers.base import PreparedImage
from agent.errors import ComputeError, Unavailable
from agent.images import entry
from agent.images.download import Download
from agent.images.policy import ImagePolicy, check_source, local_path
from agent.messages.spec import ImageSource

Progress = Callable[[int, int | None], None]
"""Takes the bytes so far and the total if known. Called on the loop, about once per MiB; must not block."""

_CANCEL_LIMIT_S = 15.0
_log = structlog.get_logger(__name__)


class ImageCache:
    """Prepares images for instances: one download per image, however many ask for it at once."""

    def __init__(self, directory: Path, policy: ImagePolicy) -> None:
        self._directory = directory
        self._policy = policy
        self._shared: dict[tuple[str, str], _Shared] = {}

    async def clean_partials(self) -> int:
        """Make the folder, remove the leftovers of a killed process, and return how many there were.

        Call it at start, before the first `prepare`. Idempotent. Raises `Unavailable`
        (`image_cache_unavailable`).
        """
        await asyncio.to_thread(entry.make_directory, self._directory)
        return await asyncio.to_thread(entry.remove_partials, self._directory)

    async def prepare(self, source: ImageSource, progress: Progress, *, boot_file: bool = False) -> PreparedImage:
        """Return the verified image for `source`, from the cache or by a download. Idempotent, cancel safe.

        The source must be allowed even if its bytes are cached. A download ends when the last of those who
        wait for it is cancelled. `progress` may go back to 0 when a failed attempt starts again.

        Raises `ImageRejected` (the command is wrong; a retry cannot help): `image_source_forbidden`,
        `image_source_denied`, `image_missing`, `image_too_large`, `image_checksum_mismatch`,
        `image_format_mismatch`, `image_unsafe`, `image_corrupt`. Raises, where a retry can help,
        `Unavailable` (`image_unavailable`, `image_stalled`, `image_truncated`, `image_cache_unavailable`),
        `DeadlineExceeded` (`image_timeout`), `ResourceExhausted` (`no_space`).
        """
        del boot_file  # looked at like any raw image
        await self._check(source)
        key = (source.sha256, source.format)
        while True:
            shared = self._shared.get(key)
            if shared is None:
                shared = self._shared[key] = self._start(source, key)
            try:
                image = await shared.follow(progress)
            except ComputeError:
                # Another URL or limit failed, not ours: each turn joins a download that is not the last one.
                if shared.source == source:
                    raise
                continue
            if shared.source == source:
                return image
            # Published under somebody else's limits: our own turn finds it in the cache and checks it against ours.

    async def _check(self, source: ImageSource) -> None:
        check_source(self._policy, source.url)
        if not source.url.startswith("file:"):
            return
        # A thread of its own: one that hangs on a dead mount must not take the loop's shared ones with it.
        executor = ThreadPoolExecutor(1, thread_name_prefix="image-check")
        resolving = executor.submit(local_path, self._policy, source.url)
        executor.shutdown(wait=False)
        try:
            async with asyncio.timeout(self._policy.connect_timeout_s):
                await asyncio.wrap_future(resolving)
        except TimeoutError as exc:
            raise Unavailable("the image's folder does not answer", code="image_stalled") from exc

    def _start(self, source: ImageSource, key: tuple[str, str]) -> _Shared:
        shared = _Shared(source)

        def ended(_task: asyncio.Task[PreparedImage]) -> None:
            if self._shared.get(key) is shared:
                del self._shared[key]

        def promised() -> int:
            return sum(other.remaining for other in self._shared.values() if other is not shared)

        download = Download(self._directory, source, self._policy, shared.report, promised)
        shared.run(download, ended)
        return shared


class _Shared:
    """A running download and those who wait for it. Its task never outlives the last waiter."""

    def __init__(self, source: ImageSource) -> None:
        self.source = source
        self._task: asyncio.Task[PreparedImage]
        self._ended: Callable[[asyncio.Task[PreparedImage]], None]
        self._waiters: dict[object, Progress] = {}
        self._state: tuple[int, int | None] | None = None

    @property
    def remaining(self) -> int:
        """Bytes still to be written, as far as the length is known."""
        done, total = self._state or (0, None)
        return max((total or 0) - done, 0)

    def run(self, download: Download, ended: Callable[[asyncio.Task[PreparedImage]], None]) -> None:
        self._ended = ended
        self._task = asyncio.create_task(download.run(), name=f"image {self.source.sha256[:16]}")
        self._task.add_done_callback(ended)

    def report(self, done: int, total: int | None) -> None:
        self._state = (done, total)
        for waiter in list(self._waiters):
            self._tell(waiter)

    async def follow(self, progress: Progress) -> PreparedImage:
        """Wait for the download's end, which its total limit bounds. Raises what the download raises."""
        waiter = object()
        self._waiters[waiter] = progress
        if self._state is not None:
            self._tell(waiter)
        try:
            await asyncio.wait({self._task})
        finally:
            del self._waiters[waiter]
            if not self._waiters and not self._task.done():
                await self._stop()
        if self._task.cancelled():
            raise Unavailable("the download was stopped with the agent", code="image_unavailable")
        return self._task.result()

    async def _stop(self) -> None:
        """Cancel the download and wait until its file is gone. Who asks from now on starts another."""
        self._task.cancel()
        self._ended(self._task)
        await asyncio.wait({self._task}, timeout=_CANCEL_LIMIT_S)

    def _tell(self, waiter: object) -> None:
        progress, state = self._waiters[waiter], self._state or (0, None)
        try:
            progress(*state)
        except Exception:
            # One waiter's defect must not end the download of the others.
            self._waiters[waiter] = lambda _done, _total: None
            _log.exception("image.progress_failed", sha256=self.source.sha256)
