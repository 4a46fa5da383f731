"""systemd's notification protocol: one datagram to `$NOTIFY_SOCKET`. Does nothing where systemd is not there."""

from __future__ import annotations

import os
import socket

import structlog

log = structlog.get_logger("notify")


def notify(*lines: str) -> bool:
    """Send state lines such as `READY=1`. True if they were sent; never raises, never blocks."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]  # Linux's abstract namespace
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.setblocking(False)
            sock.sendto("\n".join(lines).encode(), address)
    except OSError as exc:
        log.warning("notify.failed", error=str(exc))
        return False
    return True


def watchdog_interval_s() -> float | None:
    """How often systemd wants to be fed: half of its limit; None if it does not watch this process."""
    limit_us = os.environ.get("WATCHDOG_USEC", "")
    pid = os.environ.get("WATCHDOG_PID")
    if not limit_us.isdigit() or (pid and pid != str(os.getpid())):
        return None
    return int(limit_us) / 1_000_000 / 2
