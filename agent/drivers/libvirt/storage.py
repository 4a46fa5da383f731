"""Files of instances: disks, the seed ISO, boot files and the console log.

One folder per instance holds the manifest of its volumes, what is no disk, and the disks of the built-in back end. A
file gets its final name only when it is complete, so what has that name is kept by a repeated call. qemu-img is given
explicit formats, and reads only verified images, never what a guest wrote.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Final

from agent.drivers.base import CallContext, ConsoleChunk, PreparedImage
from agent.drivers.libvirt import seed
from agent.drivers.libvirt.backend_files import FileBackend
from agent.drivers.libvirt.backends import Backends, DiskBackend
from agent.drivers.libvirt.definition import NVRAM, InstanceFiles, Tuning
from agent.drivers.libvirt.encryption import Sealed, sealed
from agent.drivers.libvirt.files import MIB, make_folder, os_errors, sync, write_durably
from agent.drivers.libvirt.manifest import NAME as MANIFEST
from agent.drivers.libvirt.manifest import Entry, Manifest
from agent.drivers.libvirt.settings import LibvirtSettings
from agent.drivers.libvirt.tuning import Tuner
from agent.drivers.libvirt.volumes import Backend, Location, Volume
from agent.errors import Cancelled, FailedPrecondition, InvalidArgument
from agent.messages.spec import BOOT_INITRD, BOOT_KERNEL, InstanceSpec
from agent.messages.spec_disks import CdromDisk, DiskOptions

_MAX_ROTATED: Final = 8
_BOOT_FILES: Final = {BOOT_KERNEL: "kernel", BOOT_INITRD: "initrd"}


class Storage:
    """The instances' folder. Methods for one instance are called one at a time, except reads."""

    def __init__(self, settings: LibvirtSettings, state_dir: Path) -> None:
        self._settings = settings
        self.dumps_root = settings.dumps_dir or state_dir / "dumps"
        self.root = settings.instances_dir or state_dir / "instances"
        self._backends = Backends(settings, self.root)
        self._tuner = Tuner(settings)

    def backend(self, spec: InstanceSpec, disk_name: str) -> Backend:
        """Return what keeps this disk of the spec, and volumes that are to take its place. A CD has none.

        Raises `InvalidArgument` (`unknown_backend`) for a new disk whose back end this host lacks, when it is used.
        """
        disk = spec.disks_by_name()[disk_name]
        if isinstance(disk, CdromDisk):
            raise InvalidArgument(f"disk {disk_name} is a CD, which lies in the image cache", code="invalid_argument")
        return self._backend(disk_name, disk)

    def _backend(self, disk_name: str, disk: DiskOptions) -> DiskBackend:
        return DiskBackend(self._backends, disk_name, disk)

    def check(self, spec: InstanceSpec) -> None:
        """Refuse what this host can never make: an unknown back end, a key that is missing or unsafe. Reads only.

        Raises as `create` does for these.
        """
        for name, disk in spec.disks_by_name().items():
            if not isinstance(disk, CdromDisk):
                self._backend(name, disk).check()

    def files(self, instance_id: str, spec: InstanceSpec) -> InstanceFiles:
        """Name the instance's files.

        Raises `InvalidArgument` if the id is no UUID in lower case or the spec names an unknown back end,
        `FailedPrecondition` (`disk_missing`) for a CD that was never put in.
        """
        folder = self._folder(instance_id)
        places: dict[str, Location] = {}
        tuning: dict[str, Tuning] = {}
        for name, disk in spec.disks_by_name().items():
            if isinstance(disk, CdromDisk):
                places[name] = self._cd(instance_id, name)
                continue
            places[name] = self._backend(name, disk).locate(Volume(instance_id, name))
            tuning[name] = self._tuner.of(disk, places[name])
        boot = spec.boot.kernel
        return InstanceFiles(
            disks=places,
            seed=folder / "seed.iso",
            console_log=self.console_log(instance_id),
            tuning=tuning,
            kernel=folder / _BOOT_FILES[BOOT_KERNEL] if boot is not None else None,
            initrd=folder / _BOOT_FILES[BOOT_INITRD] if boot is not None and boot.initrd is not None else None,
        )

    def console_log(self, instance_id: str) -> Path:
        """Where the console's log is. Raises `InvalidArgument` if the id is no UUID in lower case."""
        return self._folder(instance_id) / "console.log"

    def seals(self, instance_id: str) -> list[Sealed]:
        """How the instance's encrypted volumes are sealed, by the manifest."""
        entries = Manifest(self._folder(instance_id)).read()
        return [sealed(instance_id, entry.name, entry.key) for entry in entries.values() if entry.key is not None]

    def create(
        self, instance_id: str, spec: InstanceSpec, images: Mapping[str, PreparedImage], call: CallContext
    ) -> None:
        """Make disks, seed, boot files and an empty console log; finished ones are kept. See `Driver.create_storage`.

        All that can be refused is refused before the first file is made.
        """
        folder = self._folder(instance_id)
        entries: list[Entry] = []
        for name, disk in spec.disks_by_name().items():
            image = images.get(name)
            if isinstance(disk, CdromDisk):
                entries.append(_cd_entry(name, image))
                continue
            _check_size(name, disk.size_mib, image)
            entries.append(self._backend(name, disk).entry(Volume(instance_id, name)))
        iso = seed.build(instance_id, spec) if spec.seed is not None else None
        _check_cancelled(call)
        with os_errors("making the instance's folder"):
            make_folder(folder)
        Manifest(folder).record(entries)
        for done, (name, disk) in enumerate(spec.disks_by_name().items()):
            _check_cancelled(call)
            if not isinstance(disk, CdromDisk):
                volume = Volume(instance_id, name)
                self._backend(name, disk).create(volume, disk.size_mib * MIB, images.get(name), call)
            call.progress(round(90.0 * (done + 1) / len(entries), 1))
        self._make_files(folder, iso, images, call)
        call.progress(100.0)

    def _make_files(
        self, folder: Path, iso: bytes | None, images: Mapping[str, PreparedImage], call: CallContext
    ) -> None:
        with os_errors("making the instance's files"):
            if iso is not None and not (folder / "seed.iso").exists():
                _check_cancelled(call)
                write_durably(folder / "seed.iso", iso)
            for name, file_name in _BOOT_FILES.items():
                if name in images and not (folder / file_name).exists():
                    _check_cancelled(call)
                    _copy_durably(images[name].path, folder / file_name)
            if not self._settings.simulated and not self._settings.containers:
                # Made here so that the log is the agent's; virtlogd would make one that only root can read.
                (folder / "console.log").touch(mode=0o640)

    def delete(self, instance_id: str, *, keep_variables: bool = False) -> None:
        """Remove the instance's volumes and its folder with all in it; a link of that name is removed, not followed.

        The manifest goes last, with the folder. Where there is none, or it is damaged, every back end is searched.
        `keep_variables`: the guest's UEFI variables, if it has any, stay in the folder, beside the manifest that proves
        whose they are. Idempotent. Raises `FailedPrecondition` (`backend_missing`) while a volume's back end is not
        configured.
        """
        folder = self._folder(instance_id)
        # Not a directory: what should hold the folder is none, so there is nothing to remove.
        nothing = contextlib.suppress(FileNotFoundError, NotADirectoryError)
        with os_errors("removing the instance's files"), nothing:
            if not stat.S_ISDIR(folder.lstat().st_mode):
                folder.unlink()
                return
            for backend, volume_name in self._volumes_of(instance_id, folder):
                keeper = self._backends.keeper(backend, volume_name)
                keeper.remove(Volume(instance_id, volume_name))
                if isinstance(keeper, FileBackend) and keeper.root != self.root:
                    keeper.remove_folder(instance_id)
            if keep_variables and (folder / NVRAM).is_file():
                _clear(folder, keep={NVRAM, MANIFEST})
            else:
                shutil.rmtree(folder)

    def _volumes_of(self, instance_id: str, folder: Path) -> Iterator[tuple[str, str]]:
        """Back end and name of every volume that may be there."""
        manifest = Manifest(folder)
        with contextlib.suppress(FailedPrecondition):
            if manifest.path.exists():
                entries = manifest.read().values()
                yield from [(entry.backend, entry.name) for entry in entries if entry.kind != "image"]
                return
        for backend, keeper in self._backends.all.items():
            yield from [(backend, name) for name in keeper.names(instance_id)]

    def space_mib(self) -> tuple[int, int]:
        """Return total and free MiB of the default back end."""
        return self._backends.space_mib()

    def _cd(self, instance_id: str, name: str) -> Location:
        entry = Manifest(self._folder(instance_id)).read().get(name)
        if entry is None:
            raise FailedPrecondition(f"the instance has no CD {name}", code="disk_missing")
        return Location("file", entry.path, "raw")

    def console_tail(self, instance_id: str, max_bytes: int) -> ConsoleChunk:
        """Read the last `max_bytes` of the console log, rotated parts included; empty without a log."""
        log = self.console_log(instance_id)
        parts = [log, *(log.with_name(f"{log.name}.{number}") for number in range(_MAX_ROTATED))]
        data = b""
        with os_errors("reading the console log"):
            for part in parts:
                try:
                    chunk, truncated = _tail(part, max_bytes - len(data))
                except FileNotFoundError:
                    # virtlogd renames while we read; the gap is at the older end.
                    if part != log:
                        break
                    continue
                data = chunk + data
                if truncated:
                    return ConsoleChunk(data, truncated=True)
        return ConsoleChunk(data, truncated=False)

    def _folder(self, instance_id: str) -> Path:
        return self._backends.folder(instance_id)


