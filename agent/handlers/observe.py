"""Reading an instance's state back from the hypervisor into the operation."""

from __future__ import annotations

from agent.core.operation import Operation
from agent.drivers.base import DomainInfo
from agent.messages.events import DesiredState
from agent.store.base import InstanceRecord


async def read_back(op: Operation, *, desired: DesiredState | None = None, reason: str | None = None) -> InstanceRecord:
    """Ask the hypervisor, and stage the new state with its event for the operation's next commit.

    Raises what the driver's `get` raises: `NotFound` on proof that the domain is gone, `Unavailable`.
    """
    info = await op.query(op.ctx.driver.get, op.instance_id)
    return settle(op, info, desired=desired, reason=reason)


def settle(
    op: Operation, info: DomainInfo, *, desired: DesiredState | None = None, reason: str | None = None
) -> InstanceRecord:
    """Stage what the hypervisor said; an event only where something changed."""
    instances = op.ctx.instances
    before = instances.get(op.instance_id)
    power_changed = info.power != before.observed
    made = before.reason == "creating"  # no longer: also one that was made and not started has an end of its making
    record = instances.update(
        op.instance_id,
        observed=info.power,
        desired=desired,
        reason=(reason or info.reason) if power_changed or made else None,
        generation=op.command.generation,
    )
    if power_changed or record.desired != before.desired:
        op.stage(event=instances.state_event(record, previous=before.observed))
    op.stage(instance=record)
    return record
