"""All pairs: a small set of combinations in which every value of every axis meets every value of every other."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def _always(_row: Mapping[str, int]) -> bool:
    return True


def all_pairs(
    axes: Mapping[str, Sequence[Any]], allowed: Callable[[Mapping[str, int]], bool] = _always
) -> list[dict[str, int]]:
    """Rows of axis → index of a value, the same on every call.

    `allowed` judges rows, also unfinished ones, in which axes are missing. Pairs that no allowed row can have are left
    out. Greedy: each row begins with a pair that is still missing and takes for each axis the value that adds most.
    """
    names = list(axes)
    missing = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i in range(len(axes[a]))
        for j in range(len(axes[b]))
    }
    order = {name: position for position, name in enumerate(names)}

    def pair(one: tuple[str, int], other: tuple[str, int]) -> tuple[tuple[str, int], tuple[str, int]]:
        return (one, other) if order[one[0]] < order[other[0]] else (other, one)

    rows: list[dict[str, int]] = []
    for first in sorted(missing, key=lambda p: (order[p[0][0]], p[0][1], order[p[1][0]], p[1][1])):
        if first not in missing:
            continue
        row = dict(first)
        for name in names:
            if name in row:
                continue
            fitting = [value for value in range(len(axes[name])) if allowed({**row, name: value})]
            if not fitting:
                row = {}
                break
            gain = {v: sum(pair((name, v), item) in missing for item in row.items()) for v in fitting}
            row[name] = max(fitting, key=lambda value: (gain[value], -value))
        missing.discard(first)
        if row and allowed(row):
            missing -= {pair(one, other) for one, other in itertools.combinations(row.items(), 2)}
            rows.append(row)
    return rows
