"""One download: source → hash, unpacking, inspection and file → perhaps conversion → cache entry.

Runs on the event loop; blocking work is in two threads of its own, one that hashes and one that does the rest, one
chunk behind the network: hashing, unpacking and writing go on while the next chunk arrives. A download that breaks
off goes on where it broke where the source can do that. Knows nothing of who waits for it (see `shared`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, ParamSpec, TypeVar

from agent.drivers.base import PreparedImage
from agent.errors import DeadlineExceeded, ImageRejected, Unavailable
from agent.images import entry
from agent.images.convert import Conversion
from agent.images.fetch import open_source
from agent.images.partial import Partial
from agent.images.policy import MIB, ImagePolicy, public_url
from agent.images.stream import CHUNK, Resume, Stream
from agent.messages.spec import ImageSource

P = ParamSpec("P")
R = TypeVar("R")

ATTEMPTS = 3
"""In a row, without getting further in between."""
_RETRIED = frozenset({"image_unavailable", "image_stalled", "image_truncated"})
_CLEANUP_LIMIT_S = 10.0
_ROOM_STEP = 4 * MIB
"""Least space that is asked for at a time where nobody knows how much it will be."""

Report = Callable[[int, int | None], None]
Promised = Callable[[], int]
MakeRoom = Callable[[int], Awaitable[None]]
Stage = Literal["downloading", "converting"]


def _worth_another(exc: Exception) -> bool:
    return isinstance(exc, Unavailable) and exc.code in _RETRIED


class Download:
    """One look into the cache and, if the image is not there, one download. For one `run`.

    `report(done, total)` is called on the loop for every chunk, goes back to 0 when a conversion begins, and back
    where an attempt starts again. `promised()` gives the bytes that other downloads have still to write into the same
    folder. `make_room(needed)` makes the cache's quota admit so many bytes for this image, or raises.
    """

    def __init__(
        self,
        directory: Path,
        source: ImageSource,
        policy: ImagePolicy,
        *,
        report: Report,
        promised: Promised,
        make_room: MakeRoom,
        boot_file: bool = False,
    ) -> None:
        self.stage: Stage = "downloading"
        self._directory = directory
        self._source = source
        self._policy = policy
        self._report = report
        self._promised = promised
        self._make_room = make_room
        self._boot_file = boot_file
        self._room = 0
        self._validator: str | None = None
        self._resumed = False
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="image-write")
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="image-hash")

    async def run(self) -> PreparedImage:
        """Return the image, fetched if need be. Cancel safe: no partial file is left behind.

        A source that is away is asked up to `ATTEMPTS` times. Raises what `fetch.open_source`, `Partial`,
        `Conversion`, `entry` and `make_room` raise, and `DeadlineExceeded` (`image_timeout`).
        """
        limit = self._policy.total_timeout_s
        scope = asyncio.timeout(limit)
        try:
            async with scope:
                await self._thread(entry.make_directory, self._directory)
                # Looked for here and not by those who ask, so that nobody misses what was published just now.
                found = await self._thread(
                    entry.find, self._directory, self._source, self._policy, boot_file=self._boot_file
                )
                return found if found is not None else await self._fetch()
        except TimeoutError as exc:
            if not scope.expired():
                raise
            message = f"{public_url(self._source.url)} was not downloaded within {limit:g} s"
            raise DeadlineExceeded(message, code="image_timeout", total_timeout_s=limit) from exc
        finally:
            self._executor.shutdown(wait=False)
            self._hasher.shutdown(wait=False)

    async def _fetch(self) -> PreparedImage:
        # With the first download, to keep an idle agent small.
        await self._thread(__import__, "stamina")
        kind = entry.kind_of(self._source, boot_file=self._boot_file)
        partial = Partial(self._directory, self._source, self._policy, kind)
        try:
            await self._thread(partial.open)
            try:
                await self._receive(partial)
            except ImageRejected:
                if not self._resumed:
                    raise
                # Perhaps only joined of two different images: the source did not say that it had changed.
                self._validator = None
                await self._thread(partial.reset)
                await self._receive(partial)
            if kind == "qcow2" and self._source.format != "qcow2":
                await self._convert(partial)
                hashing = self._submit_hash(partial.hash_stored)
                await self._thread(partial.sync)
                await hashing
            else:
                await self._thread(partial.sync)
            return await self._thread(partial.commit)
        finally:
            # Queued behind whatever the thread still does with the file. A hanging disk must not hold the
            # loop's side up for ever; the thread removes the file when it gets there.
            removed = self._submit(partial.abort)
            await asyncio.wait({removed}, timeout=_CLEANUP_LIMIT_S)

    async def _receive(self, partial: Partial) -> None:
        """Fetch, in as many attempts as it takes while each gets further, and verify the whole."""
        import stamina  # noqa: PLC0415 - loaded by `_fetch`, off the loop

        while True:
            reached = partial.received

            def advanced(reached: int = reached) -> bool:
                return self._validator is not None and partial.received - reached >= CHUNK

            def again(exc: Exception, advanced: Callable[[], bool] = advanced) -> bool:
                return _worth_another(exc) and not advanced()

            try:
                async for attempt in stamina.retry_context(
                    on=again, attempts=ATTEMPTS, timeout=None, wait_initial=0.5, wait_max=5.0
                ):
                    with attempt:
                        await self._attempt(partial)
                await self._thread(partial.finish)
                return
            except Unavailable as exc:
                if not _worth_another(exc) or not advanced():
                    raise

    async def _attempt(self, partial: Partial) -> None:
        resume = Resume(partial.received, self._validator) if partial.received and self._validator else None
        async with open_source(self._source.url, self._policy, resume) as stream:
            if stream.offset != partial.received:
                await self._thread(partial.reset)
            self._resumed = stream.offset > 0
            self._validator = stream.validator
            limit = self._policy.max_bytes(self._source.max_size_mib)
            if stream.total is not None:
                entry.check_size(stream.total, limit)
                needed = stream.total - stream.offset
                await self._thread(entry.check_space, self._directory, needed, self._promised())
                if self._source.compression is None:
                    await self._need(stream.total)
            self._report(stream.offset, stream.total)
            await self._pump(stream, partial, limit)

    async def _pump(self, stream: Stream, partial: Partial, limit: int) -> None:
        done = stream.offset
        working: list[asyncio.Future[None]] = []
        try:
            while chunk := await stream.read():
                done += len(chunk)
                entry.check_size(done, limit)
                await _all(working)
                if partial.written + len(chunk) > self._room:
                    await self._need(partial.written + len(chunk) + max(_ROOM_STEP, partial.written // 8))
                working = [self._submit(partial.feed, chunk), self._submit_hash(partial.hash, chunk)]
                self._report(done, stream.total)
        except Unavailable:
            await _all(working)  # the next attempt goes on behind them
            raise
        await _all(working)

    async def _convert(self, partial: Partial) -> None:
        self.stage = "converting"
        loop, size = asyncio.get_running_loop(), partial.written
        await self._thread(entry.check_space, self._directory, size, self._promised())

        def report(share: float) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, the thread was left behind
                loop.call_soon_threadsafe(self._report, int(share * size), size)

        conversion = Conversion(self._policy, report)
        self._report(0, size)
        try:
            await self._thread(
                conversion.run, partial.path, self._source.format, partial.converted_path, partial.virtual_bytes
            )
        finally:
            conversion.cancel()
        await self._thread(partial.adopt)
        await self._need(partial.written)

    async def _need(self, needed: int) -> None:
        await self._make_room(needed)
        self._room = needed

    async def _thread(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        return await self._submit(call, *args, **kwargs)

    def _submit(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[R]:
        return _watched(self._executor, call, *args, **kwargs)

    def _submit_hash(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[R]:
        return _watched(self._hasher, call, *args, **kwargs)


async def _all(working: list[asyncio.Future[None]]) -> None:
    for future in working:
        await future


def _watched(
    executor: ThreadPoolExecutor, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs
) -> asyncio.Future[R]:
    future = asyncio.wrap_future(executor.submit(call, *args, **kwargs))
    future.add_done_callback(_retrieve)
    return future


def _retrieve(future: asyncio.Future[R]) -> None:
    """Mark the error as seen: after another failure nobody awaits the last write any more."""
    if not future.cancelled():
        future.exception()
