"""The driver contract: rebuild, rescue, and disks that come from exports."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from driver_case import Instance, files_of, make_image, make_spec, small_image

from agent.drivers.base import CallContext, Driver
from agent.drivers.verbs.rebuild import ImportedDisk
from agent.errors import FailedPrecondition, ImageRejected, InvalidArgument, Unsupported
from agent.messages.life import Life, Rescue, SoftDelete
from agent.messages.spec import ImageSource

SOURCE = ImageSource(url="file:///images/rescue.raw", sha256="0" * 64, format="raw")
RESCUED = Life(rescue=Rescue(image=SOURCE, since=datetime(2026, 1, 2, tzinfo=UTC), was_running=True))
DELETED = Life(soft_delete=SoftDelete(restore_until=datetime(2026, 1, 2, tzinfo=UTC), was_running=False))


def names(folder: Path, instance: Instance) -> list[str]:
    return [path.name for path in files_of(folder, instance.id)]


class RebuildContract:
    """Rebuild, rescue, imported disks."""

    def test_life_round_trip(self, driver: Driver, instance: Instance) -> None:
        instance.create()
        for life in (DELETED, Life()):
            driver.define(instance.id, instance.spec, generation=2, life=life)
            assert driver.get(instance.id).life == life
        assert [info.life for info in driver.recover() if info.id == instance.id] == [Life()]

    def test_rebuild_is_made_beside_and_swapped(self, driver: Driver, tmp_path: Path) -> None:
        spec = make_spec(
            seed={"hostname": "guest"},
            disks=[{"kind": "data", "name": "data", "size_mib": 4}, {"kind": "swap", "name": "swap", "size_mib": 4}],
        )
        instance = Instance(driver, spec).create(start=True)
        before = names(tmp_path, instance)
        image = make_image(tmp_path / "image.raw", 8)
        for _ in range(2):
            driver.prepare_rebuild(instance.id, spec, image, CallContext())
        driver.discard_rebuild(instance.id, spec)
        driver.discard_rebuild(instance.id, spec)
        assert names(tmp_path, instance) == before
        driver.prepare_rebuild(instance.id, spec, image, CallContext())
        with pytest.raises(FailedPrecondition) as caught:
            driver.apply_rebuild(instance.id, spec)
        assert caught.value.code == "instance_running"
        driver.destroy(instance.id)
        for _ in range(2):
            driver.apply_rebuild(instance.id, spec)
        assert names(tmp_path, instance) == before
        driver.start(instance.id)
        instance.remove()
        assert not files_of(tmp_path, instance.id)

    def test_rebuild_to_an_image_that_is_too_large(self, driver: Driver, instance: Instance, tmp_path: Path) -> None:
        instance.create()
        before = names(tmp_path, instance)
        with pytest.raises(InvalidArgument) as caught:
            driver.prepare_rebuild(instance.id, instance.spec, make_image(tmp_path / "large.raw", 17), CallContext())
        assert caught.value.code == "disk_too_small"
        assert names(tmp_path, instance) == before

    def test_rescue_comes_and_goes(self, driver: Driver, instance: Instance, tmp_path: Path) -> None:
        instance.create()
        before = names(tmp_path, instance)
        image = make_image(tmp_path / "image.raw", 8)
        for _ in range(2):
            driver.create_rescue_disk(instance.id, instance.spec, image, CallContext())
        driver.define(instance.id, instance.spec, generation=2, life=RESCUED)
        assert driver.get(instance.id).life == RESCUED
        driver.start(instance.id)
        assert instance.power == "running"
        driver.destroy(instance.id)
        driver.define(instance.id, instance.spec, generation=2)
        for _ in range(2):
            driver.remove_rescue_disk(instance.id, instance.spec)
        driver.start(instance.id)
        driver.destroy(instance.id)
        left = [name for name in names(tmp_path, instance) if name != "console.log"]
        assert left == [name for name in before if name != "console.log"]

    def test_nothing_is_left_of_a_rescued_instance(self, driver: Driver, instance: Instance, tmp_path: Path) -> None:
        instance.create()
        image = make_image(tmp_path / "image.raw", 8)
        driver.create_rescue_disk(instance.id, instance.spec, image, CallContext())
        driver.define(instance.id, instance.spec, generation=2, life=RESCUED)
        driver.start(instance.id)
        driver.prepare_rebuild(instance.id, instance.spec, image, CallContext())
        instance.remove()
        assert not files_of(tmp_path, instance.id)

    def test_imported_disks(self, driver: Driver, instance: Instance) -> None:
        """They are made before `create_storage`, which keeps them, and only of what was exported."""
        driver.define(instance.id, instance.spec, generation=1)
        export = small_image().path
        if "instance.unshelve" not in driver.capabilities().verbs:
            with pytest.raises(Unsupported):
                driver.import_disk(instance.id, instance.spec, ImportedDisk("root", export, None), CallContext())
            return
        with pytest.raises(ImageRejected) as caught:
            driver.import_disk(instance.id, instance.spec, ImportedDisk("root", export, "0" * 64), CallContext())
        assert caught.value.code == "image_checksum_mismatch"
        for _ in range(2):
            driver.import_disk(instance.id, instance.spec, ImportedDisk("root", export, None), CallContext())
        driver.create_storage(instance.id, instance.spec, {}, CallContext())
        driver.start(instance.id)
        assert instance.power == "running"
        instance.remove()

    def test_what_is_shelved_leaves_nothing_but_its_definition(
        self, driver: Driver, instance: Instance, tmp_path: Path
    ) -> None:
        if "instance.shelve" not in driver.capabilities().verbs:
            return
        instance.create()
        for _ in range(2):
            driver.shelve_storage(instance.id, CallContext())
        left = [path for path in files_of(tmp_path, instance.id) if path.parent.name != "domains"]
        assert not left, "beside what the simulation notes of its domains"
        assert driver.get(instance.id).power == "stopped"
        driver.create_storage(instance.id, instance.spec, {}, CallContext())
        driver.start(instance.id)
        instance.remove()
        driver.shelve_storage(instance.id, CallContext())
