"""The compute_id file: made once, kept, and never replaced beside a journal."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest
from support.world import World

from agent.app import Agent
from agent.bus.memory import MemoryBus
from agent.errors import FailedPrecondition
from agent.identity import FILE_NAME, compute_id


def refused(state_dir: Path, journal: Path) -> FailedPrecondition:
    with pytest.raises(FailedPrecondition) as caught:
        compute_id(state_dir, journal)
    assert caught.value.code == "identity"
    return caught.value


def test_it_is_made_once_and_then_read(tmp_path: Path) -> None:
    state_dir = tmp_path / "new" / "state"
    made = compute_id(state_dir, state_dir / "journal.sqlite")
    assert str(uuid.UUID(made)) == made
    assert compute_id(state_dir, state_dir / "journal.sqlite") == made
    assert [path.name for path in state_dir.iterdir()] == [FILE_NAME], "no temporary file is left"


def test_two_hosts_have_two(tmp_path: Path) -> None:
    assert compute_id(tmp_path / "a", tmp_path / "a/j") != compute_id(tmp_path / "b", tmp_path / "b/j")


def test_a_missing_file_beside_a_journal_is_refused(tmp_path: Path) -> None:
    journal = tmp_path / "journal.sqlite"
    journal.write_bytes(b"")
    assert str(tmp_path / FILE_NAME) in refused(tmp_path, journal).message
    assert not (tmp_path / FILE_NAME).exists()


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\xff\xfe", b"1234-5678"])
def test_a_file_that_holds_no_uuid_is_refused_and_kept(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    refused(tmp_path, tmp_path / "journal.sqlite")
    assert (tmp_path / FILE_NAME).read_bytes() == content


def test_white_space_around_it_does_no_harm(tmp_path: Path) -> None:
    made = str(uuid.uuid4())
    (tmp_path / FILE_NAME).write_text(f"  {made}\n\n")
    assert compute_id(tmp_path, tmp_path / "j") == made


def test_a_folder_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).mkdir()
    refused(tmp_path, tmp_path / "j")


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file" / "below", tmp_path / "j")


def test_what_a_killed_process_left_half_written_is_replaced(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).with_suffix(".new").write_text("half")
    made = compute_id(tmp_path, tmp_path / "j")
    assert (tmp_path / FILE_NAME).read_text().strip() == made


@pytest.mark.parametrize("what", ["host", "compute id"])
async def test_an_agent_refuses_the_journal_of_another(tmp_path: Path, no_blocking: object, what: str) -> None:
    world = await World(tmp_path, store="sqlite").open()
    await world.start()
    await world.stop()
    if what == "compute id":
        (tmp_path / "state" / FILE_NAME).write_text(str(uuid.uuid4()))
    else:
        world.settings.agent.__dict__["host"] = "renamed.example"
    agent = Agent(world.settings, MemoryBus(world.broker, name="again"))
    with pytest.raises(FailedPrecondition) as refused_to_start:
        await agent.start()
    assert refused_to_start.value.code == "journal_foreign"
    await world.close()


def test_the_file_is_readable_for_the_tools(tmp_path: Path) -> None:
    compute_id(tmp_path, tmp_path / "j")
    assert os.access(tmp_path / FILE_NAME, os.R_OK)


def test_the_folder_is_flushed_after_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        flushed.append("folder" if (path / FILE_NAME).exists() else "file")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    compute_id(tmp_path, tmp_path / "journal.sqlite")
    assert flushed == ["file", "folder"]
