"""The libvirt driver: QEMU/KVM guests, and libvirt's own simulated hypervisor for tests.

The package can be imported without the binding; constructing `LibvirtDriver` then raises `LibvirtMissing`.
"""

from __future__ import annotations

from agent.drivers.libvirt.binding import LibvirtMissing
from agent.drivers.libvirt.driver import LibvirtDriver

__all__ = ["LibvirtDriver", "LibvirtMissing"]
