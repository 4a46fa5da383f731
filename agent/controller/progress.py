"""Shows on standard error how far an awaited command is: one live line on a terminal, else a line per step."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Self

import click

from agent.controller.render import clean
from agent.messages.events import Event

if TYPE_CHECKING:
    from rich.status import Status

_STEP_PERCENT = 10
_MIB = 1024 * 1024


class Progress:
    """A context manager whose `show` takes the events of an operation. Quiet: it shows nothing."""

    def __init__(self, title: str, *, quiet: bool) -> None:
        self._title = title
        self.quiet = quiet
        self._status: Status | None = None
        self._stack = ExitStack()
        self._shown: tuple[object, ...] = ()

    def __enter__(self) -> Self:
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console  # noqa: PLC0415 (slow to load, and seldom needed)
            from rich.markup import escape  # noqa: PLC0415

            console = Console(stderr=True, highlight=False)
            self._status = self._stack.enter_context(console.status(f"{escape(self._title)}: sent"))
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stack.close()

    def show(self, event: Event) -> None:
        """Show an event, unless it says nothing new."""
        text = describe(event)
        if self.quiet or text is None:
            return
        if self._status is not None:
            from rich.markup import escape  # noqa: PLC0415

            self._status.update(f"{escape(self._title)}: {escape(text)}")
            return
        percent = percent_of(event.data)
        mark = (event.kind, event.data.get("phase"), None if percent is None else int(percent // _STEP_PERCENT))
        if mark != self._shown:
            self._shown = mark
            click.echo(f"{self._title}: {text}", err=True)


def percent_of(data: dict[str, Any]) -> float | None:
    """Percent of a progress event, worked out from its bytes where it gives none."""
    percent, done, total = data.get("percent"), data.get("done_bytes"), data.get("total_bytes")
    if isinstance(percent, int | float):
        return float(percent)
    if isinstance(done, int) and isinstance(total, int) and total > 0:
        return 100.0 * done / total
    return None


def describe(event: Event) -> str | None:
    """Say in words what an unfinished operation does; None for events that end it."""
    data = event.data
    if event.kind == "operation.accepted":
        return "accepted"
    if event.kind == "operation.started":
        attempt = data.get("attempt", 1)
        return "started" if attempt == 1 else f"taken up again (attempt {attempt})"
    if event.kind != "operation.progress":
        return None
    text = clean(data.get("phase", "working"))
    percent, done, total = percent_of(data), data.get("done_bytes"), data.get("total_bytes")
    if percent is not None:
        text += f" {percent:.0f} %"
    if isinstance(done, int):
        text += f" ({done / _MIB:.1f}"
        text += f" of {total / _MIB:.1f} MiB)" if isinstance(total, int) else " MiB)"
    return text
