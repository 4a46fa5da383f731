"""The driver contract: files of instances."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from driver_case import (
    Difference,
    DriverCase,
    Instance,
    files_of,
    make_image,
    make_spec,
)

from agent.drivers.base import CallContext, Driver
from agent.errors import (
    Cancelled,
    FailedPrecondition,
    InvalidArgument,
    Unsupported,
)

IMAGE = {"url": "file:///srv/image.raw", "sha256": "0" * 64, "format": "raw"}


class StorageContract:
    """Files of instances."""

    def test_repeated_creation_keeps_the_disk(self, driver: Driver, instance: Instance, tmp_path: Path) -> None:
        driver.create_storage(instance.id, instance.spec, {}, CallContext())
        before = {path: path.stat().st_ino for path in files_of(tmp_path, instance.id)}
        driver.create_storage(instance.id, instance.spec, {}, CallContext())
        assert {path: path.stat().st_ino for path in files_of(tmp_path, instance.id)} == before

    def test_nothing_is_left(self, driver: Driver, tmp_path: Path) -> None:
        instance = Instance(driver, make_spec(seed={"hostname": "guest", "user_data": "#cloud-config\n"}))
        instance.create(start=True)
        driver.destroy(instance.id)
        driver.start(instance.id)
        instance.remove()
        assert not files_of(tmp_path, instance.id)

    def test_storage_can_be_removed_without_a_domain(self, driver: Driver, instance: Instance, tmp_path: Path) -> None:
        driver.create_storage(instance.id, instance.spec, {}, CallContext())
        driver.delete_storage(instance.id)
        assert not files_of(tmp_path, instance.id)

    def test_image_is_not_changed(self, driver: Driver, instance: Instance, tmp_path: Path) -> None:
        image = make_image(tmp_path / "image.raw", 8)
        before = image.path.stat()
        driver.create_storage(instance.id, instance.spec, {"root": image}, CallContext())
        driver.define(instance.id, instance.spec, generation=1)
        driver.start(instance.id)
        instance.remove()
        after = image.path.stat()
        assert (after.st_mtime_ns, after.st_size, after.st_ino) == (before.st_mtime_ns, before.st_size, before.st_ino)

    def test_disk_smaller_than_its_image(self, driver: Driver, instance: Instance, tmp_path: Path) -> None:
        image = make_image(tmp_path / "image.raw", 17)
        with pytest.raises(InvalidArgument) as caught:
            driver.create_storage(instance.id, instance.spec, {"root": image}, CallContext())
        assert caught.value.code == "disk_too_small"
        assert not files_of(tmp_path, instance.id)

    def test_disks_of_every_kind(
        self, driver: Driver, driver_case: DriverCase, tmp_path: Path
    ) -> None:
        disks = [
            {"kind": "data", "name": "data", "size_mib": 2},
            {"kind": "data", "name": "filled", "size_mib": 3, "bus": "sata", "image": IMAGE},
            {"kind": "ephemeral", "name": "scratch", "size_mib": 4, "bus": "scsi"},
            {"kind": "swap", "name": "swap", "size_mib": 2},
            {"kind": "cdrom", "name": "cd", "image": IMAGE},
        ]
        instance = Instance(driver, make_spec(disks=disks, boot={"order": ["cd", "data"]}))
        image = make_image(tmp_path / "image.raw", 2)
        images = {"filled": image, "cd": image}
        for _ in range(2):
            driver.create_storage(instance.id, instance.spec, images, CallContext())
        driver.define(instance.id, instance.spec, generation=1)
        driver.start(instance.id)
        info = driver.get(instance.id)
        assert (info.power, info.spec) == ("running", instance.spec)
        paths = driver.details(instance.id).disk_paths
        if not driver_case.has(Difference.DISKS_ARE_NOT_FILES):
            assert len(set(paths)) == len(paths)
            assert len(paths) >= 5
            assert all(Path(path).exists() for path in paths)
        instance.remove()
        assert not files_of(tmp_path, instance.id)
        assert image.path.exists()

    @pytest.mark.parametrize(
        ("changes", "code"),
        [
            ({"size_mib": 1, "image": {}}, "disk_too_small"),
            ({"size_mib": 1, "backend": "none-such"}, "unknown_backend"),
            ({"size_mib": 1, "encryption": {"key": "none-such"}}, "encryption_key_missing"),
        ],
        ids=["too-small", "backend", "key"],
    )
    def test_disks_that_cannot_be_made_are_refused_before_any_other_is(
        self, driver: Driver, tmp_path: Path, changes: dict[str, Any], code: str
    ) -> None:
        changes = changes | ({"image": IMAGE} if "image" in changes else {})
        disk = {"kind": "data", "name": "second", **changes}
        instance = Instance(driver, make_spec(disks=[disk]))
        images = {"second": make_image(tmp_path / "image.raw", 2)} if "image" in changes else {}
        with pytest.raises((InvalidArgument, FailedPrecondition, Unsupported)) as caught:
            driver.create_storage(instance.id, instance.spec, images, CallContext())
        # The simulation has no encrypted disks at all.
        assert getattr(caught.value, "code", None) in {code, "unsupported"}
        assert not files_of(tmp_path, instance.id)

    def test_cancelled_creation_leaves_nothing(self, driver: Driver, instance: Instance, tmp_path: Path) -> None:
        with pytest.raises(Cancelled):
            driver.create_storage(instance.id, instance.spec, {}, CallContext(cancelled=lambda: True))
        driver.delete_storage(instance.id)
        assert not files_of(tmp_path, instance.id)

    def test_progress_rises(self, driver: Driver, instance: Instance) -> None:
        seen: list[float] = []
        driver.create_storage(instance.id, instance.spec, {}, CallContext(progress=seen.append))
        assert seen == sorted(seen)
        assert all(0 <= percent <= 100 for percent in seen)

    @pytest.mark.parametrize("bad", ["../escape", "absolute", "", "A" * 36])
    def test_id_that_is_no_uuid_is_no_path(self, driver: Driver, tmp_path: Path, bad: str) -> None:
        # A driver that fails this test removes what the id leads to, so none may lead out of tmp_path.
        precious = tmp_path / "escape"
        precious.mkdir()
        bad = str(precious) if bad == "absolute" else bad
        with pytest.raises(InvalidArgument):
            driver.delete_storage(bad)
        with pytest.raises(InvalidArgument):
            driver.create_storage(bad, make_spec(), {}, CallContext())
        assert precious.is_dir()
