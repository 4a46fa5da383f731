"""The host's image cache: who waits for which image, what is here already, and what may go.

Content-addressed, so one entry serves every URL that leads to the same bytes. Lives on the event loop and
belongs to one loop; files are touched in threads only. An image goes only when nobody uses it: an image may be the
backing file of an instance. While that is not known, none goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import structlog

from agent.drivers.base import PreparedImage
from agent.errors import ComputeError, FailedPrecondition, NotFound, ResourceExhausted, Unavailable
from agent.images import entry, signature
from agent.images.download import Download
from agent.images.entry import Stored
from agent.images.policy import MIB, ImagePolicy, check_source, local_path, trusted_key
from agent.images.shared import Progress, Shared
from agent.images.users import Users, WhoUses
from agent.messages.spec import ImageSource

__all__ = ["CachedImage", "ImageCache", "Progress"]

State = Literal["ready", "damaged", "downloading", "converting"]
Key = tuple[str, str, str | None, bool]
_READ = 4 * MIB
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class CachedImage:
    """One image in the cache, or on its way there (`downloading`, `converting`).

    `size_bytes` is of the file, or what has come so far; `disk_bytes` the space it takes; `last_used` seconds since
    1970. `damaged`: the file is not as it was published; the next use fetches it again.
    """

    sha256: str
    kind: str
    state: State
    size_bytes: int
    disk_bytes: int
    virtual_size_bytes: int | None
    last_used: float
    users: Users


class ImageCache:
    """Prepares images for instances, one download per image however many ask for it at once, and keeps house.

    `who_uses` is set by the composition root.
    """

    def __init__(self, directory: Path, policy: ImagePolicy) -> None:
        self._directory = directory
        self._policy = policy
        self._shared: dict[Key, Shared] = {}
        self._removals: dict[str, asyncio.Task[int]] = {}
        self._making_room = asyncio.Lock()
        self.who_uses: WhoUses = lambda: None

    @property
    def limit_bytes(self) -> int | None:
        """The quota of the cache, or None."""
        return None if self._policy.max_cache_mib is None else self._policy.max_cache_mib * MIB

    async def clean_partials(self) -> int:
        """Make the folder, remove the leftovers of a killed process, and return how many there were.

        Call it at start, before the first `prepare`. Idempotent. Raises `Unavailable`
        (`image_cache_unavailable`).
        """
        await asyncio.to_thread(entry.make_directory, self._directory)
        return await asyncio.to_thread(entry.remove_partials, self._directory)

    async def prepare(
        self, source: ImageSource, progress: Progress, *, boot_file: bool = False, ours: bool = False
    ) -> PreparedImage:
        """Return the verified image for `source`, from the cache or by a download. Idempotent, cancel safe.

        The source must be allowed, and its signature good, even if its bytes are cached. A download ends when the last
        of those who wait for it is cancelled. `progress` may go back: when a conversion begins, or an attempt starts
        again. `boot_file`: a kernel or ramdisk, whose content is not looked at (`format` is `raw`). `ours`: this
        agent made it and kept its sha256, which stands for a signature.

        The image stays while an instance or an unfinished operation mentions its sha256.

        Raises `ImageRejected` (the command is wrong; a retry cannot help): `image_source_forbidden`,
        `image_source_denied`, `image_unsigned`, `image_key_unknown`, `image_signature_invalid`, `image_missing`,
        `image_too_large`, `image_checksum_mismatch`, `image_format_mismatch`, `image_unsafe`, `image_corrupt`. Raises,
        where a retry can help, `Unavailable` (`image_unavailable`, `image_stalled`, `image_truncated`,
        `image_cache_unavailable`), `DeadlineExceeded` (`image_timeout`), `ResourceExhausted` (`no_space`,
        `image_cache_full`). Conversions: also `Unsupported` (`qemu_img_missing`), `Internal` (`qemu_img_failed`).
        """
        await self._check(source, ours=ours)
        key = (source.sha256, source.format, source.compression, boot_file)
        while True:
            while (removal := self._removals.get(source.sha256)) is not None:
                await asyncio.wait({removal})
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

    async def images(self) -> list[CachedImage]:
        """List what is in the cache and on its way there, by sha256. Raises as `clean_partials`."""
        stored = await asyncio.to_thread(entry.scan, self._directory)
        used = self.who_uses() or {}
        found = [_described(image, used.get(image.sha256, Users())) for image in stored]
        found += [
            _under_way(shared, used.get(shared.source.sha256, Users()))
            for shared in self._shared.values()
            if shared.progress is not None
        ]
        return sorted(found, key=lambda image: (image.sha256, image.kind))

    async def find(self, sha256: str) -> list[CachedImage]:
        """Return what the cache has of these bytes. Raises `NotFound` (`unknown_image`)."""
        found = [image for image in await self.images() if image.sha256 == sha256]
        if not found:
            raise NotFound(f"the cache holds no image {sha256}", code="unknown_image", sha256=sha256)
        return found

    def check_unused(self, sha256: str) -> None:
        """Refuse if anybody may use the image.

        Raises `FailedPrecondition` (`image_in_use`), `Unavailable` (`instances_unknown`).
        """
        used = self.who_uses()
        if used is None:
            raise Unavailable(
                "which images are in use is not known until the hypervisor has been asked", code="instances_unknown"
            )
        users = used.get(sha256, Users())
        if users.instances:
            raise FailedPrecondition(
                f"{len(users.instances)} instances use the image, one of them {min(users.instances)}",
                code="image_in_use",
                instances=len(users.instances),
            )
        if users.operations or any(key[0] == sha256 for key in self._shared):
            raise FailedPrecondition("an operation under way uses the image", code="image_in_use", instances=0)

    async def remove(self, sha256: str) -> int:
        """Remove the image and return the bytes that it took; 0 where it is not there. Idempotent.

        Raises what `check_unused` raises, and as `clean_partials`.
        """
        while (removal := self._removals.get(sha256)) is not None:
            await asyncio.wait({removal})
        self.check_unused(sha256)
        # From the check to here nothing else ran on the loop, and from here on `prepare` waits.
        paths = [entry.image_path(self._directory, sha256, kind) for kind in entry.KINDS]
        removal = asyncio.create_task(asyncio.to_thread(entry.discard, paths), name=f"image removal {sha256[:16]}")
        self._removals[sha256] = removal
        removal.add_done_callback(lambda _done: self._removals.pop(sha256, None))
        return await asyncio.shield(removal)

    async def verify(self, sha256: str, progress: Progress) -> bool:
        """Read the image's bytes again, and tell whether they are those that were published.

        A damaged image is marked: it counts as absent from then on, and the next use fetches it again. Raises
        `NotFound` (`unknown_image`), and as `clean_partials`.
        """
        stored = [image for image in await asyncio.to_thread(entry.scan, self._directory) if image.sha256 == sha256]
        if not stored:
            raise NotFound(f"the cache holds no image {sha256}", code="unknown_image", sha256=sha256)
        loop, total = asyncio.get_running_loop(), sum(image.size_bytes for image in stored)
        stopped: list[bool] = []
        done = 0

        def report(count: int) -> None:
            nonlocal done
            done += count
            progress(done, total)

        def told(count: int) -> bool:
            with contextlib.suppress(RuntimeError):  # the loop is closed, the thread was left behind
                loop.call_soon_threadsafe(report, count)
            return not stopped

        try:
            checks = [await asyncio.to_thread(_is_intact, image, told) for image in stored]
        finally:
            stopped.append(True)
        for image, intact in zip(stored, checks, strict=True):
            if not intact:
                _log.error("image.damaged", sha256=sha256, path=str(image.path))
        return all(checks)

    async def tidy(self) -> list[str]:
        """Remove what nobody has used for long or what is damaged, and bring the cache below its quota.

        Returns the sha256 of each image that is damaged and in use. Does nothing while it is not known what is used.
        Raises as `clean_partials`.
        """
        used = self.who_uses()
        if used is None:
            return []
        stored = await asyncio.to_thread(entry.scan, self._directory)
        needed = [image for image in stored if image.sha256 in used]
        await asyncio.to_thread(_touch, needed)
        now = time.time()
        for image in stored:
            if image.entry is None or now - image.last_used > self._policy.keep_unused_s:
                await self._let_go(image, "damaged" if image.entry is None else "unused")
        with contextlib.suppress(ResourceExhausted):  # what is in use may exceed a quota that was lowered
            await self._make_room(None, 0)
        return sorted({image.sha256 for image in needed if image.entry is None})

    # --- inside -----------------------------------------------------------------------------------------------

    async def _check(self, source: ImageSource, *, ours: bool) -> None:
        check_source(self._policy, source.url)
        key = None if ours else trusted_key(self._policy, source.signature)
        if key is not None and source.signature is not None:
            await asyncio.to_thread(signature.verify, key, source.signature.ed25519, source.sha256)
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

    def _start(self, source: ImageSource, key: Key) -> Shared:
        shared = Shared(source)

        def ended(_task: asyncio.Task[PreparedImage]) -> None:
            if self._shared.get(key) is shared:
                del self._shared[key]

        def promised() -> int:
            return sum(other.remaining for other in self._shared.values() if other is not shared)

        async def make_room(needed: int) -> None:
            await self._make_room(shared, needed)

        download = Download(
            self._directory,
            source,
            self._policy,
            report=shared.report,
            promised=promised,
            make_room=make_room,
            boot_file=key[-1],
        )
        shared.run(download, ended)
        return shared

    async def _make_room(self, shared: Shared | None, needed: int) -> None:
        """Let unused images go, the least recently used first, until `needed` bytes fit. Raises `ResourceExhausted`."""
        quota = self.limit_bytes
        if quota is None:
            return
        async with self._making_room:
            stored = await asyncio.to_thread(entry.scan, self._directory)
            present = {image.sha256 for image in stored}  # published just now: it is counted already
            claims = sum(
                other.claim for key, other in self._shared.items() if other is not shared and key[0] not in present
            )
            short = sum(image.disk_bytes for image in stored) + claims + needed - quota
            for image in sorted(stored, key=lambda image: image.last_used):
                if short <= 0:
                    break
                if await self._let_go(image, "quota"):
                    short -= image.disk_bytes
            if short > 0:
                raise ResourceExhausted(
                    f"the image cache is full: {short} bytes are short of the {needed} that the image needs, and all"
                    f" other images are in use; see images.max_cache_mib ({self._policy.max_cache_mib})",
                    code="image_cache_full",
                    needed_bytes=needed,
                    short_bytes=short,
                    limit_bytes=quota,
                )
            if shared is not None:
                shared.claim = needed

    async def _let_go(self, image: Stored, why: str) -> bool:
        try:
            await self.remove(image.sha256)
        except (FailedPrecondition, Unavailable):
            return False
        _log.info("image.removed", sha256=image.sha256, why=why, disk_bytes=image.disk_bytes)
        return True


def _described(image: Stored, users: Users) -> CachedImage:
    return CachedImage(
        sha256=image.sha256,
        kind=image.kind,
        state="damaged" if image.entry is None else "ready",
        size_bytes=image.size_bytes,
        disk_bytes=image.disk_bytes,
        virtual_size_bytes=None if image.entry is None else image.entry.virtual_size_bytes,
        last_used=image.last_used,
        users=users,
    )


def _under_way(shared: Shared, users: Users) -> CachedImage:
    done, _total = shared.progress or (0, None)
    return CachedImage(
        sha256=shared.source.sha256,
        kind="raw" if shared.source.format == "raw" else "qcow2",
        state=shared.download.stage,
        size_bytes=done,
        disk_bytes=shared.claim,
        virtual_size_bytes=None,
        last_used=time.time(),
        users=users,
    )


def _touch(images: Iterable[Stored]) -> None:
    for image in images:
        entry.touch(image.path)


def _is_intact(image: Stored, told: Callable[[int], bool]) -> bool:
    """Hash one image; mark it where it is damaged. Ends when `told` gives False."""
    if image.entry is None:
        return False
    digest = hashlib.sha256()
    try:
        with image.path.open("rb", buffering=0) as file:
            while data := file.read(_READ):
                digest.update(data)
                if not told(len(data)):
                    return True
    except FileNotFoundError:
        return True  # removed meanwhile: nothing is damaged
    except OSError as exc:
        raise entry.storage_error(exc) from exc
    if digest.hexdigest() == (image.entry.stored_sha256 or image.sha256):
        return True
    entry.entry_path(image.path).unlink(missing_ok=True)
    return False
