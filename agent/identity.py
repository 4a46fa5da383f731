"""Who this host is: a compute id kept in a file, so that a journal is never used by another host.

The host's name can change and a disk can be cloned; the id in the file and the one in the journal must agree.
"""

from __future__ import annotations

import fcntl
import os
import uuid
from pathlib import Path

from agent.errors import FailedPrecondition

FILE_NAME = "compute_id"
LOCK_NAME = "lock"


def compute_id(state_dir: Path, journal: Path) -> str:
    """Read the id, or make it where there is neither id nor journal.

    Raises `FailedPrecondition` (code `identity`) where the file is missing beside a journal, or holds no UUID.
    """
    path = state_dir / FILE_NAME
    try:
        text = path.read_text("ascii").strip()
    except FileNotFoundError:
        if journal.exists():
            raise FailedPrecondition(
                f"{path} is missing but {journal} exists: restore the file, or move the journal away to start anew",
                code="identity",
            ) from None
        return _make(path)
    except (OSError, UnicodeDecodeError) as exc:
        raise FailedPrecondition(f"cannot read {path}: {exc}", code="identity") from exc
    try:
        return str(uuid.UUID(text))
    except ValueError:
        raise FailedPrecondition(f"{path} holds no UUID: restore the file", code="identity") from None


def hold(state_dir: Path) -> None:
    """Keep every other agent off this state directory for as long as this process lives.

    Two processes on one journal would both take up its operations. The kernel frees the lock when the process ends,
    however it ends. Raises `FailedPrecondition` (code `state_dir_in_use`, or `identity`).
    """
    path = state_dir / LOCK_NAME
    try:
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o755)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)  # never closed: it is the lock
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FailedPrecondition(
            f"another agent is running on {state_dir}: end it, or give this one a state_dir of its own",
            code="state_dir_in_use",
        ) from None
    except OSError as exc:
        raise FailedPrecondition(f"cannot lock {path}: {exc}", code="identity") from exc


def _make(path: Path) -> str:
    made = str(uuid.uuid4())
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        temporary = path.with_suffix(".new")
        with temporary.open("w", encoding="ascii") as file:
            file.write(made + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        # Else a power cut could take the name away again, beside a journal that holds the id.
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as exc:
        raise FailedPrecondition(f"cannot write {path}: {exc}", code="identity") from exc
    return made
