"""Processes and ports: what every private server of this package needs.

A server may outlive the Python process that started it, and be ended by another one. So a process is named by
its pid *and* its start time, which together are never reused, and is kept in a small JSON file. Everything
here is synchronous and safe to use from several threads and processes.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Below the range that the kernel hands out to outgoing connections (32768 and up by default): a server that
# is restarted on its port must not find it taken by somebody's client socket.
_FIRST_PORT = 20000
_LAST_PORT = 31999


class DevstackError(RuntimeError):
    """A private server could not be started, asked or ended; the message says what to look at."""


@dataclass(frozen=True)
class ProcessRef:
    """One process, and no later one that got the same pid."""

    pid: int
    start_ticks: int

    @classmethod
    def of(cls, pid: int) -> ProcessRef | None:
        """Return the reference for a pid, or None when no such process runs (a zombie does not run)."""
        fields = _stat_fields(pid)
        if fields is None or fields[0] in "ZX":
            return None
        return cls(pid, int(fields[19]))

    @property
    def alive(self) -> bool:
        """True while this very process runs."""
        return ProcessRef.of(self.pid) == self

    def send(self, signal_number: int) -> bool:
        """Send a signal; False when the process is gone. Idempotent as far as the signal is."""
        if not self.alive:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal_number)
            return True
        return False

    def wait_gone(self, timeout_s: float) -> bool:
        """Wait at most ``timeout_s`` seconds for the end of the process; True when it has ended."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return True
        try:
            if not self.alive:
                return True
            poller = select.poll()
            poller.register(descriptor, select.POLLIN)
            return bool(poller.poll(max(0.0, timeout_s) * 1000))
        finally:
            os.close(descriptor)

    def end(self, grace_s: float) -> None:
        """Ask the process to end, and kill it after ``grace_s`` seconds. Idempotent.

        Raises:
            DevstackError: it is still there 10 seconds after SIGKILL (uninterruptible sleep).

        """
        if grace_s > 0 and self.send(signal.SIGTERM):
            # A stopped process gets SIGTERM only when it goes on.
            self.send(signal.SIGCONT)
            if self.wait_gone(grace_s):
                return
        if self.send(signal.SIGKILL) and not self.wait_gone(10.0):
            raise DevstackError(f"process {self.pid} survives SIGKILL; see /proc/{self.pid}/stack")


def _stat_fields(pid: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat from the state on, or None without such a process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command name stands in parentheses and may contain anything, also ")".
    return text.rpartition(")")[2].split()


def all_pids() -> Iterator[int]:
    """Yield the pids of this pid namespace."""
    for name in os.listdir("/proc"):
        if name.isdigit():
            yield int(name)


def pids_with_environment(name: str, value: str) -> list[int]:
    """Return the running processes that were started with ``name=value`` in their environment."""
    wanted = f"{name}={value}".encode()
    found = []
    for pid in all_pids():
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            continue
        if wanted in environment.split(b"\0") and ProcessRef.of(pid) is not None:
            found.append(pid)
    return found


def children_of(pid: int) -> list[int]:
    """Return the direct children of a process (empty when it is gone)."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                text = Path(f"/proc/{pid}/task/{task}/children").read_text(encoding="ascii")
                found.extend(int(word) for word in text.split())
    return found


def wait_until(ready: Callable[[], bool], timeout_s: float, interval_s: float = 0.05) -> bool:
    """Call ``ready`` every ``interval_s`` seconds until it is true; False after ``timeout_s`` seconds.

    For conditions that nothing announces, such as "the server's port answers".
    """
    deadline = time.monotonic() + timeout_s
    while True:
        if ready():
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(interval_s)


class PortLease:
    """A TCP port of 127.0.0.1 that no other user of this module gets until ``release``.

    The lease is an abstract Unix socket named after the port: the kernel frees it when the process dies, and
    its scope, the network namespace, is also that of the port.
    """

    def __init__(self, port: int, lock: socket.socket | None) -> None:
        """Use ``acquire`` instead."""
        self.port = port
        self._lock = lock

    @classmethod
    def acquire(cls, port: int | None = None) -> PortLease:
        """Lease ``port``, or any free one.

        Raises:
            DevstackError: the given port is leased already, or no port is free.

        """
        candidates = [port] if port is not None else random.sample(range(_FIRST_PORT, _LAST_PORT + 1), 200)
        for candidate in candidates:
            lock = _lock_port(candidate)
            if lock is None:
                continue
            # A given port may be in use by the very server that the caller is about to attach to.
            if port is not None or _bindable(candidate):
                return cls(candidate, lock)
            lock.close()
        raise DevstackError(f"port {port} is leased by another process" if port else "no free TCP port was found")

    def release(self) -> None:
        """Give the port up. Idempotent."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _lock_port(port: int) -> socket.socket | None:
    lock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        lock.bind(f"\0compute-agent-devstack-port-{port}")
    except OSError:
        lock.close()
        return None
    return lock


def _bindable(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def tail(path: Path, lines: int = 15) -> str:
    """Return the last lines of a log for an error message; empty when it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


def run_tool(
    command: Sequence[str], arguments: Sequence[str], *, environment: Mapping[str, str], cwd: Path, timeout_s: float
) -> str:
    """Run a command-line tool to its end and return what it prints.

    Raises:
        DevstackError: it exits with an error, which is in the message, or takes longer than ``timeout_s``.

    """
    said = f"{Path(command[0]).name} {' '.join(arguments)}"
    try:
        done = subprocess.run(
            [*command, *arguments], env=environment, cwd=cwd, timeout=timeout_s, check=False,
            stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise DevstackError(f"{said} took more than {timeout_s:g} s") from error
    if done.returncode != 0:
        raise DevstackError(f"{said}: {(done.stderr or done.stdout).strip()}")
    return done.stdout
