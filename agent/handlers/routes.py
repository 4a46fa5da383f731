"""The routes that need nothing but the context, of all families."""

from __future__ import annotations

from agent.core.registry import Route
from agent.handlers import (
    adopt,
    backup,
    create,
    delete,
    export,
    images,
    live,
    memory,
    power,
    read,
    rebuild,
    rescue,
    resize,
    restore,
    shelve,
    snapshot,
    stats,
)

ROUTES: tuple[Route, ...] = (
    *adopt.ROUTES,
    *create.ROUTES,
    *delete.ROUTES,
    *power.ROUTES,
    *memory.ROUTES,
    *read.ROUTES,
    *rebuild.ROUTES,
    *rescue.ROUTES,
    *restore.ROUTES,
    *shelve.ROUTES,
    *export.ROUTES,
    *backup.ROUTES,
    *snapshot.ROUTES,
    *images.ROUTES,
    *resize.ROUTES,
    *live.ROUTES,
    *stats.ROUTES,
)
"""As the modules have them: `guarded` is put around each where they are registered."""
