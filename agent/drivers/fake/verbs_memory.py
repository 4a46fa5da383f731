"""The memory family of verbs on the simulated hypervisor."""

from __future__ import annotations

from agent.drivers.fake.parts import Parts


class FakeMemory(Parts):
    """See `agent.drivers.verbs.memory`."""
