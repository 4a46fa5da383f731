"""The instances of this host in memory, written through to the journal. The loop's thread only."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable

from agent.core.context import now
from agent.errors import DeadlineExceeded, NotFound
from agent.messages.events import DesiredState, InstanceState, PowerState
from agent.messages.life import Life
from agent.messages.spec import InstanceSpec
from agent.store.base import InstanceRecord


class Instances:
    """What the agent believes about each instance, and who waits for a change of power."""

    def __init__(self) -> None:
        self._records: dict[str, InstanceRecord] = {}
        self._waiters: dict[str, set[asyncio.Future[PowerState]]] = {}
        self._signals: dict[tuple[str, str], set[asyncio.Future[None]]] = {}
        self.changed: Callable[[str], None] = lambda _instance_id: None
        """Told the id of every instance that was added, changed or removed."""

    def load(self, records: Iterable[InstanceRecord]) -> None:
        """Take what the journal has."""
        self._records = {record.id: record for record in records}

    def find(self, instance_id: str) -> InstanceRecord | None:
        """One instance, or None."""
        return self._records.get(instance_id)

    def get(self, instance_id: str) -> InstanceRecord:
        """One instance. Raises `NotFound`."""
        record = self._records.get(instance_id)
        if record is None:
            raise NotFound(
                f"no instance {instance_id} is on this host", code="unknown_instance", instance_id=instance_id
            )
        return record

    def all(self) -> list[InstanceRecord]:
        """All instances, by id."""
        return [self._records[key] for key in sorted(self._records)]

    def named(self, name: str) -> InstanceRecord | None:
        """The instance with this name, or None."""
        return next((record for record in self._records.values() if record.name == name), None)

    def __len__(self) -> int:
        return len(self._records)

    def counts(self) -> dict[str, int]:
        """How many instances are in each observed state."""
        return dict(Counter(record.observed for record in self._records.values()))

    def put(self, record: InstanceRecord) -> InstanceRecord:
        """Add or replace; the caller commits the same record."""
        self._records[record.id] = record
        self.changed(record.id)
        return record

    def remove(self, instance_id: str) -> None:
        """Forget; the caller commits the removal. Waiters are released as if it had stopped."""
        self._records.pop(instance_id, None)
        self._release(instance_id, "stopped")
        self.changed(instance_id)

    def update(
        self,
        instance_id: str,
        *,
        observed: PowerState | None = None,
        desired: DesiredState | None = None,
        reason: str | None = None,
        generation: int | None = None,
        spec: InstanceSpec | None = None,
        life: Life | None = None,
    ) -> InstanceRecord:
        """Change an instance in memory and return the record for the caller to commit. Raises `NotFound`."""
        old = self.get(instance_id)
        record = dataclasses.replace(
            old,
            observed=observed or old.observed,
            desired=desired or old.desired,
            reason=reason or old.reason,
            generation=max(old.generation, generation or 0),
            spec=spec or old.spec,
            life=old.life if life is None else life,
            updated_at=now(),
        )
        self._records[instance_id] = record
        if observed is not None:
            self._release(instance_id, observed)
        self.changed(instance_id)
        return record

    def state_event(
        self, record: InstanceRecord, *, previous: PowerState | None, resync: bool = False
    ) -> InstanceState:
        """Describe an instance's state for publishing. What follows `unknown` follows a gap, whoever read it first."""
        return InstanceState(
            instance_id=record.id,
            name=record.name,
            desired=record.desired,
            observed=record.observed,
            previous=previous,
            reason=record.reason,
            generation=record.generation,
            resync=resync or previous == "unknown",
        )

    async def wait_observed(self, instance_id: str, wanted: frozenset[PowerState], timeout_s: float) -> PowerState:
        """Wait until the observed state is one of `wanted`. Raises `DeadlineExceeded`.

        Of an instance that is not there the answer is `stopped`; one that is removed meanwhile counts as stopped.
        """
        record = self._records.get(instance_id)
        if record is None:
            return "stopped"
        if record.observed in wanted:
            return record.observed
        waiters = self._waiters.setdefault(instance_id, set())
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    future: asyncio.Future[PowerState] = asyncio.get_running_loop().create_future()
                    waiters.add(future)
                    try:
                        power = await future
                    finally:
                        waiters.discard(future)
                    if power in wanted:
                        return power
        except TimeoutError:
            raise DeadlineExceeded(
                f"the instance did not become {' or '.join(sorted(wanted))} within {timeout_s:g} s"
            ) from None
        finally:
            if not waiters:
                self._waiters.pop(instance_id, None)

    def expect_signal(self, instance_id: str, kind: str) -> asyncio.Future[None]:
        """A future that ends with the next event of `kind` about the instance. Cancel it when done."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        key = (instance_id, kind)
        self._signals.setdefault(key, set()).add(future)
        future.add_done_callback(lambda done: self._forget_signal(key, done))
        return future

    def signal(self, instance_id: str, kind: str) -> None:
        """Tell those who expect it that an event of `kind` happened."""
        for future in tuple(self._signals.get((instance_id, kind), ())):
            if not future.done():
                future.set_result(None)

    def _forget_signal(self, key: tuple[str, str], future: asyncio.Future[None]) -> None:
        waiting = self._signals.get(key)
        if waiting is not None:
            waiting.discard(future)
            if not waiting:
                del self._signals[key]

    def _release(self, instance_id: str, power: PowerState) -> None:
        for future in tuple(self._waiters.get(instance_id, ())):
            if not future.done():
                future.set_result(power)
