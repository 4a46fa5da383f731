"""The memory family of verbs over libvirt."""

from __future__ import annotations

from agent.drivers.libvirt.parts import Parts


class LibvirtMemory(Parts):
    """See `agent.drivers.verbs.memory`."""
