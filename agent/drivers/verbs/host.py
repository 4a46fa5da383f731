"""The optional driver methods of the host family."""

from __future__ import annotations

from typing import ClassVar


class HostVerbs:
    """What a driver may lack of the host family."""

    name: ClassVar[str]


VERBS: frozenset[str] = frozenset()
"""Verbs of this family that a driver announces one by one."""
