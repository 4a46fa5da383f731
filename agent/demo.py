"""`compute-agent demo`: a controller, the memory bus, a SQLite journal and the simulated hypervisor in one process."""

from __future__ import annotations

import tempfile
import uuid
from pathlib import Path

import click

from agent import config, log
from agent.app import Agent
from agent.bus.memory import MemoryBroker, MemoryBus
from agent.controller.client import ComputeClient
from agent.messages.commands import InstanceCreate, InstanceDelete, InstanceList, InstanceStop
from agent.messages.spec import InstanceSpec, RootDisk

HOST = "demo-host"


async def run_demo(count: int) -> int:
    """Create, list, stop and delete `count` instances. Returns the exit status: 0 if all of it succeeded."""
    log.configure("error")
    with tempfile.TemporaryDirectory(prefix="compute-agent-demo-") as folder:
        broker = MemoryBroker()
        agent = Agent(_settings(Path(folder)), MemoryBus(broker, name="agent"))
        await agent.start()
        try:
            await agent.wait_ready(30)
            async with ComputeClient(MemoryBus(broker, name="controller"), source="/demo") as client:
                return await _story(client, count)
        finally:
            await agent.stop()


def _settings(folder: Path) -> config.Settings:
    return config.Settings.model_validate(
        {
            "agent": {"host": HOST, "state_dir": folder, "drain_timeout_s": 5},
            "bus": {"url": "amqp://unused/"},
            "driver": {"name": "fake", "settings": {"latency_s": {"start": 0.2}, "guest_shutdown_s": 0.3}},
            "health": {"listen": ""},
        }
    )


async def _story(client: ComputeClient, count: int) -> int:
    click.echo(f"An agent for {HOST} is up: memory bus, SQLite journal, simulated hypervisor.")
    ids = [str(uuid.uuid4()) for _ in range(count)]
    for number, instance_id in enumerate(ids, start=1):
        spec = InstanceSpec(name=f"demo-{number}", vcpus=2, memory_mib=2048, root_disk=RootDisk(size_mib=10240))
        made = await client.call(InstanceCreate(spec=spec), host=HOST, instance_id=instance_id, timeout_s=30)
        click.echo(f"created  {made.result['name']}: {made.result['observed']}, {made.duration_ms:.0f} ms")
    listed = await client.call(InstanceList(), host=HOST, timeout_s=30)
    click.echo(f"listed   {len(listed.result['instances'])} instances")
    for instance_id in ids:
        stopped = await client.call(InstanceStop(timeout_s=5), host=HOST, instance_id=instance_id, timeout_s=30)
        how = "by force" if stopped.result["forced"] else "the guest shut down by itself"
        click.echo(f"stopped  {instance_id}: {stopped.result['observed']}, {how}")
        await client.call(InstanceDelete(), host=HOST, instance_id=instance_id, timeout_s=30)
        click.echo(f"deleted  {instance_id}")
    left = await client.call(InstanceList(), host=HOST, timeout_s=30)
    click.echo(f"{len(left.result['instances'])} instances left")
    return 0 if not left.result["instances"] else 1
