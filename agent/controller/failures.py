"""How a command that did not succeed reaches the caller: the final event of its operation, as an exception.

`CommandRefused` had no effect. `CommandFailed` was begun; `undone` says whether all its effects were taken
back.
"""

from __future__ import annotations

from agent.errors import ComputeError
from agent.messages.events import (
    Event,
    OperationCancelled,
    OperationExpired,
    OperationFailed,
    OperationRejected,
    OperationSucceeded,
    OperationUnsuccessful,
)


class CommandError(ComputeError):
    """Root of both. `code`, `message`, `retryable`, `details` are the agent's; `state` is the final state."""

    default_code = "internal"

    def __init__(self, final: OperationUnsuccessful, *, state: str) -> None:
        super().__init__(final.error.message, code=final.error.code)
        self.details = final.error.details
        # The agent's word about this refusal, where other errors have it from their class.
        self.retryable = final.error.retryable  # type: ignore[misc]
        self.state = state
        self.operation_id = final.operation_id
        self.verb = final.verb
        self.instance_id = final.instance_id
        self.duration_ms = final.duration_ms


class CommandRefused(CommandError):
    """Rejected or expired: nothing was done."""


class CommandFailed(CommandError):
    """Failed or cancelled after work had begun. `undone`: nothing of it is left."""

    def __init__(self, final: OperationUnsuccessful, *, state: str) -> None:
        super().__init__(final, state=state)
        self.undone = final.undone if isinstance(final, OperationFailed) else True


_UNSUCCESSFUL: dict[str, tuple[type[OperationUnsuccessful], type[CommandError]]] = {
    OperationFailed.kind: (OperationFailed, CommandFailed),
    OperationCancelled.kind: (OperationCancelled, CommandFailed),
    OperationRejected.kind: (OperationRejected, CommandRefused),
    OperationExpired.kind: (OperationExpired, CommandRefused),
}

FINAL_KINDS: frozenset[str] = frozenset({OperationSucceeded.kind, *_UNSUCCESSFUL})
"""Kinds of event that end an operation."""


def verdict(final: Event) -> OperationSucceeded:
    """Return what a final event says, or raise `CommandRefused` or `CommandFailed`.

    Raises pydantic's `ValidationError` where the event's data is not what its kind promises.
    """
    if final.kind == OperationSucceeded.kind:
        return OperationSucceeded.model_validate(final.data)
    model, error = _UNSUCCESSFUL[final.kind]
    raise error(model.model_validate(final.data), state=final.kind.removeprefix("operation."))
