"""What ``rabbitmq`` needs of the host: the installed scripts and plugins, and Erlang's port mapper."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from pathlib import Path

from devstack.process import DevstackError, PortLease, ProcessRef, tail, wait_until

# The scripts below the wrappers in /usr/sbin: those change the user and refuse everybody but root and
# rabbitmq.
_SCRIPT_DIRECTORIES = ("/usr/lib/rabbitmq/bin", "/opt/rabbitmq/sbin", "/usr/local/sbin", "/usr/sbin")
_CORE_PLUGINS = ("rabbitmq_prelaunch", "rabbitmq_auth_mechanism_ssl")


class Epmd:
    """Erlang's port mapper for the nodes of one broker or cluster, on a port and a life of its own."""

    def __init__(self, directory: Path, *, port: int | None = None) -> None:
        """Prepare a port mapper that logs to ``directory``; nothing runs before ``start``."""
        self._log = directory / "epmd.log"
        self._lease = PortLease.acquire(port)
        self._process: subprocess.Popen[bytes] | None = None
        self.ref: ProcessRef | None = None

    @property
    def port(self) -> int:
        """The TCP port on 127.0.0.1."""
        return self._lease.port

    def start(self, timeout_s: float = 10.0) -> None:
        """Start the daemon and wait until it listens. Idempotent.

        Raises:
            DevstackError: no ``epmd`` is installed or it does not listen in time.

        """
        if self.ref is not None and self.ref.alive:
            return
        binary = shutil.which("epmd")
        if binary is None:
            raise DevstackError("epmd is not installed; run devstack/bootstrap.sh packages")
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [binary, "-address", "127.0.0.1", "-port", str(self.port)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd="/",
            )  # fmt: skip
        self.ref = ProcessRef.of(self._process.pid)
        if not wait_until(lambda: _accepts(self.port), timeout_s, 0.01):
            self.stop()
            raise DevstackError(f"epmd does not listen on port {self.port}: {tail(self._log)}")

    def stop(self) -> None:
        """End the daemon and give up its port. Idempotent."""
        if self.ref is not None:
            self.ref.end(0.0)  # it keeps nothing that a SIGKILL could lose
            self.ref = None
        reap(self._process)
        self._lease.release()


def reap(process: subprocess.Popen[bytes] | None, timeout_s: float = 5.0) -> None:
    """Take the exit status of a child that has ended or is about to, so that no zombie stays."""
    if process is not None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=timeout_s)


def _accepts(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
        return True
    return False


def link_core_plugins(directory: Path) -> None:
    """Link the plugins that the broker itself needs: reading all of them costs a second per boot."""
    directory.mkdir(exist_ok=True)
    installed = Path(script("rabbitmq-server")).resolve().parent.parent / "plugins"
    for entry in installed.iterdir():
        optional = entry.name.startswith("rabbitmq_") and not entry.name.startswith(_CORE_PLUGINS)
        link = directory / entry.name
        if not optional and not link.is_symlink():
            link.symlink_to(entry)


def script(name: str) -> str:
    """Return the path of one of RabbitMQ's scripts; DevstackError when it is not installed."""
    for directory in _SCRIPT_DIRECTORIES:
        if os.access(path := os.path.join(directory, name), os.X_OK):
            return path
    raise DevstackError(f"{name} is not installed; run devstack/bootstrap.sh packages")
