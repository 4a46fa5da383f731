"""The host's back ends by name, and the one behind which a disk of a spec is reached, wherever it is kept.

The spec, or the host's default, says where a new volume goes; the manifest says where one is that was made before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from agent.drivers.base import CallContext, PreparedImage
from agent.drivers.libvirt import filesystems
from agent.drivers.libvirt.backend_files import FileBackend
from agent.drivers.libvirt.backend_lvm import LvmBackend
from agent.drivers.libvirt.encryption import Key, read_key, sealed
from agent.drivers.libvirt.files import check_id, make_folder, os_errors
from agent.drivers.libvirt.manifest import Entry, Manifest
from agent.drivers.libvirt.settings import BUILT_IN, FileBackendSettings, LibvirtSettings
from agent.drivers.libvirt.volumes import Keeper, Location, Source, Volume
from agent.errors import FailedPrecondition, Internal, InvalidArgument, Unsupported
from agent.messages.spec_disks import DiskOptions, EphemeralDisk, SwapDisk

_SCRATCH: Final = ".fs.part"


class Backends:
    """Every back end of the host, by name."""

    def __init__(self, settings: LibvirtSettings, root: Path) -> None:
        self.settings = settings
        self.root = root
        self.default = settings.default_backend
        plain = settings.simulated or settings.containers  # neither opens a qcow2 file
        self.all: dict[str, Keeper] = {BUILT_IN: FileBackend(settings, root, "raw" if plain else "qcow2")}
        for name, own in settings.backends.items():
            if isinstance(own, FileBackendSettings):
                self.all[name] = FileBackend(settings, own.dir or root, own.type)
            else:
                self.all[name] = LvmBackend(settings, own)

    def named(self, name: str | None, disk_name: str) -> str:
        """The name of the back end for a disk whose spec says `name`. Raises `InvalidArgument` (`unknown_backend`)."""
        wanted = name or self.default
        if wanted not in self.all:
            raise InvalidArgument(
                f"disk {disk_name}: this host has no storage back end {wanted}; it has {', '.join(sorted(self.all))}",
                code="unknown_backend", backend=wanted,
            )  # fmt: skip
        return wanted

    def keeper(self, name: str, volume_name: str) -> Keeper:
        """The back end that a manifest names. Raises `FailedPrecondition` (`backend_missing`)."""
        if name not in self.all:
            raise FailedPrecondition(
                f"volume {volume_name} is on the back end {name}, which is no longer configured; configure it again",
                code="backend_missing", backend=name,
            )  # fmt: skip
        return self.all[name]

    def folder(self, instance_id: str) -> Path:
        """The instance's own folder, with its manifest. Raises `InvalidArgument` if the id is no UUID."""
        return self.root / check_id(instance_id)

    def space_mib(self) -> tuple[int, int]:
        """Total and free MiB of the default back end."""
        return self.all[self.default].space_mib()


