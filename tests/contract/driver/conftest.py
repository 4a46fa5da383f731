"""The drivers that the contract runs on, and its fixtures."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from driver_case import PREFIX, Difference, DriverCase, EventRecorder, Instance

from agent.drivers.base import Driver, DriverContext, DriverEvent
from agent.drivers.fake import FakeDriver
from agent.drivers.registry import load_driver

if TYPE_CHECKING:
    from devstack.libvirtd import PrivateLibvirtd


_PARTS = (
    "connection", "definition", "host", "life", "machine", "memory", "reading", "rebuild", "resize", "snapshot", "stats",
    "storage",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "qemu: runs real QEMU guests; needs root, libvirtd and QEMU")
    # The suite's modules are no test modules by name, but their assertions should explain themselves all the same.
    pytest.register_assert_rewrite(*(f"contract_{part}" for part in _PARTS))


class FakeCase(DriverCase):
    def __init__(self, **settings: Any) -> None:
        self._settings = settings

    def make(self, state_dir: Path, emit: Callable[[DriverEvent], None], **settings: Any) -> Driver:
        merged = self._settings | settings
        return FakeDriver(DriverContext(host="contract", state_dir=state_dir, settings=merged, emit=emit))

    def add_foreign(self, driver: Driver, name: str, *, disk: bool = False) -> str:
        assert isinstance(driver, FakeDriver)
        return driver.add_foreign(name, 1, 32)

    def interrupt(self, driver: Driver) -> None:
        assert isinstance(driver, FakeDriver)
        driver.disconnect()

    def restore(self, driver: Driver) -> None:
        assert isinstance(driver, FakeDriver)
        driver.reconnect()


class FakeInMemory(FakeCase):
    differences = frozenset({Difference.STATE_DIES_WITH_THE_DRIVER, Difference.DISKS_ARE_NOT_FILES})


class LibvirtCase(DriverCase):
    domain_type: ClassVar[str] = "test"

    def __init__(self, uri: str) -> None:
        self._uri = uri

    def make(self, state_dir: Path, emit: Callable[[DriverEvent], None], **settings: Any) -> Driver:
        merged = {"uri": self._uri, "virt_type": "qemu", "reconnect_max_s": 0.5} | settings
        context = DriverContext(host="contract", state_dir=state_dir, settings=merged, emit=emit)
        return load_driver("libvirt")(context)

    def add_foreign(self, driver: Driver, name: str, *, disk: bool = False) -> str:
        devices = ""
        if disk:
            with tempfile.NamedTemporaryFile(prefix=name, suffix=".raw", delete=False) as file:
                file.truncate(1024 * 1024)
            devices = (
                "<devices><disk type='file' device='disk'><driver name='qemu' type='raw'/>"
                f"<source file='{file.name}'/><target dev='vda' bus='virtio'/></disk></devices>"
            )
        document = (
            f"<domain type='{self.domain_type}'><name>{name}</name><memory unit='MiB'>32</memory><vcpu>1</vcpu>"
            f"<os><type arch='x86_64'>hvm</type></os>{devices}</domain>"
        )
        if self.domain_type == "test":
            document = document.replace(" arch='x86_64'", "")
        with _opened(self._uri) as connection:
            domain = connection.defineXML(document)
            domain.create()
            return str(domain.UUIDString())

    def clean(self) -> None:
        with _opened(self._uri) as connection:
            for domain in connection.listAllDomains():
                if domain.name().startswith(PREFIX):
                    if domain.isActive():
                        domain.destroy()
                    if domain.hasManagedSaveImage():
                        domain.managedSaveRemove()
                    domain.undefine()


class LibvirtTestInProcess(LibvirtCase):
    differences = frozenset(
        {
            Difference.STATE_DIES_WITH_THE_DRIVER,
            Difference.STATE_DIES_WITH_THE_HYPERVISOR,
            Difference.CANNOT_BE_INTERRUPTED,
            Difference.PLAIN_MACHINES_ONLY,
            Difference.A_RESTORED_GUEST_RUNS,
        }
    )


class LibvirtDaemonCase(LibvirtCase):
    def __init__(self, uri: str, daemon: PrivateLibvirtd) -> None:
        super().__init__(uri)
        self._daemon = daemon

    def interrupt(self, driver: Driver) -> None:
        self._daemon.kill_daemon()

    def restore(self, driver: Driver) -> None:
        self._daemon.start_daemon()


class LibvirtTestDaemon(LibvirtDaemonCase):
    differences = frozenset(
        # The daemon frees the simulation with its last connection.
        {
            Difference.STATE_DIES_WITH_THE_DRIVER,
            Difference.STATE_DIES_WITH_THE_HYPERVISOR,
            Difference.PLAIN_MACHINES_ONLY,
            Difference.A_RESTORED_GUEST_RUNS,
        }
    )


class LibvirtQemu(LibvirtDaemonCase):
    domain_type = "qemu"
    differences = frozenset(
        {
            Difference.GUEST_IGNORES_SHUTDOWN,
            Difference.VCPUS_ARE_NOT_UNPLUGGED,
            Difference.PLUGGED_VCPUS_HAVE_NO_SNAPSHOT,
        }
    )


@contextmanager
def _opened(uri: str) -> Iterator[Any]:
    """Give a libvirt connection beside the driver's."""
    import libvirt  # noqa: PLC0415 - optional

    connection = libvirt.open(uri)
    try:
        yield connection
    finally:
        connection.close()


@pytest.fixture(scope="session")
def libvirtd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateLibvirtd]:
    """One private daemon for all tests of the session."""
    if os.geteuid() != 0:
        pytest.skip("a private libvirtd needs root")
    missing = [name for name in ("libvirtd", "virtlogd", "qemu-system-x86_64") if _which(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    from devstack.libvirtd import PrivateLibvirtd  # noqa: PLC0415 - needs more than the other drivers

    with PrivateLibvirtd(tmp_path_factory.mktemp("lv")) as daemon:
        daemon.start()
        yield daemon


def _which(program: str) -> str | None:
    return shutil.which(program, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")


_CASES: dict[str, Callable[[pytest.FixtureRequest], DriverCase]] = {
    "fake": lambda _request: FakeInMemory(),
    "fake-persist": lambda _request: FakeCase(persist=True),
    "libvirt-test": lambda _request: LibvirtTestInProcess("test:///default"),
    "libvirt-test-daemon": lambda request: _daemon_case(LibvirtTestDaemon, request, "test_uri"),
    "libvirt-qemu": lambda request: _daemon_case(LibvirtQemu, request, "uri"),
}


def _daemon_case(cls: type[LibvirtDaemonCase], request: pytest.FixtureRequest, uri: str) -> DriverCase:
    daemon = request.getfixturevalue("libvirtd")
    return cls(getattr(daemon, uri), daemon)


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.qemu) if "qemu" in name else name for name in _CASES])
def driver_case(request: pytest.FixtureRequest) -> DriverCase:
    if request.param.startswith("libvirt"):
        pytest.importorskip("libvirt", reason="libvirt-python is not installed")
    return _CASES[request.param](request)


@pytest.fixture
def events() -> EventRecorder:
    return EventRecorder()


@pytest.fixture
def driver(driver_case: DriverCase, events: EventRecorder, tmp_path: Path) -> Iterator[Driver]:
    made = driver_case.make(tmp_path, events)
    made.connect()
    yield made
    driver_case.restore(made)
    driver_case.clean()
    made.close()


@pytest.fixture
def instance(driver: Driver) -> Instance:
    """One that does not exist yet."""
    return Instance(driver)
