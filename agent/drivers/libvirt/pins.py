"""Which CPUs of the dedicated set belong to which instance.

The truth is in the domains' definitions. What is held here is only ahead of it, for the time between choosing CPUs and
defining the domain, so that two instances that are defined at once never get the same CPU.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Sequence

from agent.drivers.base import DomainInfo
from agent.drivers.cpuset import assign


class Pins:
    """Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[str, tuple[int, dict[int, int]]] = {}
        self._changes = 0
        self.known = False
        """Whether the domains were read once."""

    def mark(self) -> int:
        """The moment before the domains are read, for `learn`."""
        with self._lock:
            return self._changes

    def learn(self, domains: Iterable[DomainInfo], mark: int) -> None:
        """Take what the definitions say, except about instances that were changed here since `mark`."""
        read = {domain.id: dict(enumerate(domain.dedicated_cpus)) for domain in domains if domain.dedicated_cpus}
        with self._lock:
            newer = {key: held for key, held in self._held.items() if held[0] > mark}
            self._held = {key: (mark, cpus) for key, cpus in read.items()} | newer
            self.known = True

    def take(
        self, instance_id: str, vcpus: int, *, among: Collection[int], cells: Sequence[Collection[int]] = ()
    ) -> dict[int, int]:
        """Give an instance a CPU for each vCPU; what it has it keeps. Returns vCPU → CPU.

        Raises `ResourceExhausted` (code `does_not_fit`) where too few are free.
        """
        with self._lock:
            has = self._held.get(instance_id, (0, {}))[1]
            others = {cpu for key, (_at, cpus) in self._held.items() if key != instance_id for cpu in cpus.values()}
            given = assign(vcpus, keep=has, free=set(among) - others, cells=cells)
            self._put(instance_id, given)
            return given

    def held_by(self, instance_id: str) -> dict[int, int]:
        """What an instance has."""
        with self._lock:
            return dict(self._held.get(instance_id, (0, {}))[1])

    def put_back(self, instance_id: str, cpus: dict[int, int]) -> None:
        """Let an instance have just these; none: its CPUs are free again."""
        with self._lock:
            self._put(instance_id, cpus)

    def taken(self) -> frozenset[int]:
        """All CPUs that instances have."""
        with self._lock:
            return frozenset(cpu for _at, cpus in self._held.values() for cpu in cpus.values())

    def _put(self, instance_id: str, cpus: dict[int, int]) -> None:
        self._changes += 1
        # Kept without CPUs too: a reading that was begun before must not bring them back.
        self._held[instance_id] = (self._changes, cpus)
