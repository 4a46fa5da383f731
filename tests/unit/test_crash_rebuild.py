"""The whole agent dies at every commit and in every driver call of rebuild, rescue, unrescue, soft delete and restore."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.crash import agrees
from support.uploads import Uploads
from support.world import ROUNDS, World, until

from agent.drivers.fake.settings import Fault
from agent.handlers import halt
from agent.messages.commands import InstanceDelete, OperationCancel
from agent.messages.spec import ImageSource
from agent.messages.spec_disks import DataDisk
from agent.messages.verb import CommandData
from agent.messages.verbs_rebuild import (
    InstanceRebuild,
    InstanceRescue,
    InstanceRestore,
    InstanceShelve,
    InstanceUnrescue,
    InstanceUnshelve,
)
from agent.messages.verbs_snapshot import ExportTarget


@pytest.fixture(params=["memory", "sqlite"])
async def world(
    request: pytest.FixtureRequest, tmp_path: Path, no_blocking: object, unannounced: None, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[World]:
    # An undo that is repeated waits this long for a guest that it has started itself before the agent died.
    monkeypatch.setattr(halt, "RESTART_WAIT_S", 1.0)
    (tmp_path / "shelf").mkdir()
    made = await World(tmp_path, store=request.param, exports={"stores": {"shelf": tmp_path / "shelf"}}).open()
    await made.start()
    yield made
    await made.stop()
    await made.close()


def image(world: World, content: bytes = b"another system") -> ImageSource:
    path = world.folder / "images" / "another.raw"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content.ljust(1024 * 1024, b"\0"))
    return ImageSource(url=path.as_uri(), sha256=hashlib.sha256(path.read_bytes()).hexdigest(), format="raw")


VERBS = ("rebuild", "rebuild-stopped", "rescue", "unrescue", "soft-delete", "restore")


def command(world: World, verb: str) -> tuple[CommandData, str]:
    """The command, and the power that it leads to."""
    return {
        "rebuild": (InstanceRebuild(image=image(world)), "running"),
        "rebuild-stopped": (InstanceRebuild(image=image(world)), "stopped"),
        "rescue": (InstanceRescue(image=image(world)), "running"),
        "unrescue": (InstanceUnrescue(force=True), "running"),
        "soft-delete": (InstanceDelete(restore_within_s=3600), "stopped"),
        "restore": (InstanceRestore(), "running"),
    }[verb]


async def prepared(world: World, verb: str) -> str:
    instance_id = await world.create("vm", start=verb != "rebuild-stopped")
    before = {"unrescue": InstanceRescue(image=image(world)), "restore": InstanceDelete(restore_within_s=3600)}.get(verb)
    if before is not None:
        assert (await world.do(before, instance_id=instance_id)).kind == "operation.succeeded"
    await world.quiet()
    return instance_id


async def situation(world: World, instance_id: str) -> tuple[bool, bool, str | None, list[str]]:
    """Whether rescued and soft-deleted, the root disk's image, and the disks beside it: the same in every place."""
    record = world.agent.ctx.instances.get(instance_id)
    info = await world.ask(world.driver.get, instance_id)
    assert (info.life, info.spec) == (record.life, record.spec)
    hypervisor = world.driver._hypervisor
    disk = hypervisor.disks.get(instance_id)
    source = record.spec.root_disk.image
    assert disk is not None
    assert disk.image_sha256 == (source.sha256 if source is not None else None)
    life = record.life
    return life.rescue is not None, life.soft_delete is not None, disk.image_sha256, [name for name in hypervisor.disks.all(instance_id) if name not in record.spec.disks_by_name()]


async def expect_done(world: World, verb: str, instance_id: str) -> None:
    rescued, deleted, sha256, sides = await situation(world, instance_id)
    assert (rescued, deleted) == (verb == "rescue", verb == "soft-delete")
    assert sha256 == (image(world).sha256 if verb.startswith("rebuild") else None)
    assert sides == (["rescue_disk"] if verb == "rescue" else [])
    record = world.agent.ctx.instances.get(instance_id)
    wanted = {"soft-delete": "deleted", "rebuild-stopped": "stopped"}.get(verb, "running")
    assert record.desired == wanted


