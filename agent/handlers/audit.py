"""`host.audit`: what is on the host against what should be. Only what is provably ours and nobody's is removed.

An item is removed while its instance's lane is held, and its proof is looked at again then: a command that came
meanwhile for the same id has its turn before or after, never during it.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import structlog

from agent import metrics
from agent.core.context import Context, now
from agent.core.issue import issue
from agent.core.leftovers import Leftovers
from agent.core.operation import Json, Operation
from agent.core.reconcile import reconcile
from agent.core.registry import Route
from agent.core.runner import Runner
from agent.drivers.verbs.host import Artifact, Holding
from agent.errors import ComputeError, FailedPrecondition
from agent.messages.events import HostLeftover
from agent.messages.verbs_host import AuditItem, HostAudit, HostAuditResult
from agent.store.base import Change, OperationRecord

log = structlog.get_logger("audit")

MAX_ITEMS = 1000
MAX_OPERATIONS = 20_000
"""So far back an ended operation proves that a folder of its own is a leftover."""
MAX_EVENTS = 100
"""New findings that one periodic audit tells one by one; the log has the count of all."""
OF_THE_AGENT = frozenset({"partial-download", "staging", "memory-dump"})
"""Kinds that the agent makes itself, beside the driver."""
REMOVABLE = OF_THE_AGENT | {"folder", "file", "secret"}
"""Kinds that a repair removes. A domain of ours without an instance is taken in instead: it holds data."""


@dataclass(slots=True)
class Findings:
    """One look at the host."""

    items: list[AuditItem] = field(default_factory=list)
    busy: list[str] = field(default_factory=list)


async def look(ctx: Context, runner: Runner, leftovers: Leftovers) -> Findings:
    """Read the whole ledger and compare. Instances that are busy at any time meanwhile are left out. Raises what the
    driver raises.
    """
    with runner.open.watching() as busy:
        holdings = {record.id: Holding(record.spec, record.life) for record in ctx.instances.all()}
        ledger = await ctx.executor.call("long", ctx.driver.ledger, holdings, deadline_s=ctx.deadlines.long_s)
        own = await asyncio.to_thread(leftovers.find, await _operations(ctx))
    known = {record.id for record in ctx.instances.all()}
    found = Findings(busy=sorted(busy & (known | holdings.keys())))
    for artifact in (*ledger.present, *own):
        if artifact.kind == "file" and artifact.name.rsplit("/", 2)[-2] in busy:
            continue
        if artifact.proof is None:
            if artifact.kind == "folder" and artifact.name.rsplit("/", 1)[-1] in busy:
                continue  # an operation is about to write the proof, or has just begun to remove the folder
            found.items.append(_item("unproven", artifact))
        elif artifact.instance_id is None or artifact.instance_id not in known | busy | holdings.keys():
            found.items.append(_item("unowned", artifact))
    for artifact in ledger.missing:
        if artifact.instance_id in known and artifact.instance_id not in busy:
            found.items.append(_item("missing", artifact))
    return found


async def _operations(ctx: Context) -> list[OperationRecord]:
    """All that the journal knows: the newest, and every unfinished one."""
    store = ctx.journal.store
    newest = await ctx.journal.read(lambda: store.operations(limit=MAX_OPERATIONS))
    return [*newest, *await ctx.journal.read(lambda: store.operations(unfinished=True, limit=MAX_OPERATIONS))]


def _item(finding: str, artifact: Artifact) -> AuditItem:
    return AuditItem.model_validate(
        {
            "finding": finding,
            "kind": artifact.kind,
            "name": artifact.name,
            "instance_id": artifact.instance_id,
            "proof": artifact.proof,
            "detail": artifact.detail,
            "size_bytes": artifact.size_bytes,
            "modified_at": artifact.modified_at,
        }
    )


def routes(runner: Callable[[], Runner], leftovers: Callable[[], Leftovers]) -> tuple[Route, ...]:
    """Routes of this verb; runner and leftovers are asked for when a command comes."""

    async def audit(op: Operation, data: HostAudit) -> HostAuditResult:
        return await _audit(op, data, runner(), leftovers())

    return (Route("host.audit", "build", audit, lane="audit"),)


async def _audit(op: Operation, data: HostAudit, runner: Runner, leftovers: Leftovers) -> HostAuditResult:
    async def read() -> Json:
        found = await look(op.ctx, runner, leftovers)
        items = [item.model_dump(mode="json", exclude_none=True) for item in found.items[:MAX_ITEMS]]
        return {"items": items, "more": max(0, len(found.items) - MAX_ITEMS), "busy": found.busy}

    # What is to be removed is journaled before anything is: a second look after a crash would see less.
    seen = await op.step("look", read, harmless=True)
    assert seen is not None  # noqa: S101 - this step always has an output
    items = [AuditItem.model_validate_json(json.dumps(item)) for item in seen["items"]]
    if data.repair:
        items = await _repair(op, items, runner, leftovers)
    return HostAuditResult(
        items=items,
        more=seen["more"],
        busy=seen["busy"],
        removed=sum(item.action == "removed" for item in items),
    )


async def _repair(op: Operation, items: list[AuditItem], runner: Runner, leftovers: Leftovers) -> list[AuditItem]:
    repaired: list[AuditItem] = []
    for number, item in enumerate(items):
        if item.finding != "unowned":
            repaired.append(item)
            continue
        op.progress(100.0 * number / len(items))

        async def remove(item: AuditItem = item) -> Json:
            return await _remove(op, item, runner, leftovers)

        done = await op.step(f"repair-{number}", remove)
        repaired.append(item.model_copy(update=done or {}))
    return repaired


async def _remove(op: Operation, item: AuditItem, runner: Runner, leftovers: Leftovers) -> dict[str, Any]:
    """Remove one item, or say why it is kept."""
    if item.kind == "domain":
        await reconcile(op.ctx, runner, resync=False)
        taken = item.instance_id is not None and op.ctx.instances.find(item.instance_id) is not None
        return {"action": "taken-in" if taken else "kept"}
    if item.kind not in REMOVABLE:
        return {"action": "kept", "detail": f"a {item.kind} is not removed by an audit"}
    artifact = Artifact(item.kind, item.name, item.instance_id, proof=item.proof)  # type: ignore[arg-type]
    try:
        if item.kind in OF_THE_AGENT:
            gone = await asyncio.to_thread(leftovers.remove, artifact, await _operations(op.ctx))
        else:
            gone = await _remove_held(op, artifact, runner)
    except FailedPrecondition as exc:
        return {"action": "kept", "detail": exc.message}
    if gone:
        log.warning("audit.removed", kind=item.kind, name=item.name, proof=item.proof, instance=item.instance_id)
    return {"action": "removed"}


async def _remove_held(op: Operation, artifact: Artifact, runner: Runner) -> bool:
    owner = artifact.instance_id or artifact.name.rsplit("/", 2)[-2]  # an unfinished file is in its instance's folder
    async with runner.open.holding(owner) as held:
        known = op.ctx.instances.find(owner) is not None
        if not held or (known and artifact.kind != "file"):
            raise FailedPrecondition("an operation acts on its instance now", code="not_removable")
        ctx = op.ctx
        return await ctx.executor.call(
            "mutate", ctx.driver.remove_artifact, artifact, deadline_s=ctx.deadlines.mutate_s, key=owner
        )


class PeriodicAudit:
    """The same by the clock: new findings are published once each, and removed only where the host says so."""

    def __init__(self, ctx: Context, runner: Runner, leftovers: Leftovers, *, repair: bool) -> None:
        self._ctx = ctx
        self._runner = runner
        self._leftovers = leftovers
        self._repair = repair
        self._told: set[tuple[str, str, str]] = set()

    async def run(self) -> None:
        """Look once. While the hypervisor is away: nothing."""
        if not self._ctx.state.connected.is_set() or "host.audit" not in self._ctx.state.capabilities.verbs:
            return
        try:
            found = (await look(self._ctx, self._runner, self._leftovers)).items
        except ComputeError as exc:
            log.info("audit.not_done", code=exc.code, error=exc.message)
            return
        await self._tell(found)
        if self._repair and any(item.finding == "unowned" for item in found):
            # As a command of our own: journaled, shown, its removals reported one by one.
            await issue(
                self._ctx, self._runner, HostAudit(repair=True), instance_id=None,
                id=f"audit/{now().strftime('%Y%m%dT%H%M%S.%f')}",
            )  # fmt: skip

    async def _tell(self, found: Iterable[AuditItem]) -> None:
        items = {(item.finding, item.kind, item.name): item for item in found}
        metrics.LEFTOVERS.set(sum(key[0] == "unowned" for key in items))
        new = [item for key, item in items.items() if key not in self._told]
        self._told = set(items)
        if not new:
            return
        counts = Counter(str(item.finding) for item in new)
        log.warning("audit.found", **dict(counts))
        events = [
            self._ctx.journal.event(
                HostLeftover(
                    finding=item.finding, item=item.kind, name=item.name, instance_id=item.instance_id,
                    proof=item.proof, detail=item.detail,
                ),
                subject=item.instance_id,
            )
            for item in new[:MAX_EVENTS]
        ]  # fmt: skip
        await self._ctx.journal.commit(Change(events=events))
