"""The host family of verbs over libvirt."""

from __future__ import annotations

from agent.drivers.libvirt.parts import Parts


class LibvirtHost(Parts):
    """See `agent.drivers.verbs.host`."""
