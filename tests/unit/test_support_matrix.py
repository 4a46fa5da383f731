"""The support matrix agrees with the contract, with the drivers and with its page."""

from __future__ import annotations

from pathlib import Path

from agent.drivers.base import OPTIONAL_VERBS
from agent.messages.commands import COMMANDS
from agent.support_matrix import COLUMNS, NOVA, render

PAGE = Path(__file__).parents[2] / "docs" / "support-matrix.md"


def test_every_verb_has_its_row_of_nova() -> None:
    assert {command.verb for command in COMMANDS} - NOVA.keys() == set()


def test_every_optional_verb_is_one_of_the_contract() -> None:
    assert {command.verb for command in COMMANDS} >= OPTIONAL_VERBS
    assert all(verbs <= OPTIONAL_VERBS for verbs in COLUMNS.values())


def test_the_page_is_what_make_matrix_prints() -> None:
    assert PAGE.read_text("utf-8") == render(), "run: make matrix"
