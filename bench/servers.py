"""The processes that are measured: the agent, the bare aio-pika consumer, the oslo.messaging RPC server.

Each is its own process, so that CPU and memory can be told apart; each says `ready` on stdout.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

AGENT_HOST = "bench-host"


@contextlib.contextmanager
def process(arguments: list[str], ready: str, *, log: Path, env: dict[str, str] | None = None) -> Iterator[int]:
    """Run a process until it has written a line that contains `ready`; end it afterwards. Yields its pid."""
    with log.open("w") as out, log.open("r") as lines:
        child = subprocess.Popen(
            arguments, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **(env or {}), "PYTHONUNBUFFERED": "1"}
        )
        try:
            _wait_for(child, lines, ready, log)
            yield child.pid
        finally:
            child.terminate()
            try:
                child.wait(20)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def _wait_for(child: subprocess.Popen[bytes], lines: object, ready: str, log: Path) -> None:
    end = time.monotonic() + 60
    seen = ""
    while ready not in seen:
        seen += lines.read()  # type: ignore[attr-defined]
        if child.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"{child.args} did not become ready:\n{log.read_text()[-3000:]}")
        time.sleep(0.01)


def agent_config(
    directory: Path,
    amqp_url: str,
    *,
    driver: str = "fake",
    settings: dict[str, object] | None = None,
    heartbeat_s: float = 10.0,
    extra: str = "",
    image_roots: tuple[Path, ...] = (),
) -> Path:
    """Write a configuration for a measured agent."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = [
        "[agent]",
        f'host = "{AGENT_HOST}"',
        f"state_dir = {json.dumps(str(directory / 'state'))}",
        "drain_timeout_s = 10",
        "[bus]",
        f"url = {json.dumps(amqp_url)}",
        "reconnect_min_s = 0.1",
        "reconnect_max_s = 0.3",
        "[driver]",
        f'name = "{driver}"',
        "[driver.settings]",
        *(f"{key} = {json.dumps(value)}" for key, value in (settings or {}).items()),
        "[images]",
        f"file_roots = {json.dumps([str(root) for root in image_roots])}",
        "[periodic]",
        f"heartbeat_s = {heartbeat_s}",
        "[health]",
        'listen = ""',
        extra,
    ]
    path = directory / "agent.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def agent(config: Path, env: dict[str, str] | None = None) -> contextlib.AbstractContextManager[int]:
    """The agent, ready to serve."""
    arguments = [sys.executable, "-m", "agent", "run", "--config", str(config)]
    return process(arguments, "agent.ready", log=config.parent / "agent.log", env=env)


def bare_consumer(amqp_url: str, queue: str, log: Path) -> contextlib.AbstractContextManager[int]:
    """A consumer that acknowledges and sends a confirmed reply: the floor."""
    return process([sys.executable, "-m", "bench.bare_consumer", amqp_url, queue], "ready", log=log)


def oslo_server(amqp_url: str, log: Path) -> contextlib.AbstractContextManager[int]:
    """The RPC server that nova-compute uses, with threads."""
    return process([sys.executable, "-m", "bench.oslo_server", amqp_url], "ready", log=log)
