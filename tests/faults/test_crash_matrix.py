"""The crash matrix: kill -9 of the agent at the boundaries of every verb's steps.

Afterwards the operation is finished or taken back, there is one final event, journal and hypervisor agree, nothing
is left over, and the instance can still be deleted. `COMPUTE_AGENT_FAULTS=full` plays every boundary; else one of each
step is played, on real QEMU.
"""

from __future__ import annotations

import os

import pytest
from scenarios import SCENARIOS, Scenario, Stage
from support.agent_process import AgentProcess
from support.fleet import World
from support.recorder import describe

from agent.messages.commands import InstanceDelete, OperationShow
from agent.messages.spec import ImageSource
from devstack.libvirtd import PrivateLibvirtd

FULL = os.environ.get("COMPUTE_AGENT_FAULTS") == "full"
SIDES = ("before", "after") if FULL else ("after",)
AROUND = ("accept:after", "result:before", "result:after") if FULL else ()
QEMU = pytest.param("qemu", marks=pytest.mark.qemu)


def boundaries() -> list[tuple[Scenario, str]]:
    return [
        (scenario, point)
        for scenario in SCENARIOS
        for point in [f"{step}:{side}" for step in scenario.steps for side in SIDES] + list(AROUND)
    ]


@pytest.fixture
def hypervisor(request: pytest.FixtureRequest) -> PrivateLibvirtd | None:
    return None if request.param == "fake" else request.getfixturevalue("libvirtd")


@pytest.fixture
async def agent(world: World, hypervisor: PrivateLibvirtd | None) -> AgentProcess:
    store = world.folder / "store"
    store.mkdir()
    settings = {"exports": {"stores": {"main": str(store)}}}
    return await (
        world.fake_agent(settings=settings) if hypervisor is None else world.libvirt_agent(hypervisor, settings=settings)
    )


@pytest.mark.parametrize("hypervisor", ["fake", QEMU] if FULL else ["fake"], indirect=True)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
async def test_steps_are_as_listed(
    world: World, agent: AgentProcess, hypervisor: PrivateLibvirtd | None, image: ImageSource, scenario: Scenario
) -> None:
    await agent.start()
    stage = Stage(world, agent.host, image, real=hypervisor is not None)
    instance_id = await scenario.prepare(stage)
    command = await world.send(agent.host, scenario.ask(stage), instance_id)
    final = await world.recorder.wait_final(agent.host, command)
    assert final.kind == "operation.succeeded", describe(final)
    shown = await world.succeed(agent.host, OperationShow(operation_id=command))
    assert tuple(step["name"] for step in shown.data["result"]["steps"]) == scenario.steps


@pytest.mark.parametrize("hypervisor", ["fake", QEMU] if FULL else [QEMU], indirect=True)
@pytest.mark.parametrize(
    ("scenario", "point"), boundaries(), ids=[f"{scenario.name}-{point.replace(':', '-')}" for scenario, point in boundaries()]
)
async def test_killed(
    world: World, agent: AgentProcess, hypervisor: PrivateLibvirtd | None, image: ImageSource, scenario: Scenario, point: str
) -> None:
    # The verbs that prepare the instance must not meet the failpoint: it is set for a life of its own.
    await agent.start()
    stage = Stage(world, agent.host, image, real=hypervisor is not None)
    instance_id = await scenario.prepare(stage)
    await agent.stop()
    await agent.start(failpoint=f"{scenario.verb}:{point}")
    command = await world.send(agent.host, scenario.ask(stage), instance_id)
    assert await agent.wait_ended() == -9, "the failpoint was never reached"

    await agent.start()
    final = await world.recorder.wait_final(agent.host, command)
    assert final.kind in scenario.ends, describe(final)
    await world.settle(agent.host)
    assert agent.alive
    known = world.recorder.events(agent.host, "instance.removed")
    if not known:
        await world.judge(agent, [instance_id], hypervisor)
        await world.succeed(agent.host, InstanceDelete(), instance_id)
    await world.judge(agent, [], hypervisor)
