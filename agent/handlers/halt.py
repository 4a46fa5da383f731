"""Stopping a guest as a part of a longer operation, and starting it again where that is taken back."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from agent.core.context import now
from agent.core.operation import Json, Operation, require
from agent.errors import DeadlineExceeded
from agent.messages.events import PowerState

DOWN: frozenset[PowerState] = frozenset({"stopped", "crashed", "suspended"})
RESTART_WAIT_S = 30.0
"""How long an undo waits for a guest that was asked to shut down: a start before its end would be no start."""


@dataclass(frozen=True, slots=True)
class Found:
    """What an operation found when it began: all that follows is decided by it, also after a crash."""

    power: PowerState
    facts: Mapping[str, Any]

    @property
    def was_up(self) -> bool:
        """Whether there was a guest in memory."""
        return self.power not in DOWN


async def look(op: Operation, *, suspended: bool = False, **facts: str | float | bool | None) -> Found:
    """Read the power state and journal it, with other facts, as the operation's first step.

    Unless `suspended`, an instance that is suspended to disk is refused: its saved memory fits only the disks it has.
    Raises `NotFound` for an unknown instance before the hypervisor is asked.
    """
    op.ctx.instances.get(op.instance_id)
    power: PowerState = "unknown"
    if not op.begun:
        power = (await op.query(op.ctx.driver.get, op.instance_id)).power
        require(
            suspended or power != "suspended",
            "the instance is suspended to disk; start it, or stop it, first",
            code="instance_suspended",
        )

    async def do() -> Json:
        # Where a former run began this step and did not end it, what it saw is not known.
        seen = power if power != "unknown" else (await op.query(op.ctx.driver.get, op.instance_id)).power
        return {"power": seen, "facts": facts}

    found = await op.step("look", do, harmless=True) or {}
    return Found(found.get("power", "unknown"), found.get("facts", {}))


async def halt(op: Operation, found: Found, timeout_s: float, *, force: bool) -> None:
    """Stop the guest if it was up at the beginning; undone by starting it again.

    A paused guest cannot shut down and is ended.
    """
    if not found.was_up:
        return
    soft = not force and found.power == "running"

    async def ask() -> Json:
        await op.mutate(op.ctx.driver.shutdown, op.instance_id)
        return {"asked_at": now().isoformat()}

    async def end_it() -> Json:
        obeyed = soft and await _obeyed(op, timeout_s, asked)
        if not obeyed:
            await op.mutate(op.ctx.driver.destroy, op.instance_id)
        return {"forced": not obeyed}

    asked = await op.step("shutdown", ask, undo=lambda: _start_again(op, asked=False)) if soft else None
    # Only this step's undo waits for the end of a guest that was asked: what was asked cannot be taken back.
    await op.step("halt", end_it, undo=lambda: _start_again(op, asked=soft))


async def start(op: Operation) -> Json:
    """Start the guest: the `do` of a step."""
    await op.mutate(op.ctx.driver.start, op.instance_id)
    return None


async def end(op: Operation) -> None:
    """End the guest: the `undo` of such a step."""
    await op.mutate(op.ctx.driver.destroy, op.instance_id)


async def _obeyed(op: Operation, timeout_s: float, asked: Json) -> bool:
    """Wait until the guest is down. After a restart of the agent only the rest of the time is waited."""
    waited_s = (now() - datetime.fromisoformat(asked["asked_at"])).total_seconds() if asked else 0.0
    if await _is_down(op):
        return True  # before this run of the agent, perhaps: its event will not come again
    try:
        await op.wait_observed(DOWN, max(0.0, timeout_s - waited_s))
    except DeadlineExceeded:
        return await _is_down(op)  # an event may have been lost with a connection
    return True


async def _start_again(op: Operation, *, asked: bool) -> None:
    if asked and not await _is_down(op):
        # The guest may be about to end, and a start before that would be none.
        with suppress(DeadlineExceeded):
            await op.ctx.instances.wait_observed(op.instance_id, DOWN, RESTART_WAIT_S)
    await op.mutate(op.ctx.driver.start, op.instance_id)


async def _is_down(op: Operation) -> bool:
    return (await op.query(op.ctx.driver.get, op.instance_id)).power in DOWN
