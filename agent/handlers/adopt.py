"""`instance.adopt`: a foreign domain becomes an instance, its guest and its definition untouched."""

from __future__ import annotations

import json

from agent.core.context import now
from agent.core.operation import Json, Operation
from agent.core.registry import Route
from agent.errors import AlreadyExists, FailedPrecondition
from agent.handlers.observe import read_back
from agent.handlers.view import instance_view
from agent.messages.events import DesiredState, HostDrift, InstanceRemoved
from agent.messages.life import Adoption, Life
from agent.messages.results import InstanceView
from agent.messages.spec import InstanceSpec
from agent.messages.verbs_host import InstanceAdopt
from agent.store.base import InstanceRecord


async def adopt(op: Operation, data: InstanceAdopt) -> InstanceView:
    """Adopt. Refused: unknown or transient domain, one of ours, disks that are none, a spec that does not agree."""
    driver, instance_id = op.ctx.driver, op.instance_id
    known = op.ctx.instances.find(instance_id)
    if not op.begun and known is not None and known.created_by != op.id:
        raise AlreadyExists(f"{instance_id} is an instance of this host already", code="instance_exists")

    async def plan() -> Json:
        found = await op.query(driver.foreign_plan, instance_id, data.own_disks)
        if data.spec is not None:
            _check_agrees(found.spec, data.spec)
        spec = data.spec or found.spec
        return {"spec": spec.model_dump(mode="json"), "adoption": found.adoption.model_dump(mode="json")}

    fresh = None
    if not op.begun and op.record.state != "undoing":
        fresh = await plan()  # outside of a step, so that a refusal precedes the first one

    async def keep_plan() -> Json:
        return fresh if fresh is not None else await plan()

    planned = await op.step("plan", keep_plan, harmless=True)
    assert planned is not None  # noqa: S101 - this step always has an output
    spec = InstanceSpec.model_validate_json(json.dumps(planned["spec"]))
    life = Life(adopted=Adoption.model_validate(planned["adoption"]))

    async def claim() -> Json:
        current = op.ctx.instances.find(instance_id)
        if current is None:
            current = op.ctx.instances.put(_record(op, spec, life))
        op.stage(instance=current)
        return None

    async def unclaim() -> None:
        current = op.ctx.instances.find(instance_id)
        if current is not None and current.created_by == op.id:
            op.ctx.instances.remove(instance_id)
            op.stage(removed=instance_id, event=InstanceRemoved(instance_id=instance_id, name=current.name))
            op.ctx.heartbeat_now()

    async def mark() -> Json:
        await op.mutate(driver.adopt, instance_id, spec, generation=op.command.generation or 0, life=life)
        return None

    async def unmark() -> None:
        await op.mutate(driver.release, instance_id)

    await op.step("claim", claim, undo=unclaim)
    await op.step("mark", mark, undo=unmark)
    record = await read_back(op, reason="adopted")
    # What it does now is what was wanted of it: nobody has commanded anything else yet.
    wanted: dict[str, DesiredState] = {"running": "running", "paused": "paused"}
    record = op.ctx.instances.update(instance_id, desired=wanted.get(record.observed, "stopped"))
    op.stage(
        instance=record,
        event=HostDrift(difference="adopted", instance_id=instance_id, name=record.name, detail="adopted by a command"),
    )
    op.ctx.state.foreign.pop(instance_id, None)
    op.ctx.heartbeat_now()
    return instance_view(record)


def _record(op: Operation, spec: InstanceSpec, life: Life) -> InstanceRecord:
    at = now()
    return InstanceRecord(
        id=op.instance_id,
        spec=spec,
        generation=op.command.generation or 0,
        desired="stopped",
        observed="stopped",
        reason="creating",
        created_by=op.id,
        created_at=at,
        updated_at=at,
        life=life,
    )


def _check_agrees(found: InstanceSpec, given: InstanceSpec) -> None:
    """The spec given may say more than the domain shows, and nothing else than it shows."""
    differences = {
        "name": (found.name, given.name),
        "vcpus": (found.vcpus, given.vcpus),
        "memory_mib": (found.memory_mib, given.memory_mib),
        "disks": (len(found.disks), len(given.disks)),
        "nics": (len(found.nics), len(given.nics)),
        "root_disk.size_mib": (found.root_disk.size_mib, given.root_disk.size_mib),
    }
    wrong = {key: pair for key, pair in differences.items() if pair[0] != pair[1]}
    if wrong:
        words = "; ".join(f"{key} is {has}, not {wants}" for key, (has, wants) in wrong.items())
        raise FailedPrecondition(f"the domain is not as the spec says: {words}", code="adopt_differs")


ROUTES = (Route("instance.adopt", "power", adopt),)
