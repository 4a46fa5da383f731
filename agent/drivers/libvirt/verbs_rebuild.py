"""The rebuild family of verbs over libvirt."""

from __future__ import annotations

from agent.drivers.libvirt.parts import Parts


class LibvirtRebuild(Parts):
    """See `agent.drivers.verbs.rebuild`."""
