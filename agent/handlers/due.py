"""What an instance is due for by the clock: its own deadlines become commands of the agent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime

from agent.core.context import Context
from agent.core.issue import issue
from agent.core.runner import Runner
from agent.handlers import resize, restore
from agent.messages.verb import CommandData
from agent.store.base import InstanceRecord

Due = Callable[[InstanceRecord, datetime], Iterator[tuple[str, CommandData]]]
"""Gives the commands that an instance is due for at a time, each with an id that names its cause."""

SOURCES: tuple[Due, ...] = (resize.due, restore.overdue)
"""One of each family that has deadlines."""


async def issue_due(ctx: Context, runner: Runner, at: datetime) -> None:
    """Give the commands that are due, except for instances that are busy: their turn comes again soon."""
    busy = runner.open.busy_instances()
    for record in ctx.instances.all():
        if record.id in busy:
            continue
        for command_id, data in (command for source in SOURCES for command in source(record, at)):
            await issue(ctx, runner, data, instance_id=record.id, id=command_id)
