"""Power verbs: start, stop, reboot, pause, resume. Each reads the state first and back at the end.

`desired` is written with the final result, when the command has succeeded. A guest that obeys a stop is not taken for
one that ended by itself: policies leave an instance alone while an operation has it in hand, also across a crash.
"""

from __future__ import annotations

import asyncio
from datetime import datetime

from agent.core.context import now
from agent.core.operation import Json, Operation, require
from agent.core.registry import Route
from agent.drivers.base import DomainInfo
from agent.errors import DeadlineExceeded
from agent.handlers.observe import read_back, settle
from agent.messages.commands import InstancePause, InstanceReboot, InstanceResume, InstanceStart, InstanceStop
from agent.messages.events import PowerState
from agent.messages.results import PowerResult

DOWN: frozenset[PowerState] = frozenset({"stopped", "crashed"})


async def present(op: Operation) -> DomainInfo:
    """Read the domain. Raises `NotFound` for an unknown instance before the hypervisor is asked."""
    op.ctx.instances.get(op.instance_id)
    return await op.query(op.ctx.driver.get, op.instance_id)


def power_result(op: Operation, *, changed: bool, forced: bool = False) -> PowerResult:
    """What is true of the instance now, after `read_back`. Raises `NotFound`."""
    record = op.ctx.instances.get(op.instance_id)
    return PowerResult(instance_id=record.id, observed=record.observed, changed=changed, forced=forced)


async def start(op: Operation, data: InstanceStart) -> PowerResult:
    """Start a stopped or crashed instance, or bring a suspended one back."""
    info = await present(op)
    saved = info.power == "suspended" and not op.begun
    changed = info.power != "running" or op.begun
    if op.done_before("restore") or (saved and not data.discard_saved):
        await bring_back(op)
    elif changed:
        require(info.power != "paused" or op.begun, "the instance is paused; resume it", code="instance_paused")

        async def discard() -> Json:
            await op.mutate(op.ctx.driver.discard_saved, op.instance_id)
            return None

        async def do() -> Json:
            await op.mutate(op.ctx.driver.start, op.instance_id)
            return None

        if op.done_before("discard") or saved:
            await op.step("discard", discard)
        await op.step("start", do)
    await read_back(op, desired="running")
    return power_result(op, changed=changed)


async def bring_back(op: Operation) -> None:
    """Take a suspended guest's memory back and let it run, also one that was saved while it was paused."""

    async def restore() -> Json:
        await op.long(op.ctx.driver.restore, op.instance_id)
        info = await op.query(op.ctx.driver.get, op.instance_id)
        return {"runs": info.power == "running"}

    async def run_on() -> Json:
        await op.mutate(op.ctx.driver.resume, op.instance_id)
        return None

    outcome = await op.step("restore", restore)
    if not (outcome and outcome["runs"]):
        await op.step("resume", run_on)


async def stop(op: Operation, data: InstanceStop) -> PowerResult:
    """Shut the guest down, or end it when it does not obey in time."""
    info = await present(op)
    if info.power in DOWN:
        settle(op, info, desired="stopped")  # taken up after a restart: the event of its end may have been missed
        if not op.begun:
            return power_result(op, changed=False)
    require(
        data.force or info.power != "paused" or op.begun,
        "a paused guest cannot shut down; resume it first, or stop it with force",
        code="instance_paused",
    )
    require(
        data.force or info.power != "suspended" or op.begun,
        "a suspended guest cannot shut down; resume it first, or stop it with force, which loses its saved memory",
        code="instance_suspended",
    )
    forced = data.force
    if not data.force:
        asked = await op.step("shutdown", lambda: _ask(op))
        forced = not await _obeyed(op, data.timeout_s, asked)
    if forced:

        async def destroy() -> Json:
            await op.mutate(op.ctx.driver.destroy, op.instance_id)
            return None

        await op.step("destroy", destroy)
    await read_back(op, desired="stopped", reason="destroyed" if forced else "shutdown")
    return power_result(op, changed=True, forced=forced)


