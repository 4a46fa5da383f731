"""An HTTP server that takes uploads and gives them back, and may fail, redirect or stall before it does."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Self

from aiohttp import web


@dataclass
class Uploads:
    """An async context manager. `answers` are given first, one per request; then every PUT is taken."""

    answers: list[int] = field(default_factory=list)
    location: str = ""
    received: dict[str, str] = field(default_factory=dict)
    bodies: dict[str, bytes] = field(default_factory=dict)
    lengths: list[int | None] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    port: int = 0

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=1 << 32)
        app.router.add_route("*", "/{name:.*}", self._take)
        self._runner = web.AppRunner(app, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self._runner.cleanup()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.port}/{name}"

    async def _take(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        self.requests.append(request.method)
        if request.method == "DELETE":
            found = self.received.pop(name, None)
            return web.Response(status=204 if found else 404)
        if request.method in {"GET", "HEAD"}:
            return web.Response(body=self.bodies[name]) if name in self.received else web.Response(status=404)
        self.lengths.append(request.content_length)
        if self.answers:
            status = self.answers.pop(0)
            if status == 0:  # reads some and cuts the connection
                await request.content.readany()
                assert request.transport is not None
                request.transport.abort()
            return web.Response(status=status or 500, headers={"Location": self.location} if self.location else None)
        body = await request.read()
        self.bodies[name] = body
        self.received[name] = hashlib.sha256(body).hexdigest()
        return web.Response(status=201)
