"""The routes that need nothing but the context, of all families."""

from __future__ import annotations

from agent.core.registry import Route
from agent.handlers import create, delete, memory, power, read

ROUTES: tuple[Route, ...] = (
    *create.ROUTES,
    *delete.ROUTES,
    *power.ROUTES,
    *memory.ROUTES,
    *read.ROUTES,
)
