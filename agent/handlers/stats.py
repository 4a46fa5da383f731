"""`instance.stats`: a read that takes no turn, and whose answer does not depend on a guest's process that hangs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Final

from agent.core.context import now
from agent.core.operation import Operation
from agent.core.registry import Route
from agent.drivers.verbs.stats import Use
from agent.errors import DeadlineExceeded, NotFound, Unavailable
from agent.messages.verbs_stats import CpuStats, DiskStats, InstanceStats, InstanceStatsResult, MemoryStats, NicStats

ANSWER_S: Final = 5.0
"""How long a guest's process may take to answer, where `deadlines.query_s` is not shorter."""


async def stats(op: Operation, _data: InstanceStats) -> InstanceStatsResult:
    """Read the figures; without those of the guest's process if it does not answer in time.

    Raises `Unavailable` at once while the hypervisor is away: what was known last is no statistic.
    """
    record = op.ctx.instances.get(op.instance_id)
    if not op.ctx.state.connected.is_set():
        raise Unavailable("the hypervisor is away; ask again when it is back", code="hypervisor_unreachable")
    read = op.ctx.driver.stats
    limit_s = min(ANSWER_S, op.ctx.deadlines.query_s)
    try:
        try:
            use = await op.query(read, op.instance_id, record.spec, deadline_s=limit_s)
        except DeadlineExceeded:
            use = await op.query(read, op.instance_id, record.spec, False, deadline_s=limit_s)
    except NotFound:
        # It is being made, or is on the shelf: no domain, so nothing is used.
        use = Use(at=now(), power=record.observed)
    return InstanceStatsResult(
        instance_id=op.instance_id,
        at=use.at,
        power=use.power,
        complete=use.complete,
        cpu=CpuStats(**asdict(use.cpu)),
        memory=MemoryStats(**asdict(use.memory)),
        disks=[DiskStats(**asdict(disk)) for disk in use.disks],
        nics=[NicStats(**asdict(nic)) for nic in use.nics],
    )


ROUTES = (Route("instance.stats", "query", stats, lane="none"),)
