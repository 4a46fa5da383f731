"""How results look: tables for people, JSON for programs. Writes to standard output only.

What comes from a host or a guest may hold control characters; none of them reaches a terminal.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import click

_ESCAPES = re.compile(r"\x1b(\[[0-9;?<=>!]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[ -/]*[0-~])")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_PIPE_WIDTH = 400
"""Columns of a table that nobody looks at directly: nothing is cut where a program reads it."""
_WORD = 40
"""A word of this length is never folded: an id has 36 characters, the longest verb fewer."""
_FOLDED = 16
"""A longer word is folded down to this before a row is broken into lines."""
_GAP = _INDENT = "  "


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
    """Print a table with one line per row where the terminal is wide enough.

    On a narrower one text is folded between its words, and in longer words than ids and verbs are. Where that is not
    enough, a row takes several lines, of which the first begins at the margin.
    """
    # rich takes a tenth of a second to load, which JSON output and --help need not wait for.
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    heads = [column.upper() for column in columns]
    cells = [["-" if cell is None else clean(cell).replace("\n", " ") for cell in row] for row in rows]
    width = _width()
    words = [max(_longest_word(text) for text in column) for column in zip(heads, *cells, strict=True)]
    if sum((longest if longest <= _WORD else _FOLDED) + len(_GAP) for longest in words) - len(_GAP) > width:
        click.echo("\n".join(_stacked([heads, *cells], width)))
        return
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for head, longest, column in zip(heads, words, zip(heads, *cells, strict=True), strict=True):
        one_word = longest <= _WORD and not any(" " in text for text in column)
        grid.add_column(head, overflow="fold", no_wrap=one_word)
    for row in cells:
        grid.add_row(*(Text(text) for text in row))
    console = Console(file=sys.stdout, width=width, highlight=False)
    with console.capture() as lines:
        console.print(grid)
    text = lines.get()
    if not sys.stdout.isatty():
        # Columns are filled up to their width, the last one too: 400 characters where one value is long.
        text = "".join(f"{line.rstrip()}\n" for line in text.splitlines())
    click.echo(text, nl=False)


def _width() -> int:
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else _PIPE_WIDTH


def _longest_word(text: str) -> int:
    return max((len(word) for word in text.split()), default=0)


def _stacked(rows: Sequence[Sequence[str]], width: int) -> Iterator[str]:
    """Lines of a table in which a row takes as many as it needs; what is longer than a line is left to the terminal."""
    from rich.cells import cell_len, set_cell_size  # noqa: PLC0415 - as above

    sizes = [max(cell_len(text) for text in column) for column in zip(*rows, strict=True)]
    lines: list[list[int]] = [[]]
    room = width
    for place, size in enumerate(sizes):
        if lines[-1] and size > room:
            lines.append([])
            room = width - len(_INDENT)
        lines[-1].append(place)
        room -= size + len(_GAP)
    for row in rows:
        for number, places in enumerate(lines):
            text = _GAP.join(set_cell_size(row[place], sizes[place]) for place in places)
            yield ((_INDENT if number else "") + text).rstrip()


def fields(value: Mapping[str, Any]) -> None:
    """Print nested data as two columns, with dotted names."""
    table(("field", "value"), _flat(value, ""))


def _flat(value: Any, name: str) -> Iterable[tuple[str, object]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(item is None or isinstance(item, Mapping | list) for item in value):
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
