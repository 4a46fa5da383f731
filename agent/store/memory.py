"""The journal's in-process twin: same semantics, no disk. Can be told to fail (`fail_with`)."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Sequence
from datetime import datetime

from agent.errors import ComputeError, FailedPrecondition
from agent.store.base import (
    Change,
    Committed,
    Identity,
    InstanceRecord,
    OperationRecord,
    SequencedEvent,
    StepRecord,
)

_STATE_COLUMNS = (
    "state", "attempt", "started_at", "finished_at", "cancel_requested", "undo_pending", "error_code", "final_body",
)  # fmt: skip


class MemoryStore:
    """Implements `Store`. State outlives `close`, so a test can open it again as after a restart."""

    def __init__(self) -> None:
        self.fail_with: ComputeError | None = None
        self.requests: list[str] = []
        self._identity: Identity | None = None
        self._operations: dict[str, OperationRecord] = {}
        self._steps: dict[str, dict[int, StepRecord]] = {}
        self._instances: dict[str, InstanceRecord] = {}
        self._outbox: dict[int, SequencedEvent] = {}
        self._settings: dict[str, str] = {}
        self._sequence = 0

    async def open(self, *, compute_id: str, host: str) -> Identity:
        if self._identity is None:
            self._identity = Identity(compute_id, host, uuid.uuid4().hex)
        if (self._identity.compute_id, self._identity.host) != (compute_id, host):
            raise FailedPrecondition("the journal belongs to another host", code="journal_foreign")
        return self._identity

    async def close(self) -> None:
        return None

    async def commit(self, changes: Sequence[Change]) -> list[Committed]:
        if self.fail_with is not None:
            raise self.fail_with
        return [self._apply(change) for change in changes]

    def _apply(self, change: Change) -> Committed:
        claim = change.claim
        if claim is not None:
            known = self._operations.get(claim.id)
            if known is not None:
                return Committed(copy.copy(known), [])
            self._operations[claim.id] = copy.copy(claim)
        if change.operation is not None:
            self._update(change.operation)
        for step in change.steps:
            self._steps.setdefault(step.operation_id, {})[step.index] = step
        for instance in change.instances:
            self._instances[instance.id] = instance
        for instance_id in change.removed_instances:
            self._instances.pop(instance_id, None)
        self._settings.update(change.settings)
        sequenced = []
        for event in change.events:
            self._sequence += 1
            sequenced.append(SequencedEvent(self._sequence, event))
            self._outbox[self._sequence] = sequenced[-1]
        if change.final_of is not None and sequenced:
            self._operations[change.final_of].final_sequence = self._sequence
        return Committed(None, sequenced)

    def _update(self, new: OperationRecord) -> None:
        known = self._operations.get(new.id)
        if known is None or (known.final and not new.final):
            return
        for name in _STATE_COLUMNS:
            setattr(known, name, getattr(new, name))

    def published(self, sequences: Sequence[int]) -> None:
        for sequence in sequences:
            self._outbox.pop(sequence, None)

    async def backlog(self, after: int, limit: int) -> list[SequencedEvent]:
        return [event for sequence, event in sorted(self._outbox.items()) if sequence > after][:limit]

    async def last_sequence(self) -> int:
        return self._sequence

    async def operation(self, operation_id: str) -> OperationRecord | None:
        return copy.copy(self._operations.get(operation_id))

    async def operations(self, *, unfinished: bool = False, limit: int = 1000) -> list[OperationRecord]:
        rows = [copy.copy(record) for record in self._operations.values()]
        if unfinished:
            return [record for record in rows if not record.final or record.undo_pending]
        return rows[::-1][:limit]

    async def steps(self, operation_id: str) -> list[StepRecord]:
        return [step for _, step in sorted(self._steps.get(operation_id, {}).items())]

    async def instances(self) -> list[InstanceRecord]:
        return list(self._instances.values())

    async def settings(self) -> dict[str, str]:
        return dict(self._settings)

    async def prune(self, before: datetime, limit: int) -> int:
        old = [
            record.id
            for record in self._operations.values()
            if record.final and not record.undo_pending and record.finished_at and record.finished_at < before
        ][:limit]
        for operation_id in old:
            del self._operations[operation_id]
            self._steps.pop(operation_id, None)
        return len(old)

    async def take_requests(self) -> list[str]:
        taken, self.requests = self.requests, []
        return taken
