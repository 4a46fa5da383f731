"""Drivers are found by entry point; what is missing is named."""

from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints

import pytest

from agent.drivers import registry
from agent.drivers.fake import FakeDriver
from agent.errors import Internal, InvalidArgument, Unsupported


def offer(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    points = EntryPoints([EntryPoint("other", value, registry.GROUP)])
    monkeypatch.setattr(registry, "entry_points", points.select)


def test_installed_drivers() -> None:
    assert {"fake", "libvirt"} <= set(registry.known_drivers())
    assert registry.load_driver("fake") is FakeDriver


def test_unknown_driver_names_the_known() -> None:
    with pytest.raises(InvalidArgument, match="fake") as caught:
        registry.load_driver("xen")
    assert caught.value.code == "unknown_driver"
    assert "libvirt" in str(caught.value.details["known"])


def test_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_point: EntryPoint) -> object:
        raise ModuleNotFoundError("No module named 'libvirt'", name="libvirt")

    monkeypatch.setattr(EntryPoint, "load", load)
    with pytest.raises(Unsupported, match=r"pip install 'compute-agent\[libvirt\]'") as caught:
        registry.load_driver("libvirt")
    assert caught.value.code == "driver_library_missing"


def test_missing_library_of_another_package(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, "no_such_library_anywhere:Driver")
    with pytest.raises(Unsupported, match="no_such_library_anywhere"):
        registry.load_driver("other")


@pytest.mark.parametrize(
    "value", ["agent.drivers.no_such_module:Driver", "agent.errors:NoSuchDriver", "agent.errors:NotFound"]
)
def test_broken_installation_is_internal(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    offer(monkeypatch, value)
    with pytest.raises(Internal, match="other"):
        registry.load_driver("other")