async def expect_untouched(world: World, verb: str, instance_id: str) -> None:
    rescued, deleted, sha256, sides = await situation(world, instance_id)
    assert (rescued, deleted, sha256) == (verb == "unrescue", verb == "restore", None)
    assert sides == (["rescue_disk"] if verb == "unrescue" else [])
    record = world.agent.ctx.instances.get(instance_id)
    assert record.desired == {"restore": "deleted", "rebuild-stopped": "stopped"}.get(verb, "running")
    assert await world.power(instance_id) == ("stopped" if verb in {"restore", "rebuild-stopped"} else "running")


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("verb", VERBS)
async def test_dies_at_every_commit(world: World, verb: str, applied: bool) -> None:
    for commits in range(ROUNDS):
        instance_id = await prepared(world, verb)
        data, power = command(world, verb)
        world.cut.after(commits, applied=applied)
        operation_id = world.send(data, instance_id=instance_id)
        died = await world.cut_or_final(operation_id)
        await world.crash()
        await world.start()
        await world.final(operation_id)
        await agrees(world, operation_id, instance_id, power)
        await expect_done(world, verb, instance_id)
        await world.do(InstanceDelete(), instance_id=instance_id)
        await world.quiet()
        assert world.owned_files() == []
        if not died:
            return
    raise AssertionError("there were more commits than this test has rounds")


async def test_a_rescue_that_is_cancelled_at_its_end_leaves_what_is_wanted_as_it_was(world: World) -> None:
    instance_id = await world.create("vm", start=False)
    world.driver.inject(Fault(call="start", hang_s=60, times=1))
    operation_id = world.send(InstanceRescue(image=image(world)), instance_id=instance_id)
    await until(lambda: (one := world.agent._runner.find(operation_id)) is not None and one.operation is not None and one.operation._index == 5)
    assert (await world.do(OperationCancel(operation_id=operation_id))).kind == "operation.succeeded"
    await world.ask(world.driver.clear_faults)
    assert (await world.final(operation_id)).kind == "operation.cancelled"
    await world.quiet()
    await expect_untouched(world, "rebuild-stopped", instance_id)


def shelve(name: str = "one") -> InstanceShelve:
    return InstanceShelve(target=ExportTarget(store="shelf", name=name))


def exports(world: World) -> list[str]:
    """What is in the store, with all that is half done there, and in the staging folder."""
    staging = world.folder / "state" / "exports"
    return sorted(path.name for folder in (world.folder / "shelf", staging) if folder.is_dir() for path in folder.iterdir())


async def shelved(world: World, instance_id: str, wanted: bool) -> None:
    """Everything says that it is shelved, or that it is not."""
    record = world.agent.ctx.instances.get(instance_id)
    info = await world.ask(world.driver.get, instance_id)
    disks = list(world.driver._hypervisor.disks.all(instance_id))
    used = world.agent.ctx.capacity.inventory([record], [])["VCPU"].used
    kept = {record.id: record for record in await world.cut.instances()}
    assert kept == {instance_id: record}
    assert info.life == record.life
    assert record.observed == info.power
    assert len(world.driver._hypervisor.disks.all(instance_id)) == (0 if wanted else 2)
    if wanted:
        assert record.life.shelf is not None
        assert not record.life.shelf.returning
        assert (disks, used, info.power, record.desired) == ([], 0, "stopped", "stopped")
        assert exports(world) == ["one-data.qcow2", "one-data.qcow2.sha256", "one.qcow2", "one.qcow2.sha256"]
    else:
        assert record.life.shelf is None
        assert (disks, used, info.power, record.desired) == (["root", "data"], 1, "running", "running")
        assert exports(world) == []


