"""The verbs of the crash matrix: how each is prepared, what it is asked, and the steps it takes.

A scenario names the steps of its verb for the kind of hypervisor that it runs on, so that every boundary becomes a
test with a name of its own; a run without any death proves that the list is complete.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from support.fleet import World

from agent.messages.commands import (
    InstancePause,
    InstanceReboot,
    InstanceResume,
    InstanceStart,
    InstanceStop,
)
from agent.messages.spec import ImageSource
from agent.messages.verb import CommandData


@dataclass(frozen=True)
class Stage:
    """Where a scenario is played: an agent's host, and an image that it may read."""

    world: World
    host: str
    image: ImageSource
    real: bool
    """QEMU, and not the simulation."""

    async def do(self, data: CommandData, instance_id: str) -> None:
        await self.world.succeed(self.host, data, instance_id, timeout_s=60)


Prepare = Callable[[Stage], Awaitable[str]]
Ask = Callable[[Stage], CommandData]


@dataclass(frozen=True)
class Scenario:
    """One verb in one situation. `prepare` makes the instance; `ends` are the kinds of final event that are right."""

    name: str
    verb: str
    steps: tuple[str, ...]
    prepare: Prepare
    ask: Ask
    ends: frozenset[str] = frozenset({"operation.succeeded"})


async def running(stage: Stage) -> str:
    return await stage.world.create(stage.host)


def after(*commands: CommandData) -> Prepare:
    """A running instance that was given these commands."""

    async def prepare(stage: Stage) -> str:
        instance_id = await running(stage)
        for data in commands:
            await stage.do(data, instance_id)
        return instance_id

    return prepare


STOPPED = after(InstanceStop(force=True))

SCENARIOS = (
    Scenario("start", "instance.start", ("start",), STOPPED, lambda _stage: InstanceStart()),
    Scenario("stop", "instance.stop", ("shutdown", "destroy"), running, lambda _stage: InstanceStop(timeout_s=0)),
    Scenario("stop-force", "instance.stop", ("destroy",), running, lambda _stage: InstanceStop(force=True)),
    Scenario("reboot-hard", "instance.reboot", ("destroy", "start"), running, lambda _stage: InstanceReboot(mode="hard")),
    Scenario("pause", "instance.pause", ("pause",), running, lambda _stage: InstancePause()),
    Scenario("resume", "instance.resume", ("resume",), after(InstancePause()), lambda _stage: InstanceResume()),
)
