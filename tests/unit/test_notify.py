"""systemd's protocol: a datagram, never an exception, never a wait."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from agent.notify import notify, watchdog_interval_s


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)


def receiver(address: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(address)
    sock.settimeout(2)
    return sock


def test_without_systemd_nothing_happens() -> None:
    assert notify("READY=1") is False


def test_lines_travel_in_one_datagram(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = str(tmp_path / "notify")
    with receiver(address) as sock:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        assert notify("READY=1", "STATUS=serving") is True
        assert sock.recv(100) == b"READY=1\nSTATUS=serving"


def test_an_abstract_address(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"compute-agent-test-{os.getpid()}"
    with receiver(f"\0{name}") as sock:
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        assert notify("WATCHDOG=1") is True
        assert sock.recv(100) == b"WATCHDOG=1"


@pytest.mark.parametrize("address", ["/nowhere/at/all", "x" * 200, "/dev/null"])
def test_a_socket_that_cannot_be_used_is_no_reason_to_fail(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert notify("READY=1") is False


def test_a_full_socket_does_not_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = str(tmp_path / "notify")
    with receiver(address):
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        sent = [notify("X=" + "y" * 1000) for _ in range(2000)]
    assert sent[0] is True
    assert sent[-1] is False


@pytest.mark.parametrize(
    ("usec", "pid", "interval"),
    [
        (None, None, None), ("30000000", None, 15.0), ("30000000", str(os.getpid()), 15.0), ("30000000", "1", None),
        ("", None, None), ("soon", None, None), ("-5", None, None),
    ],
    ids=range(7),
)  # fmt: skip
def test_the_watchdog_is_fed_twice_within_its_limit(
    usec: str | None, pid: str | None, interval: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("WATCHDOG_USEC", usec), ("WATCHDOG_PID", pid)):
        if value is not None:
            monkeypatch.setenv(name, value)
    assert watchdog_interval_s() == interval
