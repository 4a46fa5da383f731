"""The driver contract: exports and snapshots."""

from __future__ import annotations

from pathlib import Path

import pytest
from driver_case import Difference, DriverCase, Instance, make_spec

from agent.drivers.base import CallContext, Driver
from agent.drivers.verbs.snapshot import ExportRequest, RevertRequest, SnapshotRequest
from agent.errors import Cancelled, FailedPrecondition, NotFound, Unsupported
from agent.messages.life import ORDINARY
from agent.messages.types import DiskFormat

CALL = CallContext()


def lacks(driver: Driver, verb: str, instance: Instance) -> bool:
    """Whether the driver has not announced a verb; then it must refuse it by name."""
    if verb in driver.capabilities().verbs:
        return False
    with pytest.raises(Unsupported):
        driver.list_snapshots(instance.id)
    with pytest.raises(Unsupported):
        driver.create_snapshot(instance.id, instance.spec, SnapshotRequest("one"), CALL)
    with pytest.raises(Unsupported):
        driver.export_disks(instance.id, instance.spec, ExportRequest({"root": Path("/x/y")}, "qcow2"), CALL)
    return True


class SnapshotContract:
    """Exports and snapshots."""

    @pytest.mark.parametrize("live", [True, False], ids=["live", "cold"])
    def test_export(self, driver: Driver, instance: Instance, tmp_path: Path, live: bool) -> None:
        instance.create(start=live)
        if lacks(driver, "instance.export", instance):
            return
        folder = tmp_path / "staged"
        folder.mkdir()
        before = driver.details(instance.id)
        seen: list[tuple[int, int]] = []
        kinds: tuple[DiskFormat, ...] = ("qcow2", "raw")
        for kind in kinds:
            target = folder / f"root.{kind}"
            request = ExportRequest({"root": target}, kind, report=lambda done, total: seen.append((done, total)))
            for _ in range(2):
                made = driver.export_disks(instance.id, instance.spec, request, CALL)
            assert (made["root"].live, made["root"].virtual_size_bytes) == (live, 16 << 20)
            assert target.read_bytes()[:4] == (b"QFI\xfb" if kind == "qcow2" else bytes(4))
        assert (folder / "root.raw").stat().st_size == 16 << 20
        assert all(0 <= done <= total for done, total in seen)
        assert sorted(path.name for path in folder.iterdir()) == ["root.qcow2", "root.raw"]
        assert driver.details(instance.id) == before
        assert instance.power == ("running" if live else "stopped")
        driver.abort_export(instance.id, folder)

    def test_cancelled_export(self, driver: Driver, instance: Instance, tmp_path: Path) -> None:
        instance.create(start=True)
        if lacks(driver, "instance.export", instance):
            return
        request = ExportRequest({"root": tmp_path / "root.qcow2"}, "qcow2")
        with pytest.raises(Cancelled):
            driver.export_disks(instance.id, instance.spec, request, CallContext(cancelled=lambda: True))
        # Nothing goes on behind its back: another can begin at once.
        driver.export_disks(instance.id, instance.spec, request, CALL)

    @pytest.mark.parametrize("booted", [2, 1], ids=["booted-with", "plugged"])
    def test_vcpus_that_can_be_unplugged(self, driver: Driver, driver_case: DriverCase, booted: int) -> None:
        instance = Instance(driver, make_spec(vcpus=booted, max_vcpus=2)).create(start=True)
        if lacks(driver, "snapshot.create", instance):
            return
        driver.request_vcpus(instance.id, 2)
        spec = instance.spec.model_copy(update={"vcpus": 2})
        if not driver_case.has(Difference.PLUGGED_VCPUS_HAVE_NO_SNAPSHOT):
            driver.create_snapshot(instance.id, spec, SnapshotRequest("one", running=True), CALL)
            driver.revert_snapshot(instance.id, spec, RevertRequest("one", 1, ORDINARY, None, "a"), CALL)
            assert instance.power == "running"
            return
        # A snapshot that could not be reverted to would cost the guest its memory when somebody relies on it.
        with pytest.raises(Unsupported) as caught:
            driver.create_snapshot(instance.id, spec, SnapshotRequest("one", running=True), CALL)
        assert caught.value.code == "snapshot_unsupported"
        assert instance.power == "running"
        driver.delete_snapshot(instance.id, spec, "one", CALL)  # what the operation does then
        assert (driver.list_snapshots(instance.id), instance.power) == ([], "running")
        driver.destroy(instance.id)
        driver.create_snapshot(instance.id, spec, SnapshotRequest("off"), CALL)
        driver.revert_snapshot(instance.id, spec, RevertRequest("off", 1, ORDINARY, None, "b"), CALL)
        driver.delete_snapshot(instance.id, spec, "off", CALL)

    def test_snapshots(self, driver: Driver, instance: Instance) -> None:
        instance.create(generation=3, start=True)
        if lacks(driver, "snapshot.create", instance):
            return
        for _ in range(2):
            made = driver.create_snapshot(instance.id, instance.spec, SnapshotRequest("one", "a word", running=True), CALL)
            assert (made.name, made.memory, made.power, made.description) == ("one", True, "running", "a word")
            assert made.spec == instance.spec
        assert instance.power == "running"
        driver.destroy(instance.id)
        cold = driver.create_snapshot(instance.id, instance.spec, SnapshotRequest("two"), CALL)
        assert (cold.memory, cold.power, cold.description) == (False, "stopped", None)
        assert [info.name for info in driver.list_snapshots(instance.id)] == ["one", "two"]

        driver.define(instance.id, instance.spec, generation=7)
        request = RevertRequest("one", 7, ORDINARY, None, "operation/1")
        driver.revert_snapshot(instance.id, instance.spec, request, CALL)
        info = driver.get(instance.id)
        assert (info.power, info.generation, info.spec) == ("running", 7, instance.spec)
        # Done once: what the guest did since is kept, here that it ended.
        driver.destroy(instance.id)
        driver.revert_snapshot(instance.id, instance.spec, request, CALL)
        assert instance.power == "stopped"
        driver.define(instance.id, instance.spec, generation=7)
        driver.revert_snapshot(instance.id, instance.spec, RevertRequest("one", 8, ORDINARY, False, "operation/2"), CALL)
        assert (instance.power, driver.get(instance.id).generation) == ("paused", 8)
        driver.revert_snapshot(instance.id, instance.spec, RevertRequest("two", 8, ORDINARY, True, "operation/3"), CALL)
        assert instance.power == "running"
        driver.revert_snapshot(instance.id, instance.spec, RevertRequest("two", 8, ORDINARY, None, "operation/4"), CALL)
        assert instance.power == "stopped"

        with pytest.raises(NotFound) as caught:
            driver.revert_snapshot(instance.id, instance.spec, RevertRequest("no", 8, ORDINARY, None, "x"), CALL)
        assert caught.value.code == "unknown_snapshot"
        for _ in range(2):
            driver.delete_snapshot(instance.id, instance.spec, "one", CALL)
        assert [info.name for info in driver.list_snapshots(instance.id)] == ["two"]
        # A snapshot does not keep an instance from being removed.
        instance.remove()
        with pytest.raises(NotFound):
            driver.list_snapshots(instance.id)

    def test_export_without_disk(self, driver: Driver, instance: Instance, tmp_path: Path) -> None:
        driver.define(instance.id, instance.spec, generation=1)
        if lacks(driver, "instance.export", instance):
            return
        with pytest.raises(FailedPrecondition) as caught:
            driver.export_disks(instance.id, instance.spec, ExportRequest({"root": tmp_path / "x.qcow2"}, "qcow2"), CALL)
        assert caught.value.code == "disk_missing"
