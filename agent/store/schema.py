"""The journal's tables, as SQL text. A new version appends a migration; released ones never change."""

from __future__ import annotations

MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE settings (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE operations (
        arrival INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        verb TEXT NOT NULL,
        instance_id TEXT,
        body BLOB NOT NULL,
        reply_to TEXT,
        correlation_id TEXT,
        state TEXT NOT NULL,
        accepted_at REAL NOT NULL,
        attempt INTEGER NOT NULL,
        started_at REAL,
        finished_at REAL,
        cancel_requested INTEGER NOT NULL,
        undo_pending INTEGER NOT NULL,
        error_code TEXT,
        final_body BLOB,
        final_sequence INTEGER
    );
    CREATE INDEX operations_open ON operations (arrival)
        WHERE state IN ('accepted', 'running', 'undoing') OR undo_pending = 1;
    CREATE TABLE steps (
        operation_id TEXT NOT NULL,
        step INTEGER NOT NULL,
        name TEXT NOT NULL,
        state TEXT NOT NULL,
        output BLOB,
        PRIMARY KEY (operation_id, step)
    ) WITHOUT ROWID;
    CREATE TABLE instances (
        id TEXT PRIMARY KEY,
        spec BLOB NOT NULL,
        generation INTEGER NOT NULL,
        desired TEXT NOT NULL,
        observed TEXT NOT NULL,
        reason TEXT NOT NULL,
        created_by TEXT NOT NULL,
        created_at REAL NOT NULL,
        updated_at REAL NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE outbox (
        sequence INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL,
        routing_key TEXT NOT NULL,
        body BLOB NOT NULL,
        cc TEXT NOT NULL,
        correlation_id TEXT
    );
    CREATE TABLE requests (operation_id TEXT PRIMARY KEY) WITHOUT ROWID;
    """,
    "ALTER TABLE instances ADD COLUMN life BLOB;",
)

OPEN_WHERE = "state IN ('accepted', 'running', 'undoing') OR undo_pending = 1"
"""Matches the partial index, so that a start does not read the whole history."""

OPERATION_COLUMNS = (
    "id, verb, instance_id, body, reply_to, correlation_id, state, accepted_at, attempt, started_at, finished_at,"
    " cancel_requested, undo_pending, error_code, final_body, final_sequence"
)
INSERT_OPERATION = f"INSERT OR IGNORE INTO operations ({OPERATION_COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)"  # noqa: S608 - constants only
UPDATE_OPERATION = (
    "UPDATE operations SET state=?, attempt=?, started_at=?, finished_at=?, cancel_requested=?, undo_pending=?,"
    " error_code=?, final_body=? WHERE id=?"
    # Nothing that comes late makes a final operation run again.
    " AND (finished_at IS NULL OR ? IS NOT NULL)"
)
SELECT_OPERATION = f"SELECT {OPERATION_COLUMNS} FROM operations"  # noqa: S608 - constants only
UPSERT_STEP = "INSERT OR REPLACE INTO steps (operation_id, step, name, state, output) VALUES (?,?,?,?,?)"
UPSERT_INSTANCE = (
    "INSERT OR REPLACE INTO instances (id, spec, generation, desired, observed, reason, created_by, created_at,"
    " updated_at, life) VALUES (?,?,?,?,?,?,?,?,?,?)"
)
INSERT_EVENT = "INSERT INTO outbox (id, routing_key, body, cc, correlation_id) VALUES (?,?,?,?,?)"
SELECT_EVENTS = (
    "SELECT sequence, id, routing_key, body, cc, correlation_id FROM outbox WHERE sequence > ?"
    " ORDER BY sequence LIMIT ?"
)
