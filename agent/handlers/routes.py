"""The routes that need nothing but the context, of all families."""

from __future__ import annotations

from agent.core.registry import Route
from agent.handlers import adopt, create, delete, power, read

ROUTES: tuple[Route, ...] = (
    *adopt.ROUTES,
    *create.ROUTES,
    *delete.ROUTES,
    *power.ROUTES,
    *read.ROUTES,
)
