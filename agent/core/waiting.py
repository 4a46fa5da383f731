"""Waiting for an event, with a limit."""

from __future__ import annotations

import asyncio


async def happens(event: asyncio.Event, limit_s: float) -> bool:
    """Wait until the event is set. False if that took longer than `limit_s`."""
    try:
        async with asyncio.timeout(limit_s):
            await event.wait()
    except TimeoutError:
        return False
    return True
