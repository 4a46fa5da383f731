"""Exports over HTTP: one plain PUT of a whole file, with its length, repeated as a whole where that can help."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from agent.errors import ComputeError, DeadlineExceeded, FailedPrecondition, Unavailable
from agent.exports.policy import ExportPolicy, check_url, forbidden, public_url
from agent.images.policy import is_public_address

if TYPE_CHECKING:
    import aiohttp
    from aiohttp.abc import AddrInfoType  # type: ignore[attr-defined,unused-ignore]

CHUNK: Final = 1024 * 1024
PAUSE_S: Final = 0.5
MAX_REDIRECTS: Final = 3
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_KEEPING_METHOD: Final = frozenset({307, 308})
_BUSY: Final = frozenset({408, 425, 429})


async def put(path: Path, url: str, policy: ExportPolicy, report: Callable[[int, int], None]) -> None:
    """Upload a file by PUT, in up to `policy.attempts` attempts.

    Raises `InvalidArgument` (`export_target_forbidden`), `FailedPrecondition` (`export_refused`), and, when all
    attempts failed, `Unavailable` (`export_unavailable`) or `DeadlineExceeded`.
    """
    check_url(policy, url)
    await asyncio.to_thread(__import__, "aiohttp")
    try:
        async with asyncio.timeout(policy.total_timeout_s):
            for attempt in range(1, policy.attempts + 1):
                try:
                    return await _put_once(path, url, policy, report)
                except Unavailable:
                    if attempt == policy.attempts:
                        raise
                pause = PAUSE_S * 2**attempt * random.uniform(0.5, 1.0)  # noqa: S311 - jitter
                await asyncio.sleep(pause)
    except TimeoutError:
        raise DeadlineExceeded(f"the upload to {public_url(url)} took more than {policy.total_timeout_s:g} s") from None


async def delete(url: str, policy: ExportPolicy) -> bool:
    """Ask the server to forget what was put there. False where it does not do that."""
    await asyncio.to_thread(__import__, "aiohttp")
    async with (
        asyncio.timeout(policy.stall_timeout_s),
        _Session(policy) as (session, _guard),
        session.delete(url, allow_redirects=False) as response,
    ):
        return response.status in (200, 202, 204, 404, 410)


class _Session:
    """A client whose sockets go only where the policy allows; an async context manager."""

    def __init__(self, policy: ExportPolicy) -> None:
        self._policy = policy
        self.refused: str | None = None

    async def __aenter__(self) -> tuple[aiohttp.ClientSession, _Session]:
        import aiohttp  # noqa: PLC0415 - loaded by the caller, off the loop

        self._client = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(socket_factory=self._socket, limit=1),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._policy.connect_timeout_s),
            headers={"User-Agent": "compute-agent"},
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self._client, self

    async def __aexit__(self, *_exc: object) -> None:
        await self._client.close()

    def _socket(self, info: AddrInfoType) -> socket.socket:
        family, kind, protocol, _name, address = info
        # At the moment of the connection neither a second DNS answer nor a numeric host gets past it.
        if not self._policy.allow_private_addresses and not is_public_address(str(address[0])):
            self.refused = str(address[0])
            raise PermissionError(f"address {self.refused} is not public")
        return socket.socket(family=family, type=kind, proto=protocol)


async def _put_once(path: Path, url: str, policy: ExportPolicy, report: Callable[[int, int], None]) -> None:
    import aiohttp  # noqa: PLC0415

    target, shown = url, public_url(url)
    async with _Session(policy) as (session, guard):
        for _hop in range(MAX_REDIRECTS + 1):
            try:
                status, location = await _send(session, path, target, policy, report)
            except TimeoutError as exc:
                message = f"{shown} took nothing for {policy.stall_timeout_s:g} s"
                raise Unavailable(message, code="export_unavailable") from exc
            except aiohttp.InvalidURL as exc:
                raise forbidden(f"{shown} is not a URL that can be asked") from exc
            except (aiohttp.ClientError, OSError) as exc:
                if guard.refused is not None:
                    raise forbidden(f"{shown} is at {guard.refused}, which is not a public address") from exc
                raise Unavailable(
                    f"the upload to {shown} failed: {type(exc).__name__}", code="export_unavailable"
                ) from exc
            if status not in _REDIRECTS:
                return _check(status, shown)
            target = _next(target, location, status)
    raise forbidden(f"{shown} redirects more than {MAX_REDIRECTS} times")


async def _send(
    session: aiohttp.ClientSession, path: Path, url: str, policy: ExportPolicy, report: Callable[[int, int], None]
) -> tuple[int, str | None]:
    """Send the whole file; status and Location. `TimeoutError` where nothing moves for the stall limit."""
    loop, limit_s = asyncio.get_running_loop(), policy.stall_timeout_s
    size = (await asyncio.to_thread(path.stat)).st_size

    async def body() -> AsyncIterator[bytes]:
        done = 0
        with await asyncio.to_thread(path.open, "rb", buffering=0) as file:
            while done < size:
                chunk = await asyncio.to_thread(file.read, min(CHUNK, size - done))
                if not chunk:
                    raise OSError("the export became shorter while it was sent")
                done += len(chunk)
                limit.reschedule(loop.time() + limit_s)
                report(done, size)
                yield chunk
        limit.reschedule(loop.time() + limit_s)

    headers = {"Content-Length": str(size), "Content-Type": "application/octet-stream"}
    async with asyncio.timeout(limit_s) as limit:
        async with session.put(url, data=body(), headers=headers, allow_redirects=False) as response:
            return response.status, response.headers.get("Location")


def _next(url: str, location: str | None, status: int) -> str:
    """Where a redirect leads. Only to the same server: the data are meant for nobody else."""
    import yarl  # noqa: PLC0415 - comes with aiohttp

    shown = public_url(url)
    if location is None or status not in _KEEPING_METHOD:
        raise FailedPrecondition(f"{shown} answered {status} to a PUT", code="export_refused", status=status)
    try:
        old = yarl.URL(url)
        new = old.join(yarl.URL(location))
        same = (old.scheme, old.host, old.port, "@" in new.raw_authority) == (new.scheme, new.host, new.port, False)
    except ValueError as exc:
        raise forbidden(f"{shown} redirects to what is not a URL") from exc
    if not same:
        raise forbidden(f"{shown} redirects to another server, which does not get the data")
    return str(new)


def _check(status: int, shown: str) -> None:
    """Turn a status that is no success into the error it stands for."""
    if 200 <= status < 300:
        return
    error: ComputeError = FailedPrecondition(
        f"{shown} answered {status}; it does not take the upload", code="export_refused", status=status
    )
    if status >= 500 or status in _BUSY:
        error = Unavailable(f"{shown} answered {status}", code="export_unavailable", status=status)
    raise error
