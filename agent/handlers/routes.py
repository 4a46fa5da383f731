"""The routes that need nothing but the context, of all families."""

from __future__ import annotations

from agent.core.registry import Route
from agent.handlers import backup, create, delete, export, power, read, rebuild, rescue, restore, shelve, snapshot

ROUTES: tuple[Route, ...] = (
    *create.ROUTES,
    *delete.ROUTES,
    *power.ROUTES,
    *read.ROUTES,
    *rebuild.ROUTES,
    *rescue.ROUTES,
    *restore.ROUTES,
    *shelve.ROUTES,
    *export.ROUTES,
    *backup.ROUTES,
    *snapshot.ROUTES,
)
"""As the modules have them: `guarded` is put around each where they are registered."""
