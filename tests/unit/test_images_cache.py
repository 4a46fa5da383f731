"""The cache: hits, sharing of one download, cancellation, failures, and what each of them leaves in the folder."""

import asyncio
import errno
import gzip
import hashlib
import json
import os
import stat
import threading
from contextlib import asynccontextmanager

import pytest
import stamina
from blockbuster import blockbuster_ctx

from agent.errors import DeadlineExceeded, ImageRejected, ResourceExhausted, Unavailable
from agent.images import download
from agent.images import entry as entry_module
from agent.images.cache import ImageCache
from agent.images.policy import ImagePolicy
from agent.images.stream import Stream
from agent.messages.spec import ImageSource

MIB = 2**20
DATA = bytes(range(256)) * 10_000
SHA = hashlib.sha256(DATA).hexdigest()


@pytest.fixture(autouse=True)
def no_backoff():
    with stamina.set_testing(True, attempts=3):
        yield


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "state" / "images"


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "sources" / "a.raw"
    path.parent.mkdir()
    path.write_bytes(DATA)
    return path


@pytest.fixture
def cache(folder, image):
    return ImageCache(folder, ImagePolicy(file_roots=[image.parent]))


def source_of(path, sha256=SHA, **more):
    return ImageSource(url=f"file://{path}", sha256=sha256, **{"format": "raw"} | more)


def ignore(_done, _total):
    pass


def names(folder):
    return sorted(path.name for path in folder.iterdir())


ENTRY = [f"{SHA}.raw", f"{SHA}.raw.json"]


class Remote:
    """Takes the place of all sources: counts the openings and sends what the test lets through."""

    def __init__(self, data=DATA, failures=()):
        self.data = data
        self.failures = list(failures)
        self.opened = 0
        self.closed = 0
        self.asked = asyncio.Event()
        self.gate = asyncio.Event()

    def open_source(self, url, _policy, _resume=None):
        @asynccontextmanager
        async def opened():
            self.opened += 1
            self.url = url
            parts = [self.data[:MIB], self.data[MIB:], b""]

            async def read():
                self.asked.set()
                if len(parts) < 3:
                    await self.gate.wait()
                    if self.failures:
                        raise self.failures.pop(0)
                return parts.pop(0)

            try:
                yield Stream(len(self.data), read)
            finally:
                self.closed += 1

        return opened()


@pytest.fixture
async def remote(monkeypatch):
    remote = Remote()
    monkeypatch.setattr("agent.images.download.open_source", remote.open_source)
    return remote


class Waiter:
    """One `prepare` in a task; `heard` is set when it gets its first progress."""

    def __init__(self, cache, source):
        self.progress = []
        self.heard = asyncio.Event()
        self.task = asyncio.create_task(cache.prepare(source, self._hear))

    def _hear(self, done, total):
        self.progress.append((done, total))
        self.heard.set()

    async def cancel(self):
        self.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await self.task


async def waiting(cache, source, count):
    """Start `count` waiters and return when all of them have joined the download."""
    waiters = [Waiter(cache, source) for _ in range(count)]
    async with asyncio.timeout(30):
        for waiter in waiters:
            await waiter.heard.wait()
    return waiters


async def test_download_and_entry(cache, folder, image):
    progress = []
    prepared = await cache.prepare(source_of(image), lambda *figures: progress.append(figures))
    assert prepared.path == folder / f"{SHA}.raw"
    assert (prepared.format, prepared.sha256, prepared.virtual_size_bytes) == ("raw", SHA, len(DATA))
    assert prepared.path.read_bytes() == DATA
    assert names(folder) == ENTRY
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    assert stat.S_IMODE(prepared.path.stat().st_mode) == 0o444
    assert progress[0] == (0, len(DATA))
    assert progress[-1] == (len(DATA), len(DATA))
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)


async def test_cached_image_needs_no_source(cache, folder, image):
    first = await cache.prepare(source_of(image), ignore)
    image.unlink()
    assert await cache.prepare(source_of(image), ignore) == first
    # and after a restart of the agent
    assert await ImageCache(folder, ImagePolicy(file_roots=[image.parent])).prepare(source_of(image), ignore) == first


