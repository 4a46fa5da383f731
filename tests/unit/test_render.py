"""Tables on terminals: no id and no verb is ever cut in two."""

from __future__ import annotations

import pytest

from agent.controller import render
from agent.messages.commands import COMMANDS

ID = "5f1c9d1e-7a52-4e0b-9d5c-3b1f0a7c6e24"
OTHER = "11111111-2222-3333-4444-555555555555"
POLICY = f"policy/{ID}/on-crash/1795376782226/3"
VERB = max((command.verb for command in COMMANDS), key=len)
JOURNAL = ("operation", "verb", "state", "accepted", "instance")
ROWS = [
    [ID, VERB, "succeeded*", "2026-11-22T22:28:16Z", OTHER],
    [OTHER, "host.ping", "accepted", "2026-11-22T22:28:17Z", None],
]


def shown(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    width: int,
    columns: tuple[str, ...],
    rows: list[list[object]],
) -> list[str]:
    monkeypatch.setattr(render, "_width", lambda: width)
    render.table(columns, rows)
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


def test_no_id_and_no_verb_is_cut(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for width in [*range(38, 150), 400]:
        lines = shown(monkeypatch, capsys, width, JOURNAL, ROWS)
        assert max(map(len, lines)) <= width
        words = " ".join(lines).split()
        assert words == [*(name.upper() for name in JOURNAL), *(str(cell or "-") for row in ROWS for cell in row)], width


def test_a_wide_terminal_has_one_line_per_row_and_100_columns_two(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(shown(monkeypatch, capsys, 140, JOURNAL, ROWS)) == 3
    lines = shown(monkeypatch, capsys, 100, JOURNAL, ROWS)
    assert lines == [
        "OPERATION                             VERB                         STATE       ACCEPTED",
        "  INSTANCE",
        f"{ID}  {VERB}  succeeded*  2026-11-22T22:28:16Z",
        f"  {OTHER}",
        f"{OTHER}  host.ping                    accepted    2026-11-22T22:28:17Z",
        "  -",
    ]


def test_a_long_name_is_folded_before_rows_are_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "a-rather-long-name-of-a-virtual-machine-in-prod-01"
    lines = shown(monkeypatch, capsys, 100, ("id", "name", "state", "memory"), [[ID, name, "running", "128.0 GiB"]])
    assert lines[1].startswith(f"{ID}  a-rather-")
    assert lines[1].endswith("  running  128.0 GiB")
    assert len(lines) == 3


def test_sentences_are_folded_before_ids_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = "a sentence that goes on for longer than the terminal is wide " * 2
    lines = shown(monkeypatch, capsys, 100, ("id", "verb", "why"), [[ID, VERB, sentence]])
    assert max(map(len, lines)) <= 100
    assert lines[1].startswith(f"{ID} ")
    assert VERB in lines[1]
    assert len(lines) > 2


def test_longer_words_are_folded_or_left_to_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = "0123456789abcdef" * 4
    lines = shown(monkeypatch, capsys, 60, ("field", "value"), [["sha256", digest], ["id", ID]])
    assert max(map(len, lines)) <= 60
    assert "".join(line.split()[-1] for line in lines[1:3]) == digest
    assert "".join(shown(monkeypatch, capsys, 20, ("operation",), [[POLICY]])[1:]) == POLICY


def test_an_empty_table_has_its_heads(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(monkeypatch, capsys, 100, ("id", "verb"), [])[0].split() == ["ID", "VERB"]


def test_a_place_without_a_value_is_a_dash(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(render, "_width", lambda: 80)
    render.fields({"nics": [None, {"inbound_kib_s": 5}], "disks": {"root": None}})
    assert [line.split() for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["nics.0", "-"], ["nics.1.inbound_kib_s", "5"], ["disks.root", "-"],
    ]  # fmt: skip


def test_no_blanks_at_the_end_of_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    render.table(("name", "state"), [["a", "x" * 39], ["b", "x"]])
    assert capsys.readouterr().out == f"NAME  STATE\na     {'x' * 39}\nb     x\n"
