"""What the agent keeps: operations, their steps, instances, and events that wait for the broker.

One `Change` is one transaction. Everything that must be true together (a final result, the instance's new state
and the events that tell of both) travels in one change. Changes are applied in the order in which they are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, Protocol

from agent.messages.events import FINAL_STATES, DesiredState, OperationState, PowerState
from agent.messages.life import ORDINARY, Life
from agent.messages.spec import InstanceSpec


@dataclass(slots=True)
class OperationRecord:
    """One accepted command. `body` is the command as it came; `final_body` is its unsealed final event.

    `undo_pending`: the final result is out but something it left could not be taken back yet.
    """

    id: str
    verb: str
    instance_id: str | None
    body: bytes
    reply_to: str | None
    correlation_id: str | None
    state: OperationState
    accepted_at: datetime
    attempt: int = 0
    started_at: datetime | None = None
    finished_at: datetime | None = None
    cancel_requested: bool = False
    undo_pending: bool = False
    error_code: str | None = None
    final_body: bytes | None = None
    final_sequence: int | None = None

    @property
    def final(self) -> bool:
        """Whether the command has had its one final event."""
        return self.state in FINAL_STATES


StepState = Literal["started", "done", "undone"]


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step of an operation. `output` is JSON, present once the step is done."""

    operation_id: str
    index: int
    name: str
    state: StepState
    output: bytes | None = None


@dataclass(frozen=True, slots=True)
class InstanceRecord:
    """What the agent believes about one instance. `created_by` is the id of its create operation."""

    id: str
    spec: InstanceSpec
    generation: int
    desired: DesiredState
    observed: PowerState
    reason: str
    created_by: str
    created_at: datetime
    updated_at: datetime
    life: Life = ORDINARY

    @property
    def name(self) -> str:
        """The domain's name."""
        return self.spec.name


@dataclass(frozen=True, slots=True)
class PendingEvent:
    """A rendered event that waits for its sequence and for the broker. `cc`: further routing keys."""

    id: str
    routing_key: str
    body: bytes
    cc: tuple[str, ...] = ()
    correlation_id: str | None = None


@dataclass(frozen=True, slots=True)
class SequencedEvent:
    """A committed event with its place in the host's sequence."""

    sequence: int
    event: PendingEvent


@dataclass(slots=True)
class Change:
    """One transaction.

    `claim` inserts an operation if its id is new. If the id is known, nothing of this change is applied and the
    commit returns the known record. `operation` updates the state columns of a known operation; one that is final
    stays final, whatever comes late. The final event
    of an operation is the last of `events` where `final_of` names the operation: its sequence is kept with it.
    """

    claim: OperationRecord | None = None
    operation: OperationRecord | None = None
    steps: list[StepRecord] = field(default_factory=list)
    instances: list[InstanceRecord] = field(default_factory=list)
    removed_instances: list[str] = field(default_factory=list)
    events: list[PendingEvent] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)
    final_of: str | None = None


@dataclass(frozen=True, slots=True)
class Committed:
    """What a commit did: `known` is set (and nothing was applied) if the claimed id was already there."""

    known: OperationRecord | None
    events: list[SequencedEvent]


@dataclass(frozen=True, slots=True)
class Identity:
    """Whose journal this is. `epoch` is made with the journal and names the event sequence."""

    compute_id: str
    host: str
    epoch: str


class Store(Protocol):
    """A journal. All methods are called on the event loop; none blocks it.

    Raises `Unavailable` with code `journal_full` (no space: the change was not applied, try again when there is
    some) or `journal_error`; `Internal` with code `journal_rejected` for a change that can never be stored (its
    neighbours can); `FailedPrecondition` with code `journal_foreign` or `journal_newer` from `open`.
    """

    async def open(self, *, compute_id: str, host: str) -> Identity:
        """Open or make the journal and bring its schema up to date."""

    async def close(self) -> None:
        """Finish what was given and close. Idempotent."""

    async def commit(self, changes: Sequence[Change]) -> list[Committed]:
        """Apply changes, each in full or not at all, and return once they are on stable storage."""

    def published(self, sequences: Sequence[int]) -> None:
        """Forget events that the broker has confirmed. Lazy: after a crash some may be published again."""

    async def backlog(self, after: int, limit: int) -> list[SequencedEvent]:
        """Events that still wait for the broker, in order."""

    async def last_sequence(self) -> int:
        """The highest sequence given out; 0 in a new journal."""

    async def operation(self, operation_id: str) -> OperationRecord | None:
        """One operation."""

    async def operations(self, *, unfinished: bool = False, limit: int = 1000) -> list[OperationRecord]:
        """Operations; `unfinished`: in order of arrival, those without final result or with undo pending;
        otherwise the newest first.
        """

    async def steps(self, operation_id: str) -> list[StepRecord]:
        """Steps of one operation, in order."""

    async def instances(self) -> list[InstanceRecord]:
        """All instances."""

    async def settings(self) -> dict[str, str]:
        """Small persistent settings (host enabled …)."""

    async def prune(self, before: datetime, limit: int) -> int:
        """Forget up to `limit` operations that ended before `before`; return how many were forgotten."""

    async def take_requests(self) -> list[str]:
        """Take the ids of operations that an administrator asked to retry through the journal tool."""
