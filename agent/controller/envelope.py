"""Renders commands as the agent reads them. Pure: no bus, no clock but the one that stamps `time`."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, TypedDict, Unpack

from pydantic import ValidationError

from agent.errors import InvalidArgument
from agent.messages import routing
from agent.messages.commands import ENVELOPES, MAX_COMMAND_BYTES, type_of
from agent.messages.verb import CommandData


class CommandOptions(TypedDict, total=False):
    """What may go with any command.

    `instance_id` is its subject. `generation`: refused as stale if lower than the instance's. `expires_in_s`:
    refused as expired if work has not begun by then. `traceparent`: W3C trace context, carried through.
    """

    instance_id: str | None
    generation: int | None
    expires_in_s: float | None
    traceparent: str | None


def render_command(
    data: CommandData,
    *,
    id: str,
    source: str,
    host: str,
    progress: bool = False,
    **options: Unpack[CommandOptions],
) -> bytes:
    """Render a command's envelope as JSON.

    A broadcast (`host` is `all`) carries no host, since each agent compares it with its own name. Raises
    `InvalidArgument` naming the fields that the agent would refuse; sending again cannot help.
    """
    now = datetime.now(UTC)
    expires_in_s = options.get("expires_in_s")
    fields: dict[str, Any] = {
        "specversion": "1.0",
        "id": id,
        "source": source,
        "type": type_of(data.verb),
        "time": now,
        "traceparent": options.get("traceparent"),
        "expirytime": None if expires_in_s is None else now + timedelta(seconds=expires_in_s),
        "generation": options.get("generation"),
        "host": None if host == routing.BROADCAST else host,
        "reportprogress": progress,
        "data": data,
    }
    instance_id = options.get("instance_id")
    if instance_id is not None:
        fields["subject"] = instance_id
    try:
        body: bytes = ENVELOPES[type_of(data.verb)](**fields).model_dump_json(exclude_none=True).encode()
    except ValidationError as exc:
        raise InvalidArgument(f"{data.verb}: {_sentence(exc)}") from None
    if len(body) > MAX_COMMAND_BYTES:
        raise InvalidArgument(
            f"the command has {len(body)} bytes; at most {MAX_COMMAND_BYTES} are allowed", code="too_large"
        )
    return body


def _sentence(exc: ValidationError) -> str:
    findings = exc.errors(include_url=False, include_context=False, include_input=False)
    return "; ".join(f"{'.'.join(str(part) for part in f['loc'])}: {f['msg']}" for f in findings)
