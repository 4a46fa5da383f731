"""The journal's file: opening it, and what is read and written in it. Every function works on a connection."""

from __future__ import annotations

import sqlite3
import uuid
from datetime import UTC, datetime
from pathlib import Path

from agent.errors import ComputeError, FailedPrecondition, Internal, Unavailable
from agent.store import schema
from agent.store.base import Change, Committed, Identity, OperationRecord, SequencedEvent, StepRecord
from agent.store.rows import (
    event_row,
    instance_row,
    operation_of,
    operation_row,
    operation_update_row,
    step_of,
    step_row,
)

_FULL = frozenset({"SQLITE_FULL", "SQLITE_IOERR_SHMSIZE"})
"""The second is what opening says on a full disk, where the WAL's index cannot be made."""


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


def prepare(db: sqlite3.Connection, compute_id: str, host: str) -> Identity:
    """Bring the schema up to date and check whose journal it is. Raises `FailedPrecondition`."""
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


def apply(db: sqlite3.Connection, change: Change) -> Committed:
    """Carry out one change, inside a transaction of the caller's. Of a known claim nothing is carried out."""
    if change.claim is not None:
        cursor = db.execute(schema.INSERT_OPERATION, operation_row(change.claim))
        if cursor.rowcount == 0:
            return Committed(find_operation(db, change.claim.id), [])
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


def find_operation(db: sqlite3.Connection, operation_id: str) -> OperationRecord | None:
    """Read one operation."""
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


def prune_operations(db: sqlite3.Connection, before: datetime, limit: int) -> int:
    """Forget operations as `Store.prune` promises."""
    old = db.execute(
        "SELECT id FROM operations WHERE finished_at < ? AND undo_pending = 0 ORDER BY arrival LIMIT ?",
        (before.astimezone(UTC).timestamp(), limit),
    ).fetchall()
    db.executemany("DELETE FROM steps WHERE operation_id=?", old)
    db.executemany("DELETE FROM operations WHERE id=?", old)
    return len(old)


def roll_back(db: sqlite3.Connection) -> None:
    """End a transaction without effect, if there is one."""
    if db.in_transaction:
        db.execute("ROLLBACK")


_NEVER = (sqlite3.IntegrityError, sqlite3.DataError, sqlite3.ProgrammingError, sqlite3.InterfaceError)


def translate(exc: Exception) -> ComputeError:
    """Return the agent's error for what SQLite, or a change itself, failed of."""
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
