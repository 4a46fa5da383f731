"""The optional driver methods of the resize family."""

from __future__ import annotations

from typing import ClassVar


class ResizeVerbs:
    """What a driver may lack of the resize family."""

    name: ClassVar[str]


VERBS: frozenset[str] = frozenset()
"""Verbs of this family that a driver announces one by one."""
