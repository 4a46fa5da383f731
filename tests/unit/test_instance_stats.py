"""`instance.stats` on the simulated hypervisor, how its answer is read, and what computectl prints of it."""

from __future__ import annotations

import asyncio
import json
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from controller_agent import INSTANCE, Ctl, lines_of_json, reject, succeed
from support.world import World

from agent.controller import commands_stats
from agent.controller.rates import rates
from agent.drivers.fake.settings import Fault
from agent.drivers.libvirt import verbs_stats
from agent.drivers.libvirt.counters import Counters
from agent.messages.commands import InstancePause, InstanceReboot, InstanceResume, InstanceStart, InstanceStop
from agent.messages.spec import BridgeNic, UserNic
from agent.messages.spec_disks import DataDisk
from agent.messages.verbs_memory import InstanceReset, InstanceSuspend
from agent.messages.verbs_stats import InstanceStats, InstanceStatsResult


async def read(world: World, instance_id: str) -> InstanceStatsResult:
    done = await world.do(InstanceStats(), instance_id=instance_id)
    assert done.kind == "operation.succeeded", done.data
    return InstanceStatsResult.model_validate(done.data["result"])


async def grown(world: World, instance_id: str, since: InstanceStatsResult) -> InstanceStatsResult:
    """Read until the guest has used more CPU time: of that nothing else tells."""
    assert since.cpu.cpu_time_ns is not None
    async with asyncio.timeout(20):
        while True:
            found = await read(world, instance_id)
            assert found.cpu.cpu_time_ns is not None
            if found.cpu.cpu_time_ns > since.cpu.cpu_time_ns:
                return found


async def test_figures_agree_with_power(world: World) -> None:
    vm = await world.create(
        nics=[BridgeNic(type="bridge", bridge="br0"), UserNic(type="user")],
        disks=[DataDisk(kind="data", name="data", size_mib=64)],
    )
    first = await read(world, vm)
    assert (first.power, first.complete) == ("running", True)
    assert [disk.name for disk in first.disks] == ["root", "data"]
    assert [disk.capacity_bytes for disk in first.disks] == [1024 << 20, 64 << 20]
    assert first.nics[0].rx_bytes is not None
    assert first.nics[1].rx_bytes is None, "a user-mode NIC has no counters"
    await world.do(InstanceReset(), instance_id=vm)
    after_reset = await grown(world, vm, first)
    await world.do(InstanceReboot(), instance_id=vm)
    latest = await grown(world, vm, after_reset)
    await world.do(InstancePause(), instance_id=vm)
    paused = await read(world, vm)
    assert (await read(world, vm)).model_copy(update={"at": paused.at, "memory": paused.memory}) == paused
    assert paused.power == "paused"
    await world.do(InstanceResume(), instance_id=vm)
    latest = await grown(world, vm, paused)
    await world.do(InstanceSuspend(), instance_id=vm)
    assert (await read(world, vm)).cpu.cpu_time_ns is None
    await world.do(InstanceResume(), instance_id=vm)
    latest = await grown(world, vm, latest)
    await world.do(InstanceStop(), instance_id=vm)
    stopped = await read(world, vm)
    assert (stopped.power, stopped.complete, stopped.cpu.cpu_time_ns) == ("stopped", True, None)
    assert [disk.write_bytes for disk in stopped.disks] == [None, None]
    assert stopped.disks[0].capacity_bytes == 1024 << 20
    await world.do(InstanceStart(), instance_id=vm)
    anew = await read(world, vm)
    assert anew.cpu.cpu_time_ns is not None
    assert latest.cpu.cpu_time_ns is not None


async def test_figures_outlive_the_agent(world: World) -> None:
    vm = await world.create()
    before = await read(world, vm)
    await world.stop()
    await world.start()
    await grown(world, vm, before)


