"""What is in the driver's own places on the host, and by what it is proven to be ours.

There is no second database: a domain is ours by our element in its metadata, an instance's folder by its name and the
manifest in it, a secret by its usage id. What nothing proves is reported as such and never removed.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from agent.drivers.libvirt import domains, errors, manifest
from agent.drivers.libvirt.binding import libvirt
from agent.drivers.libvirt.files import os_errors
from agent.drivers.libvirt.storage import Storage
from agent.drivers.libvirt.volumes import Volume
from agent.drivers.verbs.host import Artifact, Holding
from agent.errors import FailedPrecondition
from agent.messages.types import UUID_PATTERN

SECRET_PREFIX: Final = "compute-agent/"  # noqa: S105 - a name
UNFINISHED: Final = (".part", ".tmp")
_UUID: Final = re.compile(UUID_PATTERN)
_FRESH_S: Final = 3600.0
"""An unfinished file younger than this may belong to work that is under way."""


def folder_proof(folder: Path) -> str | None:
    """By what a folder is an instance's that we made: its name, and the list of volumes that we keep in it.

    The list must be a plain file, and what it lists must carry the same instance's id in its path: neither a link nor
    a copy can lend one folder another's proof, and so another's disks.
    """
    if not _UUID.fullmatch(folder.name):
        return None
    try:
        if not stat.S_ISDIR(folder.lstat().st_mode):
            return None
        descriptor = os.open(folder / manifest.NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as handle:
            content = json.loads(handle.read(1024 * 1024))
    except (OSError, ValueError):
        return None
    return "manifest" if _lists_only(content, folder.name) else None


def _lists_only(content: Any, instance_id: str) -> bool:
    if not isinstance(content, dict) or content.get("version") != 1:
        return False
    volumes = content.get("volumes")
    if not isinstance(volumes, list) or not all(isinstance(entry, dict) for entry in volumes):
        return False
    # An image is only referred to.
    return all(instance_id in str(entry.get("path")) for entry in volumes if entry.get("kind") != "image")


def folders(root: Path, known: Mapping[str, Holding]) -> Iterator[Artifact]:
    """Everything in the instances' folder, and unfinished files within the folders of `known` instances."""
    with os_errors("listing the instances' folder"):
        try:
            entries = sorted(root.iterdir())
        except FileNotFoundError:
            return
        for path in entries:
            # The folder of an instance that we know is its own proof: it was made by its create.
            proof = "instance" if path.name in known else folder_proof(path)
            modified_at, size = _facts(path)
            owner = path.name if proof else None
            yield Artifact("folder", str(path), owner, proof=proof, size_bytes=size, modified_at=modified_at)
            if path.name in known and not path.is_symlink():
                yield from _unfinished(path)


def _unfinished(folder: Path) -> Iterator[Artifact]:
    try:
        entries = sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return
    for path in entries:
        if path.name.endswith(UNFINISHED):
            modified_at, size = _facts(path)
            if modified_at is None or (datetime.now(UTC) - modified_at).total_seconds() < _FRESH_S:
                continue
            yield Artifact(
                "file", str(path), None, proof="unfinished", detail="unfinished, in the folder of an instance",
                size_bytes=size, modified_at=modified_at,
            )  # fmt: skip


def _facts(path: Path) -> tuple[datetime | None, int | None]:
    try:
        facts = path.lstat()
    except FileNotFoundError:
        return None, None
    size = facts.st_blocks * 512 if not stat.S_ISDIR(facts.st_mode) else _folder_bytes(path)
    return datetime.fromtimestamp(facts.st_mtime, UTC), size


def _folder_bytes(folder: Path) -> int:
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(where) / name).lstat().st_blocks * 512
            except FileNotFoundError:
                continue
    return total


def secrets(connection: Any) -> Iterator[Artifact]:
    """Secrets of libvirt that carry our usage id, `compute-agent/<instance>/<volume>`; others are not ours to list."""
    try:
        found = connection.listAllSecrets()
    except libvirt.libvirtError as exc:
        if errors.is_code(exc, "VIR_ERR_NO_SUPPORT"):
            return
        raise
    for secret in found:
        try:
            usage = secret.usageID()
        except libvirt.libvirtError as exc:
            if errors.is_code(exc, "VIR_ERR_NO_SECRET"):
                continue
            raise
        owner = secret_owner(usage)
        if owner is not None:
            yield Artifact("secret", secret.UUIDString(), owner, proof="usage-id", detail=usage)