async def _ask(op: Operation) -> Json:
    await op.mutate(op.ctx.driver.shutdown, op.instance_id)
    return {"asked_at": now().isoformat()}


async def _obeyed(op: Operation, timeout_s: float, asked: Json) -> bool:
    """Wait for the guest to be down. After a restart of the agent only the rest of the time is waited."""
    waited_s = (now() - datetime.fromisoformat(asked["asked_at"])).total_seconds() if asked else 0.0
    try:
        await op.wait_observed(DOWN, max(0.0, timeout_s - waited_s))
    except DeadlineExceeded:
        info = await op.query(op.ctx.driver.get, op.instance_id)  # an event may have been lost with a connection
        return info.power in DOWN
    return True


async def reboot(op: Operation, data: InstanceReboot) -> PowerResult:
    """Reboot: soft asks the guest and goes hard when it does not obey in time."""
    info = await present(op)
    require(
        data.mode == "hard" or info.power != "suspended" or op.begun,
        "a suspended guest cannot reboot; resume it first, or reboot it hard, which loses its saved memory",
        code="instance_suspended",
    )
    require(
        info.power in ("running", "paused", "suspended") or op.begun,
        f"only a running instance can be rebooted, this one is {info.power}; start it",
        code="instance_not_running",
    )
    require(
        data.mode == "hard" or info.power != "paused" or op.begun,
        "a paused guest cannot reboot; resume it first, or reboot it hard",
        code="instance_paused",
    )
    forced = data.mode == "hard"
    if data.mode == "soft":
        outcome = await op.step("reboot", lambda: _ask_reboot(op, data.timeout_s))
        forced = not (outcome and outcome["rebooted"])
    if forced:

        async def destroy() -> Json:
            await op.mutate(op.ctx.driver.destroy, op.instance_id)
            return None

        async def start_again() -> Json:
            await op.mutate(op.ctx.driver.start, op.instance_id)
            return None

        await op.step("destroy", destroy)
        await op.step("start", start_again)
    await read_back(op, desired="running", reason="rebooted")
    return power_result(op, changed=True, forced=forced and data.mode == "soft")


async def _ask_reboot(op: Operation, timeout_s: float) -> Json:
    rebooted = op.ctx.instances.expect_signal(op.instance_id, "instance.rebooted")
    try:
        await op.mutate(op.ctx.driver.reboot, op.instance_id)
        async with asyncio.timeout(timeout_s):
            await op.unless_cancelled(rebooted)
    except TimeoutError:
        return {"rebooted": False}
    finally:
        rebooted.cancel()
    return {"rebooted": True}


async def pause(op: Operation, _data: InstancePause) -> PowerResult:
    """Stop the vCPUs of a running guest."""
    info = await present(op)
    require(
        info.power in ("running", "paused") or op.begun,
        f"only a running instance can be paused, this one is {info.power}",
        code="instance_not_running",
    )
    changed = info.power != "paused" or op.begun
    if changed:

        async def do() -> Json:
            await op.mutate(op.ctx.driver.pause, op.instance_id)
            return None

        await op.step("pause", do)
    await read_back(op, desired="paused", reason="paused")
    return power_result(op, changed=changed)


async def resume(op: Operation, _data: InstanceResume) -> PowerResult:
    """Let a paused or suspended guest run on."""
    info = await present(op)
    require(
        info.power in ("running", "paused", "suspended") or op.begun,
        f"only a paused or suspended instance can be resumed, this one is {info.power}; start it",
        code="instance_not_paused",
    )
    changed = info.power != "running" or op.begun
    if op.done_before("restore") or (info.power == "suspended" and not op.begun):
        await bring_back(op)
    elif changed:

        async def do() -> Json:
            await op.mutate(op.ctx.driver.resume, op.instance_id)
            return None

        await op.step("resume", do)
    await read_back(op, desired="running", reason="resumed")
    return power_result(op, changed=changed)


ROUTES = (
    Route("instance.start", "power", start),
    Route("instance.stop", "power", stop),
    Route("instance.reboot", "power", reboot),
    Route("instance.pause", "power", pause),
    Route("instance.resume", "power", resume),
)
