"""Agents on libvirt's other URIs: an unprivileged session, and the simulated hypervisor in process and in a daemon."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.agent_process import AgentProcess
from support.fleet import World

from agent.messages.commands import (
    ConsoleLog,
    HostShow,
    InstanceCreate,
    InstanceDelete,
    InstanceList,
    InstancePause,
    InstanceReboot,
    InstanceResume,
    InstanceShow,
    InstanceStart,
    InstanceStop,
)
from agent.messages.spec import BridgeNic, ImageSource, InstanceSpec, RootDisk, Seed, UserNic
from agent.messages.verb import CommandData
from devstack.guest_image import GuestImage
from devstack.libvirtd import PrivateLibvirtd, PrivateSessionLibvirtd

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(900)]

UP = "compute-agent guest is up"
TEST_DOMAIN = "6695eb01-f6a4-8304-79aa-97f2502e193f"
"""The domain named `test` that libvirt's simulation always begins with."""
ROOM = {"capacity": {"ram_allocation_ratio": 16.0}}
"""That domain runs with 8 GiB on a simulated host of 3 GiB: without over-commitment nothing else would fit."""


def spec(name: str, **changes: Any) -> InstanceSpec:
    values: dict[str, Any] = {"name": name, "vcpus": 1, "memory_mib": 128, "root_disk": RootDisk(size_mib=256)}
    return InstanceSpec(**(values | changes))


# --- qemu:///session --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def session_daemon(session_libvirtd: PrivateLibvirtd) -> Iterator[PrivateSessionLibvirtd]:
    # `session_libvirtd` is named for its skips: what it needs is needed here too.
    del session_libvirtd
    # Not pytest's folder: the socket of the guest agent's channel has a long path of its own below it.
    folder = Path(tempfile.mkdtemp(prefix="lvs-"))
    daemon = PrivateSessionLibvirtd(folder)
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.stop()
        shutil.rmtree(folder)


@pytest.fixture
async def session_agent(
    world: World, session_daemon: PrivateSessionLibvirtd, bootable: GuestImage
) -> AgentProcess:
    agent = await world.agent(
        driver="libvirt", driver_settings={"uri": session_daemon.uri, "virt_type": "qemu", "reconnect_max_s": 0.5},
        settings={"images": {"file_roots": [str(bootable.path.resolve().parent)]}},
    )  # fmt: skip
    return await agent.start()


async def test_a_guest_boots_in_an_unprivileged_session(
    world: World, session_agent: AgentProcess, session_daemon: PrivateSessionLibvirtd, source: ImageSource
) -> None:
    host, guest = session_agent.host, str(uuid.uuid4())
    wanted = spec(
        "unprivileged", root_disk=RootDisk(size_mib=256, image=source), nics=[UserNic(type="user")],
        seed=Seed(user_data="#in a session\n"),
    )  # fmt: skip
    made = await world.succeed(host, InstanceCreate(spec=wanted), guest)
    assert made.data["result"]["observed"] == "running"
    async with asyncio.timeout(240):
        # The console has no events.
        while "seed: user-data-first-line=" not in (text := (await world.succeed(host, ConsoleLog(), guest)).data["result"]["text"]):
            await asyncio.sleep(0.25)
    assert UP in text
    assert f"seed: instance-id={guest}" in text
    assert "seed: user-data-first-line=#in a session" in text
    assert text.count("guest: mac=") == 1

    await world.succeed(host, InstancePause(), guest)
    await world.succeed(host, InstanceResume(), guest)
    stopped = await world.succeed(host, InstanceStop(timeout_s=60), guest)
    assert (stopped.data["result"]["observed"], stopped.data["result"]["forced"]) == ("stopped", False)
    await world.succeed(host, InstanceStart(), guest)

    # What needs privileges fails by name, and as a whole.
    bridged = spec("bridged", memory_mib=32, nics=[BridgeNic(type="bridge", bridge="nowhere")])
    failed = await world.run(host, InstanceCreate(spec=bridged), str(uuid.uuid4()))
    assert failed.kind == "operation.failed"
    assert failed.data["undone"]
    await world.judge(session_agent, [guest], session_daemon)

    await world.succeed(host, InstanceDelete(), guest)
    await world.judge(session_agent, (), session_daemon)


# --- test:///default --------------------------------------------------------------------------------------------------


