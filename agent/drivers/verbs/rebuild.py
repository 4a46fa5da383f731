"""The optional driver methods of the rebuild family."""

from __future__ import annotations

from typing import ClassVar


class RebuildVerbs:
    """What a driver may lack of the rebuild family."""

    name: ClassVar[str]


VERBS: frozenset[str] = frozenset()
"""Verbs of this family that a driver announces one by one."""
