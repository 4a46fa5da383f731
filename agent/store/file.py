"""The journal as the administrator's tool has it: one file, read and written without an agent or beside one."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from agent.errors import FailedPrecondition
from agent.store import schema
from agent.store.base import OperationRecord, StepRecord
from agent.store.database import connect, find_operation, list_operations, list_steps, translate


class JournalFile:
    """A journal file for the administrator's tool: synchronous, and safe beside a running agent.

    Raises `Unavailable` (code `journal_error`) where the file cannot be used.
    """

    def __init__(self, path: Path, *, read_only: bool) -> None:
        try:
            self._db = connect(path, read_only=read_only)
            version = int(self._db.execute("PRAGMA user_version").fetchone()[0])
        except sqlite3.Error as exc:
            raise translate(exc) from exc
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
        return find_operation(self._db, operation_id)

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
            raise translate(exc) from exc
