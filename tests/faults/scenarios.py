"""The verbs of the crash matrix: how each is prepared, what it is asked, and the steps it takes.

A scenario names the steps of its verb for the kind of hypervisor that it runs on, so that every boundary becomes a
test with a name of its own; a run without any death proves that the list is complete.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from support.fleet import World

from agent.messages.commands import (
    InstanceDelete,
    InstancePause,
    InstanceReboot,
    InstanceResume,
    InstanceStart,
    InstanceStop,
)
from agent.messages.spec import ImageSource, RootDisk
from agent.messages.spec_disks import DataDisk
from agent.messages.spec_limits import DiskLimits
from agent.messages.verb import CommandData
from agent.messages.verbs_memory import (
    InstanceMemoryDump,
    InstanceReset,
    InstanceSetPolicy,
    InstanceSuspend,
    InstanceTriggerCrashDump,
)
from agent.messages.verbs_rebuild import (
    InstanceRebuild,
    InstanceRescue,
    InstanceRestore,
    InstanceShelve,
    InstanceUnrescue,
    InstanceUnshelve,
)
from agent.messages.verbs_resize import (
    InstanceConfirmResize,
    InstanceResize,
    InstanceRevertResize,
    InstanceSetLimits,
)
from agent.messages.verbs_snapshot import ExportTarget, InstanceExport, SnapshotCreate, SnapshotDelete, SnapshotRevert


@dataclass(frozen=True)
class Stage:
    """Where a scenario is played: an agent's host, and an image that it may read."""

    world: World
    host: str
    image: ImageSource
    real: bool
    """QEMU, and not the simulation."""

    async def do(self, data: CommandData, instance_id: str) -> None:
        await self.world.succeed(self.host, data, instance_id)


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


DEAF = {"labels": {"fake.guest-shutdown-s": "never"}}
"""A simulated guest that no more listens to its power button than the real one, which has no system to boot."""


async def running(stage: Stage) -> str:
    return await stage.world.create(stage.host, **DEAF)


def after(*commands: CommandData) -> Prepare:
    """A running instance that was given these commands."""

    async def prepare(stage: Stage) -> str:
        instance_id = await running(stage)
        for data in commands:
            await stage.do(data, instance_id)
        return instance_id

    return prepare


STOPPED = after(InstanceStop(force=True))
TO_STORE = ExportTarget(store="main", name="copy")
UNSHARED = {"disks": [DataDisk(kind="data", name="data", size_mib=1)]}


def with_room(*commands: CommandData) -> Prepare:
    """As `after`, of an instance that a live resize can make larger."""

    async def prepare(stage: Stage) -> str:
        instance_id = await stage.world.create(stage.host, max_vcpus=2, balloon=True)
        for data in commands:
            await stage.do(data, instance_id)
        return instance_id

    return prepare


async def on_an_image(stage: Stage) -> str:
    return await stage.world.create(stage.host, root_disk=RootDisk(size_mib=1, image=stage.image), **UNSHARED)


async def rescued(stage: Stage) -> str:
    instance_id = await on_an_image(stage)
    await stage.do(InstanceRescue(image=stage.image, force=True), instance_id)
    return instance_id


async def shelved(stage: Stage) -> str:
    instance_id = await on_an_image(stage)
    await stage.do(InstanceShelve(target=TO_STORE, force=True), instance_id)
    return instance_id


async def with_a_resize(stage: Stage) -> str:
    instance_id = await running(stage)
    await stage.do(InstanceResize(vcpus=2, timeout_s=0), instance_id)
    return instance_id


