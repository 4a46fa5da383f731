"""kill -9 of the agent at every boundary of create and delete: what was begun is finished or taken back, once.

The agent kills itself at a failpoint, as a power cut would, and is started again on the same state. On the fake
hypervisor, which outlives the agent as files, and on real QEMU.
"""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import pytest
from support.agent_process import AgentProcess
from support.fleet import World, spec
from support.recorder import describe

from agent.messages.commands import InstanceCreate, InstanceDelete, InstanceShow
from agent.messages.events import OperationFailed
from agent.messages.spec import ImageSource, NetworkNic, RootDisk
from devstack.libvirtd import PrivateLibvirtd

CREATE_STEPS = ("claim", "image", "storage", "define", "start")
DELETE_STEPS = ("destroy", "undefine", "storage")
# `accept`: committed and not acknowledged; `result`: before the final commit, and committed but not published.
AROUND = ("accept:after", "result:before", "result:after")


def points(verb: str, steps: tuple[str, ...], sides: tuple[str, ...] = ("before", "after")) -> list[str]:
    return [f"{verb}:{step}:{side}" for step in steps for side in sides] + [f"{verb}:{point}" for point in AROUND]


class Bench:
    """A world with one kind of hypervisor."""

    def __init__(self, world: World, libvirtd: PrivateLibvirtd | None) -> None:
        self.world = world
        self.libvirtd = libvirtd

    async def agent(self) -> AgentProcess:
        if self.libvirtd is None:
            return await self.world.fake_agent()
        return await self.world.libvirt_agent(self.libvirtd)

    @property
    def unstartable(self) -> dict[str, Any]:
        """A spec's fields with which start fails after all steps before it succeeded."""
        if self.libvirtd is None:
            return {"labels": {"fake.start-error": "internal"}}
        return {"nics": [NetworkNic(type="network", network="no-such-network")]}

    async def judge(self, agent: AgentProcess, *instances: str) -> None:
        await self.world.judge(agent, instances, self.libvirtd)

    async def runs(self, host: str, instance_id: str) -> None:
        """Expect a running instance, as the hypervisor itself says."""
        shown = await self.world.succeed(host, InstanceShow(), instance_id)
        assert shown.data["result"]["observed"] == "running", shown.data
        assert shown.data["result"]["desired"] == "running", shown.data
        if self.libvirtd is not None:
            assert f"i-{instance_id[:8]}" in await asyncio.to_thread(self.libvirtd.qemu_pids)


@pytest.fixture(params=["fake", pytest.param("qemu", marks=pytest.mark.qemu)])
def hypervisor(request: pytest.FixtureRequest) -> PrivateLibvirtd | None:
    return None if request.param == "fake" else request.getfixturevalue("libvirtd")


@pytest.fixture
def bench(world: World, hypervisor: PrivateLibvirtd | None) -> Bench:
    return Bench(world, hypervisor)


async def dies(agent: AgentProcess) -> None:
    assert await agent.wait_ended() == -9, "the failpoint was never reached"


@pytest.mark.parametrize("point", points("instance.create", CREATE_STEPS))
async def test_create(bench: Bench, image: ImageSource, point: str) -> None:
    world, agent = bench.world, await bench.agent()
    await agent.start(failpoint=point)
    instance_id = str(uuid.uuid4())
    wanted = spec(instance_id, root_disk=RootDisk(size_mib=1, image=image))
    command = await world.send(agent.host, InstanceCreate(spec=wanted), instance_id)
    await dies(agent)

    await agent.start()
    final = await world.recorder.wait_final(agent.host, command)
    assert final.kind == "operation.succeeded", describe(final)
    await bench.runs(agent.host, instance_id)
    await bench.judge(agent, instance_id)

    await world.succeed(agent.host, InstanceDelete(), instance_id)
    await bench.judge(agent)


@pytest.mark.parametrize("point", points("instance.delete", DELETE_STEPS))
async def test_delete(bench: Bench, point: str) -> None:
    world, agent = bench.world, await bench.agent()
    await agent.start(failpoint=point)
    instance_id = await world.create(agent.host)
    command = await world.send(agent.host, InstanceDelete(), instance_id)
    await dies(agent)

    await agent.start()
    final = await world.recorder.wait_final(agent.host, command)
    assert final.kind == "operation.succeeded", describe(final)
    removed = world.recorder.events(agent.host, "instance.removed")
    assert [event.subject for event in removed] == [instance_id]
    await bench.judge(agent)

    other = await world.create(agent.host)
    await bench.runs(agent.host, other)
    await bench.judge(agent, other)


