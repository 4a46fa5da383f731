"""The journal on disk: SQLite in WAL mode on one owned thread, with group commit.

The only importer of `sqlite3`. Whatever is waiting when the thread comes round goes into one transaction, so one
fsync serves many commands. Errors of SQLite are translated here.
"""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import structlog

from agent.errors import ComputeError, FailedPrecondition, Internal, Unavailable
from agent.store import schema
from agent.store.base import Change, Committed, Identity, InstanceRecord, OperationRecord, SequencedEvent, StepRecord
from agent.store.rows import (
    event_of,
    event_row,
    instance_of,
    instance_row,
    operation_of,
    operation_row,
    operation_update_row,
    step_of,
    step_row,
)

T = TypeVar("T")
_Result = tuple[asyncio.Future[Any], Any, ComputeError | None]
log = structlog.get_logger("store")

LAZY_FLUSH_S = 0.5
"""Confirmed events are forgotten with the next commit, or after this long without one."""


_FULL = frozenset({"SQLITE_FULL", "SQLITE_IOERR_SHMSIZE"})
"""The second is what opening says on a full disk, where the WAL's index cannot be made."""


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
        return await self._submit(lambda db: [_apply(db, change) for change in changes], mutates=True)

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
        return await self._submit(lambda db: _find(db, operation_id))

    async def operations(self, *, unfinished: bool = False, limit: int = 1000) -> list[OperationRecord]:
        return await self._submit(lambda db: list_operations(db, unfinished=unfinished, limit=limit))

    async def steps(self, operation_id: str) -> list[StepRecord]:
        return await self._submit(lambda db: list_steps(db, operation_id))

    async def instances(self) -> list[InstanceRecord]:
        return await self._submit(lambda db: [instance_of(row) for row in db.execute("SELECT * FROM instances")])

    async def settings(self) -> dict[str, str]:
        return await self._submit(lambda db: dict(db.execute("SELECT key, value FROM settings").fetchall()))

    async def prune(self, before: datetime, limit: int) -> int:
        return await self._submit(lambda db: _prune(db, before, limit), mutates=True)

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
            identity = _prepare(db, compute_id, host)
        except Exception as exc:
            if db is not None:
                db.close()
            self._deliver([(opened, None, _translate(exc))])
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
            _rollback(db)
            if gone:
                self._published.put(gone)
            if len(jobs) == 1:
                return [(jobs[0].future, None, _translate(exc))]
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
            _rollback(db)
            return (job.future, None, _translate(exc))

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
            _rollback(db)
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


def connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    """Open a journal file. `read_only` is for the journal tool beside a running agent."""
    target = f"{path.resolve().as_uri()}{'?mode=ro' if read_only else ''}"
    db = sqlite3.connect(target, uri=True, isolation_level=None, timeout=10, check_same_thread=False)
    if not read_only:
        path.chmod(0o600)  # commands hold first-boot data; SQLite gives its -wal and -shm the same mode
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        db.execute("PRAGMA wal_autocheckpoint=2000")
    return db


def _prepare(db: sqlite3.Connection, compute_id: str, host: str) -> Identity:
    version = int(db.execute("PRAGMA user_version").fetchone()[0])
    if version > len(schema.MIGRATIONS):
        raise FailedPrecondition(
            f"the journal has schema {version}, this agent knows up to {len(schema.MIGRATIONS)}: a newer agent wrote"
            " it; install that version or newer again",
            code="journal_newer",
        )
    for number, script in enumerate(schema.MIGRATIONS[version:], start=version + 1):
        db.executescript(f"BEGIN; {script}; PRAGMA user_version={number}; COMMIT;")
    meta = dict(db.execute("SELECT key, value FROM meta").fetchall())
    if not meta:
        meta = {"compute_id": compute_id, "host": host, "epoch": uuid.uuid4().hex}
        db.execute("BEGIN IMMEDIATE")
        db.executemany("INSERT INTO meta (key, value) VALUES (?,?)", list(meta.items()))
        db.execute("COMMIT")
    if (meta["compute_id"], meta["host"]) != (compute_id, host):
        raise FailedPrecondition(
            f"the journal belongs to host {meta['host']} (compute id {meta['compute_id']}), this is {host}"
            f" ({compute_id}): give the agent its own state_dir, or restore its compute_id file",
            code="journal_foreign",
        )
    return Identity(compute_id, host, meta["epoch"])


