"""Disks beside an instance's own on the simulated hypervisor: what a rebuild waits with, and rescue disks."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Final

from agent.drivers.fake.domains import Disk, write_atomically

ROOT_NEW: Final = "root_new"
RESCUE: Final = "rescue_disk"
_SUFFIX: Final = ".side.json"


class SideDisks:
    """Disks by instance and name; with a folder, a small file each in the instance's folder. Takes no lock."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._by_key: dict[tuple[str, str], Disk] = {}

    def get(self, instance_id: str, name: str) -> Disk | None:
        return self._by_key.get((instance_id, name))

    def names(self, instance_id: str) -> list[str]:
        """Names of the instance's side disks, sorted."""
        return sorted(name for owner, name in self._by_key if owner == instance_id)

    def put(self, instance_id: str, name: str, disk: Disk) -> None:
        self._by_key[instance_id, name] = disk
        if self.folder is not None:
            folder = self.folder / instance_id
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / f"{name}{_SUFFIX}", json.dumps(asdict(disk)))

    def remove(self, instance_id: str, name: str) -> None:
        """Remove one. Idempotent."""
        self._by_key.pop((instance_id, name), None)
        if self.folder is not None:
            (self.folder / instance_id / f"{name}{_SUFFIX}").unlink(missing_ok=True)

    def forget(self, instance_id: str) -> None:
        """Forget all of an instance, whose folder goes with its own disks."""
        for name in self.names(instance_id):
            self.remove(instance_id, name)

    def load(self) -> None:
        """Read what an earlier process left."""
        if self.folder is None or not self.folder.is_dir():
            return
        for path in self.folder.glob(f"*/*{_SUFFIX}"):
            self._by_key[path.parent.name, path.name.removesuffix(_SUFFIX)] = Disk(**json.loads(path.read_bytes()))
