"""The resize family of verbs over libvirt."""

from __future__ import annotations

from agent.drivers.libvirt.parts import Parts


class LibvirtResize(Parts):
    """See `agent.drivers.verbs.resize`."""
