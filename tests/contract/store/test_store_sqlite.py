"""What only the journal on disk promises: its file, its thread, its transactions."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from store_world import AT, SqliteKind, big, ended, event, instance, operation

from agent.errors import FailedPrecondition, Internal, Unavailable
from agent.store.base import Change
from agent.store.file import JournalFile
from agent.store.sqlite import SqliteStore


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite"


async def opened(path: Path) -> SqliteStore:
    store = SqliteStore(path)
    await store.open(compute_id="c1", host="h1")
    return store


async def test_one_fsync_serves_many_commits(path: Path) -> None:
    store = await opened(path)
    await asyncio.gather(*(store.commit([Change(claim=operation(f"op{n}"))]) for n in range(200)))
    assert store.rows_committed == 200
    assert store.commits < 50
    await store.close()


async def test_a_change_that_cannot_be_stored_fails_alone_and_for_good(path: Path) -> None:
    store = await opened(path)
    good = [store.commit([Change(claim=operation(f"op{n}"))]) for n in range(3)]
    bad = store.commit([Change(claim=operation("bad", correlation_id="\ud800"), events=[event("e")])])
    huge = store.commit([Change(instances=[instance(generation=2**70)])])
    results = await asyncio.gather(*good, bad, huge, return_exceptions=True)
    for wrong in results[3:]:
        assert isinstance(wrong, Internal)
        assert wrong.code == "journal_rejected"
        assert not wrong.retryable
    assert {r.id for r in await store.operations()} == {"op0", "op1", "op2"}
    assert await store.last_sequence() == 0
    await store.close()


async def test_after_close_there_is_nothing_to_wait_for(path: Path) -> None:
    store = await opened(path)
    await store.close()
    with pytest.raises(Unavailable):
        await store.commit([Change()])


async def test_what_was_given_before_close_is_finished(path: Path) -> None:
    store = await opened(path)
    given = asyncio.ensure_future(store.commit([Change(claim=operation())]))
    await asyncio.sleep(0)
    await store.close()
    await given
    store = await opened(path)
    assert await store.operation("op") is not None
    await store.close()


async def test_a_newer_schema_is_refused(path: Path) -> None:
    await (await opened(path)).close()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version=99")
    with pytest.raises(FailedPrecondition) as refused:
        await opened(path)
    assert refused.value.code == "journal_newer"
    with pytest.raises(FailedPrecondition) as refused:
        JournalFile(path, read_only=True)
    assert refused.value.code == "journal_newer"


@pytest.mark.parametrize("what", ["garbage", "folder", "damaged meta"])
async def test_a_file_that_is_no_journal_ends_the_opening(path: Path, what: str) -> None:
    if what == "garbage":
        path.write_bytes(b"this is no database at all" * 100)
    elif what == "folder":
        path.mkdir()
    else:
        await (await opened(path)).close()
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.execute("DELETE FROM meta WHERE key='epoch'")
            db.commit()
    store = SqliteStore(path)
    async with asyncio.timeout(60):
        with pytest.raises((Unavailable, Internal)):
            await store.open(compute_id="c1", host="h1")
        with pytest.raises(Unavailable):
            await store.commit([Change()])
        await store.close()


async def test_a_failed_opening_can_be_repeated(path: Path) -> None:
    path.mkdir()
    store = SqliteStore(path)
    with pytest.raises(Unavailable):
        await store.open(compute_id="c1", host="h1")
    await store.close()
    path.rmdir()
    await store.open(compute_id="c1", host="h1")
    await store.commit([Change(claim=operation())])
    await store.close()


async def test_durability_settings(path: Path) -> None:
    store = await opened(path)
    asked = lambda db: [db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")]  # noqa: E731
    assert await store._submit(asked) == ["wal", 2]
    await store.close()


async def test_a_start_does_not_read_the_whole_history(path: Path) -> None:
    store = await opened(path)
    plan = await store._submit(
        lambda db: db.execute(
            "EXPLAIN QUERY PLAN SELECT id FROM operations WHERE state IN ('accepted', 'running', 'undoing')"
            " OR undo_pending = 1 ORDER BY arrival"
        ).fetchall()
    )
    assert "operations_open" in str(plan)
    await store.close()


async def test_published_events_are_forgotten_without_another_commit(path: Path) -> None:
    store = await opened(path)
    await store.commit([Change(events=[event("1")])])
    store.published([1])
    await store.close()
    store = await opened(path)
    assert await store.backlog(0, 10) == []
    await store.close()


async def test_what_could_not_be_forgotten_on_a_full_disk_is_forgotten_later(tmp_path: Path) -> None:
    kind = SqliteKind(tmp_path / "journal.sqlite")
    await kind.open()
    await kind.store.commit([Change(events=[event("1"), event("2")])])
    await kind.fill_disk()
    kind.store.published([1])
    with pytest.raises(Unavailable):
        await kind.store.commit([big("x")])
    await kind.free_disk()
    await kind.store.commit([Change()])
    assert [item.sequence for item in await kind.store.backlog(0, 10)] == [2]
    await kind.store.close()


async def test_the_tool_reads_beside_a_writer_and_after_it(path: Path) -> None:
    store = await opened(path)
    await store.commit([Change(claim=ended("op", undo_pending=True), events=[event("f")], final_of="op")])
    for _ in range(2):
        with contextlib.closing(JournalFile(path, read_only=True)) as file:
            record = file.operation("op")
            assert record is not None
            assert record.final_sequence == 1
            with pytest.raises(Unavailable):
                file.forget("op")
        await store.close()


async def test_a_commit_waits_for_the_tool_and_not_the_loop(path: Path) -> None:
    store = await opened(path)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        commit = asyncio.ensure_future(store.commit([Change(claim=operation())]))
        for _ in range(50):
            await asyncio.sleep(0)
        assert not commit.done()
        other.execute("ROLLBACK")
        await commit
    await store.close()


def test_a_file_size_limit_is_a_refusal_and_no_damage(path: Path) -> None:
    """The operating system refuses the write, as a quota or a full file system does; then it allows it again."""
    program = textwrap.dedent(
        """
        import asyncio, resource, signal, sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[2])
        from store_world import operation, event
        from agent.errors import Unavailable
        from agent.store.base import Change
        from agent.store.sqlite import SqliteStore

        async def main():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            store = SqliteStore(Path(sys.argv[1]))
            await store.open(compute_id="c1", host="h1")
            await store.commit([Change(claim=operation("before"), events=[event("1")])])
            resource.setrlimit(resource.RLIMIT_FSIZE, (256 * 1024, resource.RLIM_INFINITY))
            refused = 0
            for number in range(5):
                try:
                    await store.commit([Change(claim=operation(f"big{number}", body=b"x" * 150_000), events=[event("2")])])
                except Unavailable as exc:
                    assert exc.retryable, exc
                    refused += 1
            assert refused, "the limit was never met"
            kept = {record.id for record in await store.operations()}
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            await store.commit([Change(claim=operation("after"), events=[event("3")])])
            assert {record.id for record in await store.operations()} == kept | {"after"}
            assert "before" in kept
            await store.close()
            print("refused", refused)

        asyncio.run(main())
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path), str(Path(__file__).parent)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "refused" in done.stdout
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_the_clock_of_a_record_is_kept_to_the_microsecond() -> None:
    assert AT.microsecond == 678901
