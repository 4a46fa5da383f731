"""Real guests that boot, behind a real agent, a real broker and a real libvirtd."""

from __future__ import annotations

import pytest
from support.fleet_fixtures import broker, libvirtd, session_broker, session_libvirtd, world

from agent.messages.spec import ImageSource
from devstack.guest_image import GuestImage, guest_image

__all__ = ["broker", "libvirtd", "session_broker", "session_libvirtd", "world"]


@pytest.fixture(scope="session")
def bootable(request: pytest.FixtureRequest) -> GuestImage:
    """The small guest that tells on its console what it sees; built once and kept in pytest's cache."""
    return guest_image(request.config.cache.mkdir("guest-image"))


@pytest.fixture
def source(bootable: GuestImage) -> ImageSource:
    """The guest's image as a command names it."""
    return ImageSource(url=bootable.path.resolve().as_uri(), sha256=bootable.sha256, format="qcow2")
