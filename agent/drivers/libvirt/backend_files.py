"""Disks as files in one folder per instance: qcow2 overlays, or sparse raw files.

A file gets its final name only when it is complete, so what has that name is kept by a repeated call.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from agent.drivers.base import CallContext, PreparedImage
from agent.drivers.libvirt import qemu_img
from agent.drivers.libvirt.files import MIB, check_id, make_folder, os_errors, space_mib, sync
from agent.drivers.libvirt.settings import LibvirtSettings
from agent.drivers.libvirt.volumes import ROOT, Location, Volume
from agent.errors import NotFound, ResourceExhausted
from agent.messages.types import DiskFormat

_PREFIX: Final = "disk-"


class FileBackend:
    """See `volumes.Backend`. `format` is that of new disks."""

    def __init__(self, settings: LibvirtSettings, root: Path, format: DiskFormat) -> None:
        self._settings = settings
        self._root = root
        self._format = format

    def locate(self, volume: Volume) -> Location:
        stem = "disk" if volume.name == ROOT else f"{_PREFIX}{volume.name}"
        return Location("file", self._root / check_id(volume.instance_id) / f"{stem}.{self._format}", self._format)

    def exists(self, volume: Volume) -> bool:
        return self.locate(volume).path.exists()

    def create(self, volume: Volume, size_bytes: int, image: PreparedImage | None, call: CallContext) -> None:
        del call  # an overlay is made at once
        disk = self.locate(volume).path
        with os_errors("making a disk"):
            make_folder(disk.parent)
            if disk.exists():
                return
            self._check_space()
            part = disk.with_name(disk.name + ".part")
            part.unlink(missing_ok=True)
            try:
                self._make(part, size_bytes, image)
                sync(part)
                part.rename(disk)
            except BaseException:
                part.unlink(missing_ok=True)
                raise

    def size_bytes(self, volume: Volume) -> int:
        disk = self.locate(volume).path
        with os_errors("reading a disk's size"):
            if not disk.exists():
                raise NotFound(f"the instance has no disk {volume.name}", code="disk_missing")
            if self._format == "raw":
                return disk.stat().st_size
        shown = qemu_img.run(self._settings, ["info", "-U", "-f", "qcow2", "--output=json", "--", str(disk)])
        return int(json.loads(shown)["virtual-size"])

    def grow(self, volume: Volume, size_bytes: int) -> None:
        if self.size_bytes(volume) >= size_bytes:
            return
        disk = self.locate(volume).path
        qemu_img.run(self._settings, ["resize", "-q", "-f", self._format, "--", str(disk), str(size_bytes)])

    def replace(self, volume: Volume, by: Volume) -> None:
        old, new = self.locate(volume).path, self.locate(by).path
        with os_errors("replacing a disk"):
            if new.exists():
                new.replace(old)

    def remove(self, volume: Volume) -> None:
        disk = self.locate(volume).path
        with os_errors("removing a disk"):
            disk.unlink(missing_ok=True)
            disk.with_name(disk.name + ".part").unlink(missing_ok=True)

    def names(self, instance_id: str) -> list[str]:
        folder = self._root / check_id(instance_id)
        names = [ROOT] if self.exists(Volume(instance_id, ROOT)) else []
        found = sorted(folder.glob(f"{_PREFIX}*.{self._format}")) if folder.is_dir() else []
        return names + [path.stem.removeprefix(_PREFIX) for path in found]

    def space_mib(self) -> tuple[int, int]:
        return space_mib(self._root)

    def _check_space(self) -> None:
        _total, free = self.space_mib()
        if free < self._settings.min_free_mib:
            raise ResourceExhausted(
                f"{free} MiB are free for instances and {self._settings.min_free_mib} MiB must stay free",
                code="no_space",
                free_mib=free,
                min_free_mib=self._settings.min_free_mib,
            )

    def _make(self, part: Path, size_bytes: int, image: PreparedImage | None) -> None:
        if self._format == "raw" and image is None:
            with part.open("xb") as handle:
                handle.truncate(size_bytes)
            return
        if self._format == "raw" and image is not None:
            copy = ["convert", "-q", "-f", image.format, "-O", "raw", "--", str(image.path), str(part)]
            if not self._settings.simulated:  # the simulation never opens its disks
                qemu_img.run(self._settings, copy, timeout_s=max(self._settings.qemu_img_timeout_s, size_bytes / MIB))
            with part.open("ab") as handle:
                handle.truncate(size_bytes)
            return
        command = ["create", "-q", "-f", "qcow2"]
        if image is not None:
            command += ["-F", image.format, "-b", str(image.path)]
        qemu_img.run(self._settings, [*command, "--", str(part), str(size_bytes)])