class DiskBackend:
    """See `volumes.Backend`: one disk of a spec, on whichever back end it is or will be."""

    def __init__(self, backends: Backends, disk_name: str, disk: DiskOptions) -> None:
        self._backends = backends
        self._settings = backends.settings
        self._disk = disk
        self._disk_name = disk_name

    def locate(self, volume: Volume) -> Location:
        entry = self._entry(volume)
        location = self._backends.keeper(entry.backend, volume.name).locate(volume)
        if entry.key is None:
            return location
        seal = sealed(volume.instance_id, volume.name, entry.key)
        return Location(location.kind, location.path, location.format, seal)

    def exists(self, volume: Volume) -> bool:
        return self._keeper(volume).exists(volume)

    def create(self, volume: Volume, size_bytes: int, image: PreparedImage | None, call: CallContext) -> None:
        keeper, key = self._begin(volume)
        if keeper.exists(volume):
            return
        with self._source(volume, size_bytes, image, call) as source:
            keeper.create(volume, size_bytes, source, key, call)

    def create_from(self, volume: Volume, size_bytes: int, source: Source, call: CallContext) -> None:
        """As `create`, with the content of a source that is no image of the cache."""
        keeper, key = self._begin(volume)
        if not keeper.exists(volume):
            keeper.create(volume, size_bytes, source, key, call)

    def _begin(self, volume: Volume) -> tuple[Keeper, Key | None]:
        """Note a volume that is about to be made."""
        entry = self._entry(volume)
        keeper = self._backends.keeper(entry.backend, volume.name)
        key = self._key(entry)
        folder = self._backends.folder(volume.instance_id)
        with os_errors("making the instance's folder"):
            make_folder(folder)
        Manifest(folder).record([entry])
        return keeper, key

    def size_bytes(self, volume: Volume) -> int:
        entry = self._entry(volume)
        return self._backends.keeper(entry.backend, volume.name).size_bytes(volume, self._key(entry))

    def grow(self, volume: Volume, size_bytes: int) -> None:
        entry = self._entry(volume)
        self._backends.keeper(entry.backend, volume.name).grow(volume, size_bytes, self._key(entry))

    def replace(self, volume: Volume, by: Volume) -> None:
        old, new = self._entry(volume), self._entry(by)
        if (old.backend, old.key) != (new.backend, new.key):
            raise Internal(f"volume {by.name} cannot replace one on another back end or with another key")
        self._backends.keeper(old.backend, volume.name).replace(volume, by)
        self._manifest(by).forget(by.name)

    def remove(self, volume: Volume) -> None:
        self._keeper(volume).remove(volume)
        self._manifest(volume).forget(volume.name)

    def names(self, instance_id: str) -> list[str]:
        listed = Manifest(self._backends.folder(instance_id)).read()
        keepers = {entry.backend for entry in listed.values() if entry.kind != "image"} or {self._choice()}
        return [name for keeper in sorted(keepers) for name in self._backends.keeper(keeper, "").names(instance_id)]

    def space_mib(self) -> tuple[int, int]:
        return self._backends.all[self._choice()].space_mib()

    def entry(self, volume: Volume) -> Entry:
        """What the manifest says of a volume, or will say. Checks the spec's back end and key.

        Raises `InvalidArgument` (`unknown_backend`), `FailedPrecondition` (`encryption_key_missing`, …).
        """
        entry = self._entry(volume)
        self._key(entry)
        return entry

    def check(self) -> None:
        """Raise if a new disk could not be made: as `entry` does."""
        self._choice()
        if self._disk.encryption is not None:
            self._read(self._disk.encryption.key)

    def _choice(self) -> str:
        return self._backends.named(self._disk.backend, self._disk_name)

    def _manifest(self, volume: Volume) -> Manifest:
        return Manifest(self._backends.folder(volume.instance_id))

    def _entry(self, volume: Volume) -> Entry:
        known = self._manifest(volume).read()
        # A volume that is to take a disk's place goes where the disk is.
        found = known.get(volume.name) or known.get(self._disk_name)
        if found is not None:
            backend, key = found.backend, found.key
        else:
            backend, key = self._choice(), self._disk.encryption.key if self._disk.encryption else None
        location = self._backends.keeper(backend, volume.name).locate(volume)
        return Entry(
            name=volume.name,
            backend=backend,
            kind=location.kind,
            path=location.path,
            format=location.format,
            key=key,
        )

    def _keeper(self, volume: Volume) -> Keeper:
        return self._backends.keeper(self._entry(volume).backend, volume.name)

    def _key(self, entry: Entry) -> Key | None:
        return None if entry.key is None else self._read(entry.key)

    def _read(self, key: str) -> Key:
        if self._settings.simulated:
            raise Unsupported("libvirt's simulated hypervisor has no encrypted disks")
        return read_key(self._settings.keys_dir, key)

    @contextmanager
    def _source(
        self, volume: Volume, size_bytes: int, image: PreparedImage | None, call: CallContext
    ) -> Iterator[Source | None]:
        """What a new volume begins with."""
        if image is not None:
            yield Source(image.path, image.format, lasting=True)
            return
        filesystem: filesystems.Filesystem | None = None
        if isinstance(self._disk, SwapDisk):
            filesystem = "swap"
        elif isinstance(self._disk, EphemeralDisk) and self._disk.filesystem != "none":
            filesystem = self._disk.filesystem
        if filesystem is None or self._settings.simulated:
            yield None
            return
        scratch = self._backends.folder(volume.instance_id) / (volume.name + _SCRATCH)
        try:
            with os_errors("making a file system"):
                source = filesystems.make(scratch, filesystem, size_bytes, volume, self._disk_name, call=call)
            yield source
        finally:
            with os_errors("removing a scratch file"):
                scratch.unlink(missing_ok=True)
