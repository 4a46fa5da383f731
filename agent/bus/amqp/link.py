"""Keeps one connection up for ever, and on it the parts that need one: publisher, topology, consumers.

One task owns the reconnecting. A part that breaks alone (its channel was closed, its queue deleted) is opened
again on the same connection, with growing pauses.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Protocol

import structlog
from aiormq.exceptions import AMQPError

from agent.bus.amqp.session import Session
from agent.bus.amqp.settings import AmqpSettings
from agent.errors import ComputeError, InvalidArgument, Unavailable

log = structlog.get_logger("bus")

_FIRST_RETRY_S = 0.1


class Part(Protocol):
    """Something that lives on a connection and has to be renewed with it."""

    required: bool
    """Whether the link counts as up only while this part is open."""

    @property
    def is_open(self) -> bool: ...

    def describe(self) -> str:
        """Name it for the log."""

    async def open(self, session: Session) -> None:
        """Bring it up. Raises a `ComputeError` or an error of aiormq; it is called again after a pause."""

    def lost(self) -> None:
        """The connection is gone."""


class Link:
    """A connection that comes back. `on_change` is called whenever `up` may have changed."""

    def __init__(self, settings: AmqpSettings, *, name: str, on_change: Callable[[], None]) -> None:
        self.parts: list[Part] = []
        self.session: Session | None = None
        self.reconnects = 0
        self.blocked_count = 0
        self._settings = settings
        self._name = name
        self._on_change = on_change
        self._ready = False
        self._closed = False
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._opening = asyncio.Lock()

    @property
    def up(self) -> bool:
        """Whether the connection stands and everything on it had its chance to come up."""
        if not self._ready or self.session is None or self.session.lost.is_set():
            return False
        return all(part.is_open for part in self.parts if part.required)

    @property
    def blocked(self) -> bool:
        """Whether the broker is short of memory or disk and takes no messages from this connection."""
        return self.session is not None and self.session.tap.blocked

    def live_session(self) -> Session:
        """Return the connection. Raises `Unavailable` while there is none."""
        if self.session is None or self.session.lost.is_set():
            raise Unavailable("The broker is not connected.", code="bus_unavailable")
        return self.session

    async def connect(self, timeout_s: float) -> None:
        """Connect for the first time; repeats until `timeout_s` is over.

        Raises `InvalidArgument` where the broker refuses us, `Unavailable` when the time is over.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        self._closed = False
        pause = _FIRST_RETRY_S
        while True:
            left = max(deadline - loop.time(), 0.001)
            try:
                session = await self._open_session(min(self._settings.connect_timeout_s, left))
                break
            except Unavailable:
                left = deadline - loop.time()
                if left <= 0:
                    raise
                await asyncio.sleep(min(pause, left))
                pause = min(pause * 2, self._settings.reconnect_max_s, 2.0)
        self.session = session
        await self._restore()
        self._task = asyncio.create_task(self._run(), name=f"bus-{self._name}")
        self._task.add_done_callback(self._report_end)

    async def close(self) -> None:
        """End the connection and its owner. Idempotent; bounded."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,), timeout=10.0)
        self._ready = False
        session, self.session = self.session, None
        self._lose_parts()
        if session is not None:
            await session.close()

    def flush(self) -> None:
        """Send what the sinks have gathered for the end of this turn of the loop."""
        if self.session is not None:
            for sink in tuple(self.session.tap.sinks.values()):
                sink.flush()

    async def add(self, part: Part) -> None:
        """Open a part now and keep it from then on. Raises what its `open` raises; it is not kept then."""
        async with self._opening:
            await part.open(self.live_session())
            self.parts.append(part)

    def remove(self, part: Part) -> None:
        if part in self.parts:
            self.parts.remove(part)

    def check(self) -> None:
        """A part has broken: open it again soon."""
        self._on_change()
        self._wake.set()

    async def _run(self) -> None:
        retry_s = _FIRST_RETRY_S
        while not self._closed:
            session = self.session
            if session is None or session.lost.is_set():
                await self._reconnect()
                retry_s = _FIRST_RETRY_S
            elif all(part.is_open for part in self.parts):
                retry_s = _FIRST_RETRY_S
                await self._woken_or_lost(session, None)
            else:
                await self._woken_or_lost(session, retry_s)
                retry_s = min(retry_s * 2, max(self._settings.reconnect_max_s, _FIRST_RETRY_S))
                await self._restore()

    async def _woken_or_lost(self, session: Session, timeout_s: float | None) -> None:
        """Wait for a lost connection, and for a broken part (no timeout) or the time of its retry."""
        waiting = [asyncio.ensure_future(session.lost.wait())]
        if timeout_s is None:
            waiting.append(asyncio.ensure_future(self._wake.wait()))
        try:
            # Without a limit only while all is well: the heartbeat ends the wait when it is not.
            await asyncio.wait(waiting, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()
        self._wake.clear()

    def _session_lost(self) -> None:
        session, self.session = self.session, None
        if session is not None:
            self.blocked_count += session.tap.blocked_count
            log.warning(
                "bus.lost",
                connection=self._name,
                reason=session.tap.close_reason[1] if session.tap.close_reason else None,
            )
        self._ready = False
        self._lose_parts()

    def _lose_parts(self) -> None:
        for part in self.parts:
            part.lost()
        self._on_change()

    async def _reconnect(self) -> None:
        old = self.session
        self._session_lost()
        delay = self._settings.reconnect_delay_s()
        log.info("bus.reconnecting", connection=self._name, in_s=round(delay, 2))
        await asyncio.sleep(delay)
        if old is not None:
            old.tap.abort()  # aiormq has closed it by now; if it hangs, it ends here
        try:
            session = await self._open_session(self._settings.connect_timeout_s)
        except (Unavailable, InvalidArgument) as exc:
            # Also a refused login is tried for ever: somebody will put it right without restarting a fleet.
            log.warning("bus.connect_failed", connection=self._name, code=exc.code, error=exc.message)
            return
        self.session = session
        self.reconnects += 1
        await self._restore()

    async def _open_session(self, timeout_s: float) -> Session:
        session = await Session.open(self._settings, self._name, timeout_s)
        log.info("bus.connected", connection=self._name, broker=self._settings.address)
        return session

    async def _restore(self) -> None:
        """Open what is not open. One failing part does not keep the others down."""
        async with self._opening:
            for part in tuple(self.parts):
                session = self.session
                if session is None or session.lost.is_set():
                    return
                if part.is_open:
                    continue
                try:
                    await part.open(session)
                except (ComputeError, AMQPError) as exc:
                    log.warning("bus.part_failed", part=part.describe(), error=str(exc) or repr(exc))
                except Exception:
                    log.exception("bus.part_failed", part=part.describe())
        self._ready = self.session is not None and not self.session.lost.is_set()
        self._on_change()

    def _report_end(self, task: asyncio.Task[None]) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            if (error := task.exception()) is not None:
                log.error("bus.owner_died", connection=self._name, exc_info=error)
