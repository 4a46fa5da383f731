"""Fixtures of the unit tests."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from blockbuster import BlockBuster
from support.rig import Rig

from agent.core import operation, runner


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
    monkeypatch.setattr(runner, "SILENCE_S", 0.0)
