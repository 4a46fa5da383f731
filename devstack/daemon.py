"""What the private libvirt daemons of ``libvirtd`` have in common: a namespace and a daemon in it.

The end of the namespace's PID 1 is the end of the daemon, of its log daemon and of all its QEMUs. Sockets and
logs are in the caller's directory and so reachable from outside. Methods are synchronous; one object belongs
to one thread.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from devstack.process import DevstackError, ProcessRef, all_pids, children_of, run_tool, tail, wait_until

_REAPER = Path(__file__).resolve().with_name("reaper.py")
_SOCKET_PATH_LIMIT = 107  # bytes of sun_path, without the final zero


class Daemon:
    """What both kinds have in common; subclasses say where things are and how the namespace is made."""

    def __init__(self, directory: Path, qemu_settings: dict[str, str], daemon_settings: dict[str, str]) -> None:
        self.directory = directory.resolve()
        self.directory.mkdir(parents=True, exist_ok=True)
        if len(os.fsencode(self._longest_socket)) > _SOCKET_PATH_LIMIT:
            raise DevstackError(f"{self.directory} is too long for a Unix socket below it; give a shorter path")
        saved = self._load()
        self.host_uuid: str = saved.get("host_uuid") or str(uuid.uuid4())
        self._init = _ref(saved.get("init"))
        self._outer = _ref(saved.get("outer"))
        self._process: subprocess.Popen[bytes] | None = None
        self._qemu_settings = qemu_settings
        self._daemon_settings = daemon_settings

    # -- said by the subclass --------------------------------------------------------------------------------

    @property
    def socket(self) -> Path:
        """The daemon's read-write socket."""
        raise NotImplementedError

    @property
    def uri(self) -> str:
        """The QEMU driver's connection URI."""
        raise NotImplementedError

    @property
    def _longest_socket(self) -> Path:
        raise NotImplementedError

    def _unshare(self) -> list[str]:
        raise NotImplementedError

    def _enter(self) -> list[str]:
        raise NotImplementedError

    def _pid_file(self, daemon: str) -> Path:
        raise NotImplementedError

    def _daemon_command(self) -> list[str]:
        raise NotImplementedError

    def _prepare(self) -> None:
        raise NotImplementedError

    def _environment(self) -> dict[str, str]:
        return {"PATH": os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin", "LANG": "C.UTF-8"}

    # -- life ------------------------------------------------------------------------------------------------

    @property
    def test_uri(self) -> str:
        """The URI of libvirt's simulated hypervisor through this daemon, with real events."""
        return f"test+unix:///default?socket={self.socket}"

    @property
    def log_file(self) -> Path:
        """The daemon's log (warnings and errors)."""
        return self.directory / "log" / "libvirtd.log"

    def start(self, timeout_s: float = 30.0) -> None:
        """Make the namespace, start the daemons and wait until the QEMU driver answers. Idempotent.

        Raises:
            DevstackError: a program is missing, the right to make namespaces is, or nothing answers in time.

        """
        if self._init is None or not self._init.alive:
            self._prepare()
            self._start_namespace()
        self.start_daemon(timeout_s)

    def stop(self) -> None:
        """End the daemons and all their guests at once (SIGKILL). Idempotent; files stay."""
        for ref in (self._init, self._outer):
            if ref is not None:
                ref.end(0.0)
        if self._process is not None:
            self._process.wait()
        self._process = self._init = self._outer = None
        self.socket.unlink(missing_ok=True)
        self._save()

    def start_daemon(self, timeout_s: float = 30.0) -> None:
        """Start libvirtd in the running namespace and wait until it answers. Idempotent.

        Raises:
            DevstackError: the namespace does not exist, or the daemon does not answer in ``timeout_s``
            seconds.

        """
        if self._daemon() is None:
            self._run_inside(self._daemon_command())
        if not wait_until(self._answers, timeout_s, 0.02):
            raise DevstackError(f"libvirtd in {self.directory} does not answer:\n{tail(self.log_file)}")

    def kill_daemon(self) -> None:
        """End libvirtd alone with SIGKILL; its guests go on. Idempotent."""
        self._end_daemon(0.0)

    def stop_daemon(self, timeout_s: float = 10.0) -> None:
        """End libvirtd alone in good order (SIGTERM); its guests go on. Idempotent."""
        self._end_daemon(timeout_s)

    def restart_daemon(self, kill: bool = False) -> None:
        """End libvirtd, in good order or with SIGKILL, and start it again; its guests go on."""
        self._end_daemon(0.0 if kill else 10.0)
        self.start_daemon()

    def pause_daemon(self) -> None:
        """Freeze libvirtd (SIGSTOP): it accepts connections and does not answer. Its guests go on."""
        self._signal(signal.SIGSTOP)

    def unpause_daemon(self) -> None:
        """Let a frozen libvirtd go on."""
        self._signal(signal.SIGCONT)

    @property
    def pid(self) -> int | None:
        """The pid of libvirtd as seen from outside, or None while it does not run."""
        daemon = self._daemon()
        return daemon.pid if daemon else None

    def qemu_pids(self) -> dict[str, int]:
        """Return the pid, as seen from outside, of the QEMU of every running domain by the domain's name."""
        found = {}
        for pid in self.pids():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
                if "qemu" in os.path.basename(words[0]) and "-name" in words:
                    name = _guest_name(words[words.index("-name") + 1])
                    if name is not None:
                        found[name] = pid
        return found

    def virsh(self, *arguments: str, timeout_s: float = 60.0) -> str:
        """Run virsh against the QEMU driver and return what it prints.

        Raises:
            DevstackError: it exits with an error, which is in the message, or takes longer than
            ``timeout_s``.

        """
        command = [program("virsh"), "--quiet", "-c", self.uri]
        return run_tool(command, arguments, environment=self._environment(), cwd=Path("/"), timeout_s=timeout_s)

    def __enter__(self) -> Self:
        """Start the daemon."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the daemon and its guests."""
        self.stop()

    # -- inside ----------------------------------------------------------------------------------------------

    def _start_namespace(self) -> None:
        log = self.directory / "namespace.log"
        ready = self.directory / "namespace.ready"
        ready.unlink(missing_ok=True)
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                self._unshare(), env=self._environment(), cwd="/", start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip
        process = self._process
        wait_until(lambda: ready.exists() or process.poll() is not None, 10.0, 0.01)
        children = children_of(process.pid)
        if not ready.exists() or not children:
            process.kill()
            process.wait()
            raise DevstackError(f"the namespaces for libvirtd could not be made:\n{tail(log)}")
        self._outer = ProcessRef.of(process.pid)
        self._init = ProcessRef.of(children[0])
        self._save()

    def _init_command(self, commands: list[str]) -> list[str]:
        """Return what PID 1 runs: set-up commands, a sign that they worked, then the reaper in its place."""
        ready = shlex.quote(str(self.directory / "namespace.ready"))
        reaper = shlex.join([sys.executable, "-I", "-S", str(_REAPER)])
        return ["/bin/sh", "-ec", "\n".join([*commands, f": > {ready}", f"exec {reaper}"])]

    def _run_inside(self, command: list[str]) -> None:
        if self._init is None or not self._init.alive:
            raise DevstackError(f"libvirtd in {self.directory}: the namespace does not run; call start()")
        done = subprocess.run(
            [*self._enter(), *command], env=self._environment(), cwd="/", check=False, timeout=60.0,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        if done.returncode != 0:
            raise DevstackError(f"{command[0]} does not start: {done.stderr.strip()}\n{tail(self.log_file)}")

    def _answers(self) -> bool:
        with contextlib.suppress(DevstackError):
            self.virsh("version", timeout_s=20.0)
            return True
        return False

    def pids(self) -> Iterator[int]:
        """Yield the pids, as seen from outside, of all processes of the namespace."""
        if self._init is None or not self._init.alive:
            return
        namespace = os.readlink(f"/proc/{self._init.pid}/ns/pid")
        for pid in all_pids():
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/ns/pid") == namespace:
                    yield pid

    def _daemon(self) -> ProcessRef | None:
        try:
            inner = self._pid_file("libvirtd").read_text(encoding="ascii").strip()
        except OSError:
            return None
        for pid in self.pids():
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
                match = re.search(r"^NSpid:.*\s(\d+)$", status, re.MULTILINE)
                if match and match[1] == inner and status.startswith("Name:\tlibvirtd\n"):
                    return ProcessRef.of(pid)
        return None

    def _end_daemon(self, grace_s: float) -> None:
        daemon = self._daemon()
        if daemon is not None:
            daemon.end(grace_s)

    def _signal(self, number: int) -> None:
        daemon = self._daemon()
        if daemon is None or not daemon.send(number):
            raise DevstackError(f"libvirtd in {self.directory} does not run")

    def _save(self) -> None:
        state = {"host_uuid": self.host_uuid, "init": _saved(self._init), "outer": _saved(self._outer)}
        (self.directory / "libvirtd.json").write_text(json.dumps(state), encoding="utf-8")

    def _load(self) -> dict[str, Any]:
        with contextlib.suppress(FileNotFoundError, ValueError):
            loaded = json.loads((self.directory / "libvirtd.json").read_text(encoding="utf-8"))
            if isinstance(loaded, dict):
                return loaded
        return {}


def _guest_name(argument: str) -> str | None:
    """Return NAME of QEMU's ``-name guest=NAME,debug-threads=on``, in which commas are doubled."""
    match = re.match(r"guest=((?:[^,]|,,)*)", argument)
    return match[1].replace(",,", ",") if match else None


def program(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if found is None:
        raise DevstackError(f"{name} is not installed; run devstack/bootstrap.sh packages")
    return found


def _ref(saved: Any) -> ProcessRef | None:
    return ProcessRef(int(saved[0]), int(saved[1])) if saved else None


def _saved(ref: ProcessRef | None) -> list[int] | None:
    return [ref.pid, ref.start_ticks] if ref else None
