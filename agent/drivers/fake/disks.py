"""The simulated hypervisor's disks, in memory or also as small files. Nothing here takes a lock."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from agent.drivers.base import PreparedImage
from agent.drivers.fake.domains import write_atomically
from agent.errors import FailedPrecondition, InvalidArgument
from agent.messages.spec import ROOT, InstanceSpec
from agent.messages.spec_disks import CdromDisk
from agent.messages.types import UUID_PATTERN

NEW: Final = "_new"
"""Added to a disk's name while its successor waits beside it. No disk of a spec can have such a name."""
RESCUE: Final = "rescue_disk"
"""The rescue disk. Nor this one."""
_MIB: Final = 1024 * 1024
_SUFFIX: Final = ".qcow2"


@dataclass(frozen=True, slots=True)
class Disk:
    """A simulated disk. A CD takes no space."""

    size_mib: int
    image_sha256: str | None = None


def plan_disks(
    spec: InstanceSpec, images: Mapping[str, PreparedImage], *, backends: Collection[str], keys: Collection[str]
) -> dict[str, Disk]:
    """The disks that a spec asks for, by name.

    Raises `InvalidArgument` (`disk_too_small`, `unknown_backend`), `FailedPrecondition` (`encryption_key_missing`).
    """
    planned = {}
    for name, disk in spec.disks_by_name().items():
        image = images.get(name)
        sha256 = None if image is None else image.sha256
        if isinstance(disk, CdromDisk):
            planned[name] = Disk(0, sha256)
            continue
        if disk.backend is not None and disk.backend not in backends:
            raise InvalidArgument(
                f"disk {name}: this host has no storage back end {disk.backend}",
                code="unknown_backend", backend=disk.backend, known=", ".join(sorted(backends)),
            )  # fmt: skip
        if disk.encryption is not None and disk.encryption.key not in keys:
            raise FailedPrecondition(
                f"disk {name}: this host has no key {disk.encryption.key}",
                code="encryption_key_missing", key=disk.encryption.key,
            )  # fmt: skip
        if image is not None and image.virtual_size_bytes > disk.size_mib * _MIB:
            needed = -(-image.virtual_size_bytes // _MIB)
            raise InvalidArgument(
                f"disk {name} of {disk.size_mib} MiB is smaller than its image, which needs {needed} MiB",
                code="disk_too_small", disk=name, size_mib=disk.size_mib, image_mib=needed,
            )  # fmt: skip
        planned[name] = Disk(disk.size_mib, sha256)
    return planned


class Disks:
    """Disks by instance and name; with a folder, a subfolder with a placeholder file for each."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._by_id: dict[str, dict[str, Disk]] = {}
        self.used_mib = 0

    def get(self, instance_id: str, name: str = ROOT) -> Disk | None:
        return self._by_id.get(instance_id, {}).get(name)

    def all(self, instance_id: str) -> dict[str, Disk]:
        """The instance's disks by name, the root disk first; a copy."""
        return dict(sorted(self._by_id.get(instance_id, {}).items(), key=lambda item: item[0] != ROOT))

    def put(self, instance_id: str, disks: Mapping[str, Disk], *, seed: bool) -> None:
        """Make all disks, and the seed if there is one, in place of what there was."""
        self.remove(instance_id)
        if self.folder is not None:
            folder = self.folder / instance_id
            folder.mkdir(parents=True, exist_ok=True)
            if seed:
                (folder / "seed.iso").write_bytes(b"")
        # The root disk last, because `load` takes a folder without it for an unfinished one.
        for name in sorted(disks, key=lambda name: name == ROOT):
            self.put_one(instance_id, name, disks[name])

    def put_one(self, instance_id: str, name: str, disk: Disk) -> None:
        """Make one disk, in place of the one of this name."""
        old = self.get(instance_id, name)
        self.used_mib += disk.size_mib - (0 if old is None else old.size_mib)
        self._by_id.setdefault(instance_id, {})[name] = disk
        if self.folder is not None:
            (self.folder / instance_id).mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / instance_id / (name + _SUFFIX), json.dumps(asdict(disk)))

    def remove_one(self, instance_id: str, name: str) -> None:
        """Remove one disk. Idempotent."""
        disk = self._by_id.get(instance_id, {}).pop(name, None)
        if disk is not None:
            self.used_mib -= disk.size_mib
            if self.folder is not None:
                (self.folder / instance_id / (name + _SUFFIX)).unlink(missing_ok=True)

    def remove(self, instance_id: str) -> None:
        """Remove everything of an instance. Idempotent. Raises `InvalidArgument` if the id is no UUID."""
        # The id becomes a path whose whole tree is removed.
        if not re.fullmatch(UUID_PATTERN, instance_id):
            raise InvalidArgument("the instance id must be a UUID in lower case", code="invalid_instance_id")
        for disk in self._by_id.pop(instance_id, {}).values():
            self.used_mib -= disk.size_mib
        if self.folder is not None:
            shutil.rmtree(self.folder / instance_id, ignore_errors=True)

    def path(self, instance_id: str, name: str) -> str | None:
        """Where a file of an instance is, or None if disks are in memory only."""
        return None if self.folder is None else str(self.folder / instance_id / name)

    def touch_console(self, instance_id: str) -> None:
        """Make the console log's file, as the start of a guest does."""
        if self.folder is not None:
            folder = self.folder / instance_id
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "console.log").touch()

    def load(self) -> None:
        """Read what an earlier process left."""
        if self.folder is None or not self.folder.is_dir():
            return
        for folder in self.folder.iterdir():
            if not (folder / (ROOT + _SUFFIX)).exists():
                continue
            # Sorted, and the root disk first: the order of a listing means nothing.
            names = sorted((path.name.removesuffix(_SUFFIX) for path in folder.glob(f"*{_SUFFIX}")), key=_root_first)
            disks = {name: Disk(**json.loads((folder / (name + _SUFFIX)).read_bytes())) for name in names}
            self._by_id[folder.name] = disks
            self.used_mib += sum(disk.size_mib for disk in disks.values())


def _root_first(name: str) -> tuple[bool, str]:
    return name != ROOT, name
