"""Broken downloads over real HTTP go on where they broke, and never end in other bytes than those that were asked for."""

import asyncio
import gzip
import hashlib
import random

import pytest
import stamina
from aiohttp import web

from agent.errors import ImageRejected, Unavailable
from agent.images.cache import ImageCache
from agent.images.policy import ImagePolicy
from agent.messages.spec import ImageSource

DATA = random.Random(1).randbytes(12_000_003)
OTHER = random.Random(2).randbytes(len(DATA))


class Server:
    """Serves `body` and breaks each answer after so many bytes as `cuts` says, until that is empty.

    `asked` has the Range of each request. `mode`: how far the server knows ranges.
    """

    def __init__(self):
        self.body = DATA
        self.cuts = []
        self.asked = []
        self.sent = 0
        self.mode = "good"
        self.etag = '"one"'
        self.modified = None
        self.before = {}

    async def start(self):
        app = web.Application()
        app.router.add_get("/image", self.handle)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/image"

    async def stop(self):
        await self._runner.cleanup()

    async def handle(self, request):
        wanted = request.headers.get("Range")
        self.asked.append(wanted)
        change = self.before.get(len(self.asked))
        if change:
            change(self)
        headers = {name: value for name, value in (("ETag", self.etag), ("Last-Modified", self.modified)) if value}
        start, status = 0, 200
        if wanted and self.mode != "ignores" and request.headers["If-Range"] in (self.etag, self.modified):
            start, status = int(wanted.removeprefix("bytes=").removesuffix("-")), 206
            if self.mode == "unsatisfiable":
                return web.Response(status=416, headers={"Content-Range": f"bytes */{len(self.body)}"})
            if self.mode == "wrong place":
                start -= 1
            headers["Content-Range"] = f"bytes {start}-{len(self.body) - 1}/{len(self.body)}"
            if self.mode == "no place":
                del headers["Content-Range"]
        rest = self.body[start:]
        if self.mode != "chunked":
            headers["Content-Length"] = str(len(rest))
        response = web.StreamResponse(status=status, headers=headers)
        await response.prepare(request)
        cut = self.cuts.pop(0) if self.cuts else len(rest)
        for place in range(0, min(cut, len(rest)), 65_536):
            await response.write(rest[place : min(place + 65_536, cut)])
        self.sent += min(cut, len(rest))
        if cut < len(rest):
            request.transport.close()
        return response


@pytest.fixture(autouse=True)
def no_backoff():
    with stamina.set_testing(True, attempts=3):
        yield


@pytest.fixture
async def server():
    server = Server()
    await server.start()
    yield server
    await server.stop()


async def fetch(server, folder, data=DATA, progress=lambda _done, _total: None, **more):
    sha = hashlib.sha256(more.pop("packed", data)).hexdigest()
    source = ImageSource(url=server.url, sha256=sha, **{"format": "raw"} | more)
    prepared = await ImageCache(folder, ImagePolicy()).prepare(source, progress)
    assert prepared.path.read_bytes() == data
    return prepared


async def test_goes_on_where_it_broke(server, tmp_path):
    server.cuts = [5_000_000, 3_000_000]
    progress = []
    await fetch(server, tmp_path, progress=lambda *figures: progress.append(figures))
    assert server.asked[0] is None
    places = [int(asked.removeprefix("bytes=").removesuffix("-")) for asked in server.asked[1:]]
    assert places == [5_000_000, 8_000_000]
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)
    assert {total for _, total in progress} == {len(DATA)}


async def test_the_date_will_do_and_a_weak_etag_will_not(server, tmp_path):
    server.cuts, server.etag, server.modified = [5_000_000], 'W/"weak"', "Sun, 22 Nov 2026 10:00:00 GMT"
    await fetch(server, tmp_path / "date")
    assert server.asked[1].startswith("bytes=")
    server.cuts, server.asked, server.modified = [5_000_000], [], None
    await fetch(server, tmp_path / "weak")
    assert server.asked == [None, None]


@pytest.mark.parametrize("mode", ["ignores", "unsatisfiable", "wrong place", "no place"])
async def test_a_server_that_cannot_starts_again(server, tmp_path, mode):
    server.cuts, server.mode = [5_000_000], mode
    await fetch(server, tmp_path)
    assert server.asked[1].startswith("bytes=")
    assert server.asked[2:] == ([] if mode == "ignores" else [None])


async def test_a_chunked_body(server, tmp_path):
    server.cuts, server.mode = [5_000_000, 2_000_000], "chunked"
    await fetch(server, tmp_path)
    assert server.asked[1].startswith("bytes=")


async def test_something_new_at_the_url(server, tmp_path):
    """If-Range fails: the whole is sent, and it is another image."""
    def change(server):
        server.body, server.etag = OTHER, '"two"'

    server.cuts, server.before = [5_000_000], {2: change}
    with pytest.raises(ImageRejected) as caught:
        await fetch(server, tmp_path)
    assert caught.value.code == "image_checksum_mismatch"
    assert len(server.asked) == 2
    assert list(tmp_path.iterdir()) == []


async def test_a_server_that_lies_about_a_change(server, tmp_path):
    """The first half of another image under the same ETag: the join is found out, and the whole fetched again."""
    server.body = OTHER

    def change(server):
        server.body = DATA

    server.cuts, server.before = [5_000_000], {2: change}
    await fetch(server, tmp_path)
    assert server.asked[0] is None
    assert server.asked[1].startswith("bytes=")
    assert server.asked[2] is None


async def test_many_breaks_while_it_gets_further(server, tmp_path):
    """More breaks than a source that is away is asked."""
    server.cuts = [1_300_000] * 8
    await fetch(server, tmp_path)
    assert len(server.asked) == 9
    assert server.sent < 1.5 * len(DATA)


async def test_breaks_without_getting_further(server, tmp_path):
    server.cuts = [5_000_000] + [0] * 20
    with pytest.raises(Unavailable) as caught:
        await fetch(server, tmp_path)
    assert caught.value.code == "image_truncated"
    assert len(server.asked) == 4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seed", range(12))
async def test_random_cuts(server, tmp_path, seed):
    dice = random.Random(seed)
    server.mode = dice.choice(["good", "good", "good", "chunked", "ignores"])
    most = 2 if server.mode == "ignores" else 6
    server.cuts = [dice.randrange(1_200_000, 6_000_000) for _ in range(dice.randrange(1, most + 1))]
    compressed = dice.random() < 0.5
    if compressed:
        plain = DATA[:8_000_000] + bytes(3_000_000)
        server.body = gzip.compress(plain, 1, mtime=0)
        await fetch(server, tmp_path, data=plain, packed=server.body, compression="gzip")
    else:
        await fetch(server, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


async def test_cancelled_between_attempts(server, tmp_path):
    server.cuts = [2_000_000] * 50
    task = asyncio.create_task(fetch(server, tmp_path))
    async with asyncio.timeout(240):
        while len(server.asked) < 2:
            await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert list(tmp_path.iterdir()) == []
