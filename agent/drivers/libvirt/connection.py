"""The link to the hypervisor: one connection for events, watched and reopened, and one per worker thread for calls.

A thread of our own reconnects, with growing, jittered pauses; libvirt's callbacks only set flags and wake it. While
the link is down, calls fail at once. Every reopening starts a new epoch, in which all older connections are dead.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
import weakref
from collections.abc import Iterator
from functools import cache
from typing import Any, Final

import structlog

from agent.drivers.base import CallContext, ConnectionChanged, DriverEvent, EventSink
from agent.drivers.libvirt import errors, eventloop
from agent.drivers.libvirt.binding import constant, libvirt
from agent.drivers.libvirt.dial import Dialer, Slot, close_quietly
from agent.drivers.libvirt.events import Subscription
from agent.drivers.libvirt.settings import LibvirtSettings
from agent.drivers.libvirt.wakeups import Wakeups
from agent.errors import ComputeError, Unavailable

_log = structlog.get_logger(__name__)
_random = secrets.SystemRandom()

_CHECK_S: Final = 5.0
"""How often the event connection is looked at (without a call), should its close callback be missed."""
_FIRST_PAUSE_S: Final = 0.2
_STABLE_S: Final = 10.0
"""A session that lived this long starts the pauses from the beginning."""
_CLOSE_S: Final = 5.0


class _Session:
    """The event connection of one epoch."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.subscription: Subscription | None = None
        self.lost = False
        self.since = time.monotonic()

    def alive(self) -> bool:
        """Look at the local socket; no call."""
        try:
            return not self.lost and bool(self.connection.isAlive())
        except libvirt.libvirtError:
            return False

    def end(self) -> None:
        """Let go of the connection. Not on the event loop's thread, since it may wait for the daemon."""
        if self.subscription is not None:
            self.subscription.end()
        with contextlib.suppress(libvirt.libvirtError):
            self.connection.unregisterCloseCallback()
        close_quietly(self.connection)


@cache
def _close_reasons() -> dict[int | None, str]:
    words = {
        "ERROR": "the connection failed",
        "EOF": "the daemon ended the connection",
        "KEEPALIVE": "the daemon does not answer",
        "CLIENT": "closed by us",
    }
    return {constant(f"VIR_CONNECT_CLOSE_REASON_{name}"): word for name, word in words.items()}


