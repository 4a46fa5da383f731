"""Who uses which image: found in the definitions of instances and in the commands that are under way. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel


@dataclass(slots=True)
class Users:
    """The users of one image: ids of instances that are made of it, and of operations that may be about to."""

    instances: set[str] = field(default_factory=set)
    operations: set[str] = field(default_factory=set)


WhoUses = Callable[[], Mapping[str, Users] | None]
"""Gives the users of every used image by its sha256; None while that is not known. Called on the loop."""


def mentioned(value: Any) -> Iterator[str]:
    """Yield every sha256 in a model, at any depth: of disks, boot files, a rescue image, exported disks.

    What may be meant is kept: an image too many costs space, one too few costs a guest its disk.
    """
    if isinstance(value, BaseModel):
        sha256 = getattr(value, "sha256", None)
        if isinstance(sha256, str):
            yield sha256
        for item in value.__dict__.values():
            yield from mentioned(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from mentioned(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from mentioned(item)
