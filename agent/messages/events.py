"""Every event the agent publishes, and its envelope.

Readers ignore fields they do not know. `sequence` counts without gaps within an `epoch`; a new epoch means that
the journal was new, and readers should re-read the state. Events are delivered at least once: `id` tells repeats.
Heartbeats are the exception: they are not kept, carry no sequence of their own and name the last one given out.
"""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field
from pydantic_core import to_json

from agent.messages.types import Outbound

PowerState = Literal["running", "paused", "suspended", "stopped", "crashed", "unknown"]
"""Observed power state. `unknown`: the hypervisor cannot be asked now. It never means gone."""

DesiredState = Literal["running", "paused", "suspended", "stopped", "deleted"]
"""What the last successful command asked for."""

OperationState = Literal["accepted", "running", "undoing", "succeeded", "failed", "rejected", "cancelled", "expired"]

FINAL_STATES: frozenset[str] = frozenset({"succeeded", "failed", "rejected", "cancelled", "expired"})


class EventData(Outbound):
    """Base of every event's `data`. `kind` is `<noun>.<event>`, the routing key without the host."""

    kind: ClassVar[str]


class Problem(Outbound):
    """Why a command did not succeed: a stable code, a sentence to act on, and whether a retry can help."""

    code: str
    message: str
    retryable: bool
    details: dict[str, str | int | float | bool | None] = Field(default_factory=dict)


class OperationEvent(EventData):
    """What all events of one operation carry. `operation_id` is the id of its command."""

    operation_id: str
    verb: str
    instance_id: str | None = None


class OperationAccepted(OperationEvent):
    """The command is in the journal and will end in exactly one final event, whatever happens to the agent."""

    kind: ClassVar[str] = "operation.accepted"


class OperationStarted(OperationEvent):
    """Work has begun. `attempt` is above 1 when an interrupted operation is taken up again."""

    kind: ClassVar[str] = "operation.started"
    attempt: int = 1


class OperationProgress(OperationEvent):
    """How far the work is: the step in hand, and percent and bytes where they are known."""

    kind: ClassVar[str] = "operation.progress"
    phase: str
    percent: float | None = None
    done_bytes: int | None = None
    total_bytes: int | None = None


class OperationSucceeded(OperationEvent):
    """Final. `result` is what the verb returns; `duration_ms` counts from acceptance."""

    kind: ClassVar[str] = "operation.succeeded"
    result: dict[str, Any] = Field(default_factory=dict)
    duration_ms: float = 0.0


class OperationUnsuccessful(OperationEvent):
    """Base of the final events other than success."""

    error: Problem
    duration_ms: float = 0.0


class OperationFailed(OperationUnsuccessful):
    """Final. The work was begun and did not succeed; `undone` tells whether all its effects were taken back."""

    kind: ClassVar[str] = "operation.failed"
    undone: bool = True


class OperationRejected(OperationUnsuccessful):
    """Final. Refused before it had any effect."""

    kind: ClassVar[str] = "operation.rejected"


class OperationCancelled(OperationUnsuccessful):
    """Final. Cancelled by a command; what had been done was undone."""

    kind: ClassVar[str] = "operation.cancelled"


class OperationExpired(OperationUnsuccessful):
    """Final. The command's expiry time passed before work began."""

    kind: ClassVar[str] = "operation.expired"


class InstanceState(EventData):
    """Desired or observed state of an instance changed, or was re-read after a gap (`resync`)."""

    kind: ClassVar[str] = "instance.state"
    instance_id: str
    name: str
    desired: DesiredState
    observed: PowerState
    previous: PowerState | None = None
    reason: str
    generation: int
    resync: bool = False


class InstanceRemoved(EventData):
    """The instance and everything it owned on this host are gone."""

    kind: ClassVar[str] = "instance.removed"
    instance_id: str
    name: str


class HypervisorEvent(EventData):
    """Base of what a hypervisor reports about one domain, beside its power state."""

    instance_id: str


class InstanceRebooted(HypervisorEvent):
    """The guest reset itself or was reset; its QEMU goes on."""

    kind: ClassVar[str] = "instance.rebooted"


