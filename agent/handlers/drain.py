"""`host.drain`: nothing new, then wait until nothing is under way, with the guests stopped first on request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime

from agent.core.context import Context, now
from agent.core.issue import issue
from agent.core.operation import Json, Operation
from agent.core.registry import Route
from agent.core.runner import Runner
from agent.errors import DeadlineExceeded, FailedPrecondition
from agent.handlers.host import ENABLED_KEY, REASON_KEY
from agent.messages.commands import InstanceStop
from agent.messages.verbs_host import HostDrain, HostDrainResult

LOOK_S = 0.2
"""Between looks at what is under way."""
ACTIVE = ("running", "paused")


def disable(op: Operation, reason: str) -> None:
    """Take nothing new; committed with the operation's next commit."""
    state = op.ctx.state
    state.enabled, state.disabled_reason = False, reason
    op.stage(settings={ENABLED_KEY: "0", REASON_KEY: reason})
    op.ctx.heartbeat_now()


class _Drain:
    def __init__(self, op: Operation, data: HostDrain, runner: Runner, began_at: datetime) -> None:
        self._op = op
        self._data = data
        self._runner = runner
        self._began_at = began_at

    @property
    def waited_s(self) -> float:
        return (now() - self._began_at).total_seconds()

    async def stop(self, ids: list[str], *, again: bool = False) -> None:
        """Have the guests stopped, a few at a time, each by a command of its own: journaled, in its lane, once."""
        what = "drain-again" if again else "drain"
        names = {f"{what}/{self._op.id[-60:]}/{instance_id}": instance_id for instance_id in ids}
        waiting = dict(names)
        begun: set[str] = set()
        while waiting or begun:
            while waiting and len(begun) < self._data.at_once:
                name, instance_id = waiting.popitem()
                if _active(self._op.ctx, instance_id):
                    command = InstanceStop(timeout_s=self._data.stop_timeout_s)
                    await issue(self._op.ctx, self._runner, command, instance_id=instance_id, id=name)
                    begun.add(name)
            begun = {name for name in begun if self._runner.find(name) is not None}
            done = len(names) - len(waiting) - len(begun)
            self._op.progress(round(100.0 * done / max(1, len(names)), 1))
            if begun:
                await self._look_again()

    async def settle(self) -> None:
        """Wait until no operation acts on an instance."""
        while self._runner.open.acting():
            await self._look_again()

    async def _look_again(self) -> None:
        left_s = self._data.timeout_s - self.waited_s
        if self._op.ctx.state.enabled:
            raise FailedPrecondition(
                "the host was enabled while it was drained, which ends the drain", code="drain_ended"
            )
        if left_s <= 0:
            acting = self._runner.open.acting()
            raise DeadlineExceeded(
                f"{len(acting)} operations are still under way after {self._data.timeout_s:g} s; the host stays "
                "disabled: drain it again to go on waiting, or enable it",
                code="drain_timeout",
                operations=", ".join(record.id for record in acting[:10]),
                count=len(acting),
            )
        pause = asyncio.ensure_future(asyncio.sleep(min(LOOK_S, left_s)))
        try:
            await self._op.unless_cancelled(pause)
        finally:
            pause.cancel()


def _running(ctx: Context) -> list[str]:
    return [record.id for record in ctx.instances.all() if record.observed in ACTIVE]


def _active(ctx: Context, instance_id: str) -> bool:
    record = ctx.instances.find(instance_id)
    return record is not None and record.observed in ACTIVE


def routes(runner: Callable[[], Runner]) -> tuple[Route, ...]:
    """Routes of this verb; the runner is asked for when a command comes."""

    async def drain(op: Operation, data: HostDrain) -> HostDrainResult:
        reason = data.reason or "drained for maintenance"

        async def begin() -> Json:
            disable(op, f"draining: {reason}")
            return {"began_at": now().isoformat(), "stop": _running(op.ctx) if data.stop_instances else []}

        async def look_again() -> Json:
            return {"stop": _running(op.ctx)}  # made or started by commands that came before the drain

        begun = await op.step("disable", begin)
        assert begun is not None  # noqa: S101 - this step always has an output
        work = _Drain(op, data, runner(), datetime.fromisoformat(begun["began_at"]))
        await op.step("stop-guests", lambda: _nothing(work.stop(begun["stop"])), harmless=True)
        await op.step("settle", lambda: _nothing(work.settle()), harmless=True)
        stopped = list(begun["stop"])
        if data.stop_instances:
            late = await op.step("look-again", look_again, harmless=True)
            assert late is not None  # noqa: S101 - as above
            await op.step("stop-late-guests", lambda: _nothing(work.stop(late["stop"], again=True)), harmless=True)
            await op.step("settle-again", lambda: _nothing(work.settle()), harmless=True)
            stopped += [one for one in late["stop"] if one not in stopped]
        if not op.ctx.state.enabled:
            disable(op, f"drained: {reason}")
        return HostDrainResult(
            stopped=[one for one in stopped if not _active(op.ctx, one)],
            running=_running(op.ctx),
            waited_s=round(work.waited_s, 1),
        )

    return (Route("host.drain", "waiting", drain, lane="drain"),)


async def _nothing(work: object) -> Json:
    await work  # type: ignore[misc]
    return None