async def test_cached_image_is_still_under_the_policy(cache, folder, image):
    await cache.prepare(source_of(image), ignore)
    for policy, source, code in [
        (ImagePolicy(), source_of(image), "image_source_forbidden"),
        (ImagePolicy(allowed_schemes=["https"]), source_of(image), "image_source_forbidden"),
        (ImagePolicy(file_roots=[image.parent], max_size_mib=2), source_of(image), "image_too_large"),
        (ImagePolicy(file_roots=[image.parent], max_virtual_size_mib=2), source_of(image), "image_too_large"),
        (ImagePolicy(file_roots=[image.parent]), source_of(image, max_size_mib=2), "image_too_large"),
        (ImagePolicy(file_roots=[image.parent]), source_of(image, format="qcow2"), "image_format_mismatch"),
    ]:
        with pytest.raises(ImageRejected) as caught:
            await ImageCache(folder, policy).prepare(source, ignore)
        assert caught.value.code == code
    assert names(folder) == ENTRY


@pytest.mark.parametrize("damage", ["size", "entry", "no entry", "lies"])
async def test_damaged_entry_is_replaced(cache, folder, image, damage):
    prepared = await cache.prepare(source_of(image), ignore)
    inode = prepared.path.stat().st_ino
    entry = folder / f"{SHA}.raw.json"
    entry.chmod(0o644)
    if damage == "size":
        prepared.path.chmod(0o644)
        prepared.path.write_bytes(DATA[:-1])
    elif damage == "entry":
        entry.write_text("{")
    elif damage == "no entry":
        entry.unlink()
    else:
        entry.write_text(json.dumps(json.loads(entry.read_text()) | {"sha256": "0" * 64}))
    again = await cache.prepare(source_of(image), ignore)
    assert again.path.read_bytes() == DATA
    assert again.path.stat().st_ino != inode
    assert names(folder) == ENTRY


async def test_checksum_mismatch(cache, folder, image):
    with pytest.raises(ImageRejected) as caught:
        await cache.prepare(source_of(image, "0" * 64), ignore)
    assert caught.value.code == "image_checksum_mismatch"
    assert caught.value.details == {"expected": "0" * 64, "found": SHA}
    assert names(folder) == []


async def test_format_mismatch(cache, folder, image):
    with pytest.raises(ImageRejected) as caught:
        await cache.prepare(source_of(image, format="qcow2"), ignore)
    assert caught.value.code == "image_format_mismatch"
    assert names(folder) == []


async def test_too_large_by_its_length(cache, folder, image):
    with pytest.raises(ImageRejected) as caught:
        await cache.prepare(source_of(image, max_size_mib=2), ignore)
    assert caught.value.code == "image_too_large"
    assert names(folder) == []


async def test_too_large_without_a_length(cache, folder, image, remote, monkeypatch):
    class Endless(Remote):
        def open_source(self, _url, _policy, _resume=None):
            @asynccontextmanager
            async def opened():
                async def read():
                    self.opened += 1
                    return bytes(MIB)

                yield Stream(None, read)

            return opened()

    endless = Endless()
    monkeypatch.setattr("agent.images.download.open_source", endless.open_source)
    with pytest.raises(ImageRejected) as caught:
        await cache.prepare(source_of(image, max_size_mib=3), ignore)
    assert caught.value.code == "image_too_large"
    assert endless.opened == 4
    assert names(folder) == []


async def test_no_space_before_the_download(cache, folder, image, remote, monkeypatch):
    real = os.statvfs(image)
    monkeypatch.setattr(
        "agent.images.entry.os.statvfs",
        lambda _path: os.statvfs_result((4096, 4096, *real[2:4], 1, *real[5:])),
    )
    with pytest.raises(ResourceExhausted) as caught:
        await cache.prepare(source_of(image), ignore)
    assert caught.value.code == "no_space"
    assert caught.value.details == {"needed_bytes": len(DATA), "free_bytes": 4096}
    assert not remote.asked.is_set()
    assert names(folder) == []


async def test_space_promised_to_another_download_is_not_free(cache, image, remote, monkeypatch):
    real = os.statvfs(image)
    blocks = len(DATA) // 4096 + 10
    monkeypatch.setattr(
        "agent.images.entry.os.statvfs",
        lambda _path: os.statvfs_result((4096, 4096, *real[2:4], blocks, *real[5:])),
    )
    first = Waiter(cache, source_of(image))
    await first.heard.wait()
    with pytest.raises(ResourceExhausted):
        await cache.prepare(source_of(image, "0" * 64), ignore)
    remote.gate.set()
    await first.task