def _clear(folder: Path, keep: AbstractSet[str]) -> None:
    """Remove everything in a folder but the files of these names."""
    for path in folder.iterdir():
        if path.name in keep:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _cd_entry(name: str, image: PreparedImage | None) -> Entry:
    if image is None:
        raise InvalidArgument(f"CD {name} has no image", code="invalid_argument")
    return Entry(name=name, backend="", kind="image", path=image.path, format="raw")


def _copy_durably(source: Path, target: Path) -> None:
    """Copy a file of the cache. Not a link: QEMU's user may become the owner of what libvirt hands to it."""
    part = target.with_name(target.name + ".part")
    try:
        shutil.copyfile(source, part)
        part.chmod(0o644)
        sync(part)
        part.rename(target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _check_size(name: str, size_mib: int, image: PreparedImage | None) -> None:
    if image is not None and image.virtual_size_bytes > size_mib * MIB:
        needed = -(-image.virtual_size_bytes // MIB)
        raise InvalidArgument(
            f"disk {name} of {size_mib} MiB is smaller than its image, which needs {needed} MiB",
            code="disk_too_small", disk=name, size_mib=size_mib, image_mib=needed,
        )  # fmt: skip


def _check_cancelled(call: CallContext) -> None:
    if call.cancelled():
        raise Cancelled("cancelled while the instance's files were made")


def _tail(path: Path, max_bytes: int) -> tuple[bytes, bool]:
    """Return the last bytes of a file, and whether there was more."""
    with path.open("rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        start = max(0, size - max_bytes)
        handle.seek(start)
        return handle.read(size - start), start > 0