async def test_a_read_takes_no_turn_and_has_a_limit(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operation holds the instance's lane, and the guest's process answers nobody: the rest is told."""
    monkeypatch.setattr("agent.handlers.stats.ANSWER_S", 0.2)
    vm = await world.create()
    world.driver.inject(Fault(call="pause", hang_s=60))
    world.driver.inject(Fault(call="stats", hang_s=60))
    pausing = world.send(InstancePause(), instance_id=vm)
    found = await read(world, vm)
    assert (found.power, found.complete) == ("running", False)
    assert found.cpu.cpu_time_ns is not None
    assert found.cpu.vcpus == 1
    assert found.memory.rss_kib is None
    assert found.disks[0].write_bytes is None
    assert world.finals(pausing) == []
    world.driver.clear_faults()
    assert (await read(world, vm)).complete


async def test_refusals(world: World) -> None:
    done = await world.do(InstanceStats(), instance_id=INSTANCE)
    assert (done.kind, done.data["error"]["code"]) == ("operation.rejected", "unknown_instance")
    vm = await world.create()
    world.driver.disconnect()
    async with asyncio.timeout(20):
        while world.agent.ctx.state.connected.is_set():
            await asyncio.sleep(0)
    done = await world.do(InstanceStats(), instance_id=vm)
    error: dict[str, Any] = done.data["error"]
    assert (error["code"], error["retryable"]) == ("hypervisor_unreachable", True)
    world.driver.reconnect()


def test_a_table_without_qemus_part() -> None:
    """As libvirt 9.0 gives it of a guest whose QEMU is asked by another call. What is missing is not 0."""
    found = Counters(
        {"state.state": 1, "cpu.time": 5, "balloon.current": 1024, "block.count": 1, "block.0.name": "vda", "net.count": 1}
    )
    assert not found.answered
    assert found.cpu(None).cpu_time_ns == 5
    assert found.cpu(None).user_time_ns is None
    disk = found.disk("root", "vda", (10, 20), True)
    assert (disk.read_bytes, disk.allocation_bytes, disk.physical_bytes) == (None, 10, 20)
    assert found.disk("data", "vdb", (None, None), True).physical_bytes is None
    assert found.nic(0, None).rx_bytes is None


def test_many_frozen_guests_take_only_so_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those beyond the limit are answered without QEMU, and QEMU is asked again when one has answered."""
    monkeypatch.setattr(verbs_stats, "_TURN_S", 0.0)
    asked: list[bool] = []

    class Driver:
        _settings = SimpleNamespace(containers=False, simulated=False)
        _asking = threading.BoundedSemaphore(2)

        def _qemu(self, *_args: Any, ask_guest: bool) -> None:
            asked.append(ask_guest)
            if len(asked) < 4:  # while this one hangs, another comes
                read()

    driver: Any = Driver()

    def read() -> None:
        verbs_stats.LibvirtStats.stats(driver, INSTANCE, spec)

    spec: Any = None
    read()
    assert asked == [True, True, False, False]
    read()
    assert asked[4:] == [True]


def test_a_balloon_that_never_spoke() -> None:
    from xml.etree import ElementTree as ET  # noqa: PLC0415

    root = ET.fromstring(
        "<domain><memory unit='KiB'>4096</memory><devices><memory model='virtio-mem'><target><current>512</current></target>"
        "</memory></devices></domain>"
    )
    table = {"balloon.current": 2048, "balloon.rss": 99, "balloon.last-update": 0, "balloon.unused": 7}
    memory = Counters(table).memory(root, None)
    assert (memory.current_kib, memory.maximum_kib, memory.rss_kib) == (2560, 4096, 99)
    assert (memory.unused_kib, memory.guest_at) == (None, None)
    memory = Counters(table | {"balloon.last-update": 1795386734}).memory(root, None)
    assert memory.unused_kib == 7
    assert memory.guest_at is not None


# --- computectl -----------------------------------------------------------------------------------------------------


def answer(seconds: int, cpu_s: int, wrote: int | None = None, received: int | None = None, **changes: Any) -> dict[str, Any]:
    return {
        "instance_id": INSTANCE,
        "at": f"2026-11-23T10:00:{seconds:02}Z",
        "power": "running",
        "complete": True,
        "cpu": {"cpu_time_ns": cpu_s * 10**9, "vcpus": 2, "max_vcpus": 4},
        "memory": {"current_kib": 524288, "maximum_kib": 1048576, "rss_kib": 1536},
        "disks": [{"name": "root", "device": "vda", "write_bytes": wrote, "write_requests": 3, "capacity_bytes": 1 << 30}],
        "nics": [{"nic": 0, "mac": "52:54:00:00:00:01", "rx_bytes": received}],
    } | changes


def test_rates() -> None:
    found = rates(answer(10, 5, 1000, 0), answer(12, 6, 5000, 100))
    assert (found["seconds"], found["cpu_percent"]) == (2.0, 50.0)
    assert found["disks"][0]["write_bytes_s"] == 2000
    assert found["disks"][0]["read_bytes_s"] is None
    assert found["nics"] == [{"nic": 0, "rx_bytes_s": 50.0, "rx_packets_s": None, "tx_bytes_s": None, "tx_packets_s": None}]
    anew = rates(answer(10, 5, 1000, 0), answer(12, 1, 10))
    assert (anew["cpu_percent"], anew["disks"][0]["write_bytes_s"], anew["nics"][0]["rx_bytes_s"]) == (None, None, None)
    grew = rates(answer(10, 5, disks=[]), answer(12, 6, 10))
    assert grew["disks"][0]["write_bytes_s"] is None
    assert rates(answer(10, 5), answer(10, 6))["cpu_percent"] is None


@pytest.mark.parametrize("words", [("stats",), ("instance", "stats")], ids=["short", "long"])
def test_the_table(words: tuple[str, ...]) -> None:
    ctl = Ctl()
    ctl.answers = {"instance.stats": succeed(answer(10, 5, 3 << 20, 10))}
    done = ctl(*words, INSTANCE)
    assert done.exit_code == 0, done.stderr
    assert [command.data for command in ctl.commands] == [InstanceStats()]
    for text in ("running", "5.0 s", "512 MiB", "1.0 GiB", "1.5 MiB", "3.0 MiB", "vda", "52:54:00:00:00:01"):
        assert text in done.stdout, done.stdout
    assert "did not answer" not in done.stdout
    ctl = Ctl()
    ctl.answers = {"instance.stats": succeed(answer(10, 5, complete=False, disks=[], nics=[]))}
    assert "did not answer" in ctl(*words, INSTANCE).stdout


def test_json_and_errors() -> None:
    ctl = Ctl()
    ctl.answers = {"instance.stats": succeed(answer(10, 5))}
    assert json.loads(ctl("stats", INSTANCE, "--json").stdout)["result"]["cpu"]["vcpus"] == 2
    ctl = Ctl()
    ctl.answers = {"instance.stats": reject("verb_unsupported", "no")}
    assert ctl("stats", INSTANCE).exit_code == 1
    assert ctl("stats", INSTANCE, "--watch", "0").exit_code == 2


@pytest.mark.parametrize("as_json", [True, False], ids=["json", "table"])
def test_watch(as_json: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ctl = Ctl()
    readings = iter([answer(10, 5, 1000, 0), answer(12, 6, 5000, 4096)])

    def script(command: Any) -> Any:
        found = next(readings, None)
        return (succeed(found) if found is not None else reject("not_found", "it is gone"))(command)

    async def no_pause(seconds: float) -> None:
        assert seconds == 2

    class Asyncio:
        sleep = staticmethod(no_pause)

    monkeypatch.setattr(commands_stats, "asyncio", Asyncio)
    ctl.answers = {"instance.stats": script}
    done = ctl("stats", INSTANCE, "--watch", "2", *(["--json"] if as_json else []))
    assert done.exit_code == 1
    if as_json:
        first, second = lines_of_json("\n".join(done.stdout.splitlines()[:2]))
        assert first["rates"] is None
        assert second["rates"]["cpu_percent"] == 50.0
        assert second["result"]["at"] == "2026-11-23T10:00:12Z"
    else:
        assert "50 %" in done.stdout
        assert "2000 B" in done.stdout or "2.0 KiB" in done.stdout
