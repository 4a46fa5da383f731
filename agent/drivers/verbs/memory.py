"""The optional driver methods of the memory family."""

from __future__ import annotations

from typing import ClassVar


class MemoryVerbs:
    """What a driver may lack of the memory family."""

    name: ClassVar[str]


VERBS: frozenset[str] = frozenset()
"""Verbs of this family that a driver announces one by one."""
