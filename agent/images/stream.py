"""What an open image source is to its reader, and the two ways in which any source fails half-way."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from agent.errors import Unavailable
from agent.images.policy import public_url

CHUNK = 1024 * 1024
"""Bytes per read: large enough that a hop between threads costs nothing against hashing them."""

Chunk = bytes | bytearray


@dataclass(frozen=True, slots=True)
class Resume:
    """Where a broken read is to go on: at byte `offset`, if the source still is what `validator` stood for."""

    offset: int
    validator: str


@dataclass(frozen=True, slots=True)
class Stream:
    """An open source: `total` is its length in bytes where known; `read` returns b"" at the end.

    `offset` is where reading begins: what was asked for, or 0 where the source cannot go on there. `validator`
    stands for these very bytes in a later `Resume`; None where the source has none. `read` raises `Unavailable`
    (another attempt may help) when the source stalls, fails, or ends before `total` bytes (code
    `image_truncated`); all that came before was returned by then.
    """

    total: int | None
    read: Callable[[], Awaitable[Chunk]]
    offset: int = 0
    validator: str | None = None


def stalled(url: str, limit_s: float) -> Unavailable:
    """Make the error for a source that sent nothing for `limit_s` seconds."""
    return Unavailable(
        f"{public_url(url)} sent nothing for {limit_s:g} s", code="image_stalled", stall_timeout_s=limit_s
    )


def truncated(url: str, done: int, total: int | None) -> Unavailable:
    """Make the error for a source that ended before its announced length."""
    return Unavailable(
        f"{public_url(url)} ended early, after {done} bytes",
        code="image_truncated",
        received_bytes=done,
        expected_bytes=total,
    )
