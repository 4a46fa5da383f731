"""The optional driver methods of the host family: what is on the host, and foreign domains that become ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import ClassVar, Literal

from agent.errors import FailedPrecondition, Unsupported
from agent.messages.life import Adoption, Life
from agent.messages.spec import InstanceSpec

ArtifactKind = Literal["folder", "file", "domain", "secret", "disk", "partial-download", "staging", "memory-dump"]


@dataclass(frozen=True, slots=True)
class Artifact:
    """One thing on the host that the agent made, or that is where only the agent makes things.

    `name` finds it again: a path, a domain's or a secret's UUID. `instance_id` is whose it is, or was. `proof` says by
    what it is ours; without one it is not proven and is never removed.
    """

    kind: ArtifactKind
    name: str
    instance_id: str | None = None
    proof: str | None = None
    detail: str | None = None
    size_bytes: int | None = None
    modified_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Holding:
    """What an instance should have on the host."""

    spec: InstanceSpec
    life: Life


@dataclass(frozen=True, slots=True)
class Ledger:
    """What a driver found. `present`: every artifact, owned by an instance or not, with `instance_id` where it is
    known. `missing`: what instances should have and do not.
    """

    present: tuple[Artifact, ...]
    missing: tuple[Artifact, ...]


@dataclass(frozen=True, slots=True)
class ForeignPlan:
    """How a foreign domain would be adopted."""

    spec: InstanceSpec
    adoption: Adoption


def check_adopted_spec(name: str, known: InstanceSpec, wanted: InstanceSpec) -> None:
    """An adopted domain's definition is not rebuilt: only what is not part of it may change.

    Raises `FailedPrecondition` (code `instance_adopted`).
    """
    free = {"labels", "policy"}
    if known.model_dump(exclude=free) != wanted.model_dump(exclude=free):
        raise FailedPrecondition(
            f"{name} was adopted, and its definition is kept as it came: this change would rewrite it",
            code="instance_adopted",
        )


class HostVerbs:
    """What a driver may lack of the host family."""

    name: ClassVar[str]

    def ledger(self, holdings: Mapping[str, Holding]) -> Ledger:  # noqa: ARG002 - for those who can
        """Read what is in the driver's own places, by proof of ownership; `holdings` are the agent's instances.

        Changes nothing. A bounded number of hypervisor calls per domain. Raises `Unavailable`.
        """
        raise Unsupported(f"driver {self.name} keeps no ledger")

    def remove_artifact(self, artifact: Artifact) -> bool:
        """Remove one that `ledger` reported with a proof. False if it was gone.

        The proof is looked at again: raises `FailedPrecondition` (code `not_removable`) where it no longer holds, where
        the thing is in use, or where its instance has a domain. Idempotent.
        """
        raise Unsupported(f"driver {self.name} removes no {artifact.kind}")

    def foreign_plan(self, instance_id: str, own_disks: bool) -> ForeignPlan:  # noqa: ARG002 - for those who can
        """Read a foreign domain as a spec, as far as the spec can say it. Changes nothing.

        Raises `FailedPrecondition` (`not_adoptable`, `owned_domain`), `NotFound`.
        """
        raise Unsupported(f"driver {self.name} cannot adopt")

    def adopt(self, instance_id: str, spec: InstanceSpec, *, generation: int, life: Life) -> None:  # noqa: ARG002
        """Put our metadata into a foreign domain's definition and change nothing else. The guest is not touched.

        Idempotent. Raises `FailedPrecondition` (`owned_domain`) where it is ours by another adoption or by creation.
        """
        raise Unsupported(f"driver {self.name} cannot adopt")

    def release(self, instance_id: str) -> None:  # noqa: ARG002 - for those who can
        """Take our metadata out of an adopted domain: it is foreign again. Not adopted, or gone: nothing."""
        raise Unsupported(f"driver {self.name} cannot adopt")

    def delete_adopted_disks(self, instance_id: str, disks: list[str]) -> None:  # noqa: ARG002 - for those who can
        """Remove the disk files that an adopted domain brought along, once the domain is gone. Idempotent."""
        raise Unsupported(f"driver {self.name} cannot adopt")


VERBS: frozenset[str] = frozenset({"host.audit", "instance.adopt"})
"""Verbs of this family that a driver announces one by one."""