@pytest.fixture(params=["in-process", "daemon"])
async def simulated(
    world: World, session_libvirtd: PrivateLibvirtd, request: pytest.FixtureRequest
) -> AgentProcess:
    uri = "test:///default"
    if request.param == "daemon":
        session_libvirtd.start()
        uri = session_libvirtd.test_uri
    agent = await world.agent(driver="libvirt", driver_settings={"uri": uri, "reconnect_max_s": 0.5}, settings=ROOM)
    return await agent.start()


async def result(world: World, agent: AgentProcess, data: CommandData, instance_id: str | None = None) -> dict[str, Any]:
    return (await world.succeed(agent.host, data, instance_id)).data["result"]


async def test_life_on_the_simulated_hypervisor(world: World, simulated: AgentProcess) -> None:
    agent, guest = simulated, str(uuid.uuid4())
    beat = (await result(world, agent, HostShow()))["heartbeat"]
    assert (beat["hypervisor_type"], beat["foreign_domains"]) == ("TEST", 1)
    assert await result(world, agent, InstanceList(include_foreign=True)) == {
        "instances": [],
        "foreign": [{"id": TEST_DOMAIN, "name": "test", "observed": "running", "vcpus": 2, "memory_mib": 8192}],
    }

    made = await result(world, agent, InstanceCreate(spec=spec("sim"), start=False), guest)
    assert (made["desired"], made["observed"]) == ("stopped", "stopped")
    assert (await result(world, agent, InstanceStart(), guest))["changed"]
    assert not (await result(world, agent, InstanceStart(), guest))["changed"]
    mark = world.recorder.mark
    assert (await result(world, agent, InstancePause(), guest))["observed"] == "paused"
    state = await world.recorder.wait_for(agent.host, "instance.state", since=mark)
    assert (state.subject, state.data["observed"], state.data["previous"]) == (guest, "paused", "running")
    assert (await result(world, agent, InstanceShow(), guest))["observed"] == "paused"
    assert (await result(world, agent, InstanceResume(), guest))["observed"] == "running"
    stopped = await result(world, agent, InstanceStop(timeout_s=10), guest)
    assert (stopped["observed"], stopped["forced"]) == ("stopped", False)
    await result(world, agent, InstanceStart(), guest)
    await result(world, agent, InstanceDelete(), guest)
    gone = await world.run(agent.host, InstanceShow(), guest)
    assert gone.data["error"]["code"] == "unknown_instance"

    listed = await result(world, agent, InstanceList(include_foreign=True))
    assert ([one["id"] for one in listed["foreign"]], listed["instances"]) == ([TEST_DOMAIN], [])
    assert not await world.left(agent)
    world.recorder.check(agent.host, world.sent[agent.host])
    assert not agent.open_operations()


async def test_what_the_simulation_cannot_do_is_refused_by_name(world: World, simulated: AgentProcess) -> None:
    agent, guest = simulated, str(uuid.uuid4())
    can = (await result(world, agent, HostShow()))["heartbeat"]["capabilities"]
    assert "instance.pause" in can
    await result(world, agent, InstanceCreate(spec=spec("sim")), guest)
    for command in (InstanceReboot(), InstanceReboot(mode="hard"), ConsoleLog()):
        assert command.verb not in can
        refusal = await world.run(agent.host, command, guest)
        assert (refusal.kind, refusal.data["error"]["code"]) == ("operation.rejected", "verb_unsupported")
        assert command.verb in refusal.data["error"]["message"]
        assert refusal.data["error"]["details"] == {"verb": command.verb}
        assert not refusal.data["error"]["retryable"]
    assert (await result(world, agent, InstanceShow(), guest))["observed"] == "running"
    await result(world, agent, InstanceDelete(), guest)
    assert not await world.left(agent)


async def test_instances_of_a_simulating_daemon_outlive_the_agent(world: World, libvirtd: PrivateLibvirtd) -> None:
    agent = await world.agent(driver="libvirt", driver_settings={"uri": libvirtd.test_uri}, settings=ROOM)
    # The simulation ends with its last connection; this one keeps it.
    keeper = await world.agent(driver="libvirt", driver_settings={"uri": libvirtd.test_uri}, settings=ROOM)
    await keeper.start()
    await agent.start()
    guest = str(uuid.uuid4())
    await result(world, agent, InstanceCreate(spec=spec("sim")), guest)
    await result(world, agent, InstancePause(), guest)
    await agent.restart()
    shown = await result(world, agent, InstanceShow(), guest)
    assert (shown["desired"], shown["observed"]) == ("paused", "paused")
    await result(world, agent, InstanceDelete(), guest)
    world.recorder.check(agent.host, world.sent[agent.host])
