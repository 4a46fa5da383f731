"""The driver contract: files of instances."""

from __future__ import annotations

from pathlib import Path

import pytest
from driver_case import (
    Instance,
    files_of,
    make_image,
    make_spec,
)

from agent.drivers.base import CallContext, Driver
from agent.errors import (
    Cancelled,
    InvalidArgument,
)


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
