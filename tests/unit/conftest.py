"""Fixtures of the unit tests."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from blockbuster import BlockBuster
from support.rig import Rig

from agent.core import announcement, operation


@pytest.fixture
async def rig(no_blocking: BlockBuster) -> AsyncIterator[Rig]:
    """The core on a memory journal."""
    made = Rig()
    yield made
    await made.ctx.executor.close(1)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo without pauses; say at once that work was accepted and started."""
    monkeypatch.setattr(operation, "UNDO_PAUSE_S", 0.0)
    monkeypatch.setattr(operation, "CALL_PAUSE_S", 0.0)
    monkeypatch.setattr(announcement, "SILENCE_S", 0.0)


@pytest.fixture(scope="session")
def firmware_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Descriptors of three UEFI builds, as Debian has them, with empty files."""
    folder = tmp_path_factory.mktemp("firmware")
    builds = {
        "40-enrolled": ("secure", ["enrolled-keys", "requires-smm", "secure-boot"], ["pc-q35-*"]),
        "50-secure": ("secure-empty", ["requires-smm", "secure-boot"], ["pc-q35-*"]),
        "60-plain": ("plain", ["acpi-s3"], ["pc-i440fx-*", "pc-q35-*"]),
    }
    for name, (stem, features, machines) in builds.items():
        files = {kind: folder / f"{stem}-{kind}.fd" for kind in ("code", "vars")}
        for path in files.values():
            path.touch()
        descriptor = {
            "description": name,
            "interface-types": ["uefi"],
            "mapping": {
                "device": "flash",
                "executable": {"filename": str(files["code"]), "format": "raw"},
                "nvram-template": {"filename": str(files["vars"]), "format": "raw"},
            },
            "targets": [{"architecture": "x86_64", "machines": machines}],
            "features": features,
            "tags": [],
        }
        (folder / f"{name}.json").write_text(json.dumps(descriptor))
    return folder
