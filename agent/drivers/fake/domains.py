"""What the simulated hypervisor keeps: domains, in memory or also as small files. Disks are in `disks`.

Files are replaced atomically but not synced: they outlive the process, as guests do, not the host. Nothing here
takes a lock; the hypervisor does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from agent.drivers.base import DomainInfo
from agent.drivers.fake.live import Live
from agent.drivers.fake.settings import UNSTEERED, Steering, parse_labels
from agent.messages.events import PowerState
from agent.messages.life import ORDINARY, Life
from agent.messages.spec import InstanceSpec


@dataclass(slots=True)
class Domain:
    """One domain. The spec is kept as text, a quarter of the size of the model: there may be thousands.

    Times are of the wall clock, since they have to hold over a restart. `pending` are the guest's acts to come,
    with their times. `cpus` are the host's CPUs that the vCPUs have for themselves. `boots` counts the boots that were
    completed before the present start. `process_at` is when the guest's process began, moved on by the time that it was
    paused; a reboot leaves it as it is. `reverted_by` is the mark of the revert that the present definition came from.
    """

    id: str
    name: str
    vcpus: int
    memory_mib: int
    owned: bool = True
    power: PowerState = "stopped"
    reason: str = "defined"
    generation: int | None = None
    spec_json: str | None = None
    life_json: str | None = None
    started_at: float | None = None
    paused_at: float | None = None
    process_at: float | None = None
    boots: int = 0
    pending: dict[str, float] = field(default_factory=dict)
    cpus: list[int] = field(default_factory=list)
    snapshots: dict[str, dict[str, Any]] = field(default_factory=dict)
    reverted_by: str | None = None
    saved: str | None = None
    """What the guest did when its memory was saved, `running` or `paused`; `damaged`: it cannot be used."""
    nmis: int = 0
    live_json: str | None = None
    steering: Steering = UNSTEERED

    @property
    def active(self) -> bool:
        """Running or paused: there is a guest in memory."""
        return self.power in {"running", "paused"}

    @property
    def spec(self) -> InstanceSpec | None:
        """The spec from the domain's metadata."""
        return None if self.spec_json is None else InstanceSpec.model_validate_json(self.spec_json)

    @property
    def life(self) -> Life:
        """The life from the domain's metadata."""
        return ORDINARY if self.life_json is None else Life.model_validate_json(self.life_json)

    @property
    def live(self) -> Live:
        """What the guest has since it was started. Of a domain of ours that is active."""
        return Live.from_json(self.live_json or "")

    @live.setter
    def live(self, live: Live) -> None:
        self.live_json = live.to_json()

    def set_spec(self, spec: InstanceSpec, generation: int, life: Life = ORDINARY) -> None:
        """Take a new definition. Raises `InvalidArgument` for a `fake.` label that does not exist."""
        self.steering = parse_labels(spec.labels)
        self.spec_json = spec.model_dump_json(exclude_defaults=True)
        self.name, self.vcpus, self.memory_mib = spec.name, spec.vcpus, spec.memory_mib
        self.generation = generation
        self.reverted_by = None
        self.life_json = None if life == ORDINARY else life.model_dump_json(exclude_none=True)

    def info(self) -> DomainInfo:
        """What the driver reports."""
        return DomainInfo(
            id=self.id, name=self.name, power=self.power, reason=self.reason, owned=self.owned, vcpus=self.vcpus,
            memory_mib=self.memory_mib, spec=self.spec, generation=self.generation, life=self.life,
            dedicated_cpus=tuple(self.cpus),
        )  # fmt: skip


_SAVED = tuple(f.name for f in fields(Domain) if f.name != "steering")


class Domains:
    """All domains by id and by name; with a folder, one JSON file each."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._by_id: dict[str, Domain] = {}
        self._ids: dict[str, str] = {}

    def __iter__(self) -> Iterator[Domain]:
        return iter(self._by_id.values())

    def get(self, instance_id: str) -> Domain | None:
        return self._by_id.get(instance_id)

    def owner_of(self, name: str) -> str | None:
        """The id of the domain with this name."""
        return self._ids.get(name)

    def put(self, domain: Domain) -> None:
        """Keep a domain as it is now."""
        self._by_id[domain.id] = domain
        self._ids[domain.name] = domain.id
        if self.folder is not None:
            path = self.folder / f"{domain.id}.json"
            text = json.dumps({name: getattr(domain, name) for name in _SAVED})
            write_atomically(path, text)

    def remove(self, domain: Domain) -> None:
        self._by_id.pop(domain.id, None)
        self._ids.pop(domain.name, None)
        if self.folder is not None:
            (self.folder / f"{domain.id}.json").unlink(missing_ok=True)

    def load(self) -> None:
        """Read what an earlier process left."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob("*.tmp"):
            leftover.unlink(missing_ok=True)
        for path in self.folder.glob("*.json"):
            domain = Domain(**json.loads(path.read_bytes()))
            spec = domain.spec
            if spec is not None:
                domain.steering = parse_labels(spec.labels)
            self._by_id[domain.id] = domain
            self._ids[domain.name] = domain.id


def write_atomically(path: Path, text: str) -> None:
    """Replace a file so that readers see the old or the new content."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)
