"""The development stack on one host: a broker, a hypervisor daemon, a guest image, the agent.

``python3 -m devstack.stack up|down|status --dir DIR``. ``up`` leaves everything running in the background;
each part is described by a file in DIR, so ``up`` keeps what runs already and ``down`` ends it from any other
shell. The agent is a command to this module: only ``agent_config`` knows what its configuration looks like.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from devstack.guest_image import GuestImage, guest_image
from devstack.libvirtd import PrivateLibvirtd
from devstack.process import DevstackError, ProcessRef, tail
from devstack.rabbitmq import PrivateBroker

_ROOT = Path(__file__).resolve().parent.parent
_IMAGE_CACHE = "guest-image"  # the one folder that `down` keeps
_AGENT_GRACE_S = 35.0  # more than the agent's own limit for a drain


def agent_config(
    *, host: str, amqp_url: str, libvirt_uri: str, state_dir: Path, image_dir: Path, store_dir: Path
) -> str:
    """Return the text of the agent's configuration file (TOML).

    Args:
        host: the name of this hypervisor host on the bus.
        amqp_url: the broker, with credentials.
        libvirt_uri: the connection URI of the libvirt driver.
        state_dir: the agent's own folder: journal, instance disks.
        image_dir: a folder of images that commands may name.
        store_dir: the folder of the store ``main``, for exports, backups and the shelf.

    """

    def quoted(value: object) -> str:
        # A JSON string without non-ASCII escapes of surrogates is also a TOML basic string.
        return json.dumps(str(value), ensure_ascii=False)

    return "\n".join(
        [
            "[agent]",
            f"host = {quoted(host)}",
            f"state_dir = {quoted(state_dir)}",
            "drain_timeout_s = 30",
            "",
            "[bus]",
            f"url = {quoted(amqp_url)}",
            "reconnect_min_s = 0.5",
            "reconnect_max_s = 2",
            "",
            "[driver]",
            'name = "libvirt"',
            "",
            "[driver.settings]",
            f"uri = {quoted(libvirt_uri)}",
            "",
            "[images]",
            f"file_roots = [{quoted(image_dir)}]",
            "",
            "[exports.stores]",
            f"main = {quoted(store_dir)}",
            "",
            "[health]",
            f"listen = {quoted(_health_address())}",
            "",
        ]
    )


def _health_address() -> str:
    """The agent's usual address for health checks, or any free port where another agent has it."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", 9177))
        except OSError:
            return "127.0.0.1:0"
    return "127.0.0.1:9177"