class InstanceIoError(HypervisorEvent):
    """A disk request failed. `reason` is `enospc` or what the hypervisor says; `action` is what it did."""

    kind: ClassVar[str] = "instance.io-error"
    device: str
    path: str | None = None
    reason: str
    action: Literal["none", "pause", "report"]


class InstanceWatchdog(HypervisorEvent):
    """The guest's watchdog fired; `action` is what the hypervisor did."""

    kind: ClassVar[str] = "instance.watchdog"
    action: str


class InstanceBlockJob(HypervisorEvent):
    """A block job changed: `job` is pull, copy, commit, active-commit or backup."""

    kind: ClassVar[str] = "instance.block-job"
    device: str
    job: str
    status: Literal["completed", "failed", "canceled", "ready"]


class InstanceDeviceRemoved(HypervisorEvent):
    """The guest let go of a device (`removed`) or refused to."""

    kind: ClassVar[str] = "instance.device-removed"
    alias: str
    removed: bool = True


class InstanceAgentLifecycle(HypervisorEvent):
    """The guest agent's channel was opened or closed from inside the guest."""

    kind: ClassVar[str] = "instance.agent-lifecycle"
    state: Literal["connected", "disconnected"]
    reason: str


class InstanceJobCompleted(HypervisorEvent):
    """A domain job (migration, save, dump) ended; figures are those libvirt gives, in its units."""

    kind: ClassVar[str] = "instance.job-completed"
    operation: str
    succeeded: bool
    figures: dict[str, int] = Field(default_factory=dict)


class InstanceMigrationIteration(HypervisorEvent):
    """Live migration began another pass over the guest's memory."""

    kind: ClassVar[str] = "instance.migration-iteration"
    iteration: int


class InstanceBalloon(HypervisorEvent):
    """The guest's balloon changed; `actual_mib` is what the guest has now."""

    kind: ClassVar[str] = "instance.balloon"
    actual_mib: int


class InstancePolicy(EventData):
    """The agent is about to act by the instance's policy: `cause` is what happened, `delay_s` the back-off before.

    The command that it gives itself has the id `operation_id` and ends in a final event, unless the cause is gone
    before, for one because a controller stopped or deleted the instance.
    """

    kind: ClassVar[str] = "instance.policy"
    instance_id: str
    cause: Literal["on-stop", "on-crash", "on-io-error", "on-host-boot"]
    action: Literal["start", "resume"]
    attempt: int
    delay_s: float
    operation_id: str


class HostDrift(EventData):
    """A difference between the journal and the hypervisor. Foreign domains are reported, never touched."""

    kind: ClassVar[str] = "host.drift"
    difference: Literal["missing-domain", "foreign-domain", "foreign-domain-gone", "adopted", "returned"]
    instance_id: str | None = None
    name: str
    detail: str


class HostLeftover(EventData):
    """The periodic audit found something new on the host; see the verb `host.audit` for the meaning of the fields."""

    kind: ClassVar[str] = "host.leftover"
    finding: Literal["unowned", "missing", "unproven"]
    item: str
    name: str
    instance_id: str | None = None
    proof: str | None = None
    detail: str | None = None


class HypervisorConnection(EventData):
    """The agent lost or regained the hypervisor. While lost, instances are `unknown`."""

    kind: ClassVar[str] = "host.hypervisor"
    connected: bool
    detail: str


class AgentLifecycle(EventData):
    """The agent is ready, or is about to stop. Running guests are not affected."""

    kind: ClassVar[str] = "host.agent"
    state: Literal["ready", "stopping"]
    version: str
    recovered_operations: int = 0


class Inventory(Outbound):
    """One resource class in the shape of OpenStack Placement. Usable = (total - reserved) * allocation_ratio."""

    total: int
    reserved: int
    min_unit: int = 1
    max_unit: int
    step_size: int = 1
    allocation_ratio: float
    used: int


class PagePool(Outbound):
    """Huge pages of one size in one NUMA cell."""

    size_kib: int
    total: int
    free: int


