"""The process's one libvirt event loop: a daemon thread that runs for ever.

libvirt allows one event loop implementation per process; it must be registered before the first connection is
opened and can never be replaced or stopped. Connections and timers come and go on it. If its thread stalls, the
daemon's keepalive disconnects us, so nothing that blocks may run in a callback.
"""

from __future__ import annotations

import threading
import time

import structlog

from agent.drivers.libvirt.binding import libvirt

_log = structlog.get_logger(__name__)
_lock = threading.Lock()
_started = False


def ensure_running() -> None:
    """Start the event loop's thread unless it runs. Idempotent; safe from any thread."""
    global _started  # noqa: PLW0603 - libvirt's event loop is a property of the process
    with _lock:
        if _started:
            return
        libvirt.virEventRegisterDefaultImpl()
        threading.Thread(target=_run, name="libvirt-events", daemon=True).start()
        _started = True


def _run() -> None:
    while True:
        try:
            failed = libvirt.virEventRunDefaultImpl() < 0
        except libvirt.libvirtError as exc:
            failed = True
            _log.warning("libvirt.eventloop.failed", error=str(exc))
        if failed:
            # Never give up, since no other thread can take over; never spin either. No event can end this wait, since
            # it is the loop itself that failed.
            time.sleep(0.1)
