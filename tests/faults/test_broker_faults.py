"""RabbitMQ restarts, dies or freezes during work: nothing is lost, nothing happens twice, the events keep their order."""

from __future__ import annotations

import asyncio
import uuid

import pytest
from support.agent_process import WAIT_S, AgentProcess
from support.fleet import World, spec

from agent.controller.failures import FINAL_KINDS
from agent.messages.commands import HostPing, InstanceCreate
from devstack.rabbitmq import PrivateBroker

COUNT = 50


@pytest.fixture
async def agent(world: World) -> AgentProcess:
    """An agent that makes about sixteen instances a second."""
    made = await world.fake_agent(driver_settings={"latency_s": {"define": 0.2, "start": 0.2}})
    return await made.start()


async def send_creates(world: World, host: str, count: int = COUNT) -> tuple[list[str], list[str]]:
    ids = [str(uuid.uuid4()) for _ in range(count)]
    commands = await asyncio.gather(*(world.send(host, InstanceCreate(spec=spec(instance)), instance) for instance in ids))
    return ids, list(commands)


async def done(agent: AgentProcess, count: int) -> None:
    """Wait until the agent has ended so many operations, whoever could hear of it."""
    mark = 0
    for _ in range(count):
        line = await agent.wait_log("message.done", since=mark)
        mark = agent.lines.index(line) + 1


async def all_succeed(world: World, agent: AgentProcess, ids: list[str], commands: list[str]) -> None:
    finals = await world.recorder.wait_finals(agent.host, commands)
    assert {event.kind for event in finals.values()} == {"operation.succeeded"}
    await world.judge(agent, ids)
    # Not only told once but done once: the journal's answer is the only one that was ever made.
    # What it says comes to us by a pipe, and the line of our last question after all others.
    await agent.wait_log("message.done", verb="host.audit")
    assert len(agent.log("message.done", verb="instance.create", all_lives=True)) == len(ids)


@pytest.mark.parametrize("fault", ["restart", "kill", "pause"])
async def test_broker_away_during_work(world: World, agent: AgentProcess, broker: PrivateBroker, fault: str) -> None:
    if fault == "kill":
        await world.harden(agent)
    ids, commands = await send_creates(world, agent.host)
    await world.recorder.wait_for(
        agent.host, FINAL_KINDS, where=lambda _event: len(world.recorder.finals(agent.host)) >= 10
    )
    end = {"restart": broker.stop, "kill": broker.kill, "pause": broker.pause}[fault]
    back = broker.unpause if fault == "pause" else broker.start
    await asyncio.to_thread(end)
    try:
        # Work does not wait for the broker.
        await done(agent, 40)
        if fault != "pause":
            assert "broker:" in await agent.answers("/readyz", 503)
            assert (await agent.get("/livez"))[0] == 200
    finally:
        await asyncio.to_thread(back)
    await all_succeed(world, agent, ids, commands)
    await agent.answers("/readyz", 200)


async def test_broker_dies_with_commands_in_hand(world: World, agent: AgentProcess, broker: PrivateBroker) -> None:
    """Confirmed to the controller, perhaps delivered, perhaps acknowledged: what is delivered again has no effect."""
    await world.harden(agent)
    ids, commands = await send_creates(world, agent.host)
    await asyncio.to_thread(broker.kill)
    await asyncio.to_thread(broker.start)
    await all_succeed(world, agent, ids, commands)


async def test_broker_and_agent_die_together(world: World, agent: AgentProcess, broker: PrivateBroker) -> None:
    await world.harden(agent)
    ids, commands = await send_creates(world, agent.host, 20)
    await world.recorder.wait_final(agent.host, commands[0])
    await agent.kill()
    await asyncio.to_thread(broker.kill)
    await agent.start(ready=False)
    await agent.wait_log("health.listening")
    await asyncio.to_thread(broker.start)
    await agent.wait_log("agent.ready")
    finals = await world.recorder.wait_finals(agent.host, commands)
    assert {event.kind for event in finals.values()} == {"operation.succeeded"}
    await world.judge(agent, ids)


async def test_agent_starts_before_its_broker(world: World, broker: PrivateBroker) -> None:
    agent = await world.fake_agent()
    await asyncio.to_thread(broker.stop)
    try:
        await agent.start(ready=False)
        await agent.wait_log("health.listening")
        assert "broker:" in await agent.answers("/readyz", 503)
        assert agent.alive
    finally:
        await asyncio.to_thread(broker.start)
    await agent.wait_log("agent.ready")
    await agent.answers("/readyz", 200)
    instance_id = await world.create(agent.host)
    await world.judge(agent, [instance_id])


async def test_controller_hears_every_answer_over_a_restart(
    world: World, agent: AgentProcess, broker: PrivateBroker
) -> None:
    """The client asks again for answers that were lost with its queue; the agent repeats them from its journal."""
    ids = [str(uuid.uuid4()) for _ in range(COUNT)]

    async def create(instance: str) -> str:
        answer = await world.client.call(
            InstanceCreate(spec=spec(instance)), host=agent.host, id=f"create-{instance}", instance_id=instance,
            timeout_s=WAIT_S, resend_after_s=2,
        )  # fmt: skip
        return str(answer.instance_id)

    calls = [asyncio.create_task(create(instance)) for instance in ids]
    await done(agent, 5)
    await asyncio.to_thread(broker.restart)
    assert await asyncio.gather(*calls) == ids
    await world.succeed(agent.host, HostPing())
    await all_succeed(world, agent, ids, [f"create-{instance}" for instance in ids])
