"""The snapshot family of verbs over libvirt."""

from __future__ import annotations

from agent.drivers.libvirt.parts import Parts


class LibvirtSnapshot(Parts):
    """See `agent.drivers.verbs.snapshot`."""
