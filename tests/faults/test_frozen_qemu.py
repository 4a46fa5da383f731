"""One QEMU that hangs: its own commands end with their deadline, everybody else's go on as before."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest
from support.fleet import World
from support.recorder import describe

from agent.messages.commands import (
    HostPing,
    HostShow,
    InstanceDelete,
    InstanceList,
    InstancePause,
    InstanceResume,
    InstanceShow,
)
from devstack.libvirtd import PrivateLibvirtd

pytestmark = pytest.mark.qemu

MUTATE_S = 5.0


async def test_frozen_qemu_beside_healthy_ones(world: World, libvirtd: PrivateLibvirtd) -> None:
    agent = await world.libvirt_agent(libvirtd, settings={"deadlines": {"query_s": 2.0, "mutate_s": MUTATE_S}})
    await agent.start()
    host, recorder = agent.host, world.recorder
    frozen, *healthy = [await world.create(host) for _ in range(3)]
    pids = await asyncio.to_thread(libvirtd.qemu_pids)
    pid = pids[f"i-{frozen[:8]}"]

    async def exercise() -> list[int]:
        """Some commands on the healthy ones and on the host, which all succeed; the sequence of their final events."""
        asked = [(data, one) for one in healthy for data in (InstancePause(), InstanceShow(), InstanceResume())]
        asked += [(data, None) for data in (InstanceList(), HostPing(), HostShow())]
        return [(await world.succeed(host, data, one)).sequence for data, one in asked]

    os.kill(pid, signal.SIGSTOP)
    try:
        stuck = await world.send(host, InstancePause(), frozen)
        behind = await world.send(host, InstanceResume(), frozen)
        during = await exercise()

        final = await recorder.wait_final(host, stuck)
        assert (final.kind, final.data["error"]["code"]) == ("operation.failed", "deadline_exceeded"), describe(final)
        assert final.data["error"]["retryable"]
        assert during[0] < final.sequence, "nobody waited for the frozen one"

        # The thread hangs on; it is replaced, counted and told.
        await recorder.heartbeat(host, where=lambda beat: beat.stuck_threads == 1 and "driver-threads" in beat.conditions)
        await agent.wait_log("lane.blocked", lane=frozen)
        await exercise()
        # Its lane waits: the late call may still take effect.
        assert behind not in recorder.finals(host)
    finally:
        os.kill(pid, signal.SIGCONT)
    final = await recorder.wait_final(host, behind)
    assert final.kind == "operation.succeeded", describe(final)
    await recorder.heartbeat(host, where=lambda beat: beat.healthy and beat.stuck_threads == 0)
    shown = await world.succeed(host, InstanceShow(), frozen)
    assert shown.data["result"]["observed"] == "running"
    assert await asyncio.to_thread(libvirtd.qemu_pids) == pids
    await world.judge(agent, [frozen, *healthy], libvirtd)
    for instance_id in (frozen, *healthy):
        await world.succeed(host, InstanceDelete(), instance_id)
    await world.judge(agent, [], libvirtd)
