"""What the agent itself leaves on the host beside the driver: unfinished downloads, the folders of exports.

A place of the agent's own is given by the composition root. A file there is proven by its name and its age: whoever
works on one writes to it, and all such work has limits far below `older_than_s`. A folder is proven by the operation
that it is named after: the journal knows that one, and that it has ended.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from agent.drivers.verbs.host import Artifact, ArtifactKind
from agent.errors import FailedPrecondition, Internal
from agent.exports.service import claim_of
from agent.store.base import OperationRecord

_CLAIM: Final = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class Place:
    """One folder of ours, with the names that we make in it: unfinished files by `patterns`, or folders of operations.

    `patterns` empty: folders, each named by `claim_of` its operation. `older_than_s`: instead of the usual age.
    """

    folder: Path
    kind: ArtifactKind
    patterns: tuple[str, ...] = ()
    older_than_s: float | None = None


class Leftovers:
    """Finds and removes them. All methods do file I/O: run them in a thread."""

    def __init__(self, places: Sequence[Place], *, older_than_s: float) -> None:
        self._places = tuple(places)
        self._older_than_s = older_than_s

    def find(self, operations: Iterable[OperationRecord]) -> list[Artifact]:
        """What nobody works on, and what nobody knows. `operations` are all that the journal knows."""
        ended = {claim_of(one.id): one.final and not one.undo_pending for one in operations}
        found: list[Artifact] = []
        for place in self._places:
            found += self._files(place) if place.patterns else _folders(place, ended)
        return list({artifact.name: artifact for artifact in found}.values())

    def remove(self, artifact: Artifact, operations: Iterable[OperationRecord]) -> bool:
        """Remove one. False if it is gone. Raises `FailedPrecondition` (`not_removable`) if it is no leftover."""
        if not Path(artifact.name).exists() and not Path(artifact.name).is_symlink():
            return False
        still = next((one for one in self.find(operations) if one.name == artifact.name), None)
        if still is None or still.proof is None:
            raise FailedPrecondition(f"{artifact.name} is no proven leftover any more", code="not_removable")
        path = Path(artifact.name)
        try:
            if stat.S_ISDIR(path.lstat().st_mode):
                shutil.rmtree(path)
            else:
                path.unlink()
        except FileNotFoundError:
            return False
        except OSError as exc:
            raise Internal(f"cannot remove {path}: {exc}", code="storage_failed") from exc
        return True

    def _files(self, place: Place) -> Iterator[Artifact]:
        limit_s = self._older_than_s if place.older_than_s is None else place.older_than_s
        for path in sorted({path for pattern in place.patterns for path in _glob(place.folder, pattern)}):
            facts = _facts(path)
            old = facts is not None and datetime.now(UTC).timestamp() - facts.st_mtime > limit_s
            if facts is not None and old and stat.S_ISREG(facts.st_mode):
                yield _artifact(place, path, facts, "name-and-age", facts.st_blocks * 512)


def _folders(place: Place, ended: Mapping[str, bool]) -> Iterator[Artifact]:
    for path in sorted(_glob(place.folder, "*")):
        facts = _facts(path)
        if facts is None or ended.get(path.name) is False:
            continue  # its operation is under way, or will be taken up again
        named = _CLAIM.fullmatch(path.name) and stat.S_ISDIR(facts.st_mode)
        proof = "ended-operation" if named and path.name in ended else None
        yield _artifact(place, path, facts, proof, None)


def _artifact(place: Place, path: Path, facts: os.stat_result, proof: str | None, size_bytes: int | None) -> Artifact:
    modified_at = datetime.fromtimestamp(facts.st_mtime, UTC)
    return Artifact(place.kind, str(path), proof=proof, size_bytes=size_bytes, modified_at=modified_at)


def _facts(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except FileNotFoundError:
        return None


def _glob(folder: Path, pattern: str) -> list[Path]:
    return list(folder.glob(pattern)) if folder.is_dir() and not folder.is_symlink() else []