class NumaCell(Outbound):
    """One NUMA cell: its CPUs, its memory, its huge pages, and which CPUs are for guests that get their own."""

    id: int
    cpus: list[int]
    memory_mib: int
    pages: list[PagePool] = Field(default_factory=list)
    dedicated_cpus: list[int] = Field(default_factory=list)
    free_dedicated_cpus: list[int] = Field(default_factory=list)


class HostHeartbeat(EventData):
    """The host's health, versions, capabilities, instance counts and capacity, every few seconds."""

    kind: ClassVar[str] = "host.heartbeat"
    agent_version: str
    compute_id: str
    started_at: datetime
    uptime_s: float
    enabled: bool
    disabled_reason: str | None = None
    hypervisor_connected: bool
    hypervisor_type: str
    hypervisor_version: str
    driver: str
    capabilities: list[str]
    healthy: bool
    conditions: dict[str, str] = Field(default_factory=dict)
    instances: dict[str, int]
    foreign_domains: int
    operations_in_flight: int
    outbox_waiting: int
    stuck_threads: int
    last_sequence: int
    interval_s: float
    inventory: dict[str, Inventory]
    traits: list[str]
    numa_cells: list[NumaCell]
    cpu_model: str
    architecture: str


EVENTS: tuple[type[EventData], ...] = (
    OperationAccepted,
    OperationStarted,
    OperationProgress,
    OperationSucceeded,
    OperationFailed,
    OperationRejected,
    OperationCancelled,
    OperationExpired,
    InstanceState,
    InstanceRemoved,
    InstanceRebooted,
    InstanceIoError,
    InstanceWatchdog,
    InstanceBlockJob,
    InstanceDeviceRemoved,
    InstanceAgentLifecycle,
    InstanceJobCompleted,
    InstanceMigrationIteration,
    InstanceBalloon,
    InstancePolicy,
    HostDrift,
    HostLeftover,
    HypervisorConnection,
    AgentLifecycle,
    HostHeartbeat,
)


class Event(Outbound):
    """The envelope of an event, as a reader sees it. `data` is kept as it came; `EVENTS` has the models."""

    specversion: Literal["1.0"]
    id: str
    source: str
    type: str
    subject: str | None = None
    time: datetime
    datacontenttype: str = "application/json"
    host: str
    traceparent: str | None = None
    sequence: int | None = None
    epoch: str | None = None
    data: dict[str, Any]

    @property
    def kind(self) -> str:
        """`<noun>.<event>` of this event."""
        return self.type.removeprefix("compute.").removesuffix(".v1")


def render_event(
    data: EventData,
    *,
    host: str,
    subject: str | None = None,
    traceparent: str | None = None,
    at: datetime | None = None,
) -> tuple[bytes, str]:
    """Render an event's envelope without `sequence` and `epoch`, which `seal` puts in once they are known.

    Returns the body and the event's id.
    """
    event_id = str(uuid.uuid4())
    envelope: dict[str, Any] = {
        "specversion": "1.0",
        "id": event_id,
        "source": f"/compute/hosts/{host}",
        "type": f"compute.{data.kind}.v1",
        "time": at or datetime.now(UTC),
        "datacontenttype": "application/json",
        "host": host,
        "data": _dump(data),
    }
    if subject is not None:
        envelope["subject"] = subject
    if traceparent is not None:
        envelope["traceparent"] = traceparent
    return to_json(envelope), event_id


def _dump(data: BaseModel) -> dict[str, Any]:
    return data.model_dump(exclude_none=True)


def seal(body: bytes, sequence: int, epoch: str) -> bytes:
    """Add `sequence` and `epoch` to a rendered event. The journal gives them out when it commits the event."""
    return b'%b,"sequence":%d,"epoch":"%b"}' % (body[:-1], sequence, epoch.encode())


def parse_event(body: bytes) -> Event:
    """Parse an event as a reader does. Raises pydantic's `ValidationError` on bytes that are no event."""
    return Event.model_validate_json(body)
