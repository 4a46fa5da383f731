"""Every verb in every situation of an instance: what is refused, by which name, and what goes through."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from support.world import World

from agent.handlers.states import ALLOWED, FORBIDDEN, guarded, is_allowed, situation_of
from agent.messages.commands import (
    COMMANDS,
    InstanceDelete,
    InstancePause,
    InstanceReboot,
    InstanceResume,
    InstanceStart,
    InstanceStop,
)
from agent.messages.life import ORDINARY, Life, PendingResize, Rescue, Shelf, Sizes, SoftDelete
from agent.messages.spec import ImageSource
from agent.messages.verb import CommandData
from agent.messages.verbs_rebuild import (
    InstanceRebuild,
    InstanceRescue,
    InstanceRestore,
    InstanceShelve,
    InstanceUnrescue,
    InstanceUnshelve,
)
from agent.messages.verbs_snapshot import ExportTarget, InstanceExport, SnapshotCreate
from agent.store.base import Change

AT = "2030-01-02T03:04:05Z"
IMAGE = ImageSource(url="file:///nowhere", sha256=hashlib.sha256(b"").hexdigest(), format="raw")
TARGET = ExportTarget(store="none", name="one")

LIVES: dict[str, Life] = {
    "soft_deleted": Life(soft_delete=SoftDelete.model_validate({"restore_until": AT, "was_running": False})),
    "shelved": Life(shelf=Shelf.model_validate({"disks": [], "since": AT, "was_running": False})),
    "rescued": Life(rescue=Rescue.model_validate({"image": IMAGE, "since": AT, "was_running": False})),
    "resizing": Life(resize=PendingResize(old=Sizes(vcpus=1, memory_mib=256))),
    "ordinary": ORDINARY,
}
CODES = {
    "soft_deleted": "instance_soft_deleted",
    "shelved": "instance_shelved",
    "rescued": "instance_rescued",
    "resizing": "resize_pending",
}
VERBS: dict[str, CommandData] = {
    "start": InstanceStart(),
    "stop": InstanceStop(force=True),
    "reboot": InstanceReboot(mode="hard"),
    "pause": InstancePause(),
    "resume": InstanceResume(),
    "rebuild": InstanceRebuild(image=IMAGE),
    "rescue": InstanceRescue(image=IMAGE),
    "unrescue": InstanceUnrescue(),
    "shelve": InstanceShelve(target=TARGET),
    "unshelve": InstanceUnshelve(),
    "restore": InstanceRestore(),
    "export": InstanceExport(target=TARGET),
    "snapshot": SnapshotCreate(name="one"),
    "delete": InstanceDelete(),
}
PASSES: dict[str, set[str]] = {
    "soft_deleted": {"restore", "delete"},
    "shelved": {"unshelve", "delete"},
    "rescued": {"start", "stop", "reboot", "pause", "resume", "unrescue", "delete"},
    "resizing": set(VERBS) - {"rebuild", "rescue", "shelve"},
    "ordinary": set(VERBS),
}


async def test_the_whole_table(world: World) -> None:
    """Through the whole agent: what the situation forbids is rejected by its name, all else has another end."""
    seen: dict[str, set[str]] = {}
    for situation, life in LIVES.items():
        seen[situation] = set()
        for verb, data in VERBS.items():
            instance_id = await world.create("vm", start=False)
            record = world.agent.ctx.instances.update(instance_id, life=life)
            await world.agent.ctx.journal.commit(Change(instances=[record]))
            final = await world.do(data, instance_id=instance_id)
            code = final.data.get("error", {}).get("code")
            if code is None or code != CODES.get(situation):
                seen[situation].add(verb)
            else:
                assert final.kind == "operation.rejected"
                assert world.agent.ctx.instances.get(instance_id).life == life
                assert await world.power(instance_id) == "stopped"
            if verb != "delete":
                await world.do(InstanceDelete(keep_exports=True), instance_id=instance_id)
    assert seen == PASSES


def test_situations_by_their_weight() -> None:
    assert {name: situation_of(life) for name, life in LIVES.items() if name != "ordinary"} == {
        name: name for name in CODES
    }
    assert situation_of(ORDINARY) is None
    all_at_once: dict[str, Any] = {}
    for name in ("resizing", "rescued", "shelved", "soft_deleted"):
        all_at_once |= LIVES[name].model_dump(exclude_none=True)
        assert situation_of(Life.model_validate(all_at_once)) == name


@pytest.mark.parametrize("situation", list(ALLOWED))
def test_a_verb_that_nobody_thought_of_is_refused(situation: Any) -> None:
    assert not is_allowed("instance.levitate", situation)
    assert is_allowed("instance.delete", situation)


def test_the_table_names_only_verbs_that_exist_or_are_about_to() -> None:
    known = {command.verb for command in COMMANDS}
    about_to = {"instance.reset", "instance.trigger-crash-dump", "instance.memory-dump", "instance.set-policy"}
    assert {verb for table in (ALLOWED, FORBIDDEN) for verbs in table.values() for verb in verbs} <= known | about_to


async def test_reads_are_never_guarded(world: World) -> None:
    routes = world.agent._registry
    for verb in ("instance.show", "instance.list", "console.log", "snapshot.list"):
        assert guarded(routes[verb]) is routes[verb]


async def test_the_answer_when_there_is_nothing_to_end(world: World) -> None:
    instance_id = await world.create("vm")
    ends = {
        "instance_not_rescued": InstanceUnrescue(),
        "instance_not_shelved": InstanceUnshelve(),
        "instance_not_soft_deleted": InstanceRestore(),
        "delete_not_due": InstanceDelete(if_overdue=True),
    }
    for code, data in ends.items():
        final = await world.do(data, instance_id=instance_id)
        assert (final.kind, final.data["error"]["code"]) == ("operation.rejected", code)
    assert await world.power(instance_id) == "running"
    assert (await world.do(InstanceDelete(restore_within_s=60), instance_id=instance_id)).kind == "operation.succeeded"
    final = await world.do(InstanceDelete(restore_within_s=60), instance_id=instance_id)
    assert (final.kind, final.data["error"]["code"]) == ("operation.rejected", "instance_soft_deleted")
    final = await world.do(InstanceDelete(if_overdue=True), instance_id=instance_id)
    assert final.data["error"]["code"] == "delete_not_due"


async def test_a_restore_before_the_overdue_delete_wins(world: World) -> None:
    """The delete at the deadline looks again: a restore that came first is not undone by it."""
    instance_id = await world.create("vm")
    await world.do(InstanceDelete(restore_within_s=0.01), instance_id=instance_id)
    restored = world.send(InstanceRestore(), instance_id=instance_id)
    overdue = world.send(InstanceDelete(if_overdue=True), instance_id=instance_id)
    assert (await world.final(restored)).kind == "operation.succeeded"
    assert (await world.final(overdue)).data["error"]["code"] == "delete_not_due"
    assert await world.power(instance_id) == "running"


async def test_snapshots_stand_in_the_way_of_what_removes_their_disks(world: World) -> None:
    instance_id = await world.create("vm")
    assert (await world.do(SnapshotCreate(name="one"), instance_id=instance_id)).kind == "operation.succeeded"
    final = await world.do(InstanceRebuild(image=IMAGE), instance_id=instance_id)
    assert (final.kind, final.data["error"]["code"]) == ("operation.rejected", "instance_has_snapshots")
