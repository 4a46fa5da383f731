"""Private RabbitMQ nodes: everything in one directory, on loopback only, ended without a trace.

A node is described by ``broker.json`` in its directory, so another process can attach to it, restart it or
end it. The module knows the installed ``rabbitmq-server`` scripts (Debian's 3.10 and the upstream packages
alike) and speaks no AMQP beyond the greeting. Methods are synchronous; one object belongs to one thread.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from devstack.erlang import Epmd, link_core_plugins, reap, script
from devstack.process import (
    DevstackError,
    PortLease,
    ProcessRef,
    pids_with_environment,
    run_tool,
    tail,
    wait_until,
)

# Two schedulers, none of them spinning or bound to a core: several nodes share the cores of one host.
_VM_FLAGS = "+S 2:2 +SDcpu 1:1 +SDio 2 +A 2 +sbwt none +sbwtdcpu none +sbwtdio none"
_LOOPBACK = "{127,0,0,1}"


@dataclass(frozen=True)
class Tls:
    """A TLS listener: PEM files made by the caller, readable by the current user.

    With ``external`` a client may log in by its certificate (SASL EXTERNAL): its common name is the user's
    name. With ``require_client_certificate`` a client without a certificate of this CA is refused in the
    handshake.
    """

    ca_file: Path
    cert_file: Path
    key_file: Path
    external: bool = False
    require_client_certificate: bool = False


class PrivateBroker:
    """One RabbitMQ node below one directory, user ``guest``/``guest``, bound to 127.0.0.1.

    The ports stay the same over ``stop``, ``kill`` and ``start``. Constructing it on the directory of a
    running node attaches to that node. For a cluster give all nodes the same ``epmd`` and ``cookie``.
    """

    def __init__(
        self,
        directory: Path,
        *,
        port: int | None = None,
        nodename: str | None = None,
        config: dict[str, str] | None = None,
        definitions: dict[str, Any] | None = None,
        plugins: tuple[str, ...] = (),
        tls: Tls | None = None,
        epmd: Epmd | None = None,
        cookie: str | None = None,
    ) -> None:
        """Lease ports and remember what to start; nothing runs before ``start``.

        Args:
            directory: made when it is missing; database, logs, configuration, home: all are below it.
            port: the AMQP port; a free one by default.
            nodename: the part before ``@localhost`` or all of it; a random one by default.
            config: more lines of rabbitmq.conf; they win over those made here.
            definitions: users, vhosts, queues … to load at every boot; RabbitMQ then makes no ``guest``.
            plugins: plugins to enable, without those that ``tls`` needs.
            tls: also listen with TLS.
            epmd: a port mapper shared with other nodes, which the caller ends; an own one by default.
            cookie: the secret shared by the nodes of a cluster; a random one by default.

        Raises:
            DevstackError: a port that was asked for is in use by another broker of this kind.

        """
        self.directory = directory.resolve()
        self.directory.mkdir(parents=True, exist_ok=True)
        saved = self._load()
        self._config = dict(config or {})
        self._definitions = definitions
        self._plugins = set(plugins)
        self._tls = tls
        name = nodename or saved.get("nodename") or f"devstack-{secrets.token_hex(4)}"
        self.nodename = name if "@" in name else f"{name}@localhost"
        self.cookie: str = cookie or saved.get("cookie") or secrets.token_hex(16).upper()
        self._amqp = PortLease.acquire(port or saved.get("port"))
        self._dist = PortLease.acquire(saved.get("dist_port"))
        self._amqps = PortLease.acquire(saved.get("tls_port")) if tls else None
        self._shared_epmd = epmd is not None
        self._epmd = epmd
        self._epmd_port: int | None = saved.get("epmd_port")
        self._process: subprocess.Popen[bytes] | None = None
        self._beam = _ref(saved.get("beam"))
        self._saved_epmd = _ref(saved.get("epmd"))

    # -- addresses -------------------------------------------------------------------------------------------

    @property
    def port(self) -> int:
        """The AMQP port on 127.0.0.1."""
        return self._amqp.port

    @property
    def url(self) -> str:
        """The AMQP URL with the default user and the default vhost."""
        return f"amqp://guest:guest@127.0.0.1:{self.port}/"

    @property
    def tls_port(self) -> int:
        """The AMQPS port.

        Raises:
            DevstackError: the broker was made without ``tls``.

        """
        if self._amqps is None:
            raise DevstackError("this broker has no TLS listener")
        return self._amqps.port

    @property
    def tls_url(self) -> str:
        """The AMQPS URL by a name that certificates can carry, without credentials."""
        return f"amqps://localhost:{self.tls_port}/"

    @property
    def pid(self) -> int | None:
        """The pid of the Erlang VM, or None while it does not run."""
        return self._beam.pid if self._beam is not None and self._beam.alive else None

    @property
    def log_file(self) -> Path:
        """The node's log."""
        return self.directory / "log" / f"{self.nodename}.log"

    # -- life ------------------------------------------------------------------------------------------------

    def start(self, timeout_s: float = 60.0) -> None:
        """Start the node and wait until AMQP clients are greeted. Idempotent.

        Raises:
            DevstackError: not installed, or not ready in ``timeout_s`` seconds; the end of the log is in the
            message.

        """
        if self.pid is not None and self._greets():
            return
        deadline = time.monotonic() + timeout_s
        self._sweep()
        self._start_epmd()
        self._write_files()
        with (self.directory / "log" / "stdout.log").open("ab") as log:
            self._process = subprocess.Popen(
                [script("rabbitmq-server")], env=self._environment(), cwd=self.directory,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        if not wait_until(self._ready_or_dead, deadline - time.monotonic()) or not self._greets():
            report = tail(self.log_file) or tail(self.directory / "log" / "stdout.log")
            what = "is not ready in time" if self._process.poll() is None else "ended while it booted"
            self.kill()
            raise DevstackError(f"RabbitMQ in {self.directory} {what}:\n{report}")
        self._beam = ProcessRef.of(int((self.directory / "pid").read_text(encoding="ascii")))
        self._save()

    def stop(self, timeout_s: float = 20.0) -> None:
        """End the node in good order (SIGTERM), and its port mapper; kill it after the limit. Idempotent."""
        if self._beam is not None:
            self._beam.end(timeout_s)
        self._sweep()

    def kill(self) -> None:
        """End the node as a power cut would (SIGKILL), with its port mapper; the data stay. Idempotent."""
        if self._beam is not None:
            self._beam.end(0.0)
        self._sweep()

    def restart(self, timeout_s: float = 60.0) -> None:
        """Stop in good order and start again on the same ports."""
        self.stop()
        self.start(timeout_s)

    def pause(self) -> None:
        """Freeze the node (SIGSTOP): connections stay open and nobody answers. Idempotent."""
        self._signal(signal.SIGSTOP)

    def unpause(self) -> None:
        """Let a frozen node go on. Idempotent."""
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """Kill the node and give up its ports; the directory stays for the reader of the logs. Idempotent."""
        self.kill()
        for lease in (self._amqp, self._dist, self._amqps):
            if lease is not None:
                lease.release()

    def ctl(self, *arguments: str, timeout_s: float = 60.0) -> str:
        """Run ``rabbitmqctl`` against this node and return what it prints (about a second per call).

        Raises:
            DevstackError: it exits with an error, which is in the message, or takes longer than
            ``timeout_s``.

        """
        command = [script("rabbitmqctl"), "--quiet", "-n", self.nodename]
        return run_tool(command, arguments, environment=self._environment(), cwd=self.directory, timeout_s=timeout_s)

    def __enter__(self) -> Self:
        """Start the node."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kill the node: its directory is as disposable as itself."""
        self.close()

    # -- inside ----------------------------------------------------------------------------------------------

    def _signal(self, number: int) -> None:
        if self._beam is None or not self._beam.send(number):
            raise DevstackError(f"RabbitMQ in {self.directory} does not run")

    def _start_epmd(self) -> None:
        if self._epmd is None:
            self._epmd = Epmd(self.directory, port=self._epmd_port)
        self._epmd.start()
        self._epmd_port = self._epmd.port

    def _sweep(self) -> None:
        """End what is left of this node: start script, helpers of the VM, port mapper."""
        # The start script ends after its VM and takes its exit status; killed first, it would leave a zombie
        # to PID 1.
        reap(self._process, 1.0)
        marker = ("DEVSTACK_BROKER", str(self.directory))
        for pid in pids_with_environment(*marker):
            leftover = ProcessRef.of(pid)
            if leftover is not None:
                leftover.end(0.0)
        reap(self._process)
        self._process = None
        self._beam = None
        if not self._shared_epmd:
            if self._epmd is not None:
                self._epmd.stop()
                self._epmd = None
            elif self._saved_epmd is not None:
                self._saved_epmd.end(0.0)
            self._saved_epmd = None
        self._save()

    def _ready_or_dead(self) -> bool:
        assert self._process is not None
        return self._process.poll() is not None or self._greets()

    def _greets(self) -> bool:
        """True when the port answers the AMQP 0-9-1 greeting with Connection.Start."""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 2.0) as client:
            client.sendall(b"AMQP\x00\x00\x09\x01")
            return client.recv(8)[:1] == b"\x01"
        return False

    def _write_files(self) -> None:
        for name in ("mnesia", "log", "home"):
            (self.directory / name).mkdir(exist_ok=True)
        if not self._plugins:
            link_core_plugins(self.directory / "plugins")
        cookie = self.directory / "home" / ".erlang.cookie"
        cookie.unlink(missing_ok=True)
        cookie.touch(mode=0o600)
        cookie.write_text(self.cookie, encoding="ascii")
        cookie.chmod(0o400)
        plugins = self._plugins | ({"rabbitmq_auth_mechanism_ssl"} if self._tls and self._tls.external else set())
        (self.directory / "enabled_plugins").write_text(f"[{','.join(sorted(plugins))}].\n", encoding="ascii")
        (self.directory / "conf-env").write_text("", encoding="ascii")
        (self.directory / "pid").unlink(missing_ok=True)
        if self._definitions is not None:
            path = self.directory / "definitions.json"
            path.write_text(json.dumps(self._definitions), encoding="utf-8")
        lines = self._settings() | self._config
        text = "".join(f"{key} = {value}\n" for key, value in lines.items())
        (self.directory / "rabbitmq.conf").write_text(text, encoding="utf-8")

    def _settings(self) -> dict[str, str]:
        lines = {
            "listeners.tcp.1": f"127.0.0.1:{self.port}",
            # A test host's nearly full disk must not look like a broken broker.
            "disk_free_limit.absolute": "50MB",
            "log.console": "false",
            "log.file.level": "info",
        }
        if self._definitions is not None:
            lines["load_definitions"] = str(self.directory / "definitions.json")
        if self._tls is not None:
            lines |= {
                "listeners.ssl.1": f"127.0.0.1:{self.tls_port}",
                "ssl_options.cacertfile": str(self._tls.ca_file.resolve()),
                "ssl_options.certfile": str(self._tls.cert_file.resolve()),
                "ssl_options.keyfile": str(self._tls.key_file.resolve()),
                "ssl_options.verify": "verify_peer",
                "ssl_options.fail_if_no_peer_cert": str(self._tls.require_client_certificate).lower(),
            }
            if self._tls.external:
                lines |= {"auth_mechanisms.1": "EXTERNAL", "auth_mechanisms.2": "PLAIN"}
                lines["ssl_cert_login_from"] = "common_name"
        return lines

    def _environment(self) -> dict[str, str]:
        home = self.directory / "home"
        core = {} if self._plugins else {"RABBITMQ_PLUGINS_DIR": str(self.directory / "plugins")}
        return core | {
            "PATH": os.environ.get("PATH", os.defpath),
            "LANG": "C.UTF-8",
            "HOME": str(home),
            "DEVSTACK_BROKER": str(self.directory),
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_CRASH_DUMP": str(self.directory / "log" / "erl_crash.dump"),
            "RABBITMQ_NODENAME": self.nodename,
            "RABBITMQ_DIST_PORT": str(self._dist.port),
            "RABBITMQ_MNESIA_BASE": str(self.directory / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self.directory / "log"),
            "RABBITMQ_CONFIG_FILE": str(self.directory / "rabbitmq"),
            "RABBITMQ_CONF_ENV_FILE": str(self.directory / "conf-env"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.directory / "enabled_plugins"),
            "RABBITMQ_PID_FILE": str(self.directory / "pid"),
            "RABBITMQ_SCHEDULER_BIND_TYPE": "u",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
                f"{_VM_FLAGS} -start_epmd false -kernel inet_dist_use_interface {_LOOPBACK}"
            ),
            "RABBITMQ_CTL_ERL_ARGS": (
                f"+S 1:1 +sbwt none -start_epmd false -kernel inet_dist_use_interface {_LOOPBACK}"
            ),
            # Any port: the default is a range of eleven that all nodes of the host would share.
            "RABBITMQ_CTL_DIST_PORT_MIN": "0",
            "RABBITMQ_CTL_DIST_PORT_MAX": "0",
        }

    def _save(self) -> None:
        own_epmd = self._epmd.ref if self._epmd is not None and not self._shared_epmd else None
        state = {
            "nodename": self.nodename,
            "cookie": self.cookie,
            "port": self.port,
            "dist_port": self._dist.port,
            "tls_port": self._amqps.port if self._amqps else None,
            "epmd_port": self._epmd_port,
            "beam": [self._beam.pid, self._beam.start_ticks] if self._beam else None,
            "epmd": [own_epmd.pid, own_epmd.start_ticks] if own_epmd else None,
        }
        path = self.directory / "broker.json"
        path.touch(mode=0o600)
        path.write_text(json.dumps(state), encoding="utf-8")

    def _load(self) -> dict[str, Any]:
        with contextlib.suppress(FileNotFoundError, ValueError):
            loaded = json.loads((self.directory / "broker.json").read_text(encoding="utf-8"))
            if isinstance(loaded, dict):
                return loaded
        return {}


def _ref(saved: Any) -> ProcessRef | None:
    return ProcessRef(int(saved[0]), int(saved[1])) if saved else None
