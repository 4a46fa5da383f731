"""The routes that need nothing but the context, of all families."""

from __future__ import annotations

from agent.core.registry import Route
from agent.handlers import create, delete, live, power, read, resize

ROUTES: tuple[Route, ...] = (
    *create.ROUTES,
    *delete.ROUTES,
    *power.ROUTES,
    *read.ROUTES,
    *resize.ROUTES,
    *live.ROUTES,
)
