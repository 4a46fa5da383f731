"""The agent is stopped, drained, doubled, or given a journal that is not its own."""

from __future__ import annotations

import asyncio
import json
import uuid

import pytest
from support.fleet import World, spec
from support.recorder import describe

from agent.messages.commands import InstanceCreate, InstanceDelete, InstancePause
from devstack.libvirtd import PrivateLibvirtd

EXIT_CONFIG = 3


async def test_sigterm_lets_running_work_end(world: World) -> None:
    agent = await world.fake_agent(driver_settings={"latency_s": {"define": 3.0}})
    await agent.start()
    one, other = str(uuid.uuid4()), str(uuid.uuid4())
    running = await world.send(agent.host, InstanceCreate(spec=spec(one)), one, progress=True)
    waiting = await world.send(agent.host, InstancePause(), one)
    await world.recorder.wait_for(agent.host, "operation.progress", where=lambda event: event.data["phase"] == "define")
    assert await agent.stop() == 0
    stopping = await world.recorder.wait_for(
        agent.host, "host.agent", where=lambda event: event.data["state"] == "stopping"
    )
    final = await world.recorder.wait_final(agent.host, running)
    assert final.kind == "operation.succeeded", describe(final)
    assert final.sequence < stopping.sequence
    assert waiting not in world.recorder.finals(agent.host)

    # What waited and what comes meanwhile are done in the next life.
    late = await world.send(agent.host, InstanceCreate(spec=spec(other)), other)
    await agent.start()
    finals = await world.recorder.wait_finals(agent.host, [waiting, late])
    assert {event.kind for event in finals.values()} == {"operation.succeeded"}
    await world.judge(agent, [one, other])


async def test_drain_has_a_limit(world: World) -> None:
    """A call that hangs holds up the end no longer than it may, and the operation goes on in the next life."""
    agent = await world.fake_agent(settings={"agent": {"drain_timeout_s": 0.5}})
    faults = agent.state_dir / "fake" / "faults.json"
    faults.parent.mkdir(parents=True)
    faults.write_text(json.dumps([{"call": "define", "hang_s": 60}]))
    await agent.start()
    instance_id = str(uuid.uuid4())
    command = await world.send(agent.host, InstanceCreate(spec=spec(instance_id)), instance_id, progress=True)
    await world.recorder.wait_for(agent.host, "operation.progress", where=lambda event: event.data["phase"] == "define")
    assert await agent.stop(timeout_s=50) == 0
    assert agent.log("agent.stopped", drained=False)
    faults.unlink()
    await agent.start()
    final = await world.recorder.wait_final(agent.host, command)
    assert final.kind == "operation.succeeded", describe(final)
    await world.judge(agent, [instance_id])


@pytest.mark.qemu
async def test_guests_do_not_notice(world: World, libvirtd: PrivateLibvirtd) -> None:
    """SIGTERM, kill -9 and two starts: the same QEMU, and not a single event about it."""
    agent = await world.libvirt_agent(libvirtd)
    await agent.start()
    instance_id = await world.create(agent.host)
    before = await asyncio.to_thread(libvirtd.qemu_pids)
    await world.settle(agent.host)
    mark = world.recorder.mark
    assert await agent.stop() == 0
    await agent.start()
    await agent.restart()
    assert await asyncio.to_thread(libvirtd.qemu_pids) == before
    await world.judge(agent, [instance_id], libvirtd)
    assert not world.recorder.events(agent.host, "instance.state", since=mark)


async def test_second_agent_of_a_host_stands_by(world: World) -> None:
    """The broker serves one of them; when that one dies the other goes on with what was not acknowledged."""
    first = await world.fake_agent()
    second = await world.fake_agent(host=first.host, folder="standby")
    await first.start()
    await second.start()
    one = await world.create(first.host)
    await first.wait_log("message.done", instance=one)
    assert not second.log("message.done")
    await first.kill()
    two = await world.create(first.host)
    await second.wait_log("message.done", instance=two)
    world.recorder.check(first.host, world.sent[first.host])


async def test_state_of_a_living_agent_is_not_shared(world: World) -> None:
    """Two processes on one journal would both take up its operations."""
    first = await world.fake_agent()
    await first.start()
    instance_id = await world.create(first.host)
    second = await world.fake_agent(host=first.host, folder="double", state_dir=first.state_dir)
    await second.start(ready=False)
    assert await second.wait_ended() == EXIT_CONFIG
    assert f"another agent is running on {first.state_dir}" in second.stderr, second.stderr
    assert not second.log("agent.ready")
    await world.judge(first, [instance_id])

    # A dead agent holds nothing.
    await first.kill()
    await second.start()
    await world.judge(second, [instance_id])


async def test_journal_of_another_host_is_refused(world: World) -> None:
    agent = await world.fake_agent()
    await agent.start()
    instance_id = await world.create(agent.host)
    assert await agent.stop() == 0

    renamed = await world.fake_agent(state_dir=agent.state_dir)
    await renamed.start(ready=False)
    assert await renamed.wait_ended() == EXIT_CONFIG
    assert f"the journal belongs to host {agent.host}" in renamed.stderr, renamed.stderr

    identity = agent.state_dir / "compute_id"
    mine = identity.read_text()
    identity.write_text(f"{uuid.uuid4()}\n")
    await agent.start(ready=False)
    assert await agent.wait_ended() == EXIT_CONFIG
    assert "restore its compute_id file" in agent.stderr, agent.stderr

    identity.unlink()
    await agent.start(ready=False)
    assert await agent.wait_ended() == EXIT_CONFIG
    assert f"{identity} is missing" in agent.stderr, agent.stderr

    identity.write_text(mine)
    await agent.start()
    await world.judge(agent, [instance_id])


async def test_instance_whose_domain_somebody_removed_can_be_deleted(world: World) -> None:
    agent = await world.fake_agent()
    await agent.start()
    instance_id = await world.create(agent.host)
    await agent.kill()
    (agent.state_dir / "fake" / "domains" / f"{instance_id}.json").unlink()
    await agent.start()
    drift = await world.recorder.wait_for(agent.host, "host.drift")
    assert (drift.data["difference"], drift.subject) == ("missing-domain", instance_id)
    await world.succeed(agent.host, InstanceDelete(), instance_id)
    world.recorder.check(agent.host, world.sent[agent.host])
    assert not await world.left(agent)