async def with_two_disks(world: World) -> str:
    return await world.create("vm", disks=[DataDisk(kind="data", name="data", size_mib=64)])


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("verb", ["shelve", "unshelve"])
async def test_the_shelf_at_every_commit(world: World, verb: str, applied: bool) -> None:
    for commits in range(ROUNDS):
        instance_id = await with_two_disks(world)
        if verb == "unshelve":
            assert (await world.do(shelve(), instance_id=instance_id)).kind == "operation.succeeded"
        await world.quiet()
        world.cut.after(commits, applied=applied)
        operation_id = world.send(shelve() if verb == "shelve" else InstanceUnshelve(), instance_id=instance_id)
        died = await world.cut_or_final(operation_id)
        await world.crash()
        await world.start()
        await world.final(operation_id)
        await world.quiet()
        assert [event.kind for event in world.finals(operation_id)] == ["operation.succeeded"], world.of(operation_id)
        await shelved(world, instance_id, verb == "shelve")
        world.check_sequence()
        await world.do(InstanceDelete(), instance_id=instance_id)
        await world.quiet()
        assert world.owned_files() == []
        assert exports(world) == []
        if not died:
            return
    raise AssertionError("there were more commits than this test has rounds")


@pytest.mark.parametrize(
    ("verb", "call"),
    [
        ("shelve", "export_disks"),
        ("shelve", "define"),
        ("unshelve", "import_disk"),
        ("unshelve", "create_storage"),
        ("unshelve", "define"),
        ("unshelve", "start"),
    ],
)
async def test_the_shelf_when_a_call_fails(world: World, verb: str, call: str) -> None:
    for commits in (None, 2, 4, 6, 8, 10):
        instance_id = await with_two_disks(world)
        if verb == "unshelve":
            await world.do(shelve(), instance_id=instance_id)
        await world.quiet()
        world.driver.inject(Fault(call=call, error="internal", times=1))
        if commits is not None:
            world.cut.after(commits, applied=commits % 4 == 0)
        operation_id = world.send(shelve() if verb == "shelve" else InstanceUnshelve(), instance_id=instance_id)
        if await world.cut_or_final(operation_id):
            await world.crash()
            await world.start()
        world.cut.after(1_000_000, applied=False)
        final = await world.final(operation_id)
        await world.quiet()
        assert len(world.finals(operation_id)) == 1
        await shelved(world, instance_id, (final.kind == "operation.succeeded") == (verb == "shelve"))
        await world.do(InstanceDelete(), instance_id=instance_id)
        await world.quiet()
        assert world.owned_files() == []
        assert exports(world) == []


async def test_an_export_that_was_changed_is_refused(world: World) -> None:
    instance_id = await with_two_disks(world)
    await world.do(shelve(), instance_id=instance_id)
    export = world.folder / "shelf" / "one-data.qcow2"
    export.write_bytes(export.read_bytes() + b"more")
    final = await world.do(InstanceUnshelve(), instance_id=instance_id)
    assert (final.kind, final.data["error"]["code"]) == ("operation.failed", "image_checksum_mismatch")
    await world.quiet()
    await shelved(world, instance_id, True)


async def test_an_export_on_a_server_needs_no_signature(tmp_path: Path, no_blocking: object) -> None:
    """Where every image must be signed too: the agent knows the sha256 of what it made itself."""
    world = await World(tmp_path, images={"require_signature": True}, exports={"allowed_hosts": ["127.0.0.1"]}).open()
    await world.start()
    async with Uploads() as server:
        instance_id = await with_two_disks(world)
        target = ExportTarget(url=server.url("{disk}.qcow2"))
        assert (await world.do(InstanceShelve(target=target), instance_id=instance_id)).kind == "operation.succeeded"
        assert set(server.received) == {"root.qcow2", "data.qcow2"}
        done = await world.do(InstanceUnshelve(), instance_id=instance_id)
        assert done.kind == "operation.succeeded", done.data
        await world.quiet()
        assert world.agent.ctx.instances.get(instance_id).life.shelf is None
        assert server.received == {}
    await world.stop()
    await world.close()


