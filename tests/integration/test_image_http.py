"""Images over real HTTP, from a server on the loopback interface that misbehaves as told."""

import asyncio
import hashlib
import os
import socket

import aiohttp
import pytest
import stamina
from aiohttp import web
from blockbuster import blockbuster_ctx

from agent.errors import ImageRejected, Unavailable
from agent.images.cache import ImageCache
from agent.images.policy import ImagePolicy
from agent.messages.spec import ImageSource

DATA = os.urandom(5_000_000)
SHA = hashlib.sha256(DATA).hexdigest()


def ignore(_done, _total):
    pass


class Server:
    """Serves `/image` and its broken relatives; `requests` holds the path of each request in order."""

    def __init__(self):
        self.requests = []
        self.statuses = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.streaming = asyncio.Event()
        self.gone = asyncio.Event()
        self.location = ""
        self.headers = None

    async def start(self):
        app = web.Application()
        app.router.add_get("/{name}", self.handle)
        self._runner = web.AppRunner(app, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self):
        self.gate.set()
        await self._runner.cleanup()

    def url(self, name, host="127.0.0.1"):
        return f"http://{host}:{self.port}/{name}"

    async def handle(self, request):
        self.requests.append(request.path)
        self.headers = request.headers
        return await getattr(self, "do_" + request.match_info["name"])(request)

    async def do_image(self, request):
        return await self._send(request, {"Content-Length": str(len(DATA))})

    async def do_chunked(self, request):
        return await self._send(request, {})

    async def do_gzip(self, request):
        return await self._send(request, {"Content-Encoding": "gzip"})

    async def _send(self, request, headers):
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        try:
            await response.write(DATA[:2_000_000])
            self.streaming.set()
            await self.gate.wait()
            await response.write(DATA[2_000_000:])
        except (asyncio.CancelledError, ConnectionError):
            self.gone.set()
            raise
        return response

    async def do_truncated(self, request):
        response = web.StreamResponse(headers={"Content-Length": str(len(DATA))})
        await response.prepare(request)
        await response.write(DATA[:2_000_000])
        request.transport.close()
        return response

    async def do_status(self, request):
        status = self.statuses.pop(0)
        return await self.do_image(request) if status == 200 else web.Response(status=status)

    async def do_redirect(self, _request):
        return web.Response(status=302, headers={"Location": self.location})


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


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "images"


def source_of(url, sha256=SHA, **more):
    return ImageSource(url=url, sha256=sha256, **{"format": "raw"} | more)


async def fetch(folder, url, progress=ignore, **settings):
    prepared = await ImageCache(folder, ImagePolicy(**settings)).prepare(source_of(url), progress)
    assert prepared.path.read_bytes() == DATA
    return prepared


async def fails(folder, url, error, **settings):
    with pytest.raises(error) as caught:
        await fetch(folder, url, **settings)
    assert list(folder.iterdir()) == []
    assert "token" not in caught.value.message
    return caught.value.code


@pytest.mark.parametrize(("name", "total"), [("image", len(DATA)), ("chunked", None)])
async def test_download(server, folder, name, total):
    progress = []
    await fetch(folder, server.url(name), lambda *figures: progress.append(figures))
    assert progress[0] == (0, total)
    assert progress[-1] == (len(DATA), total)
    assert len(progress) <= 8, "chunks should be of about 1 MiB"
    assert server.headers["Accept-Encoding"] == "identity"


async def test_bytes_are_taken_as_they_are(server, folder):
    await fetch(folder, server.url("gzip"))


async def test_truncated(server, folder):
    assert await fails(folder, server.url("truncated?token=1"), Unavailable) == "image_truncated"
    assert server.requests == ["/truncated"] * 3


@pytest.mark.parametrize(
    ("status", "error", "code", "requests"),
    [
        (404, ImageRejected, "image_missing", 1),
        (410, ImageRejected, "image_missing", 1),
        (401, ImageRejected, "image_source_denied", 1),
        (403, ImageRejected, "image_source_denied", 1),
        (206, ImageRejected, "image_source_denied", 1),
        (500, Unavailable, "image_unavailable", 3),
        (503, Unavailable, "image_unavailable", 3),
        (429, Unavailable, "image_unavailable", 3),
    ],
)
async def test_statuses(server, folder, status, error, code, requests):
    server.statuses = [status] * 5
    assert await fails(folder, server.url("status?token=1"), error) == code
    assert len(server.requests) == requests


async def test_server_that_recovers(server, folder):
    server.statuses = [503, 502, 200]
    await fetch(folder, server.url("status"))


async def test_nobody_listens(folder):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/image?token=1"
        assert await fails(folder, url, Unavailable) == "image_unavailable"


async def test_server_that_never_answers(folder):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/image?token=1"
        code = await fails(folder, url, Unavailable, connect_timeout_s=0.05, stall_timeout_s=0.05)
    assert code == "image_unavailable"


async def test_stall(server, folder):
    server.gate.clear()
    assert await fails(folder, server.url("image?token=1"), Unavailable, stall_timeout_s=0.5) == "image_stalled"
    assert len(server.requests) == 3


async def test_too_large(server, folder):
    assert await fails(folder, server.url("image"), ImageRejected, max_size_mib=4) == "image_too_large"
    assert await fails(folder, server.url("chunked"), ImageRejected, max_size_mib=4) == "image_too_large"


async def test_redirect(server, folder):
    server.location = "/image"
    await fetch(folder, server.url("redirect"))
    assert server.requests == ["/redirect", "/image"]


@pytest.mark.parametrize(
    "location",
    [
        "file:///etc/hostname",
        "http://forbidden.test/image",
        "http://u:p@127.0.0.1/image",
        "gopher://127.0.0.1/",
        "http://[::1/",
    ],
)
async def test_redirect_to_what_is_forbidden(server, folder, location):
    server.location = location
    code = await fails(folder, server.url("redirect"), ImageRejected, allowed_hosts=["127.0.0.1"], file_roots=["/"])
    assert code == "image_source_forbidden"
    assert server.requests == ["/redirect"]


async def test_redirect_without_end(server, folder):
    server.location = "/redirect"
    assert await fails(folder, server.url("redirect"), ImageRejected, max_redirects=2) == "image_source_forbidden"
    assert len(server.requests) == 3


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_private_address(server, folder, host):
    code = await fails(folder, server.url("image", host), ImageRejected, allow_private_addresses=False)
    assert code == "image_source_forbidden"
    assert server.requests == []


async def test_many_ask_and_one_request_is_made(server, folder):
    cache = ImageCache(folder, ImagePolicy())
    source = source_of(server.url("image"))
    server.gate.clear()
    tasks = [asyncio.create_task(cache.prepare(source, ignore)) for _ in range(50)]
    await server.streaming.wait()
    server.gate.set()
    assert len(set(await asyncio.gather(*tasks))) == 1
    assert server.requests == ["/image"]


async def test_cancellation_closes_the_connection(server, folder):
    cache = ImageCache(folder, ImagePolicy())
    server.gate.clear()
    task = asyncio.create_task(cache.prepare(source_of(server.url("image")), ignore))
    await server.streaming.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert list(folder.iterdir()) == []
    async with asyncio.timeout(240):
        await server.gone.wait()


async def test_nothing_blocks_the_loop(server, folder):
    assert aiohttp  # loaded by this test already; the import itself runs in a thread
    with blockbuster_ctx("agent.images"):
        await ImageCache(folder, ImagePolicy()).prepare(source_of(server.url("image")), ignore)
