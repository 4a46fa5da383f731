"""The Python examples of docs/contract.md, run as they stand against a real broker and an agent."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from agent.app import Agent
from agent.bus.amqp import AmqpBus, AmqpSettings
from agent.config import Settings
from devstack.rabbitmq import PrivateBroker

PAGE = Path(__file__).parents[2] / "docs" / "contract.md"
_BLOCK = re.compile(r"<!-- example: (\w+) -->\n```python\n(.*?)```\n\n[^\n]*\n\n```\n(.*?)```", re.DOTALL)
EXAMPLES = {name: (code, output) for name, code, output in _BLOCK.findall(PAGE.read_text("utf-8"))}
HOST = "node1.example"


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateBroker]:
    with PrivateBroker(tmp_path_factory.mktemp("rabbitmq")) as running:
        yield running


@pytest.fixture
async def agent(broker: PrivateBroker, tmp_path: Path) -> AsyncIterator[Agent]:
    settings = Settings.model_validate(
        {
            "agent": {"host": HOST, "state_dir": tmp_path, "drain_timeout_s": 5},
            "bus": {"url": broker.url},
            "driver": {"name": "fake"},
            "health": {"listen": ""},
        }
    )
    running = Agent(settings, AmqpBus(AmqpSettings(url=broker.url), name="agent"))
    await running.start()
    await running.wait_ready(20)
    yield running
    await running.stop()


async def _run(name: str, broker: PrivateBroker) -> str:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        EXAMPLES[name][0],
        env=os.environ | {"COMPUTE_AMQP": broker.url, "COMPUTE_HOST": HOST},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(240):
        out, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return out.decode()


def _without_ids(text: str) -> str:
    return re.sub(r"example-[0-9a-f]{8}", "example-ID", text)


@pytest.mark.parametrize("name", ["client", "raw"])
async def test_example_prints_what_the_page_says(name: str, broker: PrivateBroker, agent: Agent) -> None:
    printed = await _run(name, broker)
    got, said = _without_ids(printed).splitlines(), _without_ids(EXAMPLES[name][1]).splitlines()
    assert set(got) <= set(said)
    # Single reports of progress may be left out, and are on a slow disk.
    assert [line for line in got if "progress" not in line] == [line for line in said if "progress" not in line]


def test_all_examples_are_run() -> None:
    assert set(EXAMPLES) == {"client", "raw"}
