"""The routes that need nothing but the context, of all families."""

from __future__ import annotations

from agent.core.registry import Route
from agent.handlers import adopt, backup, create, delete, export, images, live, memory, power, read, resize, snapshot

ROUTES: tuple[Route, ...] = (
    *adopt.ROUTES,
    *create.ROUTES,
    *delete.ROUTES,
    *power.ROUTES,
    *memory.ROUTES,
    *read.ROUTES,
    *export.ROUTES,
    *backup.ROUTES,
    *snapshot.ROUTES,
    *images.ROUTES,
    *resize.ROUTES,
    *live.ROUTES,
)
