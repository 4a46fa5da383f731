"""Which handler serves which verb, with what limits. Filled by the composition root from the handler modules."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel

from agent.core.lanes import WorkClass
from agent.errors import Internal
from agent.messages.commands import COMMANDS, Command

if TYPE_CHECKING:
    from agent.core.context import Context
    from agent.core.operation import Operation
    from agent.store.base import OperationRecord

Handler = Callable[["Operation", Any], Awaitable[BaseModel | None]]
InlineHandler = Callable[["Context", Command[Any]], BaseModel | None]


@dataclass(frozen=True, slots=True)
class Route:
    """One verb's handler.

    `lane`: among whose commands it takes its turn: its instance's, the host's, those of one long verb of the host, or
    nobody's (reads). `inline`: instead of `handler`, for verbs without effect that need not wait: they run while the
    command is accepted, and acceptance and result are one commit. They may raise `ComputeError`.
    """

    verb: str
    work: WorkClass
    handler: Handler | None = None
    inline: InlineHandler | None = None
    lane: Literal["instance", "host", "audit", "drain", "none"] = "instance"

    def lane_of(self, record: OperationRecord) -> str:
        """Key of the lane in which an operation takes its turn; one of its own where it waits for nobody."""
        if self.lane == "instance" and record.instance_id:
            return record.instance_id
        return self.lane if self.lane in ("host", "audit", "drain") else f"operation {record.id}"


class Registry:
    """Verb → route. Construction fails unless every command of the wire contract is served exactly once."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self._routes: dict[str, Route] = {}
        for route in routes:
            if route.verb in self._routes:
                raise Internal(f"two handlers serve {route.verb}")
            self._routes[route.verb] = route
        missing = {command.verb for command in COMMANDS} - self._routes.keys()
        if missing:
            raise Internal(f"no handler serves {', '.join(sorted(missing))}")

    def __getitem__(self, verb: str) -> Route:
        return self._routes[verb]

    @property
    def verbs(self) -> list[str]:
        """All verbs, sorted."""
        return sorted(self._routes)
