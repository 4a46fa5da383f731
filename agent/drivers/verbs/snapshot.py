"""The optional driver methods of the snapshot family."""

from __future__ import annotations

from typing import ClassVar


class SnapshotVerbs:
    """What a driver may lack of the snapshot family."""

    name: ClassVar[str]


VERBS: frozenset[str] = frozenset()
"""Verbs of this family that a driver announces one by one."""