@pytest.mark.parametrize(
    ("number", "error", "code", "retryable"),
    [
        (errno.ENOSPC, ResourceExhausted, "no_space", True),
        (errno.EDQUOT, ResourceExhausted, "no_space", True),
        (errno.EIO, Unavailable, "image_cache_unavailable", True),
    ],
)
async def test_write_fails(cache, folder, image, monkeypatch, number, error, code, retryable):
    calls = []

    def fail(_fd, data):
        calls.append(len(data))
        if len(calls) == 2:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr("agent.images.partial.write_all", fail)
    with pytest.raises(error) as caught:
        await cache.prepare(source_of(image), ignore)
    assert (caught.value.code, caught.value.retryable) == (code, retryable)
    assert len(calls) <= 3
    assert names(folder) == []


@pytest.mark.parametrize("step", ["fsync", "fchmod"])
async def test_publishing_fails(cache, folder, image, monkeypatch, step):
    def fail(*_args):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(f"agent.images.partial.os.{step}", fail)
    with pytest.raises(ResourceExhausted):
        await cache.prepare(source_of(image), ignore)
    assert names(folder) == []


async def test_many_ask_and_one_downloads(cache, image, remote):
    waiters = await waiting(cache, source_of(image), 20)
    remote.gate.set()
    results = await asyncio.gather(*(waiter.task for waiter in waiters))
    assert remote.opened == 1
    assert len(set(results)) == 1
    assert all(waiter.progress[-1] == (len(DATA), len(DATA)) for waiter in waiters)


async def test_failure_reaches_every_waiter(cache, folder, image, remote):
    remote.failures = [ImageRejected("gone", code="image_missing")]
    waiters = await waiting(cache, source_of(image), 3)
    remote.gate.set()
    results = await asyncio.gather(*(waiter.task for waiter in waiters), return_exceptions=True)
    assert [error.code for error in results] == ["image_missing"] * 3
    assert remote.opened == 1
    assert names(folder) == []


async def test_another_url_is_tried_when_the_shared_one_fails(cache, image, remote):
    other = image.with_name("b.raw")
    first = Waiter(cache, source_of(image))
    await first.heard.wait()
    second = Waiter(cache, source_of(other))
    await second.heard.wait()
    remote.failures = [ImageRejected("gone", code="image_missing")]
    remote.gate.set()
    with pytest.raises(ImageRejected):
        await first.task
    assert (await second.task).sha256 == SHA
    assert remote.opened == 2
    assert remote.url == f"file://{other}"


async def test_shared_image_above_a_waiters_own_limit(cache, image, remote):
    first = Waiter(cache, source_of(image))
    await first.heard.wait()
    second = Waiter(cache, source_of(image, max_size_mib=2))
    await second.heard.wait()
    remote.gate.set()
    await first.task
    with pytest.raises(ImageRejected) as caught:
        await second.task
    assert caught.value.code == "image_too_large"
    assert remote.opened == 1


async def test_broken_progress_harms_nobody_else(cache, image, remote):
    def broken(_done, _total):
        raise ZeroDivisionError

    first = asyncio.create_task(cache.prepare(source_of(image), broken))
    (second,) = await waiting(cache, source_of(image), 1)
    remote.gate.set()
    assert await first == await second.task


async def test_one_waiter_cancelled(cache, image, remote):
    first, second = await waiting(cache, source_of(image), 2)
    await first.cancel()
    remote.gate.set()
    assert (await second.task).sha256 == SHA
    assert remote.opened == 1


async def test_last_waiter_cancelled_ends_the_download(cache, folder, image, remote):
    first, second = await waiting(cache, source_of(image), 2)
    await first.cancel()
    assert remote.closed == 0
    await second.cancel()
    assert remote.closed == 1
    assert names(folder) == []


async def test_download_starts_anew_after_it_was_cancelled(cache, folder, image, remote):
    (first,) = await waiting(cache, source_of(image), 1)
    await first.cancel()
    remote.gate.set()
    await cache.prepare(source_of(image), ignore)
    assert remote.opened == 2
    assert names(folder) == ENTRY


async def test_cancelled_while_the_disk_is_slow(cache, folder, image, remote, monkeypatch):
    """The cancellation waits for the write that is going on; only then the file goes."""
    loop = asyncio.get_running_loop()
    begun, release = asyncio.Event(), threading.Event()

    def slow(fd, data):
        loop.call_soon_threadsafe(begun.set)
        assert release.wait(30)
        os.write(fd, data)

    monkeypatch.setattr("agent.images.partial.write_all", slow)
    waiter = Waiter(cache, source_of(image))
    await begun.wait()
    waiter.task.cancel()
    loop.call_soon(release.set)
    with pytest.raises(asyncio.CancelledError):
        await waiter.task
    assert names(folder) == []


