"""A real broker, a real hypervisor and agents as processes, for tests that break them."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from agent.messages.spec import ImageSource
from devstack.libvirtd import PrivateLibvirtd
from devstack.rabbitmq import PrivateBroker
from support.fleet import World
from support.host import clean_libvirt


@pytest.fixture(scope="session")
def session_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateBroker]:
    if shutil.which("rabbitmq-server", path=f"{os.environ['PATH']}:/usr/sbin") is None:
        pytest.skip("rabbitmq-server is not installed")
    with PrivateBroker(tmp_path_factory.mktemp("broker")) as broker:
        yield broker


@pytest.fixture
def broker(session_broker: PrivateBroker) -> PrivateBroker:
    """The session's broker, running even if an earlier test ended it."""
    session_broker.start()
    return session_broker


@pytest.fixture(scope="session")
def session_libvirtd(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[PrivateLibvirtd]:
    if os.geteuid() != 0:
        pytest.skip("a private system libvirtd needs root")
    path = f"{os.environ['PATH']}:/usr/sbin"
    missing = [name for name in ("libvirtd", "virtlogd", "qemu-system-x86_64", "qemu-img") if not shutil.which(name, path=path)]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    pytest.importorskip("libvirt", reason="libvirt-python is not installed")
    cache = request.config.cache.mkdir("libvirt-capabilities")
    with PrivateLibvirtd(tmp_path_factory.mktemp("lv"), capabilities_cache=cache) as libvirtd:
        yield libvirtd


@pytest.fixture
def libvirtd(session_libvirtd: PrivateLibvirtd) -> Iterator[PrivateLibvirtd]:
    """The session's libvirtd, running and without domains."""
    session_libvirtd.start()
    yield session_libvirtd
    session_libvirtd.start()
    clean_libvirt(session_libvirtd)


@pytest.fixture
async def world(broker: PrivateBroker, tmp_path: Path) -> AsyncIterator[World]:
    made = World(broker, tmp_path)
    try:
        await made.open()
        yield made
    finally:
        await made.close()


@pytest.fixture
def image(tmp_path: Path) -> ImageSource:
    """A raw image of 1 MiB in the tests' folder, where agents may read."""
    path = tmp_path / "images" / "tiny.raw"
    path.parent.mkdir()
    path.write_bytes(b"tiny" + bytes(1024 * 1024 - 4))
    return ImageSource(url=path.as_uri(), sha256=hashlib.sha256(path.read_bytes()).hexdigest(), format="raw")