HALT = ("look", "halt")
_POWER = (
    Scenario("start", "instance.start", ("start",), STOPPED, lambda _stage: InstanceStart()),
    Scenario("stop", "instance.stop", ("shutdown", "destroy"), running, lambda _stage: InstanceStop(timeout_s=0)),
    Scenario("stop-force", "instance.stop", ("destroy",), running, lambda _stage: InstanceStop(force=True)),
    Scenario("reboot-hard", "instance.reboot", ("destroy", "start"), running, lambda _stage: InstanceReboot(mode="hard")),
    Scenario("pause", "instance.pause", ("pause",), running, lambda _stage: InstancePause()),
    Scenario("resume", "instance.resume", ("resume",), after(InstancePause()), lambda _stage: InstanceResume()),
)
_MEMORY = (
    Scenario("suspend", "instance.suspend", ("suspend",), running, lambda _stage: InstanceSuspend()),
    Scenario("restore", "instance.start", ("restore",), after(InstanceSuspend()), lambda _stage: InstanceStart()),
    Scenario("reset", "instance.reset", ("reset",), running, lambda _stage: InstanceReset()),
    Scenario("nmi", "instance.trigger-crash-dump", ("interrupt",), running, lambda _stage: InstanceTriggerCrashDump()),
    Scenario("dump", "instance.memory-dump", ("dump",), running, lambda _stage: InstanceMemoryDump()),
    Scenario("policy", "instance.set-policy", ("define",), running, lambda _stage: InstanceSetPolicy(on_stop="restart")),
)
_RESIZE = (
    Scenario(
        "resize", "instance.resize", ("plan", "claim", "shutdown", "stop", "grow-root", "define", "start"), running,
        lambda _stage: InstanceResize(vcpus=2, disks_mib={"root": 2}, timeout_s=0),
    ),
    Scenario("confirm-resize", "instance.confirm-resize", ("define",), with_a_resize, lambda _stage: InstanceConfirmResize()),
    Scenario(
        "revert-resize", "instance.revert-resize", ("plan", "claim", "shutdown", "stop", "define", "start"), with_a_resize,
        lambda _stage: InstanceRevertResize(timeout_s=0),
    ),
    Scenario(
        "resize-live", "instance.resize", ("plan", "claim", "grow-root", "define"), with_room(),
        lambda _stage: InstanceResize(mode="live", disks_mib={"root": 2}),
    ),
    Scenario(
        "limits", "instance.set-limits", ("live", "define"), running,
        lambda _stage: InstanceSetLimits(disks={"root": DiskLimits(total_iops=100)}),
    ),
)
_REBUILD = (
    Scenario(
        "rebuild", "instance.rebuild", ("look", "image", "make", "halt", "define", "swap", "start"), on_an_image,
        lambda stage: InstanceRebuild(image=stage.image, force=True),
    ),
    Scenario(
        "rescue", "instance.rescue", ("look", "image", "disk", "halt", "define", "start"), on_an_image,
        lambda stage: InstanceRescue(image=stage.image, force=True),
    ),
    Scenario(
        "unrescue", "instance.unrescue", (*HALT, "define", "disk", "start"), rescued,
        lambda _stage: InstanceUnrescue(force=True),
    ),
    Scenario(
        "shelve", "instance.shelve", (*HALT, "export", "publish-root", "publish-data", "export-clean", "define", "disks"),
        on_an_image, lambda _stage: InstanceShelve(target=TO_STORE, force=True),
    ),
    Scenario(
        "unshelve", "instance.unshelve", ("claim", "import-root", "import-data", "storage", "define", "start", "exports"),
        shelved, lambda _stage: InstanceUnshelve(),
    ),
    Scenario(
        "soft-delete", "instance.delete", ("look", "shutdown", "halt", "define"), running,
        lambda _stage: InstanceDelete(restore_within_s=3600, timeout_s=0),
    ),
    Scenario(
        "undelete", "instance.restore", ("look", "define", "start"), after(InstanceDelete(restore_within_s=3600, timeout_s=0)),
        lambda _stage: InstanceRestore(),
    ),
)
_SNAPSHOT = (
    Scenario("snapshot", "snapshot.create", ("snapshot-running",), running, lambda _stage: SnapshotCreate(name="one")),
    Scenario(
        "revert", "snapshot.revert", ("revert", "define"), after(SnapshotCreate(name="one")),
        lambda _stage: SnapshotRevert(name="one"),
    ),
    Scenario(
        "drop", "snapshot.delete", ("remove",), after(SnapshotCreate(name="one")), lambda _stage: SnapshotDelete(name="one")
    ),
    Scenario(
        "export", "instance.export", ("export", "publish-root", "export-clean"), running,
        lambda _stage: InstanceExport(target=TO_STORE),
    ),
)

SCENARIOS = (*_POWER, *_MEMORY, *_RESIZE, *_REBUILD, *_SNAPSHOT)
