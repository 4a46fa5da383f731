"""`compute-agent journal`: reading and mending, with and without an agent beside it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from support.world import World, command, new_id, spec, until

from agent.cli import main
from agent.core import operation
from agent.drivers.fake.settings import Fault
from agent.messages.commands import HostPing, InstanceCreate, InstanceDelete, InstanceStop


class Tool:
    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir

    def run(self, *arguments: str) -> Result:
        return CliRunner().invoke(main, ["journal", "--state-dir", str(self._state_dir), *arguments])

    async def __call__(self, *arguments: str, status: int = 0) -> str:
        result = await asyncio.to_thread(self.run, *arguments)
        assert result.exit_code == status, (result.output, result.exception)
        return result.output

    async def json(self, *arguments: str) -> Any:
        return json.loads(await self(*arguments, "--json"))


@pytest.fixture
async def world(tmp_path: Path, no_blocking: object, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(operation, "UNDO_PAUSE_S", 0.0)
    made = await World(tmp_path, store="sqlite", periodic={"requests_s": 0.01}).open()
    await made.start()
    yield made
    made.driver.clear_faults()
    await made.stop()
    await made.close()


@pytest.fixture
def tool(world: World) -> Tool:
    return Tool(world.folder / "state")


async def leave_something(world: World) -> str:
    world.driver.inject(Fault(call="start", error="internal", times=1))
    world.driver.inject(Fault(call="undefine", error="internal"))
    final = await world.do(InstanceCreate(spec=spec()), instance_id=new_id())
    await until(lambda: not world.agent._lanes.busy)
    return str(final.data["operation_id"])


async def test_ls_beside_a_running_agent(world: World, tool: Tool) -> None:
    instance_id = await world.create(labels={"fake.guest-shutdown-s": "never"})
    ping = await world.do(HostPing())
    stop = world.send(InstanceStop(timeout_s=600), instance_id=instance_id)
    await until(lambda: world.agent._runner.find(stop))
    text = await tool("ls")
    assert text.splitlines()[0].startswith("OPERATION")
    assert f"{instance_id}" in text
    found = await tool.json("ls")
    assert [row["verb"] for row in found] == ["instance.stop", "host.ping", "instance.create"]
    assert [row["id"] for row in await tool.json("ls", "--open")] == [stop]
    assert [row["id"] for row in await tool.json("ls", "--limit", "2")] == [stop, ping.data["operation_id"]]
    await world.ask(world.driver.simulate_guest_shutdown, instance_id)
    await world.final(stop)
    assert await tool.json("ls", "--open") == []


async def test_show_an_operation_with_steps_and_error(world: World, tool: Tool) -> None:
    operation_id = await leave_something(world)
    shown = await tool.json("show", operation_id)
    assert shown["state"] == "failed"
    assert shown["undo_pending"] is True
    assert shown["error"]["code"] == "internal"
    assert [(step["name"], step["state"]) for step in shown["steps"]] == [
        ("claim", "started"), ("storage", "done"), ("define", "done"), ("start", "undone"),
    ] or shown["steps"][0]["state"] == "done"  # fmt: skip
    text = await tool("show", operation_id)
    assert "internal" in text
    assert "define" in text
    assert f"{operation_id}" in await tool("ls")
    assert "failed*" in await tool("ls")


async def test_show_what_is_not_there(world: World, tool: Tool) -> None:
    assert "unknown_operation" in await tool("show", "nobody", status=3)


async def test_retry_is_done_by_the_running_agent(world: World, tool: Tool) -> None:
    operation_id = await leave_something(world)
    assert world.owned_files() != []
    world.driver.clear_faults()
    await tool("retry", operation_id)
    await until(lambda: world.owned_files() == [])
    await world.quiet()
    assert (await tool.json("show", operation_id))["undo_pending"] is False
    assert len(world.finals(operation_id)) == 1
    assert "nothing_to_retry" in await tool("retry", operation_id, status=3)


async def test_retry_is_kept_for_an_agent_that_is_down(world: World, tool: Tool) -> None:
    operation_id = await leave_something(world)
    await world.crash()
    await tool("retry", operation_id)
    await world.start()
    await until(lambda: world.owned_files() == [])
    await world.quiet()
    assert len(world.finals(operation_id)) == 1


async def test_forget_only_what_has_ended(world: World, tool: Tool) -> None:
    instance_id = await world.create(labels={"fake.guest-shutdown-s": "never"})
    stop = world.send(InstanceStop(timeout_s=600), instance_id=instance_id)
    await until(lambda: world.agent._runner.find(stop))
    assert "operation_open" in await tool("forget", stop, status=3)
    assert "unknown_operation" in await tool("forget", "nobody", status=3)
    await world.ask(world.driver.simulate_guest_shutdown, instance_id)
    await world.final(stop)
    await tool("forget", stop)
    assert "unknown_operation" in await tool("show", stop, status=3)
    # A forgotten id is a new command.
    world.put(command("instance.stop", {"timeout_s": 1}, subject=instance_id, id=stop))
    await until(lambda: len(world.finals(stop)) == 2)


async def test_what_left_something_is_not_forgotten(world: World, tool: Tool) -> None:
    """Its record is all that still knows about what has to be taken back."""
    operation_id = await leave_something(world)
    assert "undo_pending" in await tool("forget", operation_id, status=3)
    assert (await tool.json("show", operation_id))["undo_pending"] is True


async def test_reading_a_journal_that_nobody_has_open(world: World, tool: Tool) -> None:
    instance_id = await world.create()
    await world.stop()
    assert [row["verb"] for row in await tool.json("ls")] == ["instance.create"]
    await world.start()
    assert (await world.do(InstanceDelete(), instance_id=instance_id)).kind == "operation.succeeded"


async def test_many_readers_do_not_disturb_the_agent(world: World, tool: Tool) -> None:
    sent = [world.send(HostPing()) for _ in range(100)]
    await asyncio.gather(*(tool("ls") for _ in range(5)))
    for one in sent:
        assert (await world.final(one)).kind == "operation.succeeded"


def test_a_state_dir_without_journal(tmp_path: Path) -> None:
    result = Tool(tmp_path).run("ls")
    assert result.exit_code == 3
    assert result.stderr.startswith("error: no_journal: there is no journal at ")


async def test_an_error_is_json_where_json_was_asked_for(world: World, tool: Tool) -> None:
    assert json.loads(await tool("show", "nobody", "--json", status=3))["error"]["code"] == "unknown_operation"


def test_a_file_that_is_no_journal(tmp_path: Path) -> None:
    (tmp_path / "journal.sqlite").write_bytes(b"not a database at all, by any measure" * 100)
    result = Tool(tmp_path).run("ls")
    assert result.exit_code == 1
    assert "journal_error" in result.output
    assert "Traceback" not in result.output
