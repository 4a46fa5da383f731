"""Which specs ask for no more than a plain machine, for drivers that make nothing else."""

from __future__ import annotations

from collections.abc import Iterator

from agent.errors import Unsupported
from agent.messages.spec import InstanceSpec
from agent.messages.spec_machine import Cpu, Machine, MemoryBacking


def check_plain(spec: InstanceSpec, driver: str) -> None:
    """Raise `Unsupported` (code `option_unsupported`) for the first option about hardware that the spec sets."""
    for option, given in _given(spec):
        if given:
            raise Unsupported(
                f"the hypervisor of {driver} makes plain machines only and cannot do {option}",
                code="option_unsupported",
                option=option,
            )


def _given(spec: InstanceSpec) -> Iterator[tuple[str, bool]]:
    yield "cpu", spec.cpu != Cpu()
    yield "machine", spec.machine != Machine()
    yield "numa", bool(spec.numa)
    yield "memory_backing", spec.memory_backing != MemoryBacking()
    yield "shares", bool(spec.shares)
    yield "watchdog", spec.watchdog is not None
    yield "video", spec.video is not None
