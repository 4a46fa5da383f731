"""Fixtures for all tests that run a whole agent. Being here also makes `support` importable."""

from __future__ import annotations

import io
import logging
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import structlog
from blockbuster import BlockBuster
from hypothesis import HealthCheck, settings
from support.world import World

from agent import log
from agent.app import Agent
from agent.bus.memory import MemoryBroker
from agent.controller.client import ComputeClient
from agent.core import announcement
from agent.drivers.fake import FakeDriver

# No test depends on the machine's speed, and a run of the same code finds the same. To look for what no run has found
# yet: `pytest --hypothesis-profile=search`.
ANY_SPEED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("search", **ANY_SPEED)
settings.register_profile("same", **ANY_SPEED, derandomize=True)
settings.load_profile("same")


@pytest.fixture
def unannounced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no operation say that it was accepted because it takes long: what is committed and told is then the same
    at any speed of the machine.
    """
    monkeypatch.setattr(announcement, "SILENCE_S", 3600.0)


@pytest.fixture
def logs() -> Iterator[io.StringIO]:
    """Logs as in production, into memory."""
    stream = io.StringIO()
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    log.configure("info", stream=stream)
    yield stream
    structlog.reset_defaults()
    root.handlers[:], root.level = handlers, level


@pytest.fixture
def no_blocking(logs: io.StringIO) -> Iterator[BlockBuster]:
    """A blocking call of the agent on the event loop is a failure."""
    buster = BlockBuster(scanned_modules=["agent"])
    for name in ("os.stat", "io.BufferedReader.read", "io.TextIOWrapper.read", "os.listdir", "os.scandir"):
        # Finding and importing the driver, once, before anything runs that could be held up.
        buster.functions[name].can_block_in("agent/drivers/registry.py", {"load_driver"})
        # The source lines in a traceback: a defect is being logged.
        buster.functions[name].can_block_in("linecache.py", {"updatecache", "checkcache"})
    buster.activate()
    yield buster
    buster.deactivate()


@pytest.fixture
async def world(tmp_path: Path, no_blocking: BlockBuster, unannounced: None) -> AsyncIterator[World]:
    """A world with a running agent on the memory journal."""
    made = await World(tmp_path).open()
    await made.start()
    yield made
    await made.stop()
    await made.close()


@pytest.fixture
async def sqlite_world(tmp_path: Path, no_blocking: BlockBuster, unannounced: None) -> AsyncIterator[World]:
    """A world with a running agent on a SQLite journal."""
    made = await World(tmp_path, store="sqlite").open()
    await made.start()
    yield made
    await made.stop()
    await made.close()


@dataclass
class RunningAgent:
    """What `running_agent` gives."""

    agent: Agent
    broker: MemoryBroker
    client: ComputeClient
    driver: FakeDriver
    world: World


@pytest.fixture
async def running_agent(sqlite_world: World) -> AsyncIterator[RunningAgent]:
    """An agent on a SQLite journal and the fake driver, with a controller's client."""
    async with sqlite_world.client() as client:
        yield RunningAgent(sqlite_world.agent, sqlite_world.broker, client, sqlite_world.driver, sqlite_world)
