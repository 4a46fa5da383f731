"""One thread that runs functions at their time: guests that react, and events that are delivered in order."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import structlog

_log = structlog.get_logger(__name__)
_Entry = tuple[float, int, Callable[..., None], tuple[Any, ...]]


class Timers:
    """A heap of what is due. Functions run one after the other and must not block; errors are logged."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._heap: list[_Entry] = []
        self._order = itertools.count()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to run what is due. Idempotent."""
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()

    def stop(self) -> None:
        """Forget what waits and end the thread, waiting at most a second for it. Idempotent."""
        with self._changed:
            thread, self._thread = self._thread, None
            self._heap.clear()
            self._changed.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join(1.0)

    def post(self, fn: Callable[..., None], *args: Any) -> None:
        """Run a function as soon as possible, after those posted before. Without a thread: nothing."""
        self._push(0.0, fn, args)

    def after(self, delay_s: float, fn: Callable[..., None], *args: Any) -> None:
        """Run a function in `delay_s` seconds. Without a thread: nothing."""
        self._push(time.monotonic() + max(0.0, delay_s), fn, args)

    def _push(self, due: float, fn: Callable[..., None], args: tuple[Any, ...]) -> None:
        with self._changed:
            if self._thread is None:
                return
            entry = (due, next(self._order), fn, args)
            heapq.heappush(self._heap, entry)
            if self._heap[0] is entry:
                self._changed.notify()

    def _run(self) -> None:
        me = threading.current_thread()
        while True:
            with self._changed:
                while self._thread is me and (not self._heap or self._heap[0][0] > time.monotonic()):
                    # Without a limit when nothing waits: a daemon thread, woken by `post`, `after` and `stop`.
                    self._changed.wait(max(0.0, self._heap[0][0] - time.monotonic()) if self._heap else None)
                if self._thread is not me:
                    return
                _, _, fn, args = heapq.heappop(self._heap)
            try:
                fn(*args)
            except Exception:
                _log.exception("fake.timer_failed", function=getattr(fn, "__name__", repr(fn)))
            del fn, args
