"""The journal on disk: SQLite in WAL mode on one owned thread, with group commit.

Whatever is waiting when the thread comes round goes into one transaction, so one fsync serves many commands.
"""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import structlog

from agent.errors import ComputeError, Unavailable
from agent.store import schema
from agent.store.base import Change, Committed, Identity, InstanceRecord, OperationRecord, SequencedEvent, StepRecord
from agent.store.database import (
    apply,
    connect,
    find_operation,
    list_operations,
    list_steps,
    prepare,
    prune_operations,
    roll_back,
    translate,
)
from agent.store.rows import event_of, instance_of

T = TypeVar("T")
_Result = tuple[asyncio.Future[Any], Any, ComputeError | None]
log = structlog.get_logger("store")

LAZY_FLUSH_S = 0.5
"""Confirmed events are forgotten with the next commit, or after this long without one."""


class _Job:
    """Work for the store's thread: a function on the connection, and where its result goes."""

    __slots__ = ("future", "mutates", "run")

    def __init__(self, run: Callable[[sqlite3.Connection], Any], future: asyncio.Future[Any], *, mutates: bool) -> None:
        self.run = run
        self.future = future
        self.mutates = mutates


class SqliteStore:
    """Implements `Store` on a file. One process at a time writes; the journal tool may read beside it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._published: queue.SimpleQueue[Sequence[int]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.commits = 0
        self.rows_committed = 0

    # --- life -------------------------------------------------------------------------------------------------

    async def open(self, *, compute_id: str, host: str) -> Identity:
        self._loop = asyncio.get_running_loop()
        self._queue = queue.SimpleQueue()
        opened: asyncio.Future[Identity] = self._loop.create_future()
        self._thread = threading.Thread(target=self._main, args=(opened, compute_id, host), name="journal", daemon=True)
        self._thread.start()
        try:
            return await opened
        except ComputeError:
            self._thread = None
            raise

    async def close(self) -> None:
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._queue.put(None)
        await asyncio.to_thread(thread.join, 30)

    # --- requests from the loop -------------------------------------------------------------------------------

    async def commit(self, changes: Sequence[Change]) -> list[Committed]:
        return await self._submit(lambda db: [apply(db, change) for change in changes], mutates=True)

    def published(self, sequences: Sequence[int]) -> None:
        self._published.put(sequences)

    async def backlog(self, after: int, limit: int) -> list[SequencedEvent]:
        return await self._submit(
            lambda db: [event_of(row) for row in db.execute(schema.SELECT_EVENTS, (after, limit))]
        )

    async def last_sequence(self) -> int:
        def read(db: sqlite3.Connection) -> int:
            row = db.execute("SELECT seq FROM sqlite_sequence WHERE name='outbox'").fetchone()
            return int(row[0]) if row else 0

        return await self._submit(read)

    async def operation(self, operation_id: str) -> OperationRecord | None:
        return await self._submit(lambda db: find_operation(db, operation_id))

    async def operations(self, *, unfinished: bool = False, limit: int = 1000) -> list[OperationRecord]:
        return await self._submit(lambda db: list_operations(db, unfinished=unfinished, limit=limit))

    async def steps(self, operation_id: str) -> list[StepRecord]:
        return await self._submit(lambda db: list_steps(db, operation_id))

    async def instances(self) -> list[InstanceRecord]:
        return await self._submit(lambda db: [instance_of(row) for row in db.execute("SELECT * FROM instances")])

    async def settings(self) -> dict[str, str]:
        return await self._submit(lambda db: dict(db.execute("SELECT key, value FROM settings").fetchall()))

    async def prune(self, before: datetime, limit: int) -> int:
        return await self._submit(lambda db: prune_operations(db, before, limit), mutates=True)

    async def take_requests(self) -> list[str]:
        def peek(db: sqlite3.Connection) -> list[str]:
            return [row[0] for row in db.execute("SELECT operation_id FROM requests")]

        def take(db: sqlite3.Connection) -> list[str]:
            found = peek(db)
            db.execute("DELETE FROM requests")
            return found

        return await self._submit(take, mutates=True) if await self._submit(peek) else []

    def _submit(self, run: Callable[[sqlite3.Connection], T], *, mutates: bool = False) -> asyncio.Future[T]:
        if self._loop is None or self._thread is None:
            raise Unavailable("the journal is closed", code="journal_error")
        future: asyncio.Future[T] = self._loop.create_future()
        self._queue.put(_Job(run, future, mutates=mutates))
        return future

    # --- the thread -------------------------------------------------------------------------------------------

    def _main(self, opened: asyncio.Future[Identity], compute_id: str, host: str) -> None:
        db: sqlite3.Connection | None = None
        try:
            db = connect(self._path)
            identity = prepare(db, compute_id, host)
        except Exception as exc:
            if db is not None:
                db.close()
            self._deliver([(opened, None, translate(exc))])
            return
        self._deliver([(opened, identity, None)])
        try:
            while self._round(db):
                pass
        finally:
            db.close()

    def _round(self, db: sqlite3.Connection) -> bool:
        """Take all that waits, carry it out in one transaction, hand the results back. False at the end."""
        try:
            first = self._queue.get(timeout=LAZY_FLUSH_S if not self._published.empty() else None)
        except queue.Empty:
            self._flush_alone(db)
            return True
        jobs: list[_Job] = []
        ended = first is None
        if first is not None:
            jobs.append(first)
        while not self._queue.empty():
            job = self._queue.get()
            if job is None:
                ended = True
                break
            jobs.append(job)
        if jobs:
            self._deliver(self._transact(db, jobs))
        if ended:
            self._flush_alone(db)
        return not ended

    def _transact(self, db: sqlite3.Connection, jobs: list[_Job]) -> list[_Result]:
        if not any(job.mutates for job in jobs):
            return [self._alone(db, job) for job in jobs]
        gone: list[int] = []
        try:
            db.execute("BEGIN IMMEDIATE")
            results: list[_Result] = [(job.future, job.run(db), None) for job in jobs]
            gone = self._delete_published(db)
            db.execute("COMMIT")
            self.commits += 1
            self.rows_committed += len(jobs)
            return results
        except Exception as exc:
            roll_back(db)
            if gone:
                self._published.put(gone)
            if len(jobs) == 1:
                return [(jobs[0].future, None, translate(exc))]
        # One bad change must not fail its neighbours: each again, by itself.
        return [self._alone(db, job) for job in jobs]

    def _alone(self, db: sqlite3.Connection, job: _Job) -> _Result:
        try:
            if job.mutates:
                db.execute("BEGIN IMMEDIATE")
            result = job.run(db)
            if job.mutates:
                db.execute("COMMIT")
            return (job.future, result, None)
        except Exception as exc:
            roll_back(db)
            return (job.future, None, translate(exc))

    def _delete_published(self, db: sqlite3.Connection) -> list[int]:
        gone: list[int] = []
        while not self._published.empty():
            gone.extend(self._published.get())
        if gone:
            try:
                db.executemany("DELETE FROM outbox WHERE sequence=?", [(sequence,) for sequence in gone])
            except sqlite3.Error:
                self._published.put(gone)
                raise
        return gone

    def _flush_alone(self, db: sqlite3.Connection) -> None:
        if self._published.empty():
            return
        gone: list[int] = []
        try:
            db.execute("BEGIN IMMEDIATE")
            gone = self._delete_published(db)
            db.execute("COMMIT")
        except sqlite3.Error as exc:
            # Not forgotten yet is harmless: after a crash they are published again and readers drop them by id.
            roll_back(db)
            if gone:
                self._published.put(gone)
            log.warning("outbox.forget_failed", rows=len(gone), error=str(exc))

    def _deliver(self, results: list[_Result]) -> None:
        assert self._loop is not None  # noqa: S101 - set before the thread starts
        try:
            self._loop.call_soon_threadsafe(_settle, results)
        except RuntimeError:
            log.warning("store.loop_closed", results=len(results))


def _settle(results: list[_Result]) -> None:
    for future, value, error in results:
        if future.done():
            continue
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(value)
