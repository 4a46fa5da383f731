"""deploy/rabbitmq-definitions.json on a real broker: the example users can do their work and nothing else."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from agent.app import Agent
from agent.bus.amqp import AmqpBus, AmqpSettings
from agent.bus.base import Binding, Outgoing, Queue, Topology
from agent.config import Settings
from agent.controller import CommandRefused, ComputeClient
from agent.errors import FailedPrecondition
from agent.messages import routing
from agent.messages.commands import HostPing, InstanceCreate
from agent.messages.spec import InstanceSpec, RootDisk
from devstack.rabbitmq import PrivateBroker

DEFINITIONS = Path(__file__).parents[2] / "deploy" / "rabbitmq-definitions.json"
HOST, CONTROLLER = "node1.example", "controller.example"


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateBroker]:
    definitions = json.loads(DEFINITIONS.read_text("utf-8"))
    with PrivateBroker(tmp_path_factory.mktemp("rabbitmq"), definitions=definitions) as running:
        for user in (HOST, CONTROLLER):
            running.ctl("change_password", user, "test")
        yield running


def _settings(broker: PrivateBroker, user: str) -> dict[str, object]:
    url = f"amqp://{user}:test@127.0.0.1:{broker.port}/"
    return {"url": url, "reconnect_min_s": 0.05, "reconnect_max_s": 0.2}


def _bus(broker: PrivateBroker, user: str) -> AmqpBus:
    return AmqpBus(AmqpSettings.model_validate(_settings(broker, user)), name=user)


@pytest.fixture
async def agent(broker: PrivateBroker, tmp_path: Path) -> AsyncIterator[Agent]:
    settings = Settings.model_validate(
        {
            "agent": {"host": HOST, "state_dir": tmp_path, "drain_timeout_s": 5},
            "bus": _settings(broker, HOST),
            "driver": {"name": "fake"},
            "health": {"listen": ""},
        }
    )
    running = Agent(settings, _bus(broker, HOST))
    await running.start()
    await running.wait_ready(20)
    yield running
    await running.stop()


async def test_both_can_do_their_work(broker: PrivateBroker, agent: Agent) -> None:
    spec = InstanceSpec(name="web-1", vcpus=1, memory_mib=128, root_disk=RootDisk(size_mib=64))
    async with ComputeClient(_bus(broker, CONTROLLER), source="/test") as client, client.events() as events:
        made = await client.call(
            InstanceCreate(spec=spec), host=HOST, instance_id=str(uuid.uuid4()), progress=True, timeout_s=120
        )
        assert made.result["observed"] == "running"
        await client.call(HostPing(), host=HOST, id="ping-1", timeout_s=120)
        assert await events.next(5) is not None
        await client.call(HostPing(), host=HOST, id="ping-1", timeout_s=120)  # the recorded answer, sent again
        with pytest.raises(CommandRefused, match="different command"):
            await client.call(HostPing(echo="other"), host=HOST, id="ping-1", timeout_s=120)
    watcher = AmqpBus(AmqpSettings.model_validate(_settings(broker, HOST)), name="watcher")
    await watcher.connect(timeout_s=60)
    try:
        for _ in range(50):
            if await watcher.queue_depth(routing.DEAD_QUEUE):
                break
            await asyncio.sleep(0.1)
        assert await watcher.queue_depth(routing.DEAD_QUEUE) == 1
    finally:
        await watcher.close()


@pytest.mark.parametrize(
    ("user", "exchange", "key"),
    [
        (HOST, routing.COMMANDS_EXCHANGE, "instance.delete.node2.example"),
        (HOST, routing.EVENTS_EXCHANGE, "instance.state.node2.example"),
        (HOST, "", "compute.agent.node1.example"),
        (CONTROLLER, routing.EVENTS_EXCHANGE, f"instance.state.{HOST}"),
        (CONTROLLER, "", f"compute.agent.{HOST}"),
    ],
)
async def test_publishing_elsewhere_is_refused(broker: PrivateBroker, user: str, exchange: str, key: str) -> None:
    bus = _bus(broker, user)
    await bus.connect(timeout_s=60)
    try:
        with pytest.raises(FailedPrecondition) as refused:
            await bus.publish(Outgoing(exchange=exchange, routing_key=key, body=b"{}", message_id="m"), timeout_s=60)
        assert refused.value.code == "bus_write_refused"
    finally:
        await bus.close()


@pytest.mark.parametrize(("user", "queue"), [(HOST, routing.DEAD_QUEUE), (CONTROLLER, f"compute.agent.{HOST}")])
async def test_reading_elsewhere_is_refused(broker: PrivateBroker, user: str, queue: str) -> None:
    bus = _bus(broker, user)
    await bus.connect(timeout_s=60)
    try:
        with pytest.raises(FailedPrecondition):
            await bus.consume(queue, lambda delivery: delivery.ack(), prefetch=1)
    finally:
        await bus.close()


async def test_a_host_cannot_watch_another(broker: PrivateBroker) -> None:
    bus = _bus(broker, HOST)
    await bus.connect(timeout_s=60)
    try:
        with pytest.raises(FailedPrecondition):
            await bus.declare(
                Topology(
                    queues=(Queue("compute.watch.me", durable=False),),
                    bindings=(Binding(routing.EVENTS_EXCHANGE, "#", "compute.watch.me"),),
                )
            )
    finally:
        await bus.close()
