"""Ends the waiting of driver threads when there may be something new about their domain.

A wait is a hint's, never a proof's: whoever is woken looks, and looks again after a while if nobody woke him.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from agent.drivers.base import CallContext, ConnectionChanged, DriverEvent, Reported


class Wakeups:
    """Which threads wait for something new of which domain. All methods are thread-safe; none blocks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[str, set[threading.Event]] = {}

    def take(self, event: DriverEvent) -> None:
        """Wake who waits for the domain of this event; all of them, if the connection was lost or came back."""
        with self._lock:
            if isinstance(event, ConnectionChanged):
                woken = [waiting for waitings in self._waiting.values() for waiting in waitings]
            else:
                instance_id = event.event.instance_id if isinstance(event, Reported) else event.instance_id
                woken = [*self._waiting.get(instance_id, ())]
        for waiting in woken:
            waiting.set()

    @contextlib.contextmanager
    def listening(self, instance_id: str, call: CallContext) -> Iterator[threading.Event]:
        """Give an event that is set when there may be something new of the domain, and when the call is cancelled.

        Clear it, look, wait: what comes after the look ends the wait.
        """
        waiting = threading.Event()
        with self._lock:
            self._waiting.setdefault(instance_id, set()).add(waiting)
        try:
            with call.waking(waiting):
                yield waiting
        finally:
            with self._lock:
                others = self._waiting[instance_id]
                others.discard(waiting)
                if not others:
                    del self._waiting[instance_id]
