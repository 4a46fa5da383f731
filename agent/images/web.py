"""Images over HTTP(S): one request with redirects checked hop by hop, for all of an image or the rest of it.

The only importer of aiohttp in this package. It is loaded with the first download, to keep an idle agent
small, and in a thread, because it reads the system's certificates as it loads.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from agent.errors import ComputeError, ImageRejected, Unavailable
from agent.images.policy import ImagePolicy, check_hop, forbidden, is_public_address, public_url
from agent.images.stream import CHUNK, Resume, Stream, stalled, truncated

if TYPE_CHECKING:
    import aiohttp
    import yarl
    from aiohttp.abc import AddrInfoType  # type: ignore[attr-defined,unused-ignore]

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MISSING = frozenset({404, 410})
_BUSY = frozenset({408, 425, 429})
_PARTIAL, _NOT_SATISFIABLE = 206, 416
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-\d{1,18}/(?:(\d{1,18})|\*)", re.ASCII)
# What is hashed must be the bytes as they are at the URL, so no content coding is asked for or undone.
_HEADERS = {"Accept-Encoding": "identity", "User-Agent": "compute-agent"}


@asynccontextmanager
async def open_http(url: str, policy: ImagePolicy, resume: Resume | None = None) -> AsyncIterator[Stream]:
    """Send a GET for `url`, follow allowed redirects, yield the body. Errors as of `fetch.open_source`.

    With `resume` the rest is asked for by Range and If-Range. A server that knows neither, or has something new
    at the URL, sends the whole.
    """
    await asyncio.to_thread(__import__, "aiohttp")
    import aiohttp  # noqa: PLC0415 - loaded above, off the loop

    guard = _AddressGuard(policy)
    connector = aiohttp.TCPConnector(socket_factory=guard.socket, limit=1)
    session = aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=policy.connect_timeout_s),
        headers=_HEADERS,
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        read_bufsize=CHUNK,
    )
    async with session:
        response = await _request(session, url, policy, guard, resume)
        try:
            offset, total = _place(response)
            if resume is not None and response.status in {_PARTIAL, _NOT_SATISFIABLE} and offset != resume.offset:
                response.close()
                response = await _request(session, url, policy, guard, None)
                offset, total = _place(response)
            body = _Body(response, url, policy, offset, total)
            yield Stream(total, body.read, offset, _validator(response))
        finally:
            response.close()


class _AddressGuard:
    """Makes the sockets of one download, and refuses addresses that the policy does.

    This is the moment of the connection: neither a second DNS answer nor a numeric host gets past it.
    """

    def __init__(self, policy: ImagePolicy) -> None:
        self._policy = policy
        self.refused: str | None = None

    def socket(self, info: AddrInfoType) -> socket.socket:
        family, kind, protocol, _name, address = info
        if not self._policy.allow_private_addresses and not is_public_address(str(address[0])):
            self.refused = str(address[0])
            # An OSError, so that the client goes on to the host's next address.
            raise PermissionError(f"address {self.refused} is not public")
        return socket.socket(family=family, type=kind, proto=protocol)


def _place(response: aiohttp.ClientResponse) -> tuple[int, int | None]:
    """Return the offset of the body's first byte, -1 where the answer does not say it, and the whole's length."""
    if response.status == 200:
        return 0, response.content_length
    found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if response.status != _PARTIAL or found is None:
        return -1, None
    return int(found[1]), int(found[2]) if found[2] else None


def _validator(response: aiohttp.ClientResponse) -> str | None:
    """What If-Range takes: a strong ETag, else the date. What the date lets through the checksum finds."""
    etag = response.headers.get("ETag", "")
    if etag.startswith('"'):
        return etag
    return response.headers.get("Last-Modified")


async def _request(
    session: aiohttp.ClientSession, url: str, policy: ImagePolicy, guard: _AddressGuard, resume: Resume | None
) -> aiohttp.ClientResponse:
    import yarl  # noqa: PLC0415 - comes with aiohttp

    headers = {} if resume is None else {"Range": f"bytes={resume.offset}-", "If-Range": resume.validator}
    good = {200} if resume is None else {200, _PARTIAL, _NOT_SATISFIABLE}
    try:
        target = yarl.URL(url)
        for _hop in range(policy.max_redirects + 1):
            check_hop(policy, target.scheme, target.host or "", has_user="@" in target.raw_authority)
            response = await _get(session, target, policy, guard, headers)
            location = response.headers.get("Location")
            if response.status not in _REDIRECTS or location is None:
                return _checked(response, target, good)
            response.close()
            target = target.join(yarl.URL(location))
    except ValueError as exc:
        raise forbidden(f"{public_url(url)} is, or redirects to, what is not a URL") from exc
    raise forbidden(f"{public_url(url)} redirects more than {policy.max_redirects} times")


async def _get(
    session: aiohttp.ClientSession,
    target: yarl.URL,
    policy: ImagePolicy,
    guard: _AddressGuard,
    headers: dict[str, str],
) -> aiohttp.ClientResponse:
    import aiohttp  # noqa: PLC0415

    shown = public_url(str(target))
    limit = policy.connect_timeout_s + policy.stall_timeout_s
    try:
        async with asyncio.timeout(limit):
            return await session.get(target, allow_redirects=False, headers=headers)
    except aiohttp.ClientConnectorError as exc:
        if guard.refused is not None:
            raise forbidden(f"{shown} is at {guard.refused}, which is not a public address") from exc
        raise Unavailable(f"{shown} cannot be reached: {exc.os_error}", code="image_unavailable") from exc
    except aiohttp.InvalidURL as exc:
        raise forbidden(f"{shown} is not a URL that can be asked") from exc
    except TimeoutError as exc:
        raise Unavailable(f"{shown} did not answer within {limit:g} s", code="image_unavailable") from exc
    except (aiohttp.ClientError, OSError) as exc:
        raise Unavailable(f"{shown} failed: {type(exc).__name__}", code="image_unavailable") from exc


def _checked(response: aiohttp.ClientResponse, target: yarl.URL, good: set[int]) -> aiohttp.ClientResponse:
    """Return a good answer; turn any other status into the error it stands for, and close the response."""
    status = response.status
    if status in good:
        return response
    response.close()
    shown = public_url(str(target))
    error: ComputeError
    if status in _MISSING:
        error = ImageRejected(f"there is no image at {shown}", code="image_missing", status=status)
    elif status >= 500 or status in _BUSY:
        error = Unavailable(f"{shown} answered {status}", code="image_unavailable", status=status)
    else:
        error = ImageRejected(f"{shown} answered {status}", code="image_source_denied", status=status)
    raise error


class _Body:
    """Gathers a body into chunks of about `CHUNK` bytes; each wait for bytes has the stall limit.

    What came before a failure is returned first, so that the next attempt goes on behind it.
    """

    def __init__(
        self, response: aiohttp.ClientResponse, url: str, policy: ImagePolicy, offset: int, total: int | None
    ) -> None:
        self._response = response
        self._url = url
        self._limit_s = policy.stall_timeout_s
        self._done = offset
        self._total = total
        self._failure: Unavailable | None = None

    async def read(self) -> bytearray:
        if self._failure is not None:
            raise self._failure
        chunk = bytearray()
        try:
            while len(chunk) < CHUNK:
                async with asyncio.timeout(self._limit_s):
                    piece = await self._response.content.readany()
                if not piece:
                    break
                chunk += piece
        except Exception as exc:
            self._failure = self._translated(exc, chunk)
            if not chunk:
                raise self._failure from exc
        self._done += len(chunk)
        return chunk

    def _translated(self, exc: Exception, chunk: bytearray) -> Unavailable:
        import aiohttp  # noqa: PLC0415

        if isinstance(exc, TimeoutError):
            return stalled(self._url, self._limit_s)
        if not isinstance(exc, aiohttp.ClientError | OSError):
            raise exc
        # The client gives up what it has received when the connection breaks; on a bad line that may be all.
        rest = getattr(self._response.content, "_read_nowait", None)
        if rest is not None:
            chunk += rest(-1)
        if isinstance(exc, aiohttp.ClientPayloadError):
            # The connection ended before Content-Length bytes, or before the last chunk of a chunked body.
            return truncated(self._url, self._done + len(chunk), self._total)
        message = f"reading {public_url(self._url)} failed: {type(exc).__name__}"
        return Unavailable(message, code="image_unavailable")
