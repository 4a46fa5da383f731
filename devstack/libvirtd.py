"""Private libvirt daemons: own state, own sockets, own QEMU processes, ended as one.

Each daemon lives in a pid and mount namespace of its own; the end of the namespace's PID 1 is the end of the
daemon, of its log daemon and of all its QEMUs. Sockets and logs are in the caller's directory and so
reachable from outside; all other paths mean the same inside and outside. ``libvirtd.json`` in the directory
lets another process attach. The module needs util-linux (unshare, nsenter), libvirtd, virtlogd and virsh, not
the Python binding. Methods are synchronous; one object belongs to one thread.
"""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

from devstack.daemon import Daemon, program
from devstack.process import DevstackError

# Folder of the private directory → folder of the host that it covers inside the namespace.
_PRIVATE_FOLDERS = {
    "run": "/run/libvirt",
    "lib": "/var/lib/libvirt",
    "etc": "/etc/libvirt",
    "log": "/var/log/libvirt",
    "cache": "/var/cache/libvirt",
}


class PrivateLibvirtd(Daemon):
    """A system libvirtd with its virtlogd; needs root.

    Guests run as root, so that images may be anywhere. No networks are defined. ``/var/lib/libvirt`` and its
    like are below ``directory`` as ``lib``, ``etc``, ``log``, ``cache``, ``run``. Several of them make
    several hosts.
    """

    def __init__(
        self,
        directory: Path,
        *,
        qemu_settings: dict[str, str] | None = None,
        daemon_settings: dict[str, str] | None = None,
        private_network: bool = False,
        containers: bool = False,
        capabilities_cache: Path | None = None,
    ) -> None:
        """Remember what to start; nothing runs before ``start``.

        Args:
            directory: made when it is missing; its path must leave room for a socket's name.
            qemu_settings: more lines of qemu.conf, values in its syntax (strings in quotes); they win.
            daemon_settings: the same for libvirtd.conf.
            private_network: also give it a network namespace, which takes bridges, taps and DHCP servers
                with it when it ends. TCP ports of its guests (VNC, NBD, migration) are then not reachable
                from outside.
            containers: make room for libvirt's lxc driver: where the host has both versions of control groups,
                the daemon sees only the first, because it cannot bind-mount the second into a container.
            capabilities_cache: a folder shared by several daemons, kept between runs, for what libvirt
                learned about the installed QEMU; libvirt itself notices when that is outdated.

        Raises:
            DevstackError: the path of ``directory`` is too long.

        """
        super().__init__(directory, qemu_settings or {}, daemon_settings or {})
        self._private_network = private_network
        self._containers = containers
        self._capabilities_cache = capabilities_cache

    @property
    def socket(self) -> Path:
        """The daemon's read-write socket."""
        return self.directory / "run" / "libvirt-sock"

    @property
    def uri(self) -> str:
        """The QEMU driver's connection URI."""
        return f"qemu+unix:///system?socket={self.socket}"

    @property
    def lxc_uri(self) -> str:
        """The container driver's connection URI."""
        return f"lxc+unix:///system?socket={self.socket}"

    @property
    def console_log_dir(self) -> Path:
        """A folder for ``<console><log file=…/>``; any other folder does as well."""
        return self.directory / "log" / "consoles"

    @property
    def _longest_socket(self) -> Path:
        return self.directory / "run" / "virtlogd-admin-sock"

    def start_daemon(self, timeout_s: float = 30.0) -> None:
        """Start virtlogd if it does not run, and libvirtd, and wait until that answers. Idempotent.

        Raises:
            DevstackError: the namespace does not exist, or the daemon does not answer in ``timeout_s``
            seconds.

        """
        if not any(_command_name(pid) == "virtlogd" for pid in self.pids()):
            self._run_inside([program("virtlogd"), "-d", "--pid-file", "/run/libvirt/virtlogd.pid"])
        super().start_daemon(timeout_s)
        self._share_capabilities()

    def _unshare(self) -> list[str]:
        if os.geteuid() != 0:
            raise DevstackError("a system libvirtd needs root; use PrivateSessionLibvirtd")
        commands = []
        for private, public in _PRIVATE_FOLDERS.items():
            source, target = shlex.quote(str(self.directory / private)), shlex.quote(public)
            commands.append(f"mkdir -p {target}; mount --bind {source} {target}")
        if self._containers and Path("/sys/fs/cgroup/unified").is_dir() and Path("/sys/fs/cgroup/memory").is_dir():
            commands.append("umount /sys/fs/cgroup/unified")
        network = []
        if self._private_network:
            network = ["--net"]
            commands.append("ip link set lo up")
        flags = ["--mount", "--pid", "--fork", "--mount-proc", "--kill-child", *network]
        return [program("unshare"), *flags, "--", *self._init_command(commands)]

    def _enter(self) -> list[str]:
        assert self._init is not None
        network = ["--net"] if self._private_network else []
        return [program("nsenter"), "--target", str(self._init.pid), "--mount", "--pid", *network, "--"]

    def _pid_file(self, daemon: str) -> Path:
        return self.directory / "run" / f"{daemon}.pid"

    def _daemon_command(self) -> list[str]:
        return [program("libvirtd"), "-d", "--pid-file", "/run/libvirt/libvirtd.pid"]

    def _prepare(self) -> None:
        shutil.rmtree(self.directory / "run", ignore_errors=True)  # sockets and states of an earlier life
        for name in (*_PRIVATE_FOLDERS, "cache/qemu/capabilities", "lib/images", "log/consoles"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        etc = self.directory / "etc"
        daemon = {
            "host_uuid": f'"{self.host_uuid}"',
            "unix_sock_rw_perms": '"0700"',
            "auth_unix_rw": '"none"',
            "auth_unix_ro": '"none"',
            # One connection serves many threads of the agent; the default of 5 would queue them.
            "max_client_requests": "20",
            # A pool that has to grow while calls hang on a frozen guest may not: all that comes then waits for those.
            "min_workers": "20",
            "log_outputs": '"3:file:/var/log/libvirt/libvirtd.log"',
        }
        _write_settings(etc / "libvirtd.conf", daemon | self._daemon_settings)
        _write_settings(etc / "qemu.conf", _qemu_settings('"root"') | self._qemu_settings)
        _write_settings(etc / "virtlogd.conf", {"log_outputs": '"3:file:/var/log/libvirt/virtlogd.log"'})
        for file in ("network.conf", "libvirt.conf"):
            _write_settings(etc / file, {})
        if self._capabilities_cache is not None and self._capabilities_cache.is_dir():
            target = self.directory / "cache" / "qemu" / "capabilities"
            shutil.copytree(self._capabilities_cache, target, dirs_exist_ok=True)

    def _share_capabilities(self) -> None:
        if self._capabilities_cache is None:
            return
        self._capabilities_cache.mkdir(parents=True, exist_ok=True)
        for source in (self.directory / "cache" / "qemu" / "capabilities").glob("*.xml"):
            target = self._capabilities_cache / source.name
            if not target.exists() or target.stat().st_mtime_ns < source.stat().st_mtime_ns:
                temporary = target.with_name(f".{target.name}.{os.getpid()}")
                shutil.copy2(source, temporary)
                temporary.replace(target)


class PrivateSessionLibvirtd(Daemon):
    """A session libvirtd as an unprivileged user would have it, with XDG folders below ``directory``.

    Started by root it runs in a user namespace in which root's files belong to `nobody`, a user that every host
    has, without any capability: no other user's folder has to be prepared, and what needs privileges fails as it
    does for a user.
    """

    def __init__(
        self,
        directory: Path,
        *,
        qemu_settings: dict[str, str] | None = None,
        daemon_settings: dict[str, str] | None = None,
    ) -> None:
        """Remember what to start; nothing runs before ``start``. Arguments as for ``PrivateLibvirtd``.

        Raises:
            DevstackError: the path of ``directory`` is too long.

        """
        super().__init__(directory, qemu_settings or {}, daemon_settings or {})

    @property
    def socket(self) -> Path:
        """The daemon's read-write socket."""
        return self.directory / "run" / "libvirt" / "libvirt-sock"

    @property
    def uri(self) -> str:
        """The QEMU driver's connection URI."""
        return f"qemu+unix:///session?socket={self.socket}"

    @property
    def console_log_dir(self) -> Path:
        """A folder for ``<console><log file=…/>``; any other folder does as well."""
        return self.directory / "log" / "consoles"

    @property
    def _longest_socket(self) -> Path:
        # The QEMU monitor: libvirt shortens the domain's name in it to 20 characters.
        return self.directory / "config/libvirt/qemu/lib" / f"domain-99-{'x' * 20}" / "monitor.sock"

    def _unshare(self) -> list[str]:
        flags = ["--user", "--map-user=65534", "--map-group=65534"] if os.geteuid() == 0 else ["--user"]
        if os.geteuid() != 0:
            flags += [f"--map-user={os.geteuid()}", f"--map-group={os.getegid()}"]
        flags += ["--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
        return [program("unshare"), *flags, "--", *self._init_command([])]

    def _enter(self) -> list[str]:
        assert self._init is not None
        namespaces = ["--user", "--preserve-credentials", "--mount", "--pid"]
        return [program("nsenter"), "--target", str(self._init.pid), *namespaces, "--"]

    def _environment(self) -> dict[str, str]:
        return super()._environment() | {
            "HOME": str(self.directory / "home"),
            "XDG_RUNTIME_DIR": str(self.directory / "run"),
            "XDG_CONFIG_HOME": str(self.directory / "config"),
            "XDG_CACHE_HOME": str(self.directory / "cache"),
            "XDG_DATA_HOME": str(self.directory / "data"),
        }

    def _pid_file(self, daemon: str) -> Path:
        return self.directory / "run" / "libvirt" / f"{daemon}.pid"

    def _daemon_command(self) -> list[str]:
        return [program("libvirtd"), "-d", "--pid-file", str(self._pid_file("libvirtd"))]

    def _prepare(self) -> None:
        shutil.rmtree(self.directory / "run", ignore_errors=True)
        for name in ("home", "run/libvirt", "config/libvirt", "cache", "data", "log/consoles"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        daemon = {
            "host_uuid": f'"{self.host_uuid}"',
            "max_client_requests": "20",
            # A pool that has to grow while calls hang on a frozen guest may not: all that comes then waits for those.
            "min_workers": "20",
            "log_outputs": f'"3:file:{self.log_file}"',
        }
        _write_settings(self.directory / "config/libvirt/libvirtd.conf", daemon | self._daemon_settings)
        _write_settings(self.directory / "config/libvirt/qemu.conf", self._qemu_settings)


def _qemu_settings(user: str) -> dict[str, str]:
    return {
        "user": user,
        "group": user,
        "security_driver": '"none"',
        # Marks on images would name a daemon that no longer exists when the next one opens them.
        "remember_owner": "0",
        # Names of control groups and of private /dev trees would be shared by all daemons of the host.
        "cgroup_controllers": "[ ]",
        "namespaces": "[ ]",
    }


def _write_settings(path: Path, settings: dict[str, str]) -> None:
    path.write_text("".join(f"{key} = {value}\n" for key, value in settings.items()), encoding="utf-8")


def _command_name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
