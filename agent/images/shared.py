"""A download under way and those who wait for it: one for all who ask for the same image at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from agent.drivers.base import PreparedImage
from agent.errors import Unavailable
from agent.images.download import Download
from agent.messages.spec import ImageSource

Progress = Callable[[int, int | None], None]
"""Takes the bytes so far and the total if known. Called on the loop, about once per MiB; must not block."""

_CANCEL_LIMIT_S = 15.0
_log = structlog.get_logger(__name__)


class Shared:
    """A running download. Its task never outlives the last waiter.

    `claim` is what the download takes of the cache's quota until its image is counted there.
    """

    def __init__(self, source: ImageSource) -> None:
        self.source = source
        self.claim = 0
        self.download: Download
        self._task: asyncio.Task[PreparedImage]
        self._ended: Callable[[asyncio.Task[PreparedImage]], None]
        self._waiters: dict[object, Progress] = {}
        self.progress: tuple[int, int | None] | None = None
        """Bytes done and total; None before anything is known."""

    @property
    def remaining(self) -> int:
        """Bytes still to be written, as far as the length is known."""
        done, total = self.progress or (0, None)
        return max((total or 0) - done, 0)

    def run(self, download: Download, ended: Callable[[asyncio.Task[PreparedImage]], None]) -> None:
        """Begin; `ended` is called when nobody can join any more."""
        self.download = download
        self._ended = ended
        self._task = asyncio.create_task(download.run(), name=f"image {self.source.sha256[:16]}")
        self._task.add_done_callback(ended)

    def report(self, done: int, total: int | None) -> None:
        """Tell all who wait how far it is."""
        self.progress = (done, total)
        for waiter in list(self._waiters):
            self._tell(waiter)

    async def follow(self, progress: Progress) -> PreparedImage:
        """Wait for the download's end, which its total limit bounds. Raises what the download raises."""
        waiter = object()
        self._waiters[waiter] = progress
        if self.progress is not None:
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
        progress, state = self._waiters[waiter], self.progress or (0, None)
        try:
            progress(*state)
        except Exception:
            # One waiter's defect must not end the download of the others.
            self._waiters[waiter] = lambda _done, _total: None
            _log.exception("image.progress_failed", sha256=self.source.sha256)
