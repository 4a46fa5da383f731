"""What the agent itself leaves on the host beside the driver: unfinished downloads, staged exports.

A folder of the agent's own is given by the composition root with the names that it makes there. Age is the proof that
nobody works on a file: whoever does writes to it, and all such work has limits far below `older_than_s`.
"""

from __future__ import annotations

import stat
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from agent.drivers.verbs.host import Artifact, ArtifactKind
from agent.errors import FailedPrecondition, Internal


@dataclass(frozen=True, slots=True)
class Place:
    """One folder of ours. `patterns` are the names of unfinished files that we make in it."""

    folder: Path
    kind: ArtifactKind
    patterns: tuple[str, ...]


class Leftovers:
    """Finds and removes them. All methods do file I/O: run them in a thread."""

    def __init__(self, places: Sequence[Place], *, older_than_s: float) -> None:
        self._places = tuple(places)
        self._older_than_s = older_than_s

    def find(self) -> list[Artifact]:
        """Unfinished files that nobody has written to for long."""
        return [
            Artifact(
                place.kind, str(path), proof="our-name-and-age", size_bytes=facts.st_blocks * 512,
                modified_at=datetime.fromtimestamp(facts.st_mtime, UTC),
            )
            for place in self._places
            for path in sorted(_matching(place))
            if (facts := path.lstat()) is not None and self._is_old(facts.st_mtime) and stat.S_ISREG(facts.st_mode)
        ]  # fmt: skip

    def remove(self, artifact: Artifact) -> bool:
        """Remove one. False if it is gone. Raises `FailedPrecondition` (`not_removable`) if it is no leftover."""
        path = Path(artifact.name)
        place = next((place for place in self._places if place.folder == path.parent), None)
        if place is None or not any(path.match(pattern) for pattern in place.patterns):
            raise FailedPrecondition(f"{path} is none of the agent's unfinished files", code="not_removable")
        try:
            facts = path.lstat()
            if not stat.S_ISREG(facts.st_mode) or not self._is_old(facts.st_mtime):
                raise FailedPrecondition(f"{path} is in use again", code="not_removable")
            path.unlink()
        except FileNotFoundError:
            return False
        except OSError as exc:
            raise Internal(f"cannot remove {path}: {exc}", code="storage_failed") from exc
        return True

    def _is_old(self, modified: float) -> bool:
        return datetime.now(UTC).timestamp() - modified > self._older_than_s


def _matching(place: Place) -> set[Path]:
    if not place.folder.is_dir() or place.folder.is_symlink():
        return set()
    return {path for pattern in place.patterns for path in place.folder.glob(pattern)}
