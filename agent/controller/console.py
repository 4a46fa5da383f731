"""Finds what is new in the console log, of which each answer holds the end. Pure."""

from __future__ import annotations

_BROKEN = "\ufffd"


class ConsoleTail:
    """Turns successive ends of one log into its new text. `lost` tells if text in between was missed."""

    def __init__(self) -> None:
        self._seen: str | None = None
        self.lost = False

    def feed(self, text: str, *, truncated: bool) -> str:
        """Take the latest end of the log and return what of it is new.

        `truncated`: there was more before it, so that it may begin anywhere, even within a character.
        """
        if truncated:
            text = text.lstrip(_BROKEN)
        # A character of which the guest has written only the first bytes is shown when it is whole.
        text = text.rstrip(_BROKEN)
        seen, self._seen = self._seen, text
        self.lost = False
        if seen is None:
            return text
        if not truncated and text.startswith(seen):
            return text[len(seen) :]
        common = overlap(seen, text)
        # Without anything in common the log was begun anew, or more was written than one answer holds.
        self.lost = common == 0 and truncated and bool(seen)
        return text[common:]


def overlap(before: str, after: str) -> int:
    """Return the length of the longest end of `before` that `after` begins with, in linear time."""
    before = before[-len(after) :] if after else ""
    failure = _failures(after)
    matched = 0
    for char in before:
        while matched and (matched == len(after) or after[matched] != char):
            matched = failure[matched - 1]
        if after[matched] == char:
            matched += 1
    return matched


def _failures(text: str) -> list[int]:
    """Knuth, Morris and Pratt's table: for each prefix, the length of its longest border."""
    table = [0] * len(text)
    matched = 0
    for index in range(1, len(text)):
        while matched and text[matched] != text[index]:
            matched = table[matched - 1]
        if text[matched] == text[index]:
            matched += 1
        table[index] = matched
    return table
