"""How results look: tables for people, JSON for programs. Writes to standard output only.

What comes from a host or a guest may hold control characters; none of them reaches a terminal.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click

_ESCAPES = re.compile(r"\x1b(\[[0-9;?<=>!]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[ -/]*[0-~])")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_PIPE_WIDTH = 400
"""Columns of a table that nobody looks at directly: nothing is cut where a program reads it."""


def clean(value: object) -> str:
    """Make text safe for one place in a terminal: without escape sequences and control characters."""
    text = _ESCAPES.sub("", str(value))
    return _CONTROLS.sub("", text)


def printable(text: str) -> str:
    """Make a guest's output safe for a terminal: it keeps its lines and tabs and loses its escape sequences."""
    return clean(text.replace("\r\n", "\n"))


def document(value: Any) -> None:
    """Print one JSON document."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def json_line(value: Any) -> None:
    """Print one line of a JSON stream, at once."""
    click.echo(json.dumps(value, separators=(",", ":"), ensure_ascii=False))
    sys.stdout.flush()


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table with one line per row where the terminal is wide enough."""
    # rich takes a tenth of a second to load, which JSON output and --help need not wait for.
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    grid = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        grid.add_column(column.upper(), overflow="fold")
    for row in rows:
        grid.add_row(*(Text("-" if cell is None else clean(cell).replace("\n", " ")) for cell in row))
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    Console(file=sys.stdout, width=width, highlight=False).print(grid)


def fields(value: Mapping[str, Any]) -> None:
    """Print nested data as two columns, with dotted names."""
    table(("field", "value"), _flat(value, ""))


def _flat(value: Any, name: str) -> Iterable[tuple[str, object]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
        for index, item in enumerate(value):
            yield from _flat(item, f"{name}.{index}")
    elif isinstance(value, Mapping | list):
        yield name, ", ".join(str(item) for item in value) or None
    else:
        yield name, "yes" if value is True else "no" if value is False else value


def mib(value: object) -> str:
    """Write an amount of MiB in the unit that people use for it."""
    if not isinstance(value, int | float):
        return "-"
    return f"{value / 1024:.1f} GiB" if value >= 1024 else f"{value:g} MiB"


def seconds(value: float) -> str:
    """Write a duration."""
    if value < 1:
        return f"{value * 1000:.0f} ms"
    if value < 120:
        return f"{value:.1f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.0f} h"
