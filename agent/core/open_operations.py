"""Operations without final result, and which instances somebody has in hand because of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from agent.core.announcement import Announcement
from agent.core.lanes import Lanes
from agent.core.operation import Operation
from agent.core.registry import Route
from agent.core.waiting import happens
from agent.drivers.executor import DriverExecutor
from agent.messages.commands import Command
from agent.store.base import OperationRecord

TURN_S = 5.0
"""How long an empty lane may take to give whoever holds it his turn."""


@dataclass(slots=True)
class OpenOperation:
    """An operation without final result. `operation` is its present run, None while it waits for its turn."""

    record: OperationRecord
    command: Command[Any]
    route: Route
    announcement: Announcement
    resumed: bool = False
    operation: Operation | None = None
    more_replies: list[str] = field(default_factory=list)
    """Where duplicates that came meanwhile want the answer too."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when one that was cancelled while it waited for its turn has its final event."""

    @property
    def acts(self) -> bool:
        """Whether it acts on an instance, or may; what only reads does not."""
        return self.route.lane == "instance"


class OpenOperations:
    """What is under way: by operation, and by instance."""

    def __init__(self, lanes: Lanes, executor: DriverExecutor) -> None:
        self._lanes = lanes
        self._executor = executor
        self._items: dict[str, OpenOperation] = {}
        self._expected: set[str] = set()
        self._held: set[str] = set()
        self._left: dict[str, str | None] = {}
        self._watchers: dict[int, set[str]] = {}

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[OpenOperation]:
        """Go through a copy, in order of arrival: they may end meanwhile."""
        return iter(list(self._items.values()))

    def find(self, operation_id: str) -> OpenOperation | None:
        """An operation without final result, or None."""
        return self._items.get(operation_id)

    # --- who asks ---------------------------------------------------------------------------------------------

    @property
    def at_work(self) -> bool:
        """Whether an operation runs that does not wait for a guest or an image."""
        return any(item.operation is not None and not item.operation.waits for item in self)

    def acting(self) -> list[OperationRecord]:
        """Operations under way, now or soon, that act on an instance."""
        return [item.record for item in self if item.acts and not item.record.final]

    def acting_on(self, instance_id: str) -> list[str]:
        """Ids of the operations that act on an instance, in order of arrival."""
        return [item.record.id for item in self if item.acts and item.record.instance_id == instance_id]

    def busy_instances(self) -> set[str]:
        """Instances that an operation acts on, now or soon, or left something of. Those that are only read are not."""
        acted_on = {item.record.instance_id for item in self if item.acts and item.record.instance_id}
        left = {instance_id for instance_id in self._left.values() if instance_id}
        return acted_on | self._expected | self._held | left

    @contextmanager
    def watching(self) -> Iterator[set[str]]:
        """Give a set that holds the busy instances and gains those that become busy meanwhile."""
        touched = self.busy_instances()
        self._watchers[id(touched)] = touched
        try:
            yield touched
        finally:
            del self._watchers[id(touched)]

    @asynccontextmanager
    async def holding(self, instance_id: str) -> AsyncIterator[bool]:
        """Keep every operation off an instance that nobody acts on; False where somebody does, without waiting.

        Commands that come meanwhile wait in its lane.
        """
        settled = self._executor.is_settled(instance_id)
        if not settled or instance_id in self.busy_instances() or self._lanes.is_busy(instance_id):
            yield False
            return
        ours, done = asyncio.Event(), asyncio.Event()

        async def hold() -> None:
            ours.set()
            await done.wait()  # no limit of its own: ended below, whatever happens

        self._held.add(instance_id)
        self._touch(instance_id)
        self._lanes.put(instance_id, "waiting", hold)
        try:
            yield await happens(ours, TURN_S)  # the lane was empty: its turn comes at once, unless the agent stops
        finally:
            self._held.discard(instance_id)
            done.set()

    # --- who tells --------------------------------------------------------------------------------------------

    def add(self, item: OpenOperation) -> None:
        """An operation was accepted, or is taken up."""
        self._items[item.record.id] = item
        if item.acts and item.record.instance_id:
            self._touch(item.record.instance_id)

    def remove(self, operation_id: str) -> None:
        """An operation has had its final result."""
        self._items.pop(operation_id, None)

    def expect(self, records: Iterable[OperationRecord]) -> None:
        """Count the instances of interrupted operations as busy until these are taken up (`expected_no_more`)."""
        self._expected |= _instances_of(records)

    def expected_no_more(self, records: Iterable[OperationRecord]) -> None:
        """Interrupted operations were taken up: from now on they speak for themselves."""
        self._expected -= _instances_of(records)

    def leave(self, record: OperationRecord) -> None:
        """An ended operation left something of its instance, which is busy until `left_nothing`."""
        self._left[record.id] = record.instance_id

    def left_nothing(self, record: OperationRecord) -> None:
        """What an ended operation left was taken back."""
        self._left.pop(record.id, None)

    def _touch(self, instance_id: str) -> None:
        for touched in self._watchers.values():
            touched.add(instance_id)


def _instances_of(records: Iterable[OperationRecord]) -> set[str]:
    return {record.instance_id for record in records if record.instance_id}
