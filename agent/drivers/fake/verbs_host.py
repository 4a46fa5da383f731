"""The host family of verbs on the simulated hypervisor."""

from __future__ import annotations

from agent.drivers.fake.parts import Parts


class FakeHost(Parts):
    """See `agent.drivers.verbs.host`."""
