"""What is new in a console log of which only the end can be read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.controller.console import ConsoleTail, overlap
from agent.controller.render import clean, mib, printable, seconds


@given(st.text("ab\n", max_size=30), st.text("ab\n", max_size=30))
def test_overlap_is_the_longest(before: str, after: str) -> None:
    sizes = [n for n in range(min(len(before), len(after)) + 1) if before[len(before) - n :] == after[:n]]
    assert overlap(before, after) == max(sizes)


@given(st.lists(st.text("abc\n", max_size=8)), st.integers(64, 100))
def test_following_prints_the_log_once(writes: list[str], window: int) -> None:
    tail, log, printed = ConsoleTail(), "", ""
    for number, write in enumerate(writes):
        log += f"{number}:{write}"
        printed += tail.feed(log[-window:], truncated=len(log) > window)
        assert not tail.lost
    assert printed == log


def test_a_character_in_two_halves_is_shown_whole() -> None:
    tail = ConsoleTail()
    assert tail.feed("gr\ufffd", truncated=False) == "gr"
    assert tail.feed("grün", truncated=False) == "ün"
    assert tail.feed("\ufffdün!", truncated=True) == "!"


def test_a_log_that_began_anew_is_printed_whole() -> None:
    tail = ConsoleTail()
    tail.feed("old boot\n", truncated=False)
    assert tail.feed("new\n", truncated=False) == "new\n"
    assert not tail.lost


def test_text_that_was_missed_is_told() -> None:
    tail = ConsoleTail()
    tail.feed("aaa", truncated=True)
    assert tail.feed("bbb", truncated=True) == "bbb"
    assert tail.lost


@pytest.mark.parametrize(
    ("text", "safe"),
    [("a\x1b[31mred\x1b[0m", "ared"), ("\x1b]0;title\x07x", "x"), ("\x1b]52;c;AAAA\x1b\\x", "x"), ("a\x9b31mb", "a31mb"),
     ("bell\x07 back\x08", "bell back"), ("\x1bc", ""), ("tab\tline\n", "tab\tline\n"), ("\x1b", "")],
)  # fmt: skip
def test_nothing_steers_the_terminal(text: str, safe: str) -> None:
    assert clean(text) == safe


def test_units() -> None:
    assert printable("a\r\nb") == "a\nb"
    assert [mib(v) for v in (512, 1536, None)] == ["512 MiB", "1.5 GiB", "-"]
    assert [seconds(v) for v in (0.0123, 5.0, 600.0, 10_000.0)] == ["12 ms", "5.0 s", "10 min", "3 h"]
