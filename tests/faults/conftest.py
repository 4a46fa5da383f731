"""A real broker, a real hypervisor and agents as processes, for tests that break them."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import shutil
import uuid
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from agent.bus.amqp import AmqpBus, AmqpSettings
from agent.controller.client import ComputeClient
from agent.messages.commands import CommandData, HostPing, InstanceCreate
from agent.messages.events import Event
from agent.messages.spec import ImageSource, InstanceSpec, RootDisk
from devstack.libvirtd import PrivateLibvirtd
from devstack.rabbitmq import PrivateBroker
from tests.support.agent_process import AgentProcess
from tests.support.host import clean_libvirt, leftovers, libvirt_leftovers
from tests.support.recorder import Recorder, describe

_numbers = itertools.count(1)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "qemu: runs real QEMU guests; needs root, libvirtd and QEMU")


@pytest.fixture(scope="session")
def session_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateBroker]:
    if shutil.which("rabbitmq-server", path=f"{os.environ['PATH']}:/usr/sbin") is None:
        pytest.skip("rabbitmq-server is not installed")
    with PrivateBroker(tmp_path_factory.mktemp("broker")) as broker:
        yield broker


@pytest.fixture
def broker(session_broker: PrivateBroker) -> PrivateBroker:
    """The session's broker, running even if an earlier test ended it."""
    session_broker.start()
    return session_broker


@pytest.fixture(scope="session")
def session_libvirtd(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[PrivateLibvirtd]:
    if os.geteuid() != 0:
        pytest.skip("a private system libvirtd needs root")
    path = f"{os.environ['PATH']}:/usr/sbin"
    missing = [name for name in ("libvirtd", "virtlogd", "qemu-system-x86_64", "qemu-img") if not shutil.which(name, path=path)]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    pytest.importorskip("libvirt", reason="libvirt-python is not installed")
    cache = request.config.cache.mkdir("libvirt-capabilities")
    with PrivateLibvirtd(tmp_path_factory.mktemp("lv"), capabilities_cache=cache) as libvirtd:
        yield libvirtd


@pytest.fixture
def libvirtd(session_libvirtd: PrivateLibvirtd) -> Iterator[PrivateLibvirtd]:
    """The session's libvirtd, running and without domains."""
    session_libvirtd.start()
    yield session_libvirtd
    session_libvirtd.start()
    clean_libvirt(session_libvirtd)


class World:
    """One test's broker, recorder, controller and agents."""

    def __init__(self, broker: PrivateBroker, folder: Path) -> None:
        self.broker = broker
        self.folder = folder
        self.sent: dict[str, list[str]] = {}
        self.recorder: Recorder
        self.client: ComputeClient
        self._stack = AsyncExitStack()

    async def open(self) -> None:
        # First what is closed last: the agents must end before those who watch them.
        self.recorder = await self._stack.enter_async_context(Recorder(self.broker.url))
        settings = AmqpSettings.model_validate(
            {"url": self.broker.url, "reconnect_min_s": 0.05, "reconnect_max_s": 0.3, "connect_timeout_s": 3}
        )
        bus = AmqpBus(settings, name="faults-controller")
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

    # --- commands -------------------------------------------------------------------------------------------------

    async def send(self, host: str, data: CommandData, instance_id: str | None = None, **options: Any) -> str:
        """Send a command once, without waiting for its end; its id."""
        command_id = await self.client.send(data, host=host, instance_id=instance_id, **options)
        self.sent.setdefault(host, []).append(command_id)
        return command_id

    async def run(self, host: str, data: CommandData, instance_id: str | None = None, *, timeout_s: float = 30.0) -> Event:
        """Send a command once and wait for its final event, whatever it is."""
        command_id = await self.send(host, data, instance_id)
        return await self.recorder.wait_final(host, command_id, timeout_s=timeout_s)

    async def succeed(self, host: str, data: CommandData, instance_id: str | None = None, *, timeout_s: float = 30.0) -> Event:
        """Send a command once and expect it to succeed."""
        event = await self.run(host, data, instance_id, timeout_s=timeout_s)
        assert event.kind == "operation.succeeded", describe(event)
        return event

    async def create(self, host: str, **fields: Any) -> str:
        """Create an instance and wait until it runs; its id."""
        instance_id = str(uuid.uuid4())
        await self.succeed(host, InstanceCreate(spec=spec(instance_id, **fields)), instance_id)
        return instance_id

    async def settle(self, host: str, *, timeout_s: float = 30.0) -> None:
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
        if libvirtd is None:
            found = leftovers(agent.state_dir, instances)
        else:
            found = await asyncio.to_thread(libvirt_leftovers, libvirtd, agent.state_dir, instances)
        assert not found, "\n".join(found)


@pytest.fixture
async def world(broker: PrivateBroker, tmp_path: Path) -> AsyncIterator[World]:
    made = World(broker, tmp_path)
    try:
        await made.open()
        yield made
    finally:
        await made.close()


def spec(instance_id: str, **fields: Any) -> InstanceSpec:
    """The smallest guest that QEMU runs: its BIOS finds nothing to boot and idles."""
    values: dict[str, Any] = {
        "name": f"i-{instance_id[:8]}", "vcpus": 1, "memory_mib": 32, "root_disk": RootDisk(size_mib=1),
        "rng": False, "balloon": False, "guest_agent": False,
    }  # fmt: skip
    return InstanceSpec(**(values | fields))


@pytest.fixture
def image(tmp_path: Path) -> ImageSource:
    """A raw image of 1 MiB in the tests' folder, where agents may read."""
    path = tmp_path / "images" / "tiny.raw"
    path.parent.mkdir()
    path.write_bytes(b"tiny" + bytes(1024 * 1024 - 4))
    return ImageSource(url=path.as_uri(), sha256=hashlib.sha256(path.read_bytes()).hexdigest(), format="raw")