def _apply(db: sqlite3.Connection, change: Change) -> Committed:
    if change.claim is not None:
        cursor = db.execute(schema.INSERT_OPERATION, operation_row(change.claim))
        if cursor.rowcount == 0:
            return Committed(_find(db, change.claim.id), [])
    if change.operation is not None:
        db.execute(schema.UPDATE_OPERATION, operation_update_row(change.operation))
    if change.steps:
        db.executemany(schema.UPSERT_STEP, [step_row(step) for step in change.steps])
    if change.instances:
        db.executemany(schema.UPSERT_INSTANCE, [instance_row(instance) for instance in change.instances])
    for instance_id in change.removed_instances:
        db.execute("DELETE FROM instances WHERE id=?", (instance_id,))
    for key, value in change.settings.items():
        db.execute("INSERT OR REPLACE INTO settings (key, value) VALUES (?,?)", (key, value))
    sequenced = []
    for event in change.events:
        cursor = db.execute(schema.INSERT_EVENT, event_row(event))
        sequenced.append(SequencedEvent(int(cursor.lastrowid or 0), event))
    if change.final_of is not None and sequenced:
        db.execute("UPDATE operations SET final_sequence=? WHERE id=?", (sequenced[-1].sequence, change.final_of))
    return Committed(None, sequenced)


def _find(db: sqlite3.Connection, operation_id: str) -> OperationRecord | None:
    row = db.execute(f"{schema.SELECT_OPERATION} WHERE id=?", (operation_id,)).fetchone()
    return operation_of(row) if row else None


def list_operations(db: sqlite3.Connection, *, unfinished: bool, limit: int) -> list[OperationRecord]:
    """Read operations as `Store.operations` promises."""
    if unfinished:
        rows = db.execute(f"{schema.SELECT_OPERATION} WHERE {schema.OPEN_WHERE} ORDER BY arrival")
    else:
        rows = db.execute(f"{schema.SELECT_OPERATION} ORDER BY arrival DESC LIMIT ?", (limit,))
    return [operation_of(row) for row in rows]


def list_steps(db: sqlite3.Connection, operation_id: str) -> list[StepRecord]:
    """Read the steps of one operation, in order."""
    rows = db.execute(
        "SELECT operation_id, step, name, state, output FROM steps WHERE operation_id=? ORDER BY step", (operation_id,)
    )
    return [step_of(row) for row in rows]


def _prune(db: sqlite3.Connection, before: datetime, limit: int) -> int:
    old = db.execute(
        "SELECT id FROM operations WHERE finished_at < ? AND undo_pending = 0 ORDER BY arrival LIMIT ?",
        (before.astimezone(UTC).timestamp(), limit),
    ).fetchall()
    db.executemany("DELETE FROM steps WHERE operation_id=?", old)
    db.executemany("DELETE FROM operations WHERE id=?", old)
    return len(old)


def _rollback(db: sqlite3.Connection) -> None:
    if db.in_transaction:
        db.execute("ROLLBACK")


_NEVER = (sqlite3.IntegrityError, sqlite3.DataError, sqlite3.ProgrammingError, sqlite3.InterfaceError)


def _translate(exc: Exception) -> ComputeError:
    if isinstance(exc, ComputeError):
        return exc
    named = getattr(exc, "sqlite_errorname", "") in _FULL
    full = named or (isinstance(exc, sqlite3.OperationalError) and "full" in str(exc))
    error: ComputeError
    if full:
        error = Unavailable("no space is left for the journal: free space in state_dir", code="journal_full")
    elif isinstance(exc, _NEVER) or not isinstance(exc, (sqlite3.Error, OSError)):
        error = Internal(f"the journal cannot take this change: {exc}", code="journal_rejected")
    else:
        error = Unavailable(f"the journal cannot be used: {exc}", code="journal_error")
    error.__cause__ = exc
    return error


class JournalFile:
    """A journal file for the administrator's tool: synchronous, and safe beside a running agent.

    Raises `Unavailable` (code `journal_error`) where the file cannot be used.
    """

    def __init__(self, path: Path, *, read_only: bool) -> None:
        try:
            self._db = connect(path, read_only=read_only)
            version = int(self._db.execute("PRAGMA user_version").fetchone()[0])
        except sqlite3.Error as exc:
            raise _translate(exc) from exc
        if version != len(schema.MIGRATIONS):
            self._db.close()
            raise FailedPrecondition(
                f"the journal has schema {version}, this tool reads {len(schema.MIGRATIONS)}: use the agent's version",
                code="journal_newer",
            )

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def operation(self, operation_id: str) -> OperationRecord | None:
        """One operation."""
        return _find(self._db, operation_id)

    def operations(self, *, unfinished: bool, limit: int) -> list[OperationRecord]:
        """As `Store.operations`."""
        return list_operations(self._db, unfinished=unfinished, limit=limit)[:limit]

    def steps(self, operation_id: str) -> list[StepRecord]:
        """Steps of one operation."""
        return list_steps(self._db, operation_id)

    def request_retry(self, operation_id: str) -> None:
        """Leave a request that the agent takes."""
        self._write("INSERT OR IGNORE INTO requests (operation_id) VALUES (?)", operation_id)

    def forget(self, operation_id: str) -> None:
        """Remove an operation and its steps."""
        self._write("DELETE FROM steps WHERE operation_id=?", operation_id)
        self._write("DELETE FROM operations WHERE id=?", operation_id)

    def _write(self, statement: str, operation_id: str) -> None:
        try:
            self._db.execute(statement, (operation_id,))
        except sqlite3.Error as exc:
            raise _translate(exc) from exc
