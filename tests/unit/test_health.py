"""`/livez`, `/readyz`, `/metrics`, and the watchdog that is fed by progress only."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.world import LIMIT_S, World, new_id, spec, until

from agent import health
from agent.drivers.fake.settings import Fault
from agent.errors import InvalidArgument, Unavailable
from agent.health import HealthServer, Watchdog
from agent.messages import routing
from agent.messages.commands import InstanceCreate, InstanceStop


class Probe:
    def __init__(self) -> None:
        self.missing: dict[str, str] = {}
        self.server = HealthServer("127.0.0.1:0", lambda: self.missing)
        self.port = 0

    async def raw(self, data: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(data)
        answer = await reader.read()
        writer.close()
        return answer

    async def get(self, path: str) -> tuple[int, str]:
        head, _, body = (await self.raw(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())).partition(b"\r\n\r\n")
        assert f"Content-Length: {len(body)}".encode() in head
        return int(head.split()[1]), body.decode()


@pytest.fixture
async def probe(no_blocking: object) -> AsyncIterator[Probe]:
    made = Probe()
    port = await made.server.start()
    assert port
    made.port = port
    yield made
    await made.server.stop()
    await made.server.stop()


async def test_alive_and_ready(probe: Probe) -> None:
    assert await probe.get("/livez") == (200, "ok\n")
    assert await probe.get("/readyz") == (200, "ok\n")
    assert (await probe.get("/readyz?verbose"))[0] == 200


async def test_what_is_missing_is_told(probe: Probe) -> None:
    probe.missing = {"hypervisor": "it is away", "broker": "it is not connected"}
    status, body = await probe.get("/readyz")
    assert status == 503
    assert body == "broker: it is not connected\nhypervisor: it is away\n"
    assert (await probe.get("/livez"))[0] == 200


async def test_metrics(probe: Probe) -> None:
    status, body = await probe.get("/metrics")
    assert status == 200
    assert "# TYPE compute_commands_total counter" in body


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"POST /livez HTTP/1.1\r\n\r\n", b"405"), (b"GET /secret HTTP/1.1\r\n\r\n", b"404"), (b"GET \r\n\r\n", b"404"),
        (b"\xff\xfe\r\n\r\n", b"405"), (b"GET /../../etc/passwd HTTP/1.1\r\n\r\n", b"404"),
    ],
)  # fmt: skip
async def test_other_requests(probe: Probe, request_bytes: bytes, status: bytes) -> None:
    assert (await probe.raw(request_bytes)).startswith(b"HTTP/1.1 " + status)


async def test_a_head_without_end_is_cut_off(probe: Probe) -> None:
    assert await probe.raw(b"GET /livez HTTP/1.1\r\nX: " + b"a" * 100_000) == b""


async def test_a_client_that_says_nothing_is_cut_off(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "READ_TIMEOUT_S", 0.01)
    assert await probe.raw(b"") == b""
    assert (await probe.get("/livez"))[0] == 200


async def test_readiness_that_fails_does_not_end_the_server(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict[str, str]:
        raise RuntimeError("defect")

    monkeypatch.setattr(probe.server, "_readiness", broken)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio.get_running_loop(), "call_exception_handler", lambda _context: None)
        await probe.raw(b"GET /readyz HTTP/1.1\r\n\r\n")
    assert (await probe.get("/livez"))[0] == 200


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:99999", "127.0.0.1:", "256.1.1.1:80", "127.0.0.1:x"])
async def test_an_address_that_cannot_be_used(address: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        await HealthServer(address, dict).start()
    assert refused.value.code == "health_address"


async def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InvalidArgument):
            await HealthServer(f"127.0.0.1:{taken.getsockname()[1]}", dict).start()


async def test_no_address_no_server() -> None:
    server = HealthServer("", dict)
    assert await server.start() is None
    await server.stop()


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
async def test_an_ipv6_address() -> None:
    server = HealthServer("[::1]:0", dict)
    try:
        assert await server.start()
    except InvalidArgument:
        pytest.skip("no IPv6 loopback here")
    await server.stop()


# --- the watchdog -------------------------------------------------------------------------------------------------


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(health, "notify", lambda *lines: bool(said.extend(lines)) or True)
    return said


@pytest.mark.parametrize("moving", [True, False])
async def test_the_watchdog_is_fed_while_there_is_progress(fed: list[str], logs: object, moving: bool) -> None:
    looks: list[int] = []

    def is_moving() -> bool:
        looks.append(1)
        return moving

    task = asyncio.ensure_future(Watchdog(0.01, is_moving).run())
    await until(lambda: len(looks) > 3)
    task.cancel()
    assert bool(fed) is moving
    assert set(fed) <= {"WATCHDOG=1"}


# --- the agent's own readiness ------------------------------------------------------------------------------------


async def test_readiness_means_consumer_and_hypervisor(world: World) -> None:
    agent = world.agent
    assert agent.not_ready() == {}
    await world.ask(world.driver.disconnect)
    await until(lambda: "hypervisor" in agent.not_ready())
    await world.ask(world.driver.reconnect)
    await until(lambda: agent.not_ready() == {})
    world.broker.refuse(True)
    assert set(agent.not_ready()) == {"broker"}
    world.broker.refuse(False)
    await until(lambda: agent.not_ready() == {})
    # The connection is there and our consumer is not.
    world.broker.queues[routing.host_queue(agent.ctx.host)].consumers.clear()
    assert set(agent.not_ready()) == {"consumer"}
    world.broker.drop_connections(world.bus.name)
    await until(lambda: agent.not_ready() == {})
    world.cut.inner.fail_with = Unavailable("no space is left", code="journal_full")
    await until(lambda: "journal" in agent.not_ready() or world.send(InstanceStop(), instance_id=new_id()) is None)
    world.cut.inner.fail_with = None
    await until(lambda: agent.not_ready() == {})


async def test_readiness_at_start_and_stop(tmp_path: Path, no_blocking: object) -> None:
    world = await World(tmp_path).open()
    agent = await world.start(wait=False)
    assert agent.not_ready() != {}
    await agent.wait_ready(LIMIT_S)
    assert agent.not_ready() == {}
    await world.stop()
    assert agent.not_ready() != {}
    await world.close()


async def test_lanes_that_stand_still_starve_the_watchdog_and_a_stuck_hypervisor_excuses_them(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.app.watchdog_interval_s", lambda: world.agent.ctx.deadlines.long_s / 2.5)
    moving = world.agent._moving()
    assert all(moving() for _ in range(10)), "nothing to do is no standstill"
    instance_id = await world.create(labels={"fake.guest-shutdown-s": "never"})
    assert moving()
    stop = world.send(InstanceStop(timeout_s=600), instance_id=instance_id)
    await until(lambda: any(item.operation and item.operation.waits for item in world.agent._runner.open))
    assert all(moving() for _ in range(100)), "a guest may take as long as the command allows"
    world.driver.inject(Fault(call="create_storage", hang_s=30, times=1))
    created = world.send(InstanceCreate(spec=spec()), instance_id=new_id())
    await until(lambda: world.agent._runner.open.at_work)
    assert [moving() for _ in range(4)] == [True, True, False, False], "a look comes two and a half times within long_s"
    with monkeypatch.context() as patch:
        patch.setattr(type(world.agent.ctx.executor), "stuck", 1)
        assert moving()
    world.driver.clear_faults()
    await world.final(created)
    await world.ask(world.driver.simulate_guest_shutdown, instance_id)
    await world.final(stop)
    await world.quiet()
    assert moving()


# --- heartbeats ---------------------------------------------------------------------------------------------------


async def test_a_hypervisor_that_hangs_holds_up_no_heartbeat(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from agent import periodic  # noqa: PLC0415

    monkeypatch.setattr(periodic, "COALESCE_S", 0.0)
    world.agent._heartbeat._interval_s = 0.05
    world.driver.inject(Fault(call="capacity", hang_s=30))
    before = world.kinds()["host.heartbeat"]
    world.agent._heartbeat.ask()
    await until(lambda: world.kinds()["host.heartbeat"] >= before + 3)
    last = [event for event in world.events if event.kind == "host.heartbeat"][-1]
    assert "capacity" in last.data["conditions"]
    assert last.data["healthy"] is False
    assert last.data["inventory"]["VCPU"]["total"] == 64, "the old figures"
    world.driver.clear_faults()


async def test_many_changes_share_a_heartbeat(world: World) -> None:
    from agent.periodic import COALESCE_S  # noqa: PLC0415

    before, began = world.kinds()["host.heartbeat"], time.monotonic()
    for _ in range(10):
        await world.create()
    await until(lambda: world.kinds()["host.heartbeat"] > before)
    assert world.kinds()["host.heartbeat"] <= before + 2 + (time.monotonic() - began) / COALESCE_S
    await until(
        lambda: [e for e in world.events if e.kind == "host.heartbeat"][-1].data["instances"] == {"running": 10}
    )


async def test_a_heartbeat_costs_the_same_with_any_number_of_instances(world: World) -> None:
    calls: list[str] = []
    inner = world.driver.capacity
    world.driver.capacity = lambda: calls.append("capacity") or inner()  # type: ignore[method-assign, func-returns-value]
    for count in (1, 20):
        for _ in range(count):
            await world.do(InstanceCreate(spec=spec()), instance_id=new_id())
        await world.quiet()
        calls.clear()
        await world.agent._heartbeat.build()
        assert calls == ["capacity"]
