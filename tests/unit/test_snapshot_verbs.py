"""Exports, backups and snapshots on the simulated hypervisor: what is refused, undone, counted and kept."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.world import World, new_id

from agent.drivers.fake.settings import Fault
from agent.errors import Unavailable
from agent.exports import files
from agent.messages.commands import InstanceDelete, InstancePause, InstanceStart, InstanceStop
from agent.messages.events import Event
from agent.messages.spec import RootDisk
from agent.messages.verb import CommandData
from agent.messages.verbs_snapshot import (
    ExportTarget,
    InstanceBackup,
    InstanceExport,
    InstanceListBackups,
    SnapshotCreate,
    SnapshotDelete,
    SnapshotList,
    SnapshotRevert,
)


@pytest.fixture
async def host(tmp_path: Path, no_blocking: object) -> AsyncIterator[World]:
    (tmp_path / "store").mkdir()
    made = await World(
        tmp_path, driver={"keys": ["k"]}, exports={"stores": {"main": str(tmp_path / "store")}},
        snapshots={"max_per_instance": 2},
    ).open()
    await made.start()
    yield made
    await made.stop()
    await made.close()


async def run(world: World, data: CommandData, instance_id: str) -> Event:
    return await world.final(world.send(data, instance_id=instance_id))


async def code(world: World, data: CommandData, instance_id: str) -> str:
    event = await run(world, data, instance_id)
    assert event.kind in ("operation.rejected", "operation.failed"), event.data
    return event.data["error"]["code"]


def stored(world: World) -> list[str]:
    return sorted(path.name for path in (world.folder / "store").iterdir())


def to_store(name: str = "copy") -> ExportTarget:
    return ExportTarget(store="main", name=name)


async def test_an_export_is_published_with_its_checksum(host: World) -> None:
    guest = await host.create("vm")
    event = await run(host, InstanceExport(target=to_store()), guest)
    result = event.data["result"]
    (disk,) = result["disks"]
    path = host.folder / "store" / "copy.qcow2"
    assert result["live"] is True
    assert disk["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (disk["size_bytes"], disk["virtual_size_bytes"]) == (path.stat().st_size, 1024 << 20)
    assert disk["url"] == path.as_uri()
    assert stored(host) == ["copy.qcow2", "copy.qcow2.sha256"]
    assert (host.folder / "store" / "copy.qcow2.sha256").read_text() == f"{disk['sha256']}  copy.qcow2\n"
    assert not list((host.folder / "state" / "exports").iterdir())
    assert await code(host, InstanceExport(target=to_store()), guest) == "export_exists"


@pytest.mark.parametrize(
    ("target", "disks", "wanted"),
    [
        (ExportTarget(store="other", name="x"), ["root"], "export_store_unknown"),
        (ExportTarget(url="http://example.org/x"), ["root"], "export_target_forbidden"),
        (to_store(), ["data"], "unknown_disk"),
    ],
    ids=["store", "url", "disk"],
)
async def test_what_is_not_exported(host: World, target: ExportTarget, disks: list[str], wanted: str) -> None:
    guest = await host.create("vm")
    assert await code(host, InstanceExport(target=target, disks=disks), guest) == wanted
    assert stored(host) == []


@pytest.mark.parametrize("call", ["export_disks", "abort_export"])
async def test_a_failed_export_leaves_nothing(host: World, call: str) -> None:
    guest = await host.create("vm")
    host.driver.inject(Fault(call=call, error="internal", times=1))
    event = await run(host, InstanceExport(target=to_store()), guest)
    assert event.kind == "operation.failed"
    assert event.data["undone"]
    assert stored(host) == []
    assert not list((host.folder / "state" / "exports").glob("*"))


async def test_backups_rotate_only_their_own_series(host: World) -> None:
    guest, other = await host.create("vm"), await host.create("vm-daily")
    names = []
    for _ in range(3):
        event = await run(host, InstanceBackup(series="daily", keep=2, store="main"), guest)
        names.append(event.data["result"]["backup"]["name"])
    # `vm-daily` + `x` begins as `vm` + `daily-x` does: the manifest tells them apart.
    await run(host, InstanceBackup(series="x", keep=1, store="main"), other)
    await run(host, InstanceBackup(series="daily-x", keep=1, store="main"), guest)
    assert event.data["result"]["removed"] == names[:1]
    assert [backup["name"] for backup in event.data["result"]["backups"]] == names[:0:-1]
    listed = (await run(host, InstanceListBackups(series="daily"), guest)).data["result"]["backups"]
    assert [backup["name"] for backup in listed] == names[:0:-1]
    assert len((await run(host, InstanceListBackups(), guest)).data["result"]["backups"]) == 3
    assert len(stored(host)) == 4 * 3
    await run(host, InstanceDelete(), guest)
    # Backups are for when the instance is lost.
    assert len((await run(host, InstanceListBackups(store="main"), guest)).data["result"]["backups"]) == 3


async def test_a_failed_backup_removes_none(host: World) -> None:
    guest = await host.create("vm")
    await run(host, InstanceBackup(series="daily", keep=1, store="main"), guest)
    before = stored(host)
    host.driver.inject(Fault(call="export_disks", error="internal", times=1))
    assert (await run(host, InstanceBackup(series="daily", keep=1, store="main"), guest)).kind == "operation.failed"
    assert stored(host) == before


async def test_rotation_touches_only_what_a_manifest_proves(host: World) -> None:
    guest = await host.create("vm")
    event = await run(host, InstanceBackup(series="daily", keep=1, store="main"), guest)
    name = event.data["result"]["backup"]["name"]
    precious = host.folder / "precious.qcow2"
    precious.write_bytes(b"precious")
    (host.folder / "precious.qcow2.sha256").write_text("0" * 64)
    manifest = host.folder / "store" / f"{name}.backup.json"
    body = json.loads(manifest.read_text())
    body["disks"][0] |= {"url": f"file://{host.folder}/store/../precious.qcow2", "sha256": "0" * 64}
    manifest.write_text(json.dumps(body))
    (host.folder / "store" / "junk.backup.json").write_text("{")
    event = await run(host, InstanceBackup(series="daily", keep=1, store="main"), guest)
    assert event.data["result"]["removed"] == [name]
    assert precious.exists()


async def test_rotation_leaves_an_export_alone_that_a_tampered_manifest_lists(host: World) -> None:
    guest = await host.create("vm")
    target = ExportTarget(store="main", name="vm-daily-20200101T000000.000000Z-mine")
    mine = (await run(host, InstanceExport(target=target), guest)).data["result"]["disks"][0]
    event = await run(host, InstanceBackup(series="daily", keep=1, store="main"), guest)
    body = json.loads((host.folder / "store" / f"{event.data['result']['backup']['name']}.backup.json").read_text())
    # The same bytes, another name: one that is no backup's, and one that is not the disk's.
    for name in ("vm", "vm-daily-20200101T000000.000000Z"):
        body |= {"name": name, "taken_at": "2020-01-01T00:00:00Z"}
        body["disks"][0] |= {"url": mine["url"], "sha256": mine["sha256"]}
        (host.folder / "store" / f"{name}.backup.json").write_text(json.dumps(body))
    await run(host, InstanceBackup(series="daily", keep=1, store="main"), guest)
    assert Path(mine["url"].removeprefix("file://")).is_file()


async def test_what_is_no_plain_file_in_a_store_holds_nothing_up(host: World) -> None:
    guest, store = await host.create("vm"), host.folder / "store"
    os.mkfifo(store / "pipe.backup.json")
    (store / "folder.backup.json").mkdir()
    (store / "link.backup.json").symlink_to(host.folder)
    event = await run(host, InstanceBackup(series="daily", keep=1, store="main"), guest)
    assert event.kind == "operation.succeeded", event.data
    (listed,) = (await run(host, InstanceListBackups(store="main"), guest)).data["result"]["backups"]
    # Nor is a pipe in the place of a checksum waited for: the file is not proven to be ours.
    checksum = store / f"{listed['name']}.qcow2.sha256"
    checksum.unlink()
    os.mkfifo(checksum)
    event = await run(host, InstanceBackup(series="daily", keep=1, store="main"), guest)
    assert event.kind == "operation.succeeded", event.data
    assert (store / f"{listed['name']}.qcow2").exists()


def test_no_link_in_a_store_is_followed(tmp_path: Path) -> None:
    source, precious, store = tmp_path / "source", tmp_path / "precious", tmp_path / "store"
    source.write_bytes(b"export")
    precious.write_bytes(b"precious")
    store.mkdir()
    slot = files.Slot(store / "a.qcow2", "0123456789abcdef")
    (store / ".a.qcow2.sha256.part").symlink_to(precious)
    (store / ".a.qcow2.0123456789abcdef.part").symlink_to(precious)
    slot.publish(source, "0" * 64, lambda _done: None)
    assert slot.checksum.read_text().startswith("0" * 64)
    assert precious.read_bytes() == b"precious"
    other = files.Slot(store / "b.qcow2", "0123456789abcdef")
    (store / ".b.qcow2.0123456789abcdef.own").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Unavailable):
        other.publish(source, "0" * 64, lambda _done: None)
    assert not (tmp_path / "elsewhere").exists()


async def test_a_snapshot_takes_the_guest_back(host: World) -> None:
    guest = await host.create("vm")
    made = await run(host, SnapshotCreate(name="one", description="first"), guest)
    assert made.data["result"]["snapshot"]["memory"] is True
    await run(host, InstanceStop(force=True), guest)
    stopped = await run(host, SnapshotCreate(name="two"), guest)
    assert (stopped.data["result"]["snapshot"]["memory"], stopped.data["result"]["observed"]) == (False, "stopped")
    reverted = (await run(host, SnapshotRevert(name="one"), guest)).data["result"]
    assert (reverted["desired"], reverted["observed"]) == ("running", "running")
    assert await host.power(guest) == "running"
    held = (await run(host, SnapshotRevert(name="one", start=False), guest)).data["result"]
    assert (held["desired"], held["observed"]) == ("paused", "paused")
    cold = (await run(host, SnapshotRevert(name="two", start=True), guest)).data["result"]
    assert (cold["desired"], cold["observed"]) == ("running", "running")
    assert (await run(host, SnapshotRevert(name="two"), guest)).data["result"]["observed"] == "stopped"
    listed = (await run(host, SnapshotList(), guest)).data["result"]["snapshots"]
    assert [(one["name"], one.get("description")) for one in listed] == [("one", "first"), ("two", None)]
    await run(host, SnapshotDelete(name="one"), guest)
    listed = (await run(host, SnapshotList(), guest)).data["result"]["snapshots"]
    assert [one["name"] for one in listed] == ["two"]
    assert (await run(host, InstanceDelete(), guest)).kind == "operation.succeeded"


async def test_refused_snapshots(host: World) -> None:
    guest = await host.create("vm")
    assert await code(host, SnapshotCreate(name="a", memory=False), guest) == "snapshot_unsupported"
    await run(host, InstancePause(), guest)
    assert (await run(host, SnapshotCreate(name="a"), guest)).data["result"]["snapshot"]["power"] == "paused"
    await run(host, InstanceStop(force=True), guest)
    assert await code(host, SnapshotCreate(name="a"), guest) == "snapshot_exists"
    assert await code(host, SnapshotCreate(name="b", memory=True), guest) == "instance_not_running"
    await run(host, SnapshotCreate(name="b"), guest)
    assert await code(host, SnapshotCreate(name="c"), guest) == "snapshot_limit"
    assert await code(host, SnapshotRevert(name="z"), guest) == "unknown_snapshot"
    assert await code(host, SnapshotDelete(name="z"), guest) == "unknown_snapshot"
    assert await code(host, SnapshotList(), new_id()) == "unknown_instance"
    uefi = await host.create("uefi", machine={"firmware": {"type": "uefi"}})
    assert await code(host, SnapshotCreate(name="a"), uefi) == "snapshot_unsupported"
    secret = await host.create("secret", root_disk=RootDisk(size_mib=64, encryption={"key": "k"}))
    assert await code(host, SnapshotCreate(name="a"), secret) == "snapshot_unsupported"
    assert await code(host, InstanceExport(target=to_store()), secret) == "export_unsupported"


async def test_revert_keeps_generation_and_refuses_other_hardware(host: World) -> None:
    guest = await host.create("vm")
    await run(host, SnapshotCreate(name="one"), guest)
    record = host.agent.ctx.instances.get(guest)
    newer = record.spec.model_copy(update={"labels": {"k": "v"}})
    host.agent.ctx.instances.update(guest, spec=newer, generation=9)
    reverted = (await run(host, SnapshotRevert(name="one"), guest)).data["result"]
    assert (reverted["generation"], reverted["spec"]["labels"]) == (9, {"k": "v"})
    info = await host.ask(host.driver.get, guest)
    assert (info.generation, info.spec) == (9, newer)
    host.agent.ctx.instances.update(guest, spec=newer.model_copy(update={"vcpus": 2}))
    event = await run(host, SnapshotRevert(name="one"), guest)
    assert event.data["error"]["code"] == "snapshot_differs"
    assert event.data["error"]["details"]["fields"] == "vcpus"


async def test_a_failed_snapshot_is_removed(host: World) -> None:
    guest = await host.create("vm")
    host.driver.inject(Fault(call="create_snapshot", error="internal", times=1, crash_after=True))
    event = await run(host, SnapshotCreate(name="one"), guest)
    assert (event.kind, event.data["undone"]) == ("operation.failed", True)
    assert (await run(host, SnapshotList(), guest)).data["result"]["snapshots"] == []
    await run(host, InstanceStart(), guest)
    assert await host.power(guest) == "running"