async def test_source_that_comes_back_is_asked_again(cache, folder, image, remote):
    remote.failures = [Unavailable("away", code="image_unavailable"), Unavailable("slow", code="image_stalled")]
    remote.gate.set()
    await cache.prepare(source_of(image), ignore)
    assert remote.opened == 3
    assert names(folder) == ENTRY


async def test_source_that_stays_away_is_given_up(cache, folder, image, remote):
    remote.failures = [Unavailable("away", code="image_truncated") for _ in range(9)]
    remote.gate.set()
    with pytest.raises(Unavailable) as caught:
        await cache.prepare(source_of(image), ignore)
    assert caught.value.code == "image_truncated"
    assert remote.opened == 3
    assert names(folder) == []


async def test_total_limit(folder, image, remote):
    cache = ImageCache(folder, ImagePolicy(file_roots=[image.parent], total_timeout_s=0.05))
    await cache.clean_partials()
    with pytest.raises(DeadlineExceeded) as caught:
        await cache.prepare(source_of(image), ignore)
    assert caught.value.code == "image_timeout"
    assert caught.value.retryable
    assert names(folder) == []


async def test_leftovers_of_a_killed_process(cache, folder, image):
    prepared = await cache.prepare(source_of(image), ignore)
    (folder / f".partial-{SHA[:16]}-1234").write_bytes(b"half")
    (folder / f".partial-{SHA[:16]}-1234.json").write_bytes(b"{}")
    (folder / f"{'0' * 64}.raw.json").write_bytes(b"{}")
    (folder / f"{'1' * 64}.qcow2").write_bytes(b"perhaps a backing file")
    assert await cache.clean_partials() == 3
    assert await cache.clean_partials() == 0
    assert names(folder) == sorted([*ENTRY, f"{'1' * 64}.qcow2"])
    assert await cache.prepare(source_of(image), ignore) == prepared


async def test_clean_makes_the_folder(cache, folder):
    assert await cache.clean_partials() == 0
    assert folder.is_dir()


async def test_folder_that_cannot_be(image):
    cache = ImageCache(image / "not a folder", ImagePolicy(file_roots=[image.parent]))
    for call in (cache.clean_partials(), cache.prepare(source_of(image), ignore)):
        with pytest.raises(Unavailable) as caught:
            await call
        assert caught.value.code == "image_cache_unavailable"


async def test_nothing_blocks_the_loop(cache, image):
    with blockbuster_ctx("agent"):
        await cache.clean_partials()
        await cache.prepare(source_of(image), ignore)
        await cache.prepare(source_of(image), ignore)


async def test_decompressed_while_it_comes(cache, folder, tmp_path):
    content = DATA + bytes(3 * MIB) + DATA
    packed = gzip.compress(content, 1, mtime=0)
    path = tmp_path / "sources" / "a.gz"
    path.write_bytes(packed)
    source = source_of(path, hashlib.sha256(packed).hexdigest(), compression="gzip")
    prepared = await cache.prepare(source, ignore)
    assert prepared.path.read_bytes() == content
    assert (prepared.virtual_size_bytes, prepared.sha256) == (len(content), source.sha256)
    assert prepared.path.stat().st_blocks * 512 < len(content) - 2 * MIB, "zeros take no space"
    assert await cache.verify(source.sha256, ignore)
    assert await cache.prepare(source, ignore) == prepared
    with pytest.raises(ImageRejected) as caught:
        await cache.prepare(source.model_copy(update={"compression": None}), ignore)
    assert caught.value.code == "image_format_mismatch"


async def test_an_image_that_ends_with_a_hole(cache, image):
    content = DATA + bytes(4 * MIB)
    image.write_bytes(content)
    prepared = await cache.prepare(source_of(image, hashlib.sha256(content).hexdigest()), ignore)
    assert prepared.path.read_bytes() == content


