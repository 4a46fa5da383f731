"""`/livez`, `/readyz`, `/metrics` over HTTP on the agent's own loop, and the systemd watchdog.

Being on the loop is the point: if the loop hangs, `/livez` does not answer and the watchdog is not fed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from agent import metrics
from agent.errors import InvalidArgument
from agent.notify import notify

log = structlog.get_logger("health")

REQUEST_LIMIT = 8192
READ_TIMEOUT_S = 5.0
Readiness = Callable[[], dict[str, str]]
"""Returns what keeps the agent from being ready: name → sentence. Empty: ready."""


class HealthServer:
    """A minimal HTTP/1.1 server: GET only, one request per connection, no framework to keep in memory."""

    def __init__(self, address: str, readiness: Readiness) -> None:
        self._address = address
        self._readiness = readiness
        self._server: asyncio.Server | None = None

    async def start(self) -> int | None:
        """Listen on `host:port`; an empty address means not at all. Returns the port.

        Raises `InvalidArgument` where the address cannot be used.
        """
        if not self._address:
            return None
        host, _, port = self._address.rpartition(":")
        try:
            self._server = await asyncio.start_server(
                self._serve, host.strip("[]") or "127.0.0.1", int(port), limit=REQUEST_LIMIT
            )
        except (OSError, ValueError, OverflowError) as exc:
            raise InvalidArgument(
                f"health.listen = {self._address!r} cannot be used: {exc}", code="health_address"
            ) from exc
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """Stop listening. Idempotent."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
            await server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                head = await reader.readuntil(b"\r\n\r\n")
                status, kind, body = self._answer(head)
                writer.write(
                    b"HTTP/1.1 %s\r\nContent-Type: %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
                    % (status.encode(), kind.encode(), len(body))
                    + body
                )
                await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            return
        finally:
            writer.close()

    def _answer(self, head: bytes) -> tuple[str, str, bytes]:
        method, _, rest = head.partition(b" ")
        path = rest.partition(b" ")[0].partition(b"?")[0]
        if method != b"GET":
            return "405 Method Not Allowed", "text/plain", b"only GET\n"
        if path == b"/livez":
            return "200 OK", "text/plain", b"ok\n"
        if path == b"/readyz":
            missing = self._readiness()
            if not missing:
                return "200 OK", "text/plain", b"ok\n"
            lines = "".join(f"{name}: {sentence}\n" for name, sentence in sorted(missing.items()))
            return "503 Service Unavailable", "text/plain; charset=utf-8", lines.encode()
        if path == b"/metrics":
            return "200 OK", CONTENT_TYPE_LATEST, generate_latest(metrics.REGISTRY)
        return "404 Not Found", "text/plain", b"there are /livez, /readyz and /metrics\n"


class Watchdog:
    """Feeds systemd while the agent makes progress: the loop is on time, and lanes that have work move.

    A lane that waits for a stuck hypervisor call is no reason to restart: the call would only be stuck again.
    """

    def __init__(self, interval_s: float, moving: Callable[[], bool]) -> None:
        self._interval_s = interval_s
        self._moving = moving

    async def run(self) -> None:
        """Feed until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + self._interval_s
            await asyncio.sleep(self._interval_s)
            lag_s = loop.time() - due
            metrics.LOOP_LAG.set(lag_s)
            if lag_s < self._interval_s and self._moving():
                notify("WATCHDOG=1")
            else:
                log.error("watchdog.not_fed", loop_lag_s=round(lag_s, 3))
