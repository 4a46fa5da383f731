"""The routes that need nothing but the context, of all families."""

from __future__ import annotations

from agent.core.registry import Route
from agent.handlers import create, delete, power, read, rebuild, rescue, restore

ROUTES: tuple[Route, ...] = (
    *create.ROUTES,
    *delete.ROUTES,
    *power.ROUTES,
    *read.ROUTES,
    *rebuild.ROUTES,
    *rescue.ROUTES,
    *restore.ROUTES,
)
"""As the modules have them: `guarded` is put around each where they are registered."""
