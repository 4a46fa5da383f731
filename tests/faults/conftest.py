"""A real broker, a real hypervisor and agents as processes, for tests that break them."""

from support.fleet_fixtures import broker, image, libvirtd, session_broker, session_libvirtd, world

__all__ = ["broker", "image", "libvirtd", "session_broker", "session_libvirtd", "world"]
