"""What is forbidden while something special is the matter with an instance: one table of situation and verb.

Verbs that only read are not in it: they take no turn in the instance's lane and always answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final, Literal

from pydantic import BaseModel

from agent.core.operation import Operation
from agent.core.registry import Handler, Route
from agent.errors import FailedPrecondition
from agent.messages.life import Life

Situation = Literal["soft_deleted", "shelved", "rescued", "resizing"]

_POWER: Final = frozenset(
    {
        "instance.start",
        "instance.stop",
        "instance.reboot",
        "instance.reset",
        "instance.pause",
        "instance.resume",
        "instance.trigger-crash-dump",
        "instance.memory-dump",
        "instance.set-policy",
    }
)

ALLOWED: Final[Mapping[Situation, frozenset[str]]] = {
    "soft_deleted": frozenset({"instance.restore", "instance.delete"}),
    "shelved": frozenset({"instance.unshelve", "instance.delete"}),
    "rescued": _POWER | {"instance.unrescue", "instance.delete"},
}
"""What may be done to an instance in each situation. A verb that is not named is refused, also one that comes later."""

FORBIDDEN: Final[Mapping[Situation, frozenset[str]]] = {
    "resizing": frozenset({"instance.rebuild", "instance.rescue", "instance.shelve"})
}
"""As `ALLOWED`, the other way round: what waits to be confirmed stands in the way of little."""

_UNCONCERNED: Final = frozenset({"instance.create"})
"""Verbs whose instance is not there yet, or that have a say of their own."""

_SENTENCES: Final[Mapping[Situation, str]] = {
    "soft_deleted": "the instance is deleted; restore it first, or delete it for good",
    "shelved": "the instance is shelved and has no disks here; unshelve it first",
    "rescued": "the instance is rescued; unrescue it first",
    "resizing": "a resize of the instance waits; confirm or revert it first",
}


def situation_of(life: Life) -> Situation | None:
    """The situation that decides, the outermost first."""
    if life.soft_delete is not None:
        return "soft_deleted"
    if life.shelf is not None:
        return "shelved"
    if life.rescue is not None:
        return "rescued"
    return "resizing" if life.resize is not None else None


def is_allowed(verb: str, situation: Situation | None) -> bool:
    """Whether a verb may be done in this situation."""
    if situation is None or verb in _UNCONCERNED:
        return True
    if situation in ALLOWED:
        return verb in ALLOWED[situation]
    return verb not in FORBIDDEN[situation]


def forbid(op: Operation) -> None:
    """Refuse a verb that the instance's situation forbids. What was begun is not asked again.

    Raises `FailedPrecondition` with code `instance_soft_deleted`, `instance_shelved`, `instance_rescued` or
    `resize_pending`.
    """
    if op.begun or op.record.state == "undoing" or op.record.instance_id is None:
        return
    record = op.ctx.instances.find(op.record.instance_id)
    situation = None if record is None else situation_of(record.life)
    if situation is not None and not is_allowed(op.record.verb, situation):
        raise _refusal(situation)


async def refuse_snapshots(op: Operation) -> None:
    """Refuse an instance with snapshots: they are inside the disks that are about to go. Before the first step only.

    Raises `FailedPrecondition` (`instance_has_snapshots`).
    """
    if op.begun or op.record.state == "undoing" or "snapshot.list" not in op.ctx.state.capabilities.verbs:
        return
    found = await op.query(op.ctx.driver.list_snapshots, op.instance_id)
    if found:
        raise FailedPrecondition(
            f"the instance has snapshots inside its disks ({', '.join(one.name for one in found[:5])}); remove them",
            code="instance_has_snapshots",
            snapshots=len(found),
        )


def _refusal(situation: Situation) -> FailedPrecondition:
    sentence = _SENTENCES[situation]
    match situation:
        case "soft_deleted":
            return FailedPrecondition(sentence, code="instance_soft_deleted")
        case "shelved":
            return FailedPrecondition(sentence, code="instance_shelved")
        case "rescued":
            return FailedPrecondition(sentence, code="instance_rescued")
        case "resizing":
            return FailedPrecondition(sentence, code="resize_pending")


def guarded(route: Route) -> Route:
    """The same route, whose handler is reached only where the instance's situation allows its verb."""
    if route.lane != "instance" or route.handler is None:
        return route
    handler: Handler = route.handler

    async def guard(op: Operation, data: Any) -> BaseModel | None:
        forbid(op)
        return await handler(op, data)

    return replace(route, handler=guard)
