"""How CPUs of their own are given to guests."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from agent.errors import ResourceExhausted


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
