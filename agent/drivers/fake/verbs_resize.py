"""The resize family of verbs on the simulated hypervisor."""

from __future__ import annotations

from agent.drivers.fake.parts import Parts


class FakeResize(Parts):
    """See `agent.drivers.verbs.resize`."""
