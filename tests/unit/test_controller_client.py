"""The client over the in-process broker, against an agent that answers by script."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from controller_agent import INSTANCE, FakeAgent, fail, reject, succeed, with_progress
from support.world import LIMIT_S, until

from agent.bus.memory import MemoryBroker, MemoryBus
from agent.controller import CommandError, CommandFailed, CommandRefused, ComputeClient
from agent.errors import Conflict, DeadlineExceeded, Internal, InvalidArgument, Unavailable, Unroutable
from agent.messages import routing
from agent.messages.commands import HostPing, InstanceShow, InstanceStart
from agent.messages.events import Event, EventData, OperationSucceeded

HOST = "node1.example"


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


async def test_call_returns_the_success_of_its_own_command(agent: FakeAgent, client: ComputeClient) -> None:
    agent.answers["host.ping"] = lambda c: succeed({"echo": c.data.echo})(c)
    one, two = await asyncio.gather(
        client.call(HostPing(echo="1"), host=HOST), client.call(HostPing(echo="2"), host=HOST, id="my-id")
    )
    assert (one.result, two.result) == ({"echo": "1"}, {"echo": "2"})
    assert two.operation_id == "my-id"
    assert agent.commands[0].source == "/test"
    assert agent.commands[0].host == HOST


async def test_the_envelope_carries_every_option(agent: FakeAgent, client: ComputeClient) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    await client.send(
        InstanceStart(),
        host=HOST,
        instance_id=INSTANCE,
        id="op-1",
        generation=4,
        expires_in_s=60,
        progress=True,
        traceparent=trace,
    )
    await until(lambda: bool(agent.commands))
    command = agent.commands[0]
    assert (command.id, command.subject, command.generation) == ("op-1", INSTANCE, 4)
    assert (command.reportprogress, command.traceparent) == (True, trace)
    assert command.time is not None
    assert command.expirytime is not None
    assert (command.expirytime - command.time).total_seconds() == pytest.approx(60, abs=0.01)


async def test_an_answer_without_correlation_id_is_found_by_its_operation(
    agent: FakeAgent, client: ComputeClient
) -> None:
    agent.correlate = False
    agent.answers["host.ping"] = succeed()
    assert (await client.call(HostPing(), host=HOST, timeout_s=LIMIT_S)).verb == "host.ping"


async def test_a_refusal_is_typed_and_keeps_what_the_agent_said(agent: FakeAgent, client: ComputeClient) -> None:
    agent.answers["instance.start"] = reject(
        "resource_exhausted", "memory is short", retryable=True, code="x", short_mib=5
    )
    with pytest.raises(CommandRefused) as caught:
        await client.call(InstanceStart(), host=HOST, instance_id=INSTANCE)
    error = caught.value
    assert (error.code, error.message, error.retryable) == ("resource_exhausted", "memory is short", True)
    assert error.details == {"code": "x", "short_mib": 5}
    assert (error.state, error.instance_id) == ("rejected", INSTANCE)
    assert CommandError.retryable is False


async def test_a_failure_tells_whether_it_was_undone(agent: FakeAgent, client: ComputeClient) -> None:
    agent.answers["instance.start"] = fail("unavailable", "the hypervisor is away", undone=False)
    with pytest.raises(CommandFailed) as caught:
        await client.call(InstanceStart(), host=HOST, instance_id=INSTANCE)
    assert (caught.value.undone, caught.value.state) == (False, "failed")


async def test_progress_reaches_the_callback_in_order_and_once(agent: FakeAgent, client: ComputeClient) -> None:
    agent.answers["instance.start"] = with_progress(succeed())
    agent.repeat = 2
    seen: list[Event] = []
    await client.call(InstanceStart(), host=HOST, instance_id=INSTANCE, on_event=seen.append, timeout_s=LIMIT_S)
    kinds = [event.kind.removeprefix("operation.") for event in seen]
    assert kinds == ["accepted", "started", "progress", "succeeded"]
    assert agent.commands[0].reportprogress


async def test_what_the_callback_raises_ends_the_call(agent: FakeAgent, client: ComputeClient) -> None:
    agent.answers["host.ping"] = succeed()

    def broken(_event: Event) -> None:
        raise TimeoutError("mine")

    with pytest.raises(TimeoutError, match="mine"):
        await client.call(HostPing(), host=HOST, on_event=broken)


async def test_a_host_that_nobody_ever_served_is_unroutable(client: ComputeClient, broker: MemoryBroker) -> None:
    with pytest.raises(Unroutable, match="no agent has ever served host nowhere"):
        await client.call(HostPing(), host="nowhere")
    with pytest.raises(Unroutable):
        await client.send(HostPing(), host="nowhere")
    assert broker.depth(routing.UNROUTABLE_QUEUE) == 0


async def test_no_answer_in_time_names_the_operation(agent: FakeAgent, client: ComputeClient) -> None:
    with pytest.raises(DeadlineExceeded) as caught:
        await client.call(HostPing(), host=HOST, id="op-9", timeout_s=0.3)
    assert caught.value.details["operation_id"] == "op-9"
    assert len(agent.commands) == 1


async def test_silence_sends_the_same_bytes_again(agent: FakeAgent, client: ComputeClient) -> None:
    def second_time(command: object) -> list[EventData]:
        return succeed({"n": len(agent.commands)})(command) if len(agent.commands) == 2 else []  # type: ignore[arg-type]

    agent.answers["host.ping"] = second_time
    done = await client.call(HostPing(), host=HOST, timeout_s=LIMIT_S, resend_after_s=0.01)
    assert done.result == {"n": 2}
    assert agent.bodies[0] == agent.bodies[1]


async def test_a_sign_of_life_postpones_the_repeat(agent: FakeAgent, client: ComputeClient) -> None:
    agent.answers["host.ping"] = with_progress(lambda _c: [])
    with pytest.raises(DeadlineExceeded):
        await client.call(HostPing(), host=HOST, timeout_s=0.05, resend_after_s=0.04)
    assert len(agent.commands) <= 2


async def test_an_answer_lost_with_the_connection_is_asked_for_again(
    agent: FakeAgent, client: ComputeClient, broker: MemoryBroker
) -> None:
    call = asyncio.ensure_future(client.call(HostPing(), host=HOST, timeout_s=LIMIT_S, resend_after_s=60))
    await until(lambda: bool(agent.commands))
    agent.answers["host.ping"] = succeed({"late": True})
    broker.drop_connections()
    assert (await call).result == {"late": True}
    assert agent.bodies[0] == agent.bodies[-1]


async def test_a_lost_confirm_is_no_failure(agent: FakeAgent, client: ComputeClient, broker: MemoryBroker) -> None:
    agent.answers["host.ping"] = succeed()
    broker.lose_confirms(1)
    done = await client.call(HostPing(), host=HOST, timeout_s=LIMIT_S)
    assert isinstance(done, OperationSucceeded)
    assert len({command.id for command in agent.commands}) == 1


async def test_a_call_outlasts_a_broker_that_is_down(
    agent: FakeAgent, client: ComputeClient, broker: MemoryBroker
) -> None:
    agent.answers["host.ping"] = succeed()
    broker.refuse(True)
    call = asyncio.ensure_future(client.call(HostPing(), host=HOST, timeout_s=LIMIT_S))
    await asyncio.sleep(0.01)
    assert not call.done()
    broker.refuse(False)
    await call


async def test_what_could_not_be_sent_is_unavailable(
    agent: FakeAgent, client: ComputeClient, broker: MemoryBroker
) -> None:
    broker.refuse(True)
    with pytest.raises(Unavailable, match="could not be sent"):
        await client.call(HostPing(), host=HOST, timeout_s=0.02)
    with pytest.raises(Unavailable):
        await client.send(HostPing(), host=HOST)
    broker.refuse(False)


async def test_connecting_to_no_broker_is_unavailable(broker: MemoryBroker) -> None:
    broker.refuse(True)
    with pytest.raises(Unavailable):
        async with ComputeClient(MemoryBus(broker, name="test"), source="/test", connect_timeout_s=0.01):
            pass


async def test_wrong_options_are_refused_before_anything_is_sent(agent: FakeAgent, client: ComputeClient) -> None:
    for options in ({"instance_id": "x"}, {"instance_id": INSTANCE, "generation": -1}, {}):
        with pytest.raises(InvalidArgument, match=r"subject|generation"):
            await client.call(InstanceShow(), host=HOST, **options)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="host"):
        await client.send(HostPing(), host="not#a#host")
    with pytest.raises(InvalidArgument, match="broadcast"):
        await client.call(HostPing(), host=routing.BROADCAST)
    assert agent.commands == []


async def test_a_broadcast_carries_no_host(agent: FakeAgent, client: ComputeClient) -> None:
    await client.send(HostPing(), host=routing.BROADCAST)
    await until(lambda: bool(agent.commands))
    assert agent.commands[0].host is None


async def test_one_client_does_not_await_one_id_twice(agent: FakeAgent, client: ComputeClient) -> None:
    first = asyncio.ensure_future(client.call(HostPing(), host=HOST, id="same", timeout_s=LIMIT_S))
    await until(lambda: bool(agent.commands))
    with pytest.raises(Conflict):
        await client.call(HostPing(), host=HOST, id="same")
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_closing_the_client_ends_its_calls(agent: FakeAgent, broker: MemoryBroker) -> None:
    bus = MemoryBus(broker, name="test")
    async with ComputeClient(bus, source="/test") as client:
        call = asyncio.ensure_future(client.call(HostPing(), host=HOST, timeout_s=LIMIT_S))
        await until(lambda: bool(agent.commands))
    with pytest.raises(Unavailable, match="closed"):
        await call
    assert not bus.connected


async def test_a_bus_that_was_connected_stays_so(agent: FakeAgent, broker: MemoryBroker) -> None:
    bus = MemoryBus(broker, name="test")
    await bus.connect(timeout_s=1)
    async with ComputeClient(bus, source="/test"):
        pass
    assert bus.connected


async def test_a_malformed_final_event_is_internal(agent: FakeAgent, client: ComputeClient) -> None:
    class Broken(EventData):
        kind = "operation.succeeded"

    agent.answers["host.ping"] = lambda _c: [Broken()]
    with pytest.raises(Internal, match="malformed"):
        await client.call(HostPing(), host=HOST, timeout_s=LIMIT_S)
