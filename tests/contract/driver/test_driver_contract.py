"""Runs the driver contract on every driver of this repository."""

from __future__ import annotations

from suite import DriverContract


class TestDriverContract(DriverContract):
    pass
