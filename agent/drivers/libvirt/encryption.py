"""Keys of encrypted disks: files of the host that only their names travel of, and libvirt's secrets made from them.

A secret is ephemeral (libvirtd keeps it in memory) and private (libvirtd does not give it out). It is made anew
before every start, so it need not outlive libvirtd; a running QEMU has got its key.
"""

from __future__ import annotations

import contextlib
import os
import stat
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree as ET

from agent.drivers.libvirt import errors
from agent.drivers.libvirt.binding import libvirt
from agent.errors import FailedPrecondition

_MAX_BYTES: Final = 4096
_OTHERS: Final = stat.S_IRWXO
_SPACE: Final = uuid.UUID("6d3c7f1e-54f4-4a0e-9a3a-6f2f9d1f2a55")


@dataclass(frozen=True, slots=True)
class Key:
    """A key's bytes; not to be shown, logged or compared with care for anything but equality."""

    value: bytes = field(repr=False)

    @contextlib.contextmanager
    def descriptor(self) -> Iterator[int]:
        """Give an open file in memory with the key in it, to be passed to a child."""
        number = os.memfd_create("key", os.MFD_CLOEXEC)
        try:
            os.write(number, self.value)
            yield number
        finally:
            os.close(number)


@dataclass(frozen=True, slots=True)
class Sealed:
    """How a volume is encrypted: name of the key, and the secret by which libvirt knows it.

    `usage` is the secret's usage id, `compute-agent/<instance>/<volume>`, which proves that it is ours.
    """

    key: str
    secret_uuid: str
    usage: str


def sealed(instance_id: str, volume_name: str, key: str) -> Sealed:
    """The secret's UUID is always the same for a volume, so that it is found again."""
    owner = f"{instance_id}/{volume_name}"
    return Sealed(key, str(uuid.uuid5(_SPACE, owner)), f"compute-agent/{owner}")


def read_key(keys_dir: Path | None, name: str) -> Key:
    """Read a key of the host.

    Raises `FailedPrecondition`: `encryption_key_missing`, or `encryption_key_unusable` for a link, for what is no
    file, for a file that others may access, and for content that QEMU takes for no passphrase (it wants UTF-8).
    """
    if keys_dir is None:
        raise _missing(name, "the driver setting keys_dir is not set")
    path = keys_dir / name
    try:
        number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as exc:
        raise _missing(name, f"{path} does not exist") from exc
    except OSError as exc:
        raise _unusable(name, f"{path} cannot be opened ({exc.strerror}); links are not followed") from exc
    try:
        facts = os.fstat(number)
        if not stat.S_ISREG(facts.st_mode):
            raise _unusable(name, f"{path} is no regular file")
        if facts.st_mode & _OTHERS:
            raise _unusable(name, f"everybody may access {path}; take the rights of others away (chmod o=)")
        value = os.read(number, _MAX_BYTES + 1)
    except OSError as exc:
        raise _unusable(name, f"{path} cannot be read ({exc.strerror})") from exc
    finally:
        os.close(number)
    if not value or len(value) > _MAX_BYTES or not _is_text(value):
        raise _unusable(name, f"{path} must hold 1 to {_MAX_BYTES} bytes of UTF-8 without NUL")
    return Key(value)


def _is_text(value: bytes) -> bool:
    try:
        return "\0" not in value.decode()
    except UnicodeDecodeError:
        return False


def _missing(name: str, why: str) -> FailedPrecondition:
    return FailedPrecondition(f"there is no key {name}: {why}", code="encryption_key_missing", key=name)


def _unusable(name: str, why: str) -> FailedPrecondition:
    return FailedPrecondition(f"key {name} cannot be used: {why}", code="encryption_key_unusable", key=name)


def provide(connection: Any, keys_dir: Path | None, seals: Iterable[Sealed]) -> None:
    """Let libvirt know these secrets. Idempotent. Raises as `read_key` does, and libvirt's errors."""
    for seal in seals:
        key = read_key(keys_dir, seal.key)
        secret = ET.Element("secret", {"ephemeral": "yes", "private": "yes"})
        ET.SubElement(secret, "uuid").text = seal.secret_uuid
        ET.SubElement(secret, "description").text = f"compute-agent: key {seal.key}"
        usage = ET.SubElement(secret, "usage", {"type": "volume"})
        ET.SubElement(usage, "volume").text = seal.usage
        connection.secretDefineXML(ET.tostring(secret, encoding="unicode")).setValue(key.value)


def withdraw(connection: Any, seals: Iterable[Sealed]) -> None:
    """Let libvirt forget these secrets. Idempotent."""
    for seal in seals:
        try:
            connection.secretLookupByUUIDString(seal.secret_uuid).undefine()
        except libvirt.libvirtError as exc:
            if not errors.is_code(exc, "VIR_ERR_NO_SECRET"):
                raise
