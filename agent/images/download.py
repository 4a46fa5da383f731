"""One download: source → hash, inspection and file → cache entry, with attempts and limits.

Runs on the event loop; all blocking work is in one worker thread of its own, one chunk behind the network, so
that hashing and writing go on while the next chunk arrives. Knows nothing of who waits for it (see `cache`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

from agent.drivers.base import PreparedImage
from agent.errors import DeadlineExceeded, Unavailable
from agent.images import entry
from agent.images.fetch import open_source
from agent.images.partial import Partial
from agent.images.policy import ImagePolicy, public_url
from agent.images.stream import Stream
from agent.messages.spec import ImageSource

P = ParamSpec("P")
R = TypeVar("R")

ATTEMPTS = 3
_RETRIED = frozenset({"image_unavailable", "image_stalled", "image_truncated"})
_CLEANUP_LIMIT_S = 10.0

Report = Callable[[int, int | None], None]
Promised = Callable[[], int]


def _worth_another(exc: Exception) -> bool:
    return isinstance(exc, Unavailable) and exc.code in _RETRIED


class Download:
    """One look into the cache and, if the image is not there, one download. For one `run`.

    `report(done, total)` is called on the loop for every chunk and goes back to 0 when an attempt starts
    again. `promised()` gives the bytes that other downloads have still to write into the same folder.
    """

    def __init__(
        self, directory: Path, source: ImageSource, policy: ImagePolicy, report: Report, promised: Promised
    ) -> None:
        self._directory = directory
        self._source = source
        self._policy = policy
        self._report = report
        self._promised = promised
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="image-write")

    async def run(self) -> PreparedImage:
        """Return the image, fetched if need be. Cancel safe: no partial file is left behind.

        A source that is away is asked up to `ATTEMPTS` times, each from the first byte. Raises what
        `fetch.open_source`, `Partial` and `entry` raise, and `DeadlineExceeded` (`image_timeout`).
        """
        limit = self._policy.total_timeout_s
        scope = asyncio.timeout(limit)
        try:
            async with scope:
                await self._thread(entry.make_directory, self._directory)
                # Looked for here and not by those who ask, so that nobody misses what was published just now.
                found = await self._thread(entry.find, self._directory, self._source, self._policy)
                if found is not None:
                    return found
                # With the first download, to keep an idle agent small.
                await self._thread(__import__, "stamina")
                import stamina  # noqa: PLC0415 - loaded above, off the loop

                async for attempt in stamina.retry_context(
                    on=_worth_another, attempts=ATTEMPTS, timeout=None, wait_initial=0.5, wait_max=5.0
                ):
                    with attempt:
                        return await self._attempt()
        except TimeoutError as exc:
            if not scope.expired():
                raise
            message = f"{public_url(self._source.url)} was not downloaded within {limit:g} s"
            raise DeadlineExceeded(message, code="image_timeout", total_timeout_s=limit) from exc
        finally:
            self._executor.shutdown(wait=False)
        raise AssertionError("stamina ended without a result or an error")

    async def _attempt(self) -> PreparedImage:
        partial = Partial(self._directory, self._source, self._policy)
        try:
            async with open_source(self._source.url, self._policy) as stream:
                limit = self._policy.max_bytes(self._source.max_size_mib)
                if stream.total is not None:
                    entry.check_size(stream.total, limit)
                    await self._thread(entry.check_space, self._directory, stream.total, self._promised())
                self._report(0, stream.total)
                await self._thread(partial.open)
                await self._pump(stream, partial, limit)
            return await self._thread(partial.commit)
        finally:
            # Queued behind whatever the thread still does with the file. A hanging disk must not hold the
            # loop's side up for ever; the thread removes the file when it gets there.
            removed = self._submit(partial.abort)
            await asyncio.wait({removed}, timeout=_CLEANUP_LIMIT_S)

    async def _pump(self, stream: Stream, partial: Partial, limit: int) -> None:
        done = 0
        writing: asyncio.Future[None] | None = None
        while chunk := await stream.read():
            done += len(chunk)
            entry.check_size(done, limit)
            if writing is not None:
                await writing
            writing = self._submit(partial.feed, chunk)
            self._report(done, stream.total)
        if writing is not None:
            await writing

    async def _thread(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        return await self._submit(call, *args, **kwargs)

    def _submit(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[R]:
        future = asyncio.wrap_future(self._executor.submit(call, *args, **kwargs))
        future.add_done_callback(_retrieve)
        return future


def _retrieve(future: asyncio.Future[R]) -> None:
    """Mark the error as seen: after another failure nobody awaits the last write any more."""
    if not future.cancelled():
        future.exception()
