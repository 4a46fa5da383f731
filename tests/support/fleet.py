"""One test's broker, recorder, controller and agents, and what is expected of them in the end."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import Collection
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from agent.bus.amqp import AmqpBus, AmqpSettings
from agent.controller.client import ComputeClient
from agent.messages.commands import HostPing, InstanceCreate
from agent.messages.events import Event
from agent.messages.spec import InstanceSpec, RootDisk
from agent.messages.verb import CommandData
from agent.messages.verbs_host import HostAudit
from devstack.libvirtd import PrivateLibvirtd
from devstack.rabbitmq import PrivateBroker
from support.agent_process import WAIT_S, AgentProcess
from support.host import leftovers, libvirt_leftovers
from support.recorder import Recorder, describe

_numbers = itertools.count(1)


class World:
    """One test's broker, recorder, controller and agents."""

    def __init__(self, broker: PrivateBroker, folder: Path) -> None:
        self.broker = broker
        self.folder = folder
        self.sent: dict[str, list[str]] = {}
        self.recorder: Recorder
        self.client: ComputeClient
        self._connected = asyncio.Event()
        self._stack = AsyncExitStack()

    async def open(self) -> None:
        # First what is closed last: the agents must end before those who watch them.
        self.recorder = await self._stack.enter_async_context(Recorder(self.broker.url))
        settings = AmqpSettings.model_validate(
            {"url": self.broker.url, "reconnect_min_s": 0.05, "reconnect_max_s": 0.3, "connect_timeout_s": 30}
        )
        bus = AmqpBus(settings, name="faults-controller")
        bus.on_state(lambda connected: self._connected.set() if connected else self._connected.clear())
        self.client = await self._stack.enter_async_context(ComputeClient(bus, source="tests/faults"))

    async def close(self) -> None:
        await self._stack.aclose()

    async def agent(self, *, host: str | None = None, folder: str | None = None, **options: Any) -> AgentProcess:
        """An agent that is not started yet, of a new host unless one is given."""
        host = host or f"host{next(_numbers)}-{uuid.uuid4().hex[:6]}"
        directory = self.folder / (folder or host)
        made = AgentProcess(directory, host=host, broker_url=self.broker.url, **options)
        return await self._stack.enter_async_context(made)

    async def fake_agent(self, *, driver_settings: dict[str, Any] | None = None, **options: Any) -> AgentProcess:
        return await self.agent(driver="fake", driver_settings={"persist": True} | (driver_settings or {}), **options)

    async def libvirt_agent(self, libvirtd: PrivateLibvirtd, **options: Any) -> AgentProcess:
        driver = {"uri": libvirtd.uri, "virt_type": "qemu", "reconnect_max_s": 0.5, "connect_timeout_s": 3.0}
        return await self.agent(driver="libvirt", driver_settings=driver, **options)

    async def harden(self, agent: AgentProcess) -> None:
        """Restart the broker in good order, so that it can be killed.

        RabbitMQ 3.10 forgets the servers of quorum queues that were declared within seconds before kill -9
        (`names.dets not properly closed`): such a queue has no leader for ever after.
        """
        mark = agent.mark
        await asyncio.to_thread(self.broker.restart)
        await agent.wait_log("broker.connection", connected=True, since=mark)

    # --- commands -------------------------------------------------------------------------------------------------

    async def send(self, host: str, data: CommandData, instance_id: str | None = None, **options: Any) -> str:
        """Send a command once, without waiting for its end; its id."""
        async with asyncio.timeout(WAIT_S):
            await self._connected.wait()
        command_id = await self.client.send(data, host=host, instance_id=instance_id, **options)
        self.sent.setdefault(host, []).append(command_id)
        return command_id

    async def run(self, host: str, data: CommandData, instance_id: str | None = None, *, timeout_s: float = WAIT_S) -> Event:
        """Send a command once and wait for its final event, whatever it is."""
        command_id = await self.send(host, data, instance_id)
        return await self.recorder.wait_final(host, command_id, timeout_s=timeout_s)

    async def succeed(self, host: str, data: CommandData, instance_id: str | None = None, *, timeout_s: float = WAIT_S) -> Event:
        """Send a command once and expect it to succeed."""
        event = await self.run(host, data, instance_id, timeout_s=timeout_s)
        assert event.kind == "operation.succeeded", describe(event)
        return event

    async def create(self, host: str, **fields: Any) -> str:
        """Create an instance and wait until it runs; its id."""
        instance_id = str(uuid.uuid4())
        await self.succeed(host, InstanceCreate(spec=spec(instance_id, **fields)), instance_id)
        return instance_id

    async def settle(self, host: str, *, timeout_s: float = WAIT_S) -> None:
        """Wait until everything that the agent had to tell until now is recorded: events keep their order."""
        await self.succeed(host, HostPing(), timeout_s=timeout_s)

    async def judge(self, agent: AgentProcess, instances: Collection[str] = (), libvirtd: PrivateLibvirtd | None = None) -> None:
        """Expect a host on which all is ended and told, and nothing is left but `instances`."""
        await self.settle(agent.host)
        self.recorder.check(agent.host, self.sent.get(agent.host, ()))
        still_open = agent.open_operations()
        assert not still_open, f"the journal still has {[(op.verb, op.state, op.undo_pending) for op in still_open]}"
        drift = [describe(event) for event in self.recorder.events(agent.host, "host.drift")]
        assert not drift, f"journal and hypervisor differed: {drift}"
        found = await self.left(agent, instances, libvirtd)
        assert not found, "\n".join(found)
        # The agent's own ledger agrees.
        audit = (await self.succeed(agent.host, HostAudit())).data["result"]
        assert not audit["items"], audit["items"]

    async def left(self, agent: AgentProcess, instances: Collection[str] = (), libvirtd: PrivateLibvirtd | None = None) -> list[str]:
        """What is on the host and belongs to none of `instances`."""
        if libvirtd is None:
            return leftovers(agent.state_dir, instances)
        return await asyncio.to_thread(libvirt_leftovers, libvirtd, agent.state_dir, instances)


def spec(instance_id: str, **fields: Any) -> InstanceSpec:
    """The smallest guest that QEMU runs: its BIOS finds nothing to boot and idles."""
    values: dict[str, Any] = {
        "name": f"i-{instance_id[:8]}", "vcpus": 1, "memory_mib": 32, "root_disk": RootDisk(size_mib=1),
        "rng": False, "balloon": False, "guest_agent": False,
    }  # fmt: skip
    return InstanceSpec(**(values | fields))
