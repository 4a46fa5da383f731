"""Host verbs: ping, show, set-enabled."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from agent.core.context import Context
from agent.core.operation import Operation
from agent.core.registry import Route
from agent.messages.commands import Command, HostPing, HostSetEnabled, HostShow
from agent.messages.events import HostHeartbeat
from agent.messages.results import HostEnabledResult, HostShowResult, PingResult

ENABLED_KEY = "host.enabled"
REASON_KEY = "host.disabled_reason"


def ping(ctx: Context, command: Command[Any]) -> PingResult:
    """Answer from within the acceptance: one commit, no lane, no thread."""
    data: HostPing = command.data
    return PingResult(host=ctx.host, version=ctx.version, echo=data.echo)


async def set_enabled(op: Operation, data: HostSetEnabled) -> HostEnabledResult:
    """Take new instances or refuse them; kept across restarts."""
    state = op.ctx.state
    changed = state.enabled != data.enabled
    state.enabled = data.enabled
    state.disabled_reason = None if data.enabled else data.reason
    op.stage(settings={ENABLED_KEY: "1" if data.enabled else "0", REASON_KEY: state.disabled_reason or ""})
    op.ctx.heartbeat_now()
    return HostEnabledResult(enabled=data.enabled, changed=changed)


def routes(heartbeat: Callable[[], Awaitable[HostHeartbeat]]) -> tuple[Route, ...]:
    """Routes of this family; `heartbeat` builds what `host.show` returns."""

    async def show(_op: Operation, _data: HostShow) -> HostShowResult:
        return HostShowResult(heartbeat=await heartbeat())

    return (
        Route("host.ping", "query", inline=ping, lane="none"),
        Route("host.show", "query", show, lane="none"),
        Route("host.set-enabled", "query", set_enabled, lane="host"),
    )