class Link:
    """Connections to one hypervisor. All methods are thread-safe."""

    def __init__(self, settings: LibvirtSettings, emit: EventSink) -> None:
        self._settings = settings
        self._sink = emit
        self._wakeups = Wakeups()
        self._state = threading.RLock()
        self._attempting = threading.Lock()
        self._dialer = Dialer(settings.uri, settings.connect_timeout_s)
        self._session: _Session | None = None
        self._buried: list[_Session] = []
        self._announced = True
        self._pause_s = _FIRST_PAUSE_S
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._local = threading.local()
        self._slots: weakref.WeakSet[Slot] = weakref.WeakSet()
        self.epoch = 0

    @property
    def connected(self) -> bool:
        """True while calls can be made; no call."""
        return self._session is not None

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of events registered on the present session."""
        session = self._session
        return frozenset(session.subscription.kinds) if session and session.subscription else frozenset()

    def open(self) -> None:
        """Connect now, and stay connected until `close`. Idempotent. Raises `Unavailable`; a retry can help."""
        eventloop.ensure_running()
        with self._state:
            if self._thread is None:
                self._stop, self._wake = threading.Event(), threading.Event()
        if self._session is None:
            if not self._attempting.acquire(timeout=self._settings.connect_timeout_s):
                raise Unavailable("the hypervisor does not answer", code="hypervisor_unreachable")
            try:
                self._attempt(self._stop)
            finally:
                self._attempting.release()
        with self._state:
            if self._thread is None:
                self._thread = threading.Thread(target=self._keep, name="libvirt-link", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """End all connections and the reconnecting. Waits a few seconds at most. Idempotent."""
        with self._state:
            session, self._session = self._session, None
            thread, self._thread = self._thread, None
            self._announced = True
            self._stop.set()
            self._wake.set()
        if thread is not None:
            thread.join(_CLOSE_S)
        if session is not None:
            # A frozen daemon would hold us until the keepalive ends it.
            ending = threading.Thread(target=session.end, name="libvirt-close", daemon=True)
            ending.start()
            ending.join(_CLOSE_S)
        self._drop_idle_slots()

    @contextlib.contextmanager
    def call(self) -> Iterator[Any]:
        """Give this thread's connection for a few calls, and translate what they raise. Not to be nested.

        The caller keeps no libvirt object beyond the block. Raises `Unavailable` while the link is down.
        """
        session = self._session
        if session is None:
            raise Unavailable(
                "the connection to the hypervisor is lost; it is being reopened", code="hypervisor_unreachable"
            )
        if self._settings.in_process:
            # The simulation's state hangs on its connection, and it has no limit on requests.
            with self._translated(None):
                yield session.connection
            return
        slot = self._slot()
        with slot.lock, self._translated(slot):
            yield slot.connection(self.epoch)

    def listening(self, instance_id: str, call: CallContext) -> contextlib.AbstractContextManager[threading.Event]:
        """Give an event to wait on between two looks at a domain; see `Wakeups.listening`."""
        return self._wakeups.listening(instance_id, call)

    @contextlib.contextmanager
    def _translated(self, slot: Slot | None) -> Iterator[None]:
        try:
            yield
        except libvirt.libvirtError as exc:
            if errors.is_lost(exc):
                if slot is not None:
                    slot.drop()
                # Perhaps only this thread's connection died; the watcher finds out.
                self._wake.set()
            raise errors.translate(exc) from exc

    def _slot(self) -> Slot:
        slot: Slot | None = getattr(self._local, "slot", None)
        if slot is None:
            slot = self._local.slot = Slot(self._settings.uri, self._settings.connect_timeout_s)
            with self._state:
                self._slots.add(slot)
        return slot

    def _drop_idle_slots(self) -> None:
        with self._state:
            slots = list(self._slots)
        for slot in slots:
            # A slot in use belongs to its thread, which finds the epoch changed at its next call.
            if slot.lock.acquire(blocking=False):
                try:
                    slot.drop()
                finally:
                    slot.lock.release()

    # --- losing and finding ---------------------------------------------------------------------------------------

    def _attempt(self, stop: threading.Event) -> None:
        """Open a session if there is none. The caller holds `_attempting`. Raises `Unavailable`."""
        if self._session is not None:
            return
        session = _Session(self._dialer.dial())
        try:
            session.connection.registerCloseCallback(self._on_close, session)
            session.subscription = Subscription(session.connection, self._emit)
            version = session.connection.getLibVersion()
        except libvirt.libvirtError as exc:
            session.end()
            raise Unavailable(
                f"the hypervisor failed while it was connected to: {exc}", code="hypervisor_unreachable"
            ) from exc
        with self._state:
            usable = not session.lost and not stop.is_set()
            if usable:
                self._session = session
                self.epoch += 1
                self._announce(True, f"libvirt {format_version(version)}")
        if not usable:
            session.end()
            raise Unavailable("the connection was lost at once", code="hypervisor_unreachable")

    def _emit(self, event: DriverEvent) -> None:
        self._wakeups.take(event)
        self._sink(event)

    def _announce(self, connected: bool, detail: str) -> None:
        # Under the lock, so that a loss is never announced after the return that follows it.
        if self._announced != connected:
            self._announced = connected
            self._emit(ConnectionChanged(connected, detail))

    def _on_close(self, _connection: Any, reason: int, session: _Session) -> None:
        # Runs on the event loop's thread, or in a thread that waits in a call on this connection.
        session.lost = True
        self._lose(session, _close_reasons().get(reason, "the connection ended"))

    def _lose(self, session: _Session, detail: str) -> None:
        with self._state:
            if self._session is not session:
                return
            self._session = None
            self._buried.append(session)
            self._announce(False, detail)
        self._wake.set()

    def _keep(self) -> None:
        stop, wake = self._stop, self._wake
        while not stop.is_set():
            wake.wait(_CHECK_S)
            wake.clear()
            try:
                self._look(stop)
            except Exception:
                _log.exception("libvirt.link.failed")
                stop.wait(1.0)

    def _look(self, stop: threading.Event) -> None:
        session = self._session
        if session is not None and not session.alive():
            self._lose(session, "the connection ended")
        while self._buried:
            dead = self._buried.pop()
            dead.end()
            self._drop_idle_slots()
            if time.monotonic() - dead.since >= _STABLE_S:
                self._pause_s = _FIRST_PAUSE_S
            else:
                # A daemon that accepts us and drops us at once must not be hammered.
                self._pause(stop)
        while self._session is None and not stop.is_set():
            try:
                with self._attempting:
                    self._attempt(stop)
            except ComputeError as exc:
                _log.info("libvirt.link.down", error=exc.message, pause_s=round(self._pause_s, 1))
                self._pause(stop)

    def _pause(self, stop: threading.Event) -> None:
        # The jitter keeps the agents of a fleet, or several on one daemon, from returning in step.
        stop.wait(self._pause_s * _random.uniform(0.5, 1.5))
        self._pause_s = min(self._pause_s * 2, self._settings.reconnect_max_s)


def format_version(number: int) -> str:
    """Return libvirt's packed version (major * 1,000,000 + minor * 1,000 + release) as text."""
    return f"{number // 1_000_000}.{number // 1_000 % 1_000}.{number % 1_000}"