async def test_an_unshelve_needs_room(world: World) -> None:
    """While it is shelved others may take its place; when it returns it must fit again."""
    instance_id = await with_two_disks(world)
    await world.do(shelve(), instance_id=instance_id)
    world.agent.ctx.capacity.host = replace(world.agent.ctx.capacity.host, memory_mib=1000)
    await world.create("other")
    final = await world.do(InstanceUnshelve(), instance_id=instance_id)
    assert (final.kind, final.data["error"]["code"]) == ("operation.rejected", "does_not_fit")
    await shelved_beside(world, instance_id)


async def shelved_beside(world: World, instance_id: str) -> None:
    life = world.agent.ctx.instances.get(instance_id).life
    assert life.shelf is not None
    assert not life.shelf.returning


CALLS = {
    "rebuild": ["prepare_rebuild", "shutdown", "define", "apply_rebuild", "start", "get"],
    "rescue": ["create_rescue_disk", "shutdown", "define", "start", "get"],
    "unrescue": ["destroy", "define", "remove_rescue_disk", "start"],
    "soft-delete": ["shutdown", "define"],
    "restore": ["define", "start"],
}
PAIRS = [(verb, call) for verb, calls in CALLS.items() for call in calls]


@pytest.mark.parametrize(("verb", "call"), PAIRS)
async def test_dies_in_every_driver_call(world: World, verb: str, call: str) -> None:
    instance_id = await prepared(world, verb)
    data, power = command(world, verb)
    world.driver.inject(Fault(call=call, hang_s=30, times=1))
    operation_id = world.send(data, instance_id=instance_id)
    plan = world.driver._plan
    await until(lambda: all(armed.left == 0 for armed in plan._armed) or world.finals(operation_id))
    await world.crash()
    await world.start()
    await world.final(operation_id)
    await agrees(world, operation_id, instance_id, power)
    await expect_done(world, verb, instance_id)


FAILS = [(verb, call) for verb, call in PAIRS if call not in {"apply_rebuild", "remove_rescue_disk"}]
AFTER_RETURN = {("rebuild", "start"), ("unrescue", "start"), ("rebuild", "get")}


@pytest.mark.parametrize(("verb", "call"), [pair for pair in FAILS if pair not in AFTER_RETURN])
async def test_a_failure_is_taken_back(world: World, verb: str, call: str) -> None:
    """Before the point of no return: the old guest comes back as it was, also where the agent dies meanwhile."""
    for commits in (None, 1, 2, 3, 4, 5, 6, 7, 8):
        instance_id = await prepared(world, verb)
        data, _ = command(world, verb)
        world.driver.inject(Fault(call=call, error="internal", times=1))
        if commits is not None:
            world.cut.after(commits, applied=commits % 2 == 0)
        operation_id = world.send(data, instance_id=instance_id)
        if await world.cut_or_final(operation_id):
            await world.crash()
            await world.start()
        world.cut.after(1_000_000, applied=False)
        final = await world.final(operation_id)
        await world.quiet()
        assert len(world.finals(operation_id)) == 1
        if final.kind == "operation.succeeded":  # the fault died with the agent
            await expect_done(world, verb, instance_id)
        else:
            assert final.kind in {"operation.failed", "operation.rejected"}
            await expect_untouched(world, verb, instance_id)
        await world.do(InstanceDelete(), instance_id=instance_id)
        await world.quiet()
        assert world.owned_files() == []


@pytest.mark.parametrize("verb", ["rebuild", "rescue", "soft-delete"])
async def test_a_cancel_while_the_guest_shuts_down(world: World, verb: str) -> None:
    """The guest obeys too late: it is started again all the same."""
    instance_id = await world.create("vm", labels={"fake.guest-shutdown-s": "0.3"})
    data, _ = command(world, verb)
    operation_id = world.send(data, instance_id=instance_id)
    domain = world.driver._hypervisor.domains.get(instance_id)
    assert domain is not None
    await until(lambda: "shutdown" in domain.pending)
    await world.do(OperationCancel(operation_id=operation_id))
    final = await world.final(operation_id)
    assert (final.kind, final.data["error"]["code"]) == ("operation.cancelled", "cancelled")
    await world.quiet()
    await expect_untouched(world, verb, instance_id)
    assert "shutdown" not in domain.pending