class Agent:
    """The agent as a background process with a log and a pid file."""

    def __init__(self, directory: Path, command: Path) -> None:
        """Remember where its files are and what to run; nothing runs before ``start``."""
        self.config_file = directory / "agent.toml"
        self.log_file = directory / "agent.log"
        self._pid_file = directory / "agent.json"
        self._command = command

    @property
    def ref(self) -> ProcessRef | None:
        """The running process, or None."""
        try:
            pid, start_ticks = json.loads(self._pid_file.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        ref = ProcessRef(pid, start_ticks)
        return ref if ref.alive else None

    def start(self) -> None:
        """Start the agent in a session of its own. Idempotent.

        Raises:
            DevstackError: it is not installed, or it ends within the first second; its log is in the message.

        """
        if self.ref is not None:
            return
        if not os.access(self._command, os.X_OK):
            raise DevstackError(f"{self._command} is missing; run devstack/bootstrap.sh venv")
        with self.log_file.open("ab") as log:
            process = subprocess.Popen(
                [str(self._command), "run", "--config", str(self.config_file)], cwd=self.config_file.parent,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        ref = ProcessRef.of(process.pid)
        try:
            # A mistake in the configuration shows at once; whether the agent is ready is for its own health
            # port.
            process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            assert ref is not None
            self._pid_file.write_text(json.dumps([ref.pid, ref.start_ticks]), encoding="utf-8")
        else:
            raise DevstackError(f"the agent ended at once, status {process.returncode}:\n{tail(self.log_file)}")

    def stop(self) -> None:
        """End the agent: it may drain, then it is killed. Idempotent."""
        ref = self.ref
        if ref is not None:
            ref.end(_AGENT_GRACE_S)
        self._pid_file.unlink(missing_ok=True)


class Stack:
    """All parts of one directory."""

    def __init__(self, directory: Path, agent_command: Path) -> None:
        """Attach to what runs from ``directory``, which is made when it is missing."""
        self.directory = directory.resolve()
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.broker = PrivateBroker(self.directory / "broker")
        self.libvirtd = PrivateLibvirtd(
            self.directory / "host", capabilities_cache=self.directory / _IMAGE_CACHE / "capabilities"
        )
        self.agent = Agent(self.directory, agent_command)

    def up(self, *, host: str, with_agent: bool) -> None:
        """Start what does not run. Idempotent; what runs after a failure is kept by the next ``up``.

        Raises:
            DevstackError: a part does not start; the message names it and shows its log.

        """
        _timed("broker", self.broker.start)
        _timed("libvirtd", self.libvirtd.start)
        image = guest_image(self.directory / _IMAGE_CACHE)
        if self.agent.ref is None:  # a running agent has read its own already
            self._write_config(host, image)
        if with_agent:
            _timed("agent", self.agent.start)
        self.print_status()
        _say(f"guest image   {image.path} (sha256 {image.sha256})")

    def first_boot(self, host: str) -> int:
        """Boot a guest through the broker, as a controller does. Returns the exit status."""
        command = [
            str(_ROOT / ".venv" / "bin" / "python"), "-m", "devstack.first_boot", "--amqp", self.broker.url,
            "--host", host, "--images", str(self.directory / _IMAGE_CACHE),
        ]  # fmt: skip
        return subprocess.run(command, cwd=_ROOT, check=False).returncode

    def down(self) -> None:
        """End everything and remove it, except the cache of the guest image. Idempotent."""
        self.agent.stop()
        self.libvirtd.stop()
        self.broker.close()
        for entry in self.directory.iterdir():
            if entry.name == _IMAGE_CACHE:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        _say("everything is down")

    def print_status(self) -> bool:
        """Print one line per part; True when all of them run."""
        agent = self.agent.ref
        parts = (
            ("broker", self.broker.pid, self.broker.url),
            ("libvirtd", self.libvirtd.pid, self.libvirtd.uri),
            ("agent", agent.pid if agent else None, str(self.agent.log_file)),
        )
        for name, pid, where in parts:
            _say(f"{name:<13} {f'pid {pid}' if pid else 'down':<12} {where if pid else ''}".rstrip())
        guests = self.libvirtd.qemu_pids()
        _say(f"guests        {', '.join(sorted(guests)) or 'none'}")
        return all(pid is not None for _, pid, _ in parts)

    def _write_config(self, host: str, image: GuestImage) -> None:
        state = self.directory / "state"
        state.mkdir(exist_ok=True)
        store = self.directory / "exports"
        store.mkdir(exist_ok=True)
        text = agent_config(
            host=host,
            amqp_url=self.broker.url,
            libvirt_uri=self.libvirtd.uri,
            state_dir=state,
            image_dir=image.path.parent,
            store_dir=store,
        )
        self.agent.config_file.touch(mode=0o600)  # it holds the broker's password
        self.agent.config_file.write_text(text, encoding="utf-8")


def _timed(name: str, start: Callable[[], None]) -> None:
    begin = time.monotonic()
    start()
    _say(f"{name} is up ({time.monotonic() - begin:.1f} s)")


def _say(text: str) -> None:
    print(f"stack: {text}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; exit status 1 on an error or when ``status`` finds a part down, 2 on wrong usage."""
    parser = argparse.ArgumentParser(prog="python3 -m devstack.stack", description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=("up", "down", "status"))
    parser.add_argument("--dir", type=Path, required=True, help="where everything is kept; a short path")
    parser.add_argument("--host", default="devstack", help="the agent's host name on the bus")
    parser.add_argument("--no-agent", action="store_true", help="only the servers and the guest image")
    parser.add_argument("--first-boot", action="store_true", help="then boot a guest and follow it")
    parser.add_argument("--agent-command", type=Path, default=_ROOT / ".venv" / "bin" / "compute-agent")
    options = parser.parse_args(arguments)
    try:
        if options.command == "status" and not options.dir.is_dir():
            raise DevstackError(f"{options.dir} does not exist: nothing runs from there")
        stack = Stack(options.dir, options.agent_command)
        if options.command == "up":
            stack.up(host=options.host, with_agent=not options.no_agent)
            if options.first_boot and not options.no_agent:
                return stack.first_boot(options.host)
        elif options.command == "down":
            stack.down()
        else:
            return 0 if stack.print_status() else 1
    except DevstackError as error:
        print(f"stack: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
