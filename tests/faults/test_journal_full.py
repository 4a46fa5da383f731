"""The journal's disk is full: nothing is accepted that cannot be kept, the agent says so, and goes on by itself."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.agent_process import AgentProcess
from support.fleet import World, spec

from agent.messages import routing
from agent.messages.commands import HostPing, InstanceCreate
from agent.store.file import JournalFile
from devstack.rabbitmq import PrivateBroker


class TinyDisk:
    """A tmpfs that can be filled to the last byte."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ballast = path / "ballast"

    def fill(self) -> None:
        with self._ballast.open("ab", buffering=0) as file:
            for size in (1 << 20, 1 << 12, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    continue

    def free(self) -> None:
        self._ballast.unlink()


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[TinyDisk]:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a tmpfs needs root")
    path = tmp_path / "tiny"
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(path)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        yield TinyDisk(path)
    finally:
        # Lazily: an agent that does not die must not keep the mount.
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.fixture
async def agent(tiny_disk: TinyDisk, world: World) -> AgentProcess:
    """An agent with its journal on the tiny disk, and a hypervisor that needs no disk."""
    made = await world.fake_agent(state_dir=tiny_disk.path / "state", driver_settings={"persist": False})
    return await made.start()


async def kept_by_broker(broker: PrivateBroker, host: str, count: int) -> None:
    """Wait until the broker keeps so many commands for the host, delivered or not.

    It counts a quorum queue's messages anew every five seconds only, so the figure may be old for a while; how often
    it can be asked meanwhile is a matter of the machine.
    """
    wanted = f"{routing.host_queue(host)}\t{count}"
    listed = ""
    try:
        async with asyncio.timeout(120):
            while wanted not in listed.splitlines():
                listed = await asyncio.to_thread(broker.ctl, "list_queues", "name", "messages")
    except TimeoutError:
        raise AssertionError(f"the broker keeps not {count} commands of {host}:\n{listed}") from None


def journaled(agent: AgentProcess, commands: list[str]) -> list[str]:
    """Which of these commands are in the journal."""
    file = JournalFile(agent.state_dir / "journal.sqlite", read_only=True)
    try:
        return [command for command in commands if file.operation(command) is not None]
    finally:
        file.close()


@pytest.mark.parametrize("killed", [False, True], ids=["waits", "killed"])
async def test_full_disk(world: World, broker: PrivateBroker, agent: AgentProcess, tiny_disk: TinyDisk, killed: bool) -> None:
    host, recorder = agent.host, world.recorder
    first = await world.create(host)
    await world.settle(host)
    tiny_disk.fill()
    ids = [str(uuid.uuid4()) for _ in range(5)]
    commands = [await world.send(host, InstanceCreate(spec=spec(instance)), instance) for instance in ids]
    commands.append(await world.send(host, HostPing()))

    await recorder.heartbeat(host, where=lambda beat: "journal" in beat.conditions and not beat.healthy)
    text = await agent.answers("/readyz", 503)
    assert "journal: no space is left for the journal" in text, text
    assert (await agent.get("/livez"))[0] == 200
    for _ in range(2):
        await recorder.heartbeat(host, where=lambda beat: "journal" in beat.conditions)
    assert not set(commands) & set(recorder.finals(host))
    await kept_by_broker(broker, host, len(commands))
    assert not journaled(agent, commands)
    assert agent.alive

    if killed:
        await agent.kill()
    tiny_disk.free()
    if killed:
        await agent.start()
    finals = await recorder.wait_finals(host, commands)
    assert {event.kind for event in finals.values()} == {"operation.succeeded"}
    await recorder.heartbeat(host, where=lambda beat: beat.healthy)
    await agent.answers("/readyz", 200)
    await world.settle(host)
    recorder.check(host, world.sent[host])
    if not killed:  # a killed agent's hypervisor in memory is gone as well
        await world.judge(agent, [first, *ids])
    await kept_by_broker(broker, host, 0)


async def test_full_disk_during_work(world: World, tiny_disk: TinyDisk) -> None:
    """Operations in the middle of their steps stand still and go on; not one ends twice or is forgotten."""
    agent = await world.fake_agent(
        state_dir=tiny_disk.path / "state", driver_settings={"persist": False, "latency_s": {"default": 0.1}}
    )
    await agent.start()
    host = agent.host
    ids = [str(uuid.uuid4()) for _ in range(20)]
    commands = [await world.send(host, InstanceCreate(spec=spec(instance)), instance) for instance in ids]
    await world.recorder.wait_final(host, commands[0])
    tiny_disk.fill()
    # Where the others are quicker than we are, this one finds the disk full.
    ids.append(str(uuid.uuid4()))
    commands.append(await world.send(host, InstanceCreate(spec=spec(ids[-1])), ids[-1]))
    await world.recorder.heartbeat(host, where=lambda beat: "journal" in beat.conditions)
    tiny_disk.free()
    finals = await world.recorder.wait_finals(host, commands)
    assert {event.kind for event in finals.values()} == {"operation.succeeded"}
    await world.judge(agent, ids)


async def test_start_on_a_full_disk(world: World, agent: AgentProcess, tiny_disk: TinyDisk) -> None:
    """With a journal that cannot be written it serves nothing, and what it says names the cause."""
    instance_id = str(uuid.uuid4())
    assert await agent.stop() == 0
    tiny_disk.fill()
    command = await world.send(agent.host, InstanceCreate(spec=spec(instance_id)), instance_id)
    await agent.start(ready=False)
    assert await agent.wait_ended() == 1, "a restart can help, so the status must not say that it cannot"
    assert "no space is left for the journal" in agent.stderr, agent.stderr
    tiny_disk.free()
    await agent.start()
    final = await world.recorder.wait_final(agent.host, command)
    assert final.kind == "operation.succeeded"
    await world.judge(agent, [instance_id])
