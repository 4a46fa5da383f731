"""Streams of events: filters, repeats, gaps."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from controller_agent import INSTANCE, FakeAgent, heartbeat
from support.world import LIMIT_S, until

from agent.bus.memory import MemoryBroker, MemoryBus
from agent.controller import ComputeClient, EventStream, Gap
from agent.controller.stream import Recent, binding_patterns
from agent.errors import InvalidArgument
from agent.messages.events import Event, HostHeartbeat, InstanceRebooted, InstanceRemoved

HOST = "node1.example"
OTHER = "99999999-2222-3333-4444-555555555555"


def rebooted(instance: str = INSTANCE) -> InstanceRebooted:
    return InstanceRebooted(instance_id=instance)


@pytest.fixture
async def broker() -> MemoryBroker:
    return MemoryBroker()


@pytest.fixture
async def agent(broker: MemoryBroker) -> FakeAgent:
    return await FakeAgent(broker, HOST).start()


@pytest.fixture
async def client(broker: MemoryBroker) -> AsyncIterator[ComputeClient]:
    async with ComputeClient(MemoryBus(broker, name="test"), source="/test") as client:
        yield client


async def take(stream: EventStream, count: int) -> list[str]:
    found = []
    for _ in range(count):
        item = await stream.next(LIMIT_S)
        assert item is not None
        found.append(item.reason if isinstance(item, Gap) else f"{item.kind} {item.sequence}")
    assert await stream.next(0.001) is None
    return found


def test_patterns() -> None:
    assert binding_patterns((), None) == ("*.*.#",)
    assert binding_patterns((), "a.b") == ("*.*.a.b",)
    assert binding_patterns(("instance",), None) == ("instance.*.#",)
    assert binding_patterns(("instance.state", "*.progress"), "h") == ("instance.state.h", "*.progress.h")


@pytest.mark.parametrize("kind", ["instance.*.x", "instance.st*", "#", "", "Instance.state"])
def test_what_is_no_kind_is_refused(kind: str) -> None:
    with pytest.raises(InvalidArgument, match="kind"):
        binding_patterns((kind,), None)
    with pytest.raises(InvalidArgument, match="host"):
        binding_patterns((), "#")


async def test_filters(agent: FakeAgent, client: ComputeClient, broker: MemoryBroker) -> None:
    other = await FakeAgent(broker, "node2").start()
    async with (
        client.events(("instance.rebooted",), host=HOST) as by_kind,
        client.events(instance_id=INSTANCE) as by_instance,
        client.heartbeats() as beats,
    ):
        other.publish(rebooted())
        agent.publish(InstanceRemoved(instance_id=OTHER, name="x"))
        agent.publish(rebooted(OTHER))
        agent.publish(heartbeat(), sequenced=False)
        assert await take(by_kind, 1) == ["instance.rebooted 2"]
        first = await by_instance.next(LIMIT_S)
        assert isinstance(first, Event)
        assert first.host == "node2"
        beat = await beats.next(LIMIT_S)
        assert isinstance(beat, Event)
        assert HostHeartbeat.model_validate(beat.data).last_sequence == 7


async def test_repeats_are_dropped(agent: FakeAgent, client: ComputeClient) -> None:
    async with client.events() as stream:
        agent.publish(rebooted(), repeat=3)
        agent.publish(rebooted())
        assert await take(stream, 2) == ["instance.rebooted 1", "instance.rebooted 2"]


async def test_a_gap_in_the_sequence_is_marked_before_the_event(agent: FakeAgent, client: ComputeClient) -> None:
    async with client.events() as stream:
        agent.sequence = 10
        agent.publish(rebooted())
        agent.sequence += 3
        agent.publish(rebooted())
        first = await stream.next(LIMIT_S)
        gap = await stream.next(LIMIT_S)
        assert isinstance(first, Event)
        assert gap == Gap("sequence", host=HOST, epoch="e1", first=12, last=14)
        assert await take(stream, 1) == ["instance.rebooted 15"]


async def test_a_gap_is_marked_though_the_event_is_filtered_out(agent: FakeAgent, client: ComputeClient) -> None:
    async with client.events(instance_id=INSTANCE) as stream:
        agent.publish(rebooted())
        agent.sequence += 1
        agent.publish(rebooted(OTHER))
        agent.publish(rebooted())
        assert await take(stream, 3) == ["instance.rebooted 1", "sequence", "instance.rebooted 4"]


async def test_a_new_epoch_is_marked(agent: FakeAgent, client: ComputeClient) -> None:
    async with client.events() as stream:
        agent.publish(rebooted())
        agent.epoch, agent.sequence = "e2", 0
        agent.publish(rebooted())
        agent.publish(rebooted())
        assert await take(stream, 4) == ["instance.rebooted 1", "epoch", "instance.rebooted 1", "instance.rebooted 2"]


async def test_a_stream_filtered_by_kind_has_no_gaps_by_sequence(agent: FakeAgent, client: ComputeClient) -> None:
    async with client.events(("instance.removed",)) as stream:
        agent.publish(InstanceRemoved(instance_id=INSTANCE, name="x"))
        agent.publish(rebooted())
        agent.publish(InstanceRemoved(instance_id=INSTANCE, name="x"))
        assert await take(stream, 2) == ["instance.removed 1", "instance.removed 3"]


async def test_a_lost_connection_is_marked_and_the_stream_goes_on(
    agent: FakeAgent, client: ComputeClient, broker: MemoryBroker
) -> None:
    async with client.events(("instance",)) as stream:
        broker.drop_connections()
        await until(lambda: agent.bus.connected)
        gap = await stream.next(LIMIT_S)
        assert isinstance(gap, Gap)
        assert gap.reason == "disconnected"
        agent.publish(rebooted())
        assert await take(stream, 1) == ["instance.rebooted 1"]


async def test_iteration_ends_when_the_stream_is_closed(agent: FakeAgent, client: ComputeClient) -> None:
    async with client.events() as stream:
        agent.publish(rebooted())
        seen = []
        async for item in stream:
            seen.append(item)
            await stream.close()
    assert len(seen) == 1
    assert await stream.next(1.0) is None


def test_recent_forgets_the_oldest() -> None:
    recent = Recent(limit=2)
    assert [recent.is_repeat(one) for one in "aabcab"] == [False, True, False, False, False, False]