@pytest.mark.parametrize(
    ("content", "settings", "code"),
    [
        (DATA, {"max_size_mib": 2}, "image_too_large"),
        (DATA, {"max_virtual_size_mib": 2}, "image_too_large"),
        (bytes(2 * MIB), {"max_ratio": 100}, "image_too_large"),
        (b"QFI\xfb" + DATA, {}, "image_format_mismatch"),
    ],
    ids=["size", "virtual size", "ratio", "format"],
)
async def test_limits_hold_for_what_is_decompressed(folder, image, monkeypatch, content, settings, code):
    monkeypatch.setattr("agent.images.partial.RATIO_FREE_BYTES", MIB)
    packed = gzip.compress(content, mtime=0)
    image.write_bytes(packed)
    cache = ImageCache(folder, ImagePolicy(file_roots=[image.parent], **settings))
    with pytest.raises(ImageRejected) as caught:
        await cache.prepare(source_of(image, hashlib.sha256(packed).hexdigest(), compression="gzip"), ignore)
    assert caught.value.code == code
    assert names(folder) == []


async def test_checksum_is_of_the_compressed_bytes(cache, folder, image):
    image.write_bytes(gzip.compress(DATA, mtime=0))
    with pytest.raises(ImageRejected) as caught:
        await cache.prepare(source_of(image, SHA, compression="gzip"), ignore)
    assert caught.value.code == "image_checksum_mismatch"
    assert names(folder) == []


async def test_a_file_is_read_on_where_it_stalled(cache, image, monkeypatch):
    places = []

    def open_source(url, policy, resume=None):
        places.append(resume and resume.offset)

        @asynccontextmanager
        async def opened():
            async with real(url, policy, resume) as stream:
                reads = []

                async def read():
                    if len(places) == 1 and reads:
                        raise Unavailable("slow", code="image_stalled")
                    reads.append(1)
                    return await stream.read()

                yield Stream(stream.total, read, stream.offset, stream.validator)

        return opened()

    real = download.open_source
    monkeypatch.setattr(download, "open_source", open_source)
    assert (await cache.prepare(source_of(image), ignore)).path.read_bytes() == DATA
    assert places == [None, MIB]


async def test_quota_for_what_nobody_knows_the_length_of(folder, image, monkeypatch):
    """It is asked for as it grows, and what is unused goes for it."""
    cache = ImageCache(folder, ImagePolicy(file_roots=[image.parent], max_cache_mib=8))
    cache.who_uses = dict
    await cache.prepare(source_of(image), ignore)
    os.utime(folder / f"{SHA}.raw.json", (1, 1))
    content = os.urandom(6 * MIB)
    packed = gzip.compress(content, 1, mtime=0)
    image.write_bytes(packed)
    source = source_of(image, hashlib.sha256(packed).hexdigest(), compression="gzip")
    monkeypatch.setattr(download, "_ROOM_STEP", MIB)
    await cache.prepare(source, ignore)
    assert names(folder) == [f"{source.sha256}.raw", f"{source.sha256}.raw.json"]
    content = os.urandom(9 * MIB)
    packed = gzip.compress(content, 1, mtime=0)
    image.write_bytes(packed)
    with pytest.raises(ResourceExhausted) as caught:
        await cache.prepare(source_of(image, hashlib.sha256(packed).hexdigest(), compression="gzip"), ignore)
    assert caught.value.code == "image_cache_full"
    assert caught.value.details["short_bytes"] > 0
    assert not [name for name in names(folder) if name.startswith(".partial")]


async def test_an_entry_of_the_last_release_is_still_good(cache, folder, image):
    prepared = await cache.prepare(source_of(image), ignore)
    entry = folder / f"{SHA}.raw.json"
    entry.chmod(0o644)
    old = {"sha256": SHA, "format": "raw", "size_bytes": len(DATA), "virtual_size_bytes": len(DATA)}
    entry.write_text(json.dumps(old))
    image.unlink()
    assert await cache.prepare(source_of(image), ignore) == prepared
    assert await cache.verify(SHA, ignore)


async def test_a_removal_that_is_cancelled_is_finished(cache, folder, image, monkeypatch):
    """Else a use that comes meanwhile would find the image and lose it."""
    await cache.prepare(source_of(image), ignore)
    cache.who_uses = dict
    begun, release = asyncio.Event(), threading.Event()
    loop, real = asyncio.get_running_loop(), entry_module.discard

    def slow(paths):
        loop.call_soon_threadsafe(begun.set)
        assert release.wait(30)
        return real(paths)

    monkeypatch.setattr(entry_module, "discard", slow)
    removal = asyncio.create_task(cache.remove(SHA))
    await begun.wait()
    removal.cancel()
    use = asyncio.create_task(cache.prepare(source_of(image), ignore))
    await asyncio.sleep(0)
    assert not cache._shared
    release.set()
    assert (await use).path.read_bytes() == DATA
    assert names(folder) == ENTRY
