"""Disks as logical volumes, thick or thin, made and removed by LVM's commands.

A volume is `<instance id>.<disk>`; until it is complete its name ends in `.part`. All have the tag `compute-agent`,
without which nothing is renamed or removed.

A thick volume has on it what its extents held before. So a new one is zeroed before a guest gets it (an encrypted one
need not be: nothing of the old reads as text), and an old one is wiped when it is removed, as `wipe` says. A thin pool
zeroes what it hands out, by LVM's default; its volumes are not wiped.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from agent.drivers.base import CallContext
from agent.drivers.libvirt import programs, qemu_img
from agent.drivers.libvirt.backend_files import copy_into
from agent.drivers.libvirt.blockdev import overwrite
from agent.drivers.libvirt.encryption import Key
from agent.drivers.libvirt.files import MIB, check_id, os_errors
from agent.drivers.libvirt.settings import LibvirtSettings, LvmBackendSettings
from agent.drivers.libvirt.volumes import Location, Source, Volume
from agent.errors import Internal, NotFound, ResourceExhausted

_TAG: Final = "compute-agent"
_PART: Final = ".part"
_OLD: Final = ".old"
_LUKS_HEADER: Final = 2 * MIB
"""Room for the header that QEMU writes in front of the payload, rounded up."""
_SPACE_AGE_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class _Held:
    """One of our logical volumes."""

    name: str
    size_bytes: int


class LvmBackend:
    """See `volumes.Keeper`."""

    def __init__(self, settings: LibvirtSettings, own: LvmBackendSettings) -> None:
        self._settings = settings
        self._own = own
        self._lock = threading.Lock()
        self._space: tuple[float, tuple[int, int]] | None = None

    def locate(self, volume: Volume) -> Location:
        return Location("block", self._device(_name(volume)), "raw")

    def exists(self, volume: Volume) -> bool:
        return _name(volume) in self._held()

    def create(
        self, volume: Volume, size_bytes: int, source: Source | None, key: Key | None, call: CallContext
    ) -> None:
        name = _name(volume)
        part = name + _PART
        held = self._held()
        if name in held:
            return
        if part in held:
            self._drop(part)
        size_bytes += _LUKS_HEADER if key is not None else 0
        self._check_space(size_bytes)
        try:
            self._allocate(part, size_bytes)
            self._fill(self._device(part), size_bytes, source, key, call)
            self._lvm("lvrename", "--yes", self._own.volume_group, part, name)
        except BaseException:
            if part in self._held():
                self._drop(part)
            raise

    def size_bytes(self, volume: Volume, key: Key | None) -> int:
        held = self._held().get(_name(volume))
        if held is None:
            raise NotFound(f"the instance has no disk {volume.name}", code="disk_missing")
        if key is None:
            return held.size_bytes
        return qemu_img.virtual_size(self._settings, self._active(held.name), "raw", key)

    def grow(self, volume: Volume, size_bytes: int, key: Key | None) -> None:
        missing = size_bytes - self.size_bytes(volume, key)
        if missing <= 0:
            return
        name = _name(volume)
        if self._own.thin_pool is None:
            self._check_space(missing)
        before = self._held()[name].size_bytes
        self._lvm("lvextend", "--yes", "--size", f"{before + missing}b", self._path(name))
        if self._own.thin_pool is None and key is None:
            device = self._active(name)
            with os_errors("zeroing new space"):
                overwrite(device, "zero", start=before)

    def replace(self, volume: Volume, by: Volume) -> None:
        name, new = _name(volume), _name(by)
        old = name + _OLD
        held = self._held()
        if new in held:
            if name in held:
                if old in held:
                    self._drop(old)
                self._lvm("lvrename", "--yes", self._own.volume_group, name, old)
            self._lvm("lvrename", "--yes", self._own.volume_group, new, name)
        if old in self._held():
            self._drop(old)

    def remove(self, volume: Volume) -> None:
        name = _name(volume)
        held = self._held()
        for known in (name + _PART, name + _OLD, name):
            if known in held:
                self._drop(known)

    def names(self, instance_id: str) -> list[str]:
        prefix = f"{check_id(instance_id)}."
        found = (name.removeprefix(prefix) for name in sorted(self._held()) if name.startswith(prefix))
        return [name for name in found if not name.endswith((_PART, _OLD))]

    def space_mib(self) -> tuple[int, int]:
        """As last read, if that was less than half a minute ago: heartbeats ask often, and LVM answers slowly."""
        with self._lock:
            if self._space is None or time.monotonic() - self._space[0] > _SPACE_AGE_S:
                self._space = time.monotonic(), self._read_space()
            return self._space[1]

    # --- commands -------------------------------------------------------------------------------------------------

    def _lvm(self, *arguments: str) -> str:
        return programs.run([self._own.program, *arguments], timeout_s=self._own.timeout_s)

    def _report(self, command: str, fields: str, *arguments: str) -> list[dict[str, Any]]:
        shown = self._lvm(
            command, "--reportformat", "json", "--units", "b", "--nosuffix", "--options", fields, *arguments
        )
        try:
            rows: list[dict[str, Any]] = json.loads(shown)["report"][0][command.removesuffix("s")]
        except (ValueError, LookupError, TypeError) as exc:
            raise Internal(f"LVM's answer to {command} cannot be understood", code="program_failed") from exc
        return rows

    def _held(self) -> dict[str, _Held]:
        rows = self._report("lvs", "lv_name,lv_size,lv_tags", self._own.volume_group)
        ours = (row for row in rows if _TAG in row["lv_tags"].split(","))
        return {row["lv_name"]: _Held(row["lv_name"], int(row["lv_size"])) for row in ours}

    def _read_space(self) -> tuple[int, int]:
        if self._own.thin_pool is None:
            (row,) = self._report("vgs", "vg_size,vg_free", self._own.volume_group)
            return int(row["vg_size"]) // MIB, int(row["vg_free"]) // MIB
        (row,) = self._report("lvs", "lv_size,data_percent", self._path(self._own.thin_pool))
        total = int(row["lv_size"])
        return total // MIB, int(total * (100.0 - float(row["data_percent"] or 0.0)) / 100.0) // MIB

    def _check_space(self, needed_bytes: int) -> None:
        """Refuse what does not fit, in whole extents. Volumes of a thin pool may promise more than there is."""
        thin = self._own.thin_pool is not None
        total, free = self._read_space()
        needed = -(-needed_bytes // MIB)
        if not thin:
            (row,) = self._report("vgs", "vg_extent_size", self._own.volume_group)
            extent = max(1, int(row["vg_extent_size"]))
            needed = -(-needed_bytes // extent) * extent // MIB
        if free - (0 if thin else needed) < (self._settings.min_free_mib if thin else 0):
            raise ResourceExhausted(
                f"volume group {self._own.volume_group} has {free} of {total} MiB free, and {needed} are needed",
                code="no_space", free_mib=free, needed_mib=needed,
            )  # fmt: skip

    def _allocate(self, name: str, size_bytes: int) -> None:
        thin = self._own.thin_pool
        size = f"{size_bytes}b"  # rounded up to whole extents by LVM
        how = ["--size", size] if thin is None else ["--virtualsize", size, "--thinpool", thin]
        # Signatures are not asked about: the whole volume is overwritten.
        common = ["--yes", "--wipesignatures", "n", "--addtag", _TAG, "--name", name]
        self._lvm("lvcreate", *common, *how, self._own.volume_group)

    def _fill(self, device: Path, size_bytes: int, source: Source | None, key: Key | None, call: CallContext) -> None:
        if key is None:
            if self._own.thin_pool is None:
                with os_errors("zeroing a new volume"):
                    overwrite(device, "zero", call)
        else:
            qemu_img.create_encrypted(self._settings, device, "raw", size_bytes - _LUKS_HEADER, key)
        if source is not None:
            target = qemu_img.opened(device, "raw", locked=key is not None, block=True)
            copy_into(self._settings, source, target, size_bytes, key=key, call=call)

    def _drop(self, name: str) -> None:
        if self._own.thin_pool is None and self._own.wipe != "none":
            with os_errors("wiping a volume"):
                overwrite(self._active(name), self._own.wipe)
        self._lvm("lvremove", "--yes", self._path(name))

    def _active(self, name: str) -> Path:
        device = self._device(name)
        if not device.exists():  # after a boot of the host, say
            self._lvm("lvchange", "--yes", "--activate", "y", self._path(name))
        return device

    def _path(self, name: str) -> str:
        return f"{self._own.volume_group}/{name}"

    def _device(self, name: str) -> Path:
        return self._own.device_dir / self._own.volume_group / name


def _name(volume: Volume) -> str:
    return f"{check_id(volume.instance_id)}.{volume.name}"
