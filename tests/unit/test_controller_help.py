"""Every command of `computectl` and `compute-agent` says what it does."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from agent.cli import main as agent_cli
from agent.controller.cli import cli as controller_cli


def _commands(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    yield path
    if isinstance(command, click.Group):
        for name in sorted(command.commands):
            yield from _commands(command.commands[name], (*path, name))


ROOTS = {"computectl": controller_cli, "compute-agent": agent_cli}
ALL = [path for name, root in ROOTS.items() for path in _commands(root, (name,))]


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_help(path: tuple[str, ...]) -> None:
    shown = CliRunner().invoke(ROOTS[path[0]], [*path[1:], "--help"], prog_name=path[0], terminal_width=100)
    assert shown.exit_code == 0, shown.output
    assert shown.output.startswith(f"Usage: {' '.join(path)} ")
    assert "..." not in shown.output.partition("Commands:")[2], "a command's first sentence is too long for the list"
    assert shown.output.partition("\n\n")[2].strip().partition("\n")[0].strip() not in ("", "Options:")


def _options(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[str, str | None]]:
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            yield f"{' '.join(path)} {parameter.opts[0]}", parameter.help
    if isinstance(command, click.Group):
        for name, sub in command.commands.items():
            yield from _options(sub, (*path, name))


def test_every_option_says_what_it_does() -> None:
    silent = [option for name, root in ROOTS.items() for option, text in _options(root, (name,)) if not text]
    assert silent == []
