"""Sets of host CPUs as operators write them (`2-7,10`), and how CPUs of their own are given to guests."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

from agent.errors import ResourceExhausted

_RANGE: Final = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?")


def parse_cpus(text: str) -> frozenset[int]:
    """Read a list of CPUs and ranges; empty text is an empty set. Raises `ValueError` that names the wrong part."""
    cpus: set[int] = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise ValueError(f"{part!r} is no CPU and no range such as 2-7")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"the range {part!r} runs backwards")
        cpus.update(range(first, last + 1))
    return frozenset(cpus)


def format_cpus(cpus: Iterable[int]) -> str:
    """Write a set of CPUs the short way."""
    parts: list[list[int]] = []
    for cpu in sorted(set(cpus)):
        if parts and parts[-1][-1] == cpu - 1:
            parts[-1] = [parts[-1][0], cpu]
        else:
            parts.append([cpu])
    return ",".join("-".join(map(str, part)) for part in parts)


def assign(
    vcpus: int,
    *,
    keep: Mapping[int, int],
    free: Collection[int],
    cells: Sequence[Collection[int]] = (),
) -> dict[int, int]:
    """Give each of a guest's vCPUs a host CPU of its own: vCPU → CPU.

    `keep` is what the guest has already and keeps; `free` are the CPUs that nobody has. A NUMA cell of the host that
    has enough of them (`cells`) is taken before several, and the fullest of these, so that large guests still find
    one. Raises `ResourceExhausted` (code `does_not_fit`) where too few are free.
    """
    given = {vcpu: cpu for vcpu, cpu in keep.items() if vcpu < vcpus}
    missing = [vcpu for vcpu in range(vcpus) if vcpu not in given]
    spare = set(free) - set(given.values())
    if len(spare) < len(missing):
        raise ResourceExhausted(
            f"{len(missing)} dedicated CPUs are needed and {len(spare)} are free",
            code="does_not_fit",
            PCPU=len(missing) - len(spare),
        )
    fitting = [sorted(spare & set(cell)) for cell in cells]
    fitting = sorted((cpus for cpus in fitting if len(cpus) >= len(missing)), key=len)
    return given | dict(zip(missing, fitting[0] if fitting else sorted(spare), strict=False))
