"""The agent as a real process: its configuration, its log, its life and its death."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from agent.core.failpoints import VARIABLE
from agent.store.base import OperationRecord
from agent.store.file import JournalFile

WAIT_S = 120.0
"""How long a test waits for an agent: far longer than it takes, since this only ends what hangs."""
_ROOT = Path(__file__).resolve().parents[2]

Line = dict[str, Any]


class AgentEnded(AssertionError):
    """The agent ended while something was expected of it."""


class AgentProcess:
    """One agent with its own folder; an async context manager that never leaves the process behind.

    `settings` are the sections of the configuration (`{"periodic": {"heartbeat_s": 1}}`), put over values that
    make waiting short. The same object starts the agent again on the same state after a death.
    """

    def __init__(
        self,
        directory: Path,
        *,
        host: str,
        broker_url: str,
        driver: str = "fake",
        driver_settings: Mapping[str, Any] | None = None,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        state_dir: Path | None = None,
    ) -> None:
        self.host = host
        self.directory = directory
        self.state_dir = state_dir or directory / "state"
        self.config_file = directory / "agent.toml"
        self.lines: list[Line] = []
        self.health_port = 0
        self.returncode: int | None = None
        self.log_file = directory / "agent.log"
        self._stderr_file = directory / "stderr.log"
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._born = 0
        self._config = {
            "agent": {"host": host, "state_dir": str(self.state_dir), "drain_timeout_s": 60.0},
            "bus": {"url": broker_url, "reconnect_min_s": 0.05, "reconnect_max_s": 0.3, "connect_timeout_s": 3.0},
            "driver": {"name": driver, "settings": dict(driver_settings or {})},
            "images": {"file_roots": [str(directory), str(directory.parent)]},
            "periodic": {"heartbeat_s": 1.0, "requests_s": 0.5},
            "health": {"listen": "127.0.0.1:0"},
        }
        for section, values in (settings or {}).items():
            self._config.setdefault(section, {}).update(values)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.close()

    # --- life -----------------------------------------------------------------------------------------------------

    async def start(self, *, failpoint: str | None = None, ready: bool = True) -> Self:
        """Start the process and, with `ready`, wait until it serves commands."""
        if self.alive:
            raise AssertionError("the agent runs already")
        self.directory.mkdir(parents=True, exist_ok=True)
        self.config_file.write_text(_toml(self._config), encoding="utf-8")
        environment = {key: value for key, value in os.environ.items() if not key.startswith("COMPUTE_AGENT_")}
        environment |= {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(_ROOT)}
        if failpoint is not None:
            environment[VARIABLE] = failpoint
        command = [sys.executable, "-m", "agent", "run", "--config", str(self.config_file)]
        if (setpriv := shutil.which("setpriv")) is not None:
            # A test run that is killed takes its agents with it.
            command = [setpriv, "--pdeathsig", "KILL", *command]
        self._born = len(self.lines)
        self.returncode = None
        with self._stderr_file.open("ab") as stderr:
            self._process = await asyncio.create_subprocess_exec(
                *command, env=environment, cwd=self.directory, limit=4 * 1024 * 1024,
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=stderr,
            )  # fmt: skip
        self._reader = asyncio.create_task(self._read(self._process), name=f"log of {self.host}")
        if ready:
            await self.wait_log("agent.ready", timeout_s=WAIT_S)
        return self

    async def stop(self, timeout_s: float = WAIT_S) -> int:
        """Ask the agent to end (SIGTERM) and return its exit status."""
        self.send(signal.SIGTERM)
        return await self.wait_ended(timeout_s)

    async def kill(self) -> None:
        """End the agent as a power cut would."""
        self.send(signal.SIGKILL)
        await self.wait_ended()

    async def restart(self) -> Self:
        """Kill it if it lives, and start it again on the same state."""
        if self.alive:
            await self.kill()
        return await self.start()

    async def close(self) -> None:
        """End the process, whatever it does. Idempotent."""
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGCONT)
                self._process.kill()
        if self._reader is not None:
            await asyncio.wait({self._reader}, timeout=10.0)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to a living agent."""
        if self._process is None or self._process.returncode is not None:
            raise AgentEnded(self._epitaph("is not running"))
        self._process.send_signal(number)

    async def wait_ended(self, timeout_s: float = WAIT_S) -> int:
        """Wait for the end of the process; its exit status, negative for a signal."""
        assert self._reader is not None
        done, _ = await asyncio.wait({self._reader}, timeout=timeout_s)
        if not done:
            raise AssertionError(self._epitaph(f"still runs after {timeout_s:g} s"))
        assert self.returncode is not None
        return self.returncode

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def rss_mib(self) -> float:
        """Resident memory."""
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii")
        kib = next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:"))
        return int(kib) / 1024

    # --- what it says ---------------------------------------------------------------------------------------------

    def log(self, event: str | None = None, *, all_lives: bool = False, **fields: Any) -> list[Line]:
        """Lines of this life (or of all) with this event and these fields."""
        first = 0 if all_lives else self._born
        return [line for line in self.lines[first:] if _matches(line, event, fields)]

    @property
    def mark(self) -> int:
        """The present end of the log, for `wait_log(since=)`."""
        return len(self.lines)

    async def wait_log(self, event: str, *, timeout_s: float = WAIT_S, since: int | None = None, **fields: Any) -> Line:
        """Wait for a line of this life, or after the mark `since`; the first one that matches."""
        position = self._born if since is None else since
        found: Line | None = None

        def look() -> bool:
            nonlocal position, found
            for line in self.lines[position:]:
                position += 1
                if _matches(line, event, fields):
                    found = line
                    return True
            return False

        await self._until(look, f"log line {event} {fields or ''}", timeout_s)
        assert found is not None
        return found

    @property
    def stderr(self) -> str:
        with suppress(FileNotFoundError):
            return self._stderr_file.read_text(encoding="utf-8", errors="replace")
        return ""

    async def get(self, path: str, timeout_s: float = WAIT_S) -> tuple[int, str]:
        """Ask the health endpoint; status and body."""
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection("127.0.0.1", self.health_port)
            writer.write(f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
            answer = await reader.read()
            writer.close()
        head, _, body = answer.decode().partition("\r\n\r\n")
        return int(head.split()[1]), body

    async def answers(self, path: str, status: int) -> str:
        """Wait until the health endpoint answers with this status; the body."""
        loop = asyncio.get_running_loop()
        end = loop.time() + WAIT_S
        while (found := await self.get(path))[0] != status:
            assert loop.time() < end, f"{path} answers {found}, and not {status}"
            await asyncio.sleep(0.05)
        return found[1]

    def open_operations(self) -> list[OperationRecord]:
        """What the journal holds without a final result, or with something left to take back."""
        file = JournalFile(self.state_dir / "journal.sqlite", read_only=True)
        try:
            return file.operations(unfinished=True, limit=1000)
        finally:
            file.close()

    # --- inside ---------------------------------------------------------------------------------------------------

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        with self.log_file.open("ab", buffering=0) as kept:  # for whoever looks into a failed test's folder
            while raw := await process.stdout.readline():
                kept.write(raw)
                try:
                    line = json.loads(raw)
                except ValueError:
                    line = {"event": "?", "text": raw.decode(errors="replace")}
                if line.get("event") == "health.listening":
                    self.health_port = line["port"]
                self.lines.append(line)
                self._wake()
        self.returncode = await process.wait()
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _until(self, look: Callable[[], bool], what: str, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                while not look():
                    assert self._reader is not None
                    if self._reader.done():
                        raise AgentEnded(self._epitaph(f"ended (status {self.returncode}) before {what}"))
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(self._epitaph(f"gave no {what} within {timeout_s:g} s")) from None

    def _epitaph(self, what: str) -> str:
        lines = "\n".join(json.dumps(line) for line in self.lines[-15:])
        return f"the agent of {self.host} {what}\n--- log:\n{lines}\n--- stderr:\n{self.stderr[-3000:]}"


def _matches(line: Line, event: str | None, fields: Mapping[str, Any]) -> bool:
    return (event is None or line.get("event") == event) and all(line.get(k) == v for k, v in fields.items())


def _toml(config: Mapping[str, Mapping[str, Any]]) -> str:
    lines: list[str] = []

    def write(path: str, values: Mapping[str, Any]) -> None:
        lines.append(f"[{path}]")
        lines.extend(
            # JSON of plain values is also TOML.
            f"{key} = {json.dumps(value)}"
            for key, value in values.items()
            if not isinstance(value, Mapping)
        )
        for key, value in values.items():
            if isinstance(value, Mapping):
                write(f"{path}.{key}", value)

    for name, section in config.items():
        write(name, section)
    return "\n".join(lines) + "\n"
