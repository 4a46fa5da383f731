"""Disks as files in one folder per instance: qcow2 overlays, or sparse raw files.

A file gets its final name only when it is complete, so what has that name is kept by a repeated call.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from agent.drivers.base import CallContext
from agent.drivers.libvirt import qemu_img
from agent.drivers.libvirt.encryption import Key
from agent.drivers.libvirt.files import MIB, check_id, make_folder, os_errors, space_mib, sync
from agent.drivers.libvirt.settings import LibvirtSettings
from agent.drivers.libvirt.volumes import ROOT, Location, Source, Volume
from agent.errors import NotFound, ResourceExhausted
from agent.messages.types import DiskFormat

_PREFIX: Final = "disk-"
_PART: Final = ".part"


class FileBackend:
    """See `volumes.Keeper`. `format` is that of its disks."""

    def __init__(self, settings: LibvirtSettings, root: Path, format: DiskFormat) -> None:
        self._settings = settings
        self._root = root
        self._format = format

    def locate(self, volume: Volume) -> Location:
        stem = "disk" if volume.name == ROOT else f"{_PREFIX}{volume.name}"
        return Location("file", self._root / check_id(volume.instance_id) / f"{stem}.{self._format}", self._format)

    def exists(self, volume: Volume) -> bool:
        return self.locate(volume).path.exists()

    def create(
        self, volume: Volume, size_bytes: int, source: Source | None, key: Key | None, call: CallContext
    ) -> None:
        disk = self.locate(volume).path
        with os_errors("making a disk"):
            make_folder(disk.parent)
            if disk.exists():
                return
            self._check_space()
            part = disk.with_name(disk.name + _PART)
            part.unlink(missing_ok=True)
            try:
                if key is None:
                    self._make(part, size_bytes, source, call)
                else:
                    self._make_encrypted(part, size_bytes, source, key, call)
                sync(part)
                part.rename(disk)
            except BaseException:
                part.unlink(missing_ok=True)
                raise

    def size_bytes(self, volume: Volume, key: Key | None) -> int:
        disk = self.locate(volume).path
        with os_errors("reading a disk's size"):
            if not disk.exists():
                raise NotFound(f"the instance has no disk {volume.name}", code="disk_missing")
            if self._format == "raw" and key is None:
                return disk.stat().st_size
        return qemu_img.virtual_size(self._settings, disk, self._format, key)

    def grow(self, volume: Volume, size_bytes: int, key: Key | None) -> None:
        if self.size_bytes(volume, key) >= size_bytes:
            return
        disk = self.locate(volume).path
        if key is None:
            command = ["resize", "-q", "-f", self._format, "--", str(disk), str(size_bytes)]
        else:
            options = qemu_img.opened(disk, self._format, locked=True)
            command = ["resize", "-q", "--image-opts", options, str(size_bytes)]
        qemu_img.run(self._settings, command, key=key)

    def replace(self, volume: Volume, by: Volume) -> None:
        old, new = self.locate(volume).path, self.locate(by).path
        with os_errors("replacing a disk"):
            if new.exists():
                new.replace(old)
                sync(old.parent)

    def remove(self, volume: Volume) -> None:
        disk = self.locate(volume).path
        with os_errors("removing a disk"):
            for path in (disk, disk.with_name(disk.name + _PART)):
                path.unlink(missing_ok=True)

    def remove_folder(self, instance_id: str) -> None:
        """Remove the instance's folder if nothing is left in it. Idempotent."""
        folder = self._root / check_id(instance_id)
        with os_errors("removing a folder of disks"):
            if folder.is_dir() and not folder.is_symlink() and not os.listdir(folder):  # noqa: PTH208
                folder.rmdir()

    def names(self, instance_id: str) -> list[str]:
        folder = self._root / check_id(instance_id)
        names = [ROOT] if self.exists(Volume(instance_id, ROOT)) else []
        found = sorted(folder.glob(f"{_PREFIX}*.{self._format}")) if folder.is_dir() else []
        return names + [path.stem.removeprefix(_PREFIX) for path in found]

    def space_mib(self) -> tuple[int, int]:
        return space_mib(self._root)

    @property
    def root(self) -> Path:
        """The folder of the instances' folders."""
        return self._root

    def _check_space(self) -> None:
        _total, free = self.space_mib()
        if free < self._settings.min_free_mib:
            raise ResourceExhausted(
                f"{free} MiB are free for instances and {self._settings.min_free_mib} MiB must stay free",
                code="no_space",
                free_mib=free,
                min_free_mib=self._settings.min_free_mib,
            )

    def _make(self, part: Path, size_bytes: int, source: Source | None, call: CallContext) -> None:
        if self._format == "qcow2":
            if source is None or source.lasting:
                backing = [] if source is None else ["-F", source.format, "-b", str(source.path)]
                command = ["create", "-q", "-f", "qcow2", *backing, "--", str(part), str(size_bytes)]
                qemu_img.run(self._settings, command)
            else:
                self._convert(source, part, size_bytes, call)
            return
        if source is not None and not source.lasting and source.format == "raw":
            source.path.rename(part)
        elif source is not None and not self._settings.simulated:  # the simulation never opens its disks
            self._convert(source, part, size_bytes, call)
        with part.open("ab") as handle:
            handle.truncate(size_bytes)

    def _convert(self, source: Source, part: Path, size_bytes: int, call: CallContext) -> None:
        command = ["convert", "-q", "-f", source.format, "-O", self._format, "--", str(source.path), str(part)]
        qemu_img.run(self._settings, command, timeout_s=copy_limit_s(self._settings, size_bytes), call=call)

    def _make_encrypted(self, part: Path, size_bytes: int, source: Source | None, key: Key, call: CallContext) -> None:
        # A whole copy: above a plain image in the cache, what the guest did not overwrite would lie open.
        qemu_img.create_encrypted(self._settings, part, self._format, size_bytes, key)
        if source is not None:
            target = qemu_img.opened(part, self._format, locked=True)
            copy_into(self._settings, source, target, size_bytes, key=key, call=call)


def copy_limit_s(settings: LibvirtSettings, size_bytes: int) -> float:
    """How long a copy may take: at least one MiB a second is to be expected."""
    return max(settings.qemu_img_timeout_s, size_bytes / MIB)


def copy_into(
    settings: LibvirtSettings, source: Source, target: str, size_bytes: int, *, key: Key | None, call: CallContext
) -> None:
    """Write the source's content into a volume that is there, given as image options."""
    command = ["convert", "-q", "-n", "-f", source.format, "--target-image-opts", str(source.path), target]
    qemu_img.run(settings, command, timeout_s=copy_limit_s(settings, size_bytes), key=key, call=call)
