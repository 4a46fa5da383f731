"""Which UEFI firmware a host has: QEMU's firmware descriptors, as distributions install them.

They are read here, and the found files are written into the definition, so that an instance keeps its firmware when the
host gets a better one: libvirt's own choice may change from one start to the next.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

import structlog

from agent.messages.spec_machine import Firmware

_log = structlog.get_logger(__name__)

FOLDERS: Final = (Path("/etc/qemu/firmware"), Path("/usr/share/qemu/firmware"))
"""Where descriptors are by convention; a file in an earlier folder hides one of the same name in a later one."""


@dataclass(frozen=True, slots=True)
class FirmwareBuild:
    """Files of one UEFI build: the code, which is only read, and the template of each guest's own variables."""

    code: Path
    variables: Path
    secure_boot: bool
    needs_smm: bool


def find(
    wanted: Firmware, *, architecture: str, machine: str, folders: Sequence[Path] = FOLDERS
) -> FirmwareBuild | None:
    """Return the first build that fits, in the order of the descriptors' names, or None.

    With `secure_boot` it has keys enrolled, for without keys nothing is checked; without it, a plain build.
    """
    for build, features in _builds(architecture, machine, folders):
        if wanted.secure_boot == build.secure_boot and (not wanted.secure_boot or "enrolled-keys" in features):
            return build
    return None


def _builds(architecture: str, machine: str, folders: Sequence[Path]) -> Iterator[tuple[FirmwareBuild, set[str]]]:
    for path in _descriptors(folders):
        try:
            read = _read(json.loads(path.read_bytes()), architecture, machine)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
            _log.warning("firmware.descriptor_unreadable", path=str(path), error=str(exc))
            continue
        if read is not None and read[0].code.exists() and read[0].variables.exists():
            yield read


def _descriptors(folders: Sequence[Path]) -> list[Path]:
    found: dict[str, Path] = {}
    for folder in reversed(folders):
        found |= {path.name: path for path in folder.glob("*.json")}
    return [found[name] for name in sorted(found)]


def _read(descriptor: dict[str, Any], architecture: str, machine: str) -> tuple[FirmwareBuild, set[str]] | None:
    """Read one descriptor; None if it is for other machines or of a kind that keeps no variables."""
    mapping = descriptor["mapping"]
    fits = any(
        target["architecture"] == architecture and any(fnmatchcase(machine, pattern) for pattern in target["machines"])
        for target in descriptor["targets"]
    )
    split = mapping["device"] == "flash" and mapping.get("mode", "split") == "split"
    if not fits or not split or "uefi" not in descriptor["interface-types"]:
        return None
    # The definition says nothing of formats: libvirt 9.0 knows raw ones only.
    if {mapping["executable"]["format"], mapping["nvram-template"]["format"]} != {"raw"}:
        return None
    features = set(descriptor["features"])
    build = FirmwareBuild(
        code=Path(mapping["executable"]["filename"]),
        variables=Path(mapping["nvram-template"]["filename"]),
        secure_boot="secure-boot" in features,
        needs_smm="requires-smm" in features,
    )
    return build, features