def secret_owner(usage: str) -> str | None:
    """The instance that a usage id names; None if it has not the form `compute-agent/<instance>/<volume>`."""
    prefix, _, rest = usage.partition("/")
    owner, _, volume = rest.partition("/")
    return owner if f"{prefix}/" == SECRET_PREFIX and volume and _UUID.fullmatch(owner) else None


def missing(storage: Storage, holdings: Mapping[str, Holding], present: set[str]) -> Iterator[Artifact]:
    """What instances should have: their domain, and the disks of their spec or, if adopted, those they came with."""
    for instance_id, holding in holdings.items():
        if instance_id not in present:
            yield Artifact("domain", instance_id, instance_id, detail=holding.spec.name)
        if holding.life.shelf is not None:
            continue  # its disks are exported and were removed
        if holding.life.adopted is not None:
            for path in holding.life.adopted.disks:
                if not Path(path).exists():
                    yield Artifact("disk", path, instance_id)
            continue
        names = ["root", *(disk.name for disk in holding.spec.disks if disk.kind != "cdrom")]
        for name in names:
            backend, volume = storage.backend(holding.spec, name), Volume(instance_id, name)
            if not backend.exists(volume):
                yield Artifact("disk", str(backend.locate(volume).path), instance_id, detail=name)


def remove(connection: Any, storage: Storage, artifact: Artifact) -> bool:
    """Remove one artifact whose proof still holds. False if it is gone."""
    match artifact.kind:
        case "folder":
            return _remove_folder(connection, storage, Path(artifact.name))
        case "file":
            return _remove_file(storage.root, Path(artifact.name))
        case "secret":
            return _remove_secret(connection, artifact)
        case _:
            raise FailedPrecondition(f"a {artifact.kind} is not removed by an audit", code="not_removable")


def _remove_folder(connection: Any, storage: Storage, folder: Path) -> bool:
    if folder.parent != storage.root or not os.path.lexists(folder):
        return False
    if folder_proof(folder) is None:
        raise FailedPrecondition(f"{folder} is no proven leftover any more", code="not_removable")
    if _has_domain(connection, folder.name):
        raise FailedPrecondition(f"a domain with the id {folder.name} is on this host", code="not_removable")
    user = _user_of(connection, folder)
    if user is not None:
        raise FailedPrecondition(f"{folder} is used by domain {user}", code="not_removable")
    storage.delete(folder.name)
    return True


def _remove_file(root: Path, path: Path) -> bool:
    if path.parent.parent != root or not path.name.endswith(UNFINISHED):
        raise FailedPrecondition(f"{path} is no proven leftover", code="not_removable")
    with os_errors("removing an unfinished file"):
        try:
            facts = path.lstat()
        except FileNotFoundError:
            return False
        if not stat.S_ISREG(facts.st_mode) or datetime.now(UTC).timestamp() - facts.st_mtime < _FRESH_S:
            raise FailedPrecondition(f"{path} is no proven leftover any more", code="not_removable")
        path.unlink()
    return True


def _remove_secret(connection: Any, artifact: Artifact) -> bool:
    try:
        secret = connection.secretLookupByUUIDString(artifact.name)
        owner = secret_owner(secret.usageID())
        if owner is None or owner != artifact.instance_id or _has_domain(connection, owner):
            raise FailedPrecondition(f"secret {artifact.name} is no proven leftover any more", code="not_removable")
        secret.undefine()
    except libvirt.libvirtError as exc:
        if errors.is_code(exc, "VIR_ERR_NO_SECRET"):
            return False
        raise
    return True


def _has_domain(connection: Any, instance_id: str) -> bool:
    try:
        domains.find(connection, instance_id)
    except libvirt.libvirtError as exc:
        if errors.is_code(exc, "VIR_ERR_NO_DOMAIN"):
            return False
        raise
    return True


def _user_of(connection: Any, folder: Path) -> str | None:
    """The name of a domain, ours or not, whose definition names something in the folder."""
    inside = f"{folder}/"
    for domain in connection.listAllDomains():
        try:
            if inside in domain.XMLDesc() or inside in domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE):
                return str(domain.name())
        except libvirt.libvirtError as exc:
            if not errors.is_code(exc, "VIR_ERR_NO_DOMAIN"):
                raise
    return None
