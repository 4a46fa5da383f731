"""The host family of verbs: audit, drain, adoption."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from agent.messages.spec import InstanceSpec
from agent.messages.types import Outbound, TimeoutS
from agent.messages.verb import CommandData

DrainS = Annotated[float, Field(ge=0, le=7 * 86_400, allow_inf_nan=False)]


class HostAudit(CommandData):
    """Compare what is on the host with what should be. `repair` removes what is provably ours and of no instance;
    what is missing and what is not proven to be ours is only listed. Instances that an operation acts on are left out.
    """

    verb: ClassVar[str] = "host.audit"
    subject_required: ClassVar[bool] = False
    repair: bool = False


class HostDrain(CommandData):
    """Take no new instances, wait at most `timeout_s` for running operations to end, and on request ask the guests
    to shut down first, `at_once` at a time; one that does not within `stop_timeout_s` is ended. `host.set-enabled`
    undoes it, and ends one that still waits.
    """

    verb: ClassVar[str] = "host.drain"
    subject_required: ClassVar[bool] = False
    timeout_s: DrainS = 3600.0
    stop_instances: bool = False
    stop_timeout_s: TimeoutS = 60.0
    at_once: Annotated[int, Field(ge=1, le=64)] = 4
    reason: Annotated[str, Field(max_length=200)] | None = None


class InstanceAdopt(CommandData):
    """Take a foreign domain (`subject` is its UUID) as an instance, without touching its guest or its definition.

    `spec` is what it is to be known as, and must agree with the domain; without one it is read from the domain.
    `own_disks`: a later `instance.delete` removes the domain's disk files too; else they are left where they are.
    """

    verb: ClassVar[str] = "instance.adopt"
    spec: InstanceSpec | None = None
    own_disks: bool = False


class AuditItem(Outbound):
    """One thing on the host, or one that should be there. `name`: a path, or the hypervisor's name of it.

    `finding`: `unowned` is ours and belongs to nobody, `missing` should be there, `unproven` is in our places but
    nothing proves that it is ours. `proof` says what proves it. `action` is what a repair did.
    """

    finding: Literal["unowned", "missing", "unproven"]
    kind: str
    name: str
    instance_id: str | None = None
    proof: str | None = None
    detail: str | None = None
    size_bytes: int | None = None
    modified_at: datetime | None = None
    action: Literal["removed", "taken-in", "kept"] | None = None


class HostAuditResult(Outbound):
    """What the audit found; empty where all is well. At most 1000 items, `more` says how many were left out.

    `busy`: instances that were left out because an operation acts on them.
    """

    items: list[AuditItem]
    more: int = 0
    busy: list[str] = Field(default_factory=list)
    removed: int = 0


class HostDrainResult(Outbound):
    """The host takes nothing new and does nothing. `stopped` were stopped by the drain, `running` still run."""

    stopped: list[str]
    running: list[str]
    waited_s: float


COMMANDS: tuple[type[CommandData], ...] = (HostAudit, HostDrain, InstanceAdopt)
RESULTS: dict[str, type[Outbound]] = {"host.audit": HostAuditResult, "host.drain": HostDrainResult}
"""Verb → result, for the results that this module defines; those that return a shared one are in `results`."""
