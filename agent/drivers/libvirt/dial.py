"""Opens libvirt connections with a limit, and gives each worker thread one of its own.

libvirt's `open` cannot be cancelled: a frozen daemon accepts the socket and never answers. So it runs in a thread
that is left behind at the limit; a later attempt waits for the same thread, so that there is never more than one
per dialer. Worker threads do not share a connection, because libvirtd serves at most five requests of one client
at a time, and five calls that hang on a frozen QEMU would block all others.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any, Final

from agent.drivers.libvirt import errors
from agent.drivers.libvirt.binding import libvirt
from agent.errors import Unavailable

KEEPALIVE_INTERVAL_S: Final = 5
KEEPALIVE_COUNT: Final = 3
"""A connection whose daemon is silent for interval * (count + 1) = 20 s counts as lost, and its calls fail."""


def close_quietly(connection: Any) -> None:
    """Close a connection that may be dead already."""
    with contextlib.suppress(libvirt.libvirtError):
        connection.close()


class _Attempt:
    """One `open` in a thread of its own."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._lock = threading.Lock()
        self._abandoned = False
        self._connection: Any = None
        self.error: Unavailable | None = None
        self.done = threading.Event()
        threading.Thread(target=self._run, name="libvirt-open", daemon=True).start()

    def _run(self) -> None:
        try:
            connection = libvirt.open(self._uri)
            self._keep_alive(connection)
        except libvirt.libvirtError as exc:
            error = errors.translate(exc)
            # Whatever keeps us from connecting, the caller cannot ask the hypervisor; the code keeps the cause.
            self.error = error if isinstance(error, Unavailable) else Unavailable(error.message, code=error.code)
            # Not `raise ... from`: the error crosses to another thread, which raises it.
            self.error.__cause__ = exc
        else:
            with self._lock:
                abandoned = self._abandoned
                if not abandoned:
                    self._connection = connection
            if abandoned:
                close_quietly(connection)
        self.done.set()

    @staticmethod
    def _keep_alive(connection: Any) -> None:
        try:
            connection.setKeepAlive(KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT)
        except libvirt.libvirtError as exc:
            # The in-process simulation has no link that could fail.
            if not errors.is_code(exc, "VIR_ERR_NO_SUPPORT"):
                raise

    def take(self) -> Any:
        with self._lock:
            connection, self._connection = self._connection, None
        return connection

    def abandon(self) -> None:
        """Close the connection whenever it comes."""
        with self._lock:
            self._abandoned = True
        connection = self.take()
        if connection is not None:
            close_quietly(connection)


class Dialer:
    """Opens connections to one URI; belongs to one thread at a time."""

    def __init__(self, uri: str, timeout_s: float) -> None:
        self._uri = uri
        self._timeout_s = timeout_s
        self._attempt: _Attempt | None = None

    def dial(self) -> Any:
        """Return a new connection with keepalive. Raises `Unavailable`; a retry can help."""
        attempt = self._attempt or _Attempt(self._uri)
        self._attempt = attempt
        if not attempt.done.wait(self._timeout_s):
            raise Unavailable(
                f"the hypervisor did not answer within {self._timeout_s:g} s", code="hypervisor_unreachable"
            )
        self._attempt = None
        if attempt.error is not None:
            raise attempt.error
        return attempt.take()

    def abandon(self) -> None:
        """Give up an attempt that has not ended. Idempotent."""
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            attempt.abandon()


class Slot:
    """One worker thread's connection. `lock` is held during a call, so that others see that it is in use."""

    def __init__(self, uri: str, timeout_s: float) -> None:
        self.lock = threading.Lock()
        self._dialer = Dialer(uri, timeout_s)
        self._connection: Any = None
        self._epoch = -1

    def connection(self, epoch: int) -> Any:
        """Return a live connection of this epoch; opens one if need be. Raises like `Dialer.dial`."""
        if self._connection is not None and (self._epoch != epoch or not self._alive()):
            self.drop()
        if self._connection is None:
            self._connection = self._dialer.dial()
            self._epoch = epoch
        return self._connection

    def _alive(self) -> bool:
        # Looks at the local socket only.
        try:
            return bool(self._connection.isAlive())
        except libvirt.libvirtError:
            return False

    def drop(self) -> None:
        """Close the connection. The caller holds `lock`. Idempotent."""
        self._dialer.abandon()
        connection, self._connection = self._connection, None
        if connection is not None:
            close_quietly(connection)