@pytest.mark.parametrize("step", ["start", "define", "storage", "claim", "result:before", "result:after"])
async def test_undoing_a_create(bench: Bench, image: ImageSource, step: str) -> None:
    world, agent = bench.world, await bench.agent()
    await agent.start(failpoint=f"instance.create:{step if ':' in step else f'{step}:undo'}")
    instance_id = str(uuid.uuid4())
    disk = RootDisk(size_mib=1, image=image)
    wanted = spec(instance_id, root_disk=disk, **bench.unstartable)
    command = await world.send(agent.host, InstanceCreate(spec=wanted), instance_id)
    await dies(agent)

    await agent.start()
    final = await world.recorder.wait_final(agent.host, command)
    assert final.kind == "operation.failed", describe(final)
    failed = OperationFailed.model_validate(final.data)
    assert failed.undone, describe(final)
    assert failed.error.code == ("internal" if bench.libvirtd is None else "network_missing"), describe(final)
    await bench.judge(agent)

    # Neither the id nor the name is taken any more.
    await world.succeed(agent.host, InstanceCreate(spec=spec(instance_id)), instance_id)
    await bench.runs(agent.host, instance_id)
    await bench.judge(agent, instance_id)


async def test_killed_in_several_lives(bench: Bench, image: ImageSource) -> None:
    """One create meets its death in every life, and still ends once."""
    world, agent = bench.world, await bench.agent()
    instance_id = str(uuid.uuid4())
    await agent.start(failpoint="instance.create:image:after")
    wanted = spec(instance_id, root_disk=RootDisk(size_mib=1, image=image))
    command = await world.send(agent.host, InstanceCreate(spec=wanted), instance_id)
    for point in ("storage:after", "define:before", "start:after"):
        await dies(agent)
        await agent.start(failpoint=f"instance.create:{point}", ready=False)
    await dies(agent)
    await agent.start()
    final = await world.recorder.wait_final(agent.host, command)
    assert final.kind == "operation.succeeded", describe(final)
    await bench.runs(agent.host, instance_id)
    await bench.judge(agent, instance_id)


async def test_what_kills_the_agent_again_and_again_is_taken_back(world: World) -> None:
    """A command that is the death of every life ends as failed, and what it made is gone."""
    agent = await world.fake_agent()
    instance_id = str(uuid.uuid4())
    await agent.start(failpoint="instance.create:start:before")
    command = await world.send(agent.host, InstanceCreate(spec=spec(instance_id)), instance_id)
    for _life in range(4):
        await dies(agent)
        await agent.start(failpoint="instance.create:start:before", ready=False)
    await dies(agent)
    await agent.start(failpoint="instance.create:start:before")
    final = await world.recorder.wait_final(agent.host, command)
    assert (final.kind, final.data["error"]["code"]) == ("operation.failed", "too_many_attempts"), describe(final)
    assert final.data["undone"]
    await world.judge(agent)


async def test_killed_at_any_moment(world: World) -> None:
    """Thirty creates and deletes in parallel lanes; three deaths at moments that nobody chose."""
    agent = await world.fake_agent(driver_settings={"latency_s": {"default": 0.02}})
    await agent.start()
    ids = [str(uuid.uuid4()) for _ in range(30)]
    creates = [await world.send(agent.host, InstanceCreate(spec=spec(instance)), instance) for instance in ids]
    deletes = [await world.send(agent.host, InstanceDelete(), instance) for instance in ids[::2]]
    for done in (5, 15, 25):
        await world.recorder.wait_for(
            agent.host, "operation.succeeded",
            where=lambda _event, done=done: len(world.recorder.finals(agent.host)) >= done,
        )  # fmt: skip
        await agent.kill()
        await agent.start(ready=False)
    finals = await world.recorder.wait_finals(agent.host, [*creates, *deletes])
    assert {event.kind for event in finals.values()} == {"operation.succeeded"}
    await agent.wait_log("agent.ready")
    await world.judge(agent, ids[1::2])
