"""The stores under contract, and what differs between them by name."""

from __future__ import annotations

import contextlib
import sqlite3
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from agent.errors import Unavailable
from agent.messages.spec import InstanceSpec, RootDisk
from agent.store.base import Change, Identity, InstanceRecord, OperationRecord, PendingEvent, Store
from agent.store.file import JournalFile
from agent.store.memory import MemoryStore
from agent.store.sqlite import SqliteStore

AT = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


def operation(id: str = "op", **changes: Any) -> OperationRecord:
    fields: dict[str, Any] = {
        "id": id, "verb": "instance.start", "instance_id": "i", "body": b"{}", "reply_to": "r", "correlation_id": "c",
        "state": "accepted", "accepted_at": AT,
    }  # fmt: skip
    return OperationRecord(**(fields | changes))


def ended(id: str = "op", **changes: Any) -> OperationRecord:
    return operation(id, **({"state": "succeeded", "finished_at": AT, "final_body": b"final"} | changes))


def event(id: str, **changes: Any) -> PendingEvent:
    fields: dict[str, Any] = {"id": id, "routing_key": "a.b.c", "body": b'{"x":1}', "cc": ("r1", "r2"), "correlation_id": "c"}
    return PendingEvent(**(fields | changes))


def instance(id: str = "i", **changes: Any) -> InstanceRecord:
    fields: dict[str, Any] = {
        "id": id, "spec": InstanceSpec(name="n", vcpus=1, memory_mib=64, root_disk=RootDisk(size_mib=1)), "generation": 3,
        "desired": "running", "observed": "stopped", "reason": "creating", "created_by": "op", "created_at": AT,
        "updated_at": AT,
    }  # fmt: skip
    return InstanceRecord(**(fields | changes))


class StoreKind(Protocol):
    """One kind of store. `durable`: what is on disk can be read by another process."""

    store: Store
    durable: bool

    async def open(self, *, compute_id: str = "c1", host: str = "h1") -> Identity:
        """Open, or open again as after a restart."""

    async def fill_disk(self) -> None:
        """From now on there is no space."""

    async def free_disk(self) -> None:
        """There is space again."""

    async def request(self, operation_id: str) -> None:
        """Ask for a retry, as the journal tool does."""


class MemoryKind:
    durable = False

    def __init__(self) -> None:
        self.store = MemoryStore()

    async def open(self, *, compute_id: str = "c1", host: str = "h1") -> Identity:
        await self.store.close()
        return await self.store.open(compute_id=compute_id, host=host)

    async def fill_disk(self) -> None:
        self.store.fail_with = Unavailable("no space", code="journal_full")

    async def free_disk(self) -> None:
        self.store.fail_with = None

    async def request(self, operation_id: str) -> None:
        self.store.requests.append(operation_id)


class SqliteKind:
    durable = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store = SqliteStore(path)

    async def open(self, *, compute_id: str = "c1", host: str = "h1") -> Identity:
        await self.store.close()
        self.store = SqliteStore(self.path)
        return await self.store.open(compute_id=compute_id, host=host)

    async def fill_disk(self) -> None:
        await self.store._submit(self._limit(1))

    async def free_disk(self) -> None:
        await self.store._submit(self._limit(1_000_000))

    @staticmethod
    def _limit(pages: int) -> Any:
        # SQLite takes the present size where the limit is lower: the next page is refused as on a full disk.
        return lambda db: db.execute(f"PRAGMA max_page_count={pages}").fetchall()

    async def request(self, operation_id: str) -> None:
        file = JournalFile(self.path, read_only=False)
        with contextlib.closing(file):
            file.request_retry(operation_id)

    def raw(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path)


def big(id: str) -> Change:
    """A change that does not fit into the free space of pages that are there."""
    return Change(claim=operation(id, body=b"x" * 200_000), events=[event(f"e-{id}")])
