"""What verbs return: the `result` of `operation.succeeded`."""

from __future__ import annotations

from datetime import datetime

from agent.messages import (
    verbs_host,
    verbs_image,
    verbs_memory,
    verbs_rebuild,
    verbs_resize,
    verbs_snapshot,
    verbs_stats,
)
from agent.messages.events import DesiredState, HostHeartbeat, OperationState, PowerState, Problem
from agent.messages.life import Life
from agent.messages.spec import InstanceSpec
from agent.messages.types import Outbound


class InstanceView(Outbound):
    """One instance. `life` only where something special is the matter.

    `vnc_address`, `mac_addresses` and `disk_paths` only where it was asked for by `show`.
    """

    id: str
    name: str
    desired: DesiredState
    observed: PowerState
    reason: str
    generation: int
    spec: InstanceSpec
    life: Life | None = None
    created_at: datetime
    updated_at: datetime
    vnc_address: str | None = None
    mac_addresses: list[str] | None = None
    disk_paths: list[str] | None = None
    console_log: str | None = None


class PowerResult(Outbound):
    """State after a power verb. `changed` is false where the instance was there already."""

    instance_id: str
    observed: PowerState
    changed: bool
    forced: bool = False
    """The guest did not do it in time, and it was done without it."""


class DeleteResult(Outbound):
    """The instance is gone, or, with `restore_until`, is stopped and can be restored until then."""

    instance_id: str
    restore_until: datetime | None = None


class ForeignDomain(Outbound):
    """A domain on this host that is not the agent's."""

    id: str
    name: str
    observed: PowerState
    vcpus: int
    memory_mib: int


class InstanceListResult(Outbound):
    """Instances by id; `next_after` continues the list where there are more."""

    instances: list[InstanceView]
    foreign: list[ForeignDomain] | None = None
    next_after: str | None = None


class ConsoleLogResult(Outbound):
    """The end of the console's log; bytes that are no UTF-8 are replaced."""

    instance_id: str
    text: str
    truncated: bool


class PingResult(Outbound):
    """The agent lives and its journal works."""

    host: str
    version: str
    echo: str | None = None


class HostShowResult(Outbound):
    """The same as a heartbeat."""

    heartbeat: HostHeartbeat


class HostEnabledResult(Outbound):
    """Whether new instances are taken."""

    enabled: bool
    changed: bool


class StepView(Outbound):
    """One step of an operation."""

    index: int
    name: str
    state: str


class OperationView(Outbound):
    """One operation as the journal has it."""

    id: str
    verb: str
    instance_id: str | None = None
    state: OperationState
    attempt: int
    accepted_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    cancel_requested: bool = False
    undo_pending: bool = False
    error: Problem | None = None
    steps: list[StepView] = []


class CancelResult(Outbound):
    """The operation will end as cancelled, at once or at its next safe point."""

    operation_id: str


RESULTS: dict[str, type[Outbound]] = {
    "instance.create": InstanceView,
    "instance.delete": DeleteResult,
    "instance.start": PowerResult,
    "instance.stop": PowerResult,
    "instance.reboot": PowerResult,
    "instance.pause": PowerResult,
    "instance.resume": PowerResult,
    "instance.rebuild": InstanceView,
    "instance.rescue": InstanceView,
    "instance.unrescue": InstanceView,
    "instance.restore": InstanceView,
    "instance.shelve": InstanceView,
    "instance.unshelve": InstanceView,
    "instance.show": InstanceView,
    "instance.list": InstanceListResult,
    "instance.suspend": PowerResult,
    "instance.reset": PowerResult,
    "instance.trigger-crash-dump": PowerResult,
    "instance.set-policy": InstanceView,
    "console.log": ConsoleLogResult,
    "host.ping": PingResult,
    "host.show": HostShowResult,
    "host.set-enabled": HostEnabledResult,
    "operation.show": OperationView,
    "instance.adopt": InstanceView,
    "operation.cancel": CancelResult,
    **verbs_memory.RESULTS,
    **verbs_resize.RESULTS,
    **verbs_image.RESULTS,
    **verbs_snapshot.RESULTS,
    "snapshot.revert": InstanceView,
    **verbs_rebuild.RESULTS,
    **verbs_host.RESULTS,
    **verbs_stats.RESULTS,
}
"""Verb → what its `operation.succeeded` carries as `result`."""
