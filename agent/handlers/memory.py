"""Suspend to disk, reset, crash dump, memory dump, policy."""

from __future__ import annotations

import asyncio
import hashlib

from agent.core.operation import Json, Operation, require
from agent.core.registry import Route
from agent.drivers.base import CallContext
from agent.errors import Cancelled
from agent.handlers.observe import read_back
from agent.handlers.power import power_result, present
from agent.handlers.view import instance_view
from agent.messages.results import InstanceView, PowerResult
from agent.messages.verbs_memory import (
    InstanceMemoryDump,
    InstanceReset,
    InstanceSetPolicy,
    InstanceSuspend,
    InstanceTriggerCrashDump,
    MemoryDumpResult,
)

PROOF_S = 10.0
"""How long the event that proves a reset is waited for."""
_EXTENSIONS = {"elf": "elf", "kdump-zlib": "kdump", "raw": "raw"}


async def _require_guest(op: Operation, participle: str, *, paused: bool = True) -> None:
    """Refuse unless there is a guest in memory. Asked once, before the first step."""
    if op.begun:
        return
    info = await present(op)
    require(
        info.power in ("running", "paused"),
        f"only a running instance can be {participle}, this one is {info.power}",
        code="instance_not_running",
    )
    require(
        paused or info.power != "paused",
        f"a paused guest cannot be {participle}; resume it first",
        code="instance_paused",
    )


def _heed_cancel(op: Operation) -> None:
    """A cancel that came while the last step ran was promised: there is no next step that would look for it."""
    if op.record.cancel_requested:
        raise Cancelled("the operation was cancelled")


async def suspend(op: Operation, _data: InstanceSuspend) -> PowerResult:
    """Save the guest's memory to disk and end it."""
    driver, instance_id = op.ctx.driver, op.instance_id
    changed = op.begun or (await present(op)).power != "suspended"
    if changed:
        await _require_guest(op, "suspended")

        async def save() -> Json:
            await op.long(driver.suspend, instance_id)
            return None

        async def bring_back() -> None:
            # A call of its own that is not cancelled, as the operation may be.
            await op.mutate(driver.restore, instance_id, CallContext())

        await op.step("suspend", save, undo=bring_back)
        _heed_cancel(op)
    await read_back(op, desired="suspended", reason="saved")
    return power_result(op, changed=changed)


async def reset(op: Operation, _data: InstanceReset) -> PowerResult:
    """Press the guest's reset button. A crash of the agent within the step presses it once more."""
    await _require_guest(op, "reset")
    await op.step("reset", lambda: _reset(op))
    await read_back(op)
    return power_result(op, changed=True)


async def _reset(op: Operation) -> Json:
    proof = op.ctx.instances.expect_signal(op.instance_id, "instance.rebooted")
    try:
        await op.mutate(op.ctx.driver.reset, op.instance_id)
        async with asyncio.timeout(PROOF_S):
            await proof
    except TimeoutError:
        return {"proven": False}  # the hypervisor took it; the event may have been lost with a connection
    finally:
        proof.cancel()
    return {"proven": True}


async def trigger_crash_dump(op: Operation, _data: InstanceTriggerCrashDump) -> PowerResult:
    """Send the guest an NMI. A crash of the agent within the step sends one more."""
    await _require_guest(op, "interrupted", paused=False)

    async def inject() -> Json:
        await op.mutate(op.ctx.driver.inject_nmi, op.instance_id)
        return None

    await op.step("interrupt", inject)
    await read_back(op)
    return power_result(op, changed=True)


async def memory_dump(op: Operation, data: InstanceMemoryDump) -> MemoryDumpResult:
    """Write the guest's memory to the host's dumps folder. Nothing is left of one that does not succeed."""
    driver, instance_id = op.ctx.driver, op.instance_id
    name = _dump_name(op, data)
    await _require_guest(op, "dumped")
    if not op.begun:
        await op.query(driver.check_dump_space, instance_id)

    async def dump() -> Json:
        found = await op.long(driver.memory_dump, instance_id, name, data.format, data.live)
        return {"path": str(found.path), "size_bytes": found.size_bytes, "sha256": found.sha256}

    async def remove() -> None:
        await op.mutate(driver.remove_memory_dump, instance_id, name)

    made = await op.step("dump", dump, undo=remove)
    _heed_cancel(op)
    return MemoryDumpResult.model_validate({"instance_id": instance_id, "format": data.format, **(made or {})})


def _dump_name(op: Operation, data: InstanceMemoryDump) -> str:
    """The same for all runs of the operation, and another for each operation."""
    mark = hashlib.sha256(op.id.encode()).hexdigest()[:8]
    return f"{op.instance_id}-{op.record.accepted_at:%Y%m%dt%H%M%Sz}-{mark}.{_EXTENSIONS[data.format]}"


async def set_policy(op: Operation, data: InstanceSetPolicy) -> InstanceView:
    """Change the policy in the domain's own metadata and in the record; the guest is not touched."""
    driver, instance_id = op.ctx.driver, op.instance_id
    record = op.ctx.instances.get(instance_id)
    old = record.spec
    new = old.model_copy(update={"policy": data.applied_to(old.policy)})
    if not op.begun:
        await present(op)  # a definition must not bring a domain back that is gone
    if new != old or op.begun:
        generation = max(record.generation, op.command.generation or 0)

        async def define() -> Json:
            await op.mutate(driver.define, instance_id, new, generation=generation, life=record.life)
            return None

        async def define_old() -> None:
            await op.mutate(driver.define, instance_id, old, generation=record.generation, life=record.life)

        await op.step("define", define, undo=define_old)
        _heed_cancel(op)
        op.stage(instance=op.ctx.instances.update(instance_id, spec=new, generation=generation))
    return instance_view(op.ctx.instances.get(instance_id))


ROUTES = (
    Route("instance.suspend", "power", suspend),
    Route("instance.reset", "power", reset),
    Route("instance.trigger-crash-dump", "power", trigger_crash_dump),
    Route("instance.memory-dump", "build", memory_dump),
    Route("instance.set-policy", "power", set_policy),
)
