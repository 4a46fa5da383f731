"""Every test of the store contract runs on both stores."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from store_world import MemoryKind, SqliteKind, StoreKind


@pytest.fixture(params=["memory", "sqlite"])
async def kind(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[StoreKind]:
    """A store that is open, and what tests do to it from outside."""
    made: StoreKind = MemoryKind() if request.param == "memory" else SqliteKind(tmp_path / "journal.sqlite")
    await made.open()
    yield made
    await made.store.close()
