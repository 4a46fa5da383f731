"""The journal against the hypervisor: what differs, and what follows from it. Nothing is ever destroyed here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import structlog

from agent.core.context import Context, now
from agent.core.runner import Runner
from agent.drivers.base import DomainInfo
from agent.errors import ComputeError
from agent.messages.events import DesiredState, EventData, HostDrift, PowerState
from agent.store.base import Change, InstanceRecord

log = structlog.get_logger("reconcile")

_ADOPTED: Mapping[PowerState, DesiredState] = {"running": "running", "paused": "running", "suspended": "suspended"}
"""What an instance that is found is taken to be wanted as; else stopped."""


async def reconcile(ctx: Context, runner: Runner, *, resync: bool, needed: Callable[[], bool] = lambda: True) -> bool:
    """Re-read every domain, commit and publish the differences. `resync` marks events that follow a gap.

    Instances with an operation under way at any time meanwhile are left to it, and those about which something newer
    was learned meanwhile stay as they are. One re-reading at a time; `needed` is asked when its turn has come.
    Returns False where the hypervisor cannot be asked.
    """
    async with ctx.state.reconciling:
        if not needed():
            return True
        with runner.open.watching() as busy:
            before = {record.id: record for record in ctx.instances.all()}
            try:
                domains = await ctx.executor.call("long", ctx.driver.recover, deadline_s=ctx.deadlines.long_s)
            except ComputeError as exc:
                log.warning("reconcile.failed", code=exc.code, error=exc.message)
                return False
        if not ctx.state.connected.is_set():
            return False  # lost again since: what was read is not to replace `unknown`
        difference = _Difference(ctx, before, busy, resync=resync)
        for domain in domains:
            if domain.owned:
                difference.owned(domain)
        found = {domain.id for domain in domains}
        for record in ctx.instances.all():
            if record.id not in found:
                difference.missing(record)
        difference.foreign([domain for domain in domains if not domain.owned and domain.id not in busy])
        if difference.change.events or difference.change.instances:
            await ctx.journal.commit(difference.change)
            ctx.heartbeat_now()
        ctx.state.surveyed = True
        return True


class _Difference:
    """Collects one pass's differences in one change."""

    def __init__(self, ctx: Context, before: Mapping[str, InstanceRecord], busy: set[str], *, resync: bool) -> None:
        self._ctx = ctx
        self._before = before
        self._busy = busy
        self._resync = resync
        self.change = Change()

    def _overtaken(self, instance_id: str, record: InstanceRecord | None) -> bool:
        """Whether something newer than what was read is known, or will be by an operation that reads back."""
        if record is not None and record.observed == "unknown":
            return False  # nobody has read it since the hypervisor was away: this is the best there is
        return instance_id in self._busy or record is not self._before.get(instance_id)

    def owned(self, domain: DomainInfo) -> None:
        record = self._ctx.instances.find(domain.id)
        if self._overtaken(domain.id, record):
            return
        if record is None:
            self._adopt(domain)
            return
        if record.reason == "missing":
            self._drift("returned", domain.name, "the domain is there again", domain.id)
        if record.observed != domain.power or record.reason == "missing":
            self._observe(record, domain)

    def missing(self, record: InstanceRecord) -> None:
        """The hypervisor answered and has no such domain."""
        if record.reason == "missing" or record.id in self._busy or self._overtaken(record.id, record):
            return
        self._drift(
            "missing-domain",
            record.name,
            "the hypervisor has no such domain; delete the instance, or define the domain again",
            record.id,
        )
        updated = self._ctx.instances.update(record.id, observed="stopped", reason="missing")
        self._state(updated, record)

    def foreign(self, domains: Sequence[DomainInfo]) -> None:
        known = self._ctx.state.foreign
        for domain in domains:
            if domain.id not in known:
                self._drift(
                    "foreign-domain", domain.name, "not made by this agent; it is counted and left alone", domain.id
                )
        current = {domain.id: domain for domain in domains}
        # One that is being adopted is neither gone nor news.
        current |= {domain_id: known[domain_id] for domain_id in known.keys() & self._busy}
        for gone in known.keys() - current.keys():
            self._drift("foreign-domain-gone", known[gone].name, "it is no longer on this host", gone)
        self._ctx.state.foreign = current

    def _adopt(self, domain: DomainInfo) -> None:
        """A domain of ours that the journal does not know: the journal was lost; its metadata has all we need."""
        if domain.spec is None:
            return
        at = now()
        record = InstanceRecord(
            id=domain.id,
            spec=domain.spec,
            generation=domain.generation or 0,
            desired=_desired(domain),
            observed=domain.power,
            reason=domain.reason,
            created_by="",
            created_at=at,
            updated_at=at,
            life=domain.life,
        )
        self._ctx.instances.put(record)
        self._drift("adopted", domain.name, "rebuilt from the domain's own metadata", domain.id)
        self._state(record, None)

    def _observe(self, record: InstanceRecord, domain: DomainInfo) -> None:
        updated = self._ctx.instances.update(record.id, observed=domain.power, reason=domain.reason)
        self._state(updated, record)

    def _state(self, record: InstanceRecord, before: InstanceRecord | None) -> None:
        previous = before.observed if before is not None else None
        self.change.instances.append(record)
        self._event(self._ctx.instances.state_event(record, previous=previous, resync=self._resync), subject=record.id)

    def _drift(self, difference: str, name: str, detail: str, instance_id: str) -> None:
        log.warning("reconcile.drift", difference=difference, name=name, instance=instance_id)
        data = HostDrift.model_validate(
            {"difference": difference, "name": name, "detail": detail, "instance_id": instance_id}
        )
        self._event(data, subject=instance_id)

    def _event(self, data: EventData, *, subject: str) -> None:
        self.change.events.append(self._ctx.journal.event(data, subject=subject))


def _desired(domain: DomainInfo) -> DesiredState:
    """What must have been asked for, as far as the domain tells."""
    if domain.life.soft_delete is not None:
        return "deleted"
    return _ADOPTED.get(domain.power, "stopped")
