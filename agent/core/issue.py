"""Commands that the agent gives itself: what a policy or a deadline asks for.

They are journaled, take their turn in the instance's lane and end in one final event, as any other command. Their ids
say what they are for, so that the same cause never has a second effect.
"""

from __future__ import annotations

import json

import structlog

from agent.core.context import Context, now
from agent.core.runner import Runner
from agent.messages.commands import parse_command, type_of
from agent.messages.verb import CommandData
from agent.store.base import Change, OperationRecord

log = structlog.get_logger("issue")


async def issue(ctx: Context, runner: Runner, data: CommandData, *, instance_id: str | None, id: str) -> bool:
    """Accept a command of the agent's own. False if one with this id was accepted before: nothing happens then.

    `id` must name the cause (`policy/<instance>/<sequence>`, `due/<what>/<when>`). Durable when it returns.
    """
    body = json.dumps(
        {
            "specversion": "1.0",
            "id": id,
            "source": f"compute-agent/{ctx.host}",
            "type": type_of(data.verb),
            **({"subject": instance_id} if instance_id is not None else {}),
            "data": data.model_dump(mode="json"),
        }
    ).encode()
    command = parse_command(body)
    record = OperationRecord(
        id=id,
        verb=data.verb,
        instance_id=instance_id,
        body=body,
        reply_to=None,
        correlation_id=None,
        state="accepted",
        accepted_at=now(),
    )
    if runner.find(id) is not None:
        return False
    (done,) = await ctx.journal.commit(Change(claim=record))
    if done.known is not None:
        return False
    log.info("command.issued", verb=data.verb, operation=id, instance=instance_id)
    runner.submit(record, command)
    return True
