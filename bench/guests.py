"""What the measurements with instances share: specs, a base image, a controller, a watcher of events."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import aio_pika
import libvirt
import uvloop

from agent.bus.amqp import AmqpBus, AmqpSettings
from agent.controller import ComputeClient
from agent.drivers.base import DriverContext
from agent.drivers.libvirt import LibvirtDriver, xml
from agent.messages import routing
from agent.messages.commands import InstanceCreate, InstanceDelete, InstanceList, InstancePause
from agent.messages.spec import ImageSource, InstanceSpec, RootDisk
from bench.servers import AGENT_HOST

T = TypeVar("T")
LIMIT_S = 120.0
GUEST_MIB = 32
DISK_MIB = 64
OVERCOMMIT = "[capacity]\ncpu_allocation_ratio = 64.0"
"""For hosts that are smaller than what is asked of them here."""
AGENT_MODULES = (
    "agent.cli",
    "agent.config",
    "agent.app",
    "agent.bus.amqp",
    "agent.drivers.fake",
    "agent.drivers.libvirt",
)
"""All that `compute-agent run` loads before it is ready."""


def base_image(directory: Path) -> ImageSource:
    """An empty qcow2 as image: a guest on it ends in its firmware and is quiet there."""
    path = directory / "base.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), f"{DISK_MIB}M"], check=True)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return ImageSource(url=f"file://{path}", sha256=digest, format="qcow2")


def small_spec(name: str, image: ImageSource | None = None) -> InstanceSpec:
    """A guest of one CPU and 32 MiB."""
    return InstanceSpec(
        name=name, vcpus=1, memory_mib=GUEST_MIB, root_disk=RootDisk(size_mib=DISK_MIB, image=image), nics=[]
    )


def new_ids(count: int) -> list[str]:
    """Fresh instance ids."""
    return [str(uuid.uuid4()) for _ in range(count)]


@contextlib.asynccontextmanager
async def controller(url: str) -> AsyncIterator[ComputeClient]:
    """A controller on the broker."""
    bus = AmqpBus(AmqpSettings(url=url, reconnect_min_s=0.1, reconnect_max_s=0.3), name="bench")
    async with ComputeClient(bus, source="/bench") as client:
        yield client


async def create_all(
    client: ComputeClient,
    ids: Iterable[str],
    image: ImageSource | None = None,
    *,
    host: str = AGENT_HOST,
    at_once: int = 50,
) -> None:
    """Create instances named after their ids."""
    await side_by_side(
        (_call(client, InstanceCreate(spec=small_spec(f"b-{key[:13]}", image)), host, key) for key in ids),
        at_once,
    )


async def delete_all(client: ComputeClient, ids: Iterable[str], *, host: str = AGENT_HOST) -> None:
    """Delete instances."""
    await side_by_side((_call(client, InstanceDelete(), host, key) for key in ids), 50)


async def pause_all(client: ComputeClient, ids: Iterable[str], *, host: str = AGENT_HOST) -> None:
    """Pause instances."""
    await side_by_side((_call(client, InstancePause(), host, key) for key in ids), 50)


async def listed(client: ComputeClient, *, host: str = AGENT_HOST) -> dict[str, Any]:
    """What `instance.list` returns."""
    done = await client.call(InstanceList(limit=10_000), host=host, timeout_s=LIMIT_S)
    return dict(done.result)


async def _call(client: ComputeClient, data: Any, host: str, key: str) -> None:
    await client.call(data, host=host, instance_id=key, timeout_s=LIMIT_S)


async def side_by_side(work: Iterable[Awaitable[T]], at_once: int) -> list[T]:
    """Await all, so many at a time, in the order given."""
    gate = asyncio.Semaphore(at_once)

    async def one(item: Awaitable[T]) -> T:
        async with gate:
            return await item

    return list(await asyncio.gather(*(one(item) for item in work)))


class Watch:
    """A consumer of events of some kinds: what a scheduler or an inventory would be. An async context manager."""

    def __init__(self, url: str, *kinds: str) -> None:
        self._url = url
        self._kinds = kinds
        self._arrived: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def __aenter__(self) -> Self:
        self._connection = await aio_pika.connect(self._url)
        channel = await self._connection.channel()
        exchange = await channel.declare_exchange(routing.EVENTS_EXCHANGE, aio_pika.ExchangeType.TOPIC, durable=True)
        queue = await channel.declare_queue(exclusive=True)
        for kind in self._kinds:
            await queue.bind(exchange, routing_key=f"{kind}.#")
        await queue.consume(self._take, no_ack=True)
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self._connection.close()

    async def _take(self, message: aio_pika.abc.AbstractIncomingMessage) -> None:
        self._arrived.put_nowait((time.perf_counter(), message.body))

    def forget(self) -> None:
        """Drop what has arrived."""
        while not self._arrived.empty():
            self._arrived.get_nowait()

    async def next(self, wanted: Callable[[bytes], bool] = lambda _body: True) -> tuple[float, bytes]:
        """The next event whose body is wanted, and when it reached us (`time.perf_counter`)."""
        async with asyncio.timeout(LIMIT_S):
            while True:
                at, body = await self._arrived.get()
                if wanted(body):
                    return at, body

    async def about(self, instance_ids: Collection[str]) -> tuple[str, float]:
        """The next event about one of these instances: which, and when it came."""
        at, body = await self.next(lambda body: any(key.encode() in body for key in instance_ids))
        return next(key for key in instance_ids if key.encode() in body), at


@dataclass(frozen=True)
class Bare:
    """A guest that is yet to be made by hand."""

    instance_id: str
    disk: Path
    document: str

    def create(self, connection: Any, base: Path) -> dict[str, float]:
        """Make overlay, definition and guest. Returns the seconds of each."""
        size = str(DISK_MIB * 1024 * 1024)
        command = [
            "qemu-img",
            "create",
            "-q",
            "-f",
            "qcow2",
            "-F",
            "qcow2",
            "-b",
            str(base),
            "--",
            str(self.disk),
            size,
        ]
        marks = [time.perf_counter()]
        subprocess.run(command, check=True, capture_output=True)
        marks.append(time.perf_counter())
        domain = connection.defineXML(self.document)
        marks.append(time.perf_counter())
        domain.create()
        marks.append(time.perf_counter())
        return {name: marks[at + 1] - marks[at] for at, name in enumerate(("overlay", "define", "start"))}


class ByHand:
    """The floor of the hypervisor: qemu-img and libvirt-python, with the very XML that the agent's driver makes."""

    def __init__(self, uri: str, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._driver = LibvirtDriver(
            DriverContext(host=AGENT_HOST, state_dir=directory, settings={"uri": uri}, emit=lambda _event: None)
        )
        self._driver.connect()
        self.connection = libvirt.open(uri)

    def close(self) -> None:
        """Let go of the daemon."""
        self.connection.close()
        self._driver.close()

    def create(self, instance_id: str, spec: InstanceSpec, base: Path, connection: Any = None) -> dict[str, float]:
        """Make overlay, definition and guest. Returns the seconds of each; making the XML is not counted."""
        return self.prepare(instance_id, spec).create(connection or self.connection, base)

    def prepare(self, instance_id: str, spec: InstanceSpec) -> Bare:
        """Make the folder, and the XML that the agent would define."""
        facts = self._driver._hypervisor.facts(self.connection)
        files = self._driver._storage.files(instance_id, spec)
        disk = files.disks["root"].path
        disk.parent.mkdir(parents=True)
        document = xml.build(instance_id, spec, generation=0, host=AGENT_HOST, facts=facts, files=files)
        return Bare(instance_id, disk, document)

    def remove(self, instance_id: str) -> None:
        """Take it all back."""
        self._driver.destroy(instance_id)
        self._driver.undefine(instance_id)
        self._driver.delete_storage(instance_id)


def installed(directory: Path) -> dict[str, str]:
    """Environment for an agent whose modules are compiled, as those of an installed one are; makes them so."""
    env = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(directory / "pycache")}
    subprocess.run([sys.executable, "-c", f"import {', '.join(AGENT_MODULES)}"], check=True, env={**os.environ, **env})
    return env


def cpu_ms(pid: int) -> float:
    """Milliseconds on a CPU of all threads that a process has now: finer than the clock ticks of /proc/PID/stat."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e6


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run on uvloop, as the agent does."""
    return uvloop.run(work)
