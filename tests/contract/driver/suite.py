"""The driver contract: what the agent relies on, as tests that every driver passes.

A test class derives from `DriverContract` and gets the fixtures `driver_case`, `driver`, `events` and `instance`.
Differences between drivers are named in `driver_case.Difference`; a test asserts what the difference means instead
of being skipped.
"""

from __future__ import annotations

from contract_connection import ConnectionContract
from contract_definition import DefinitionContract
from contract_host import HostContract
from contract_life import LifeContract
from contract_machine import MachineContract
from contract_memory import MemoryContract
from contract_reading import ReadingContract
from contract_rebuild import RebuildContract
from contract_resize import ResizeContract
from contract_snapshot import SnapshotContract
from contract_stats import StatsContract
from contract_storage import StorageContract


class DriverContract(
    LifeContract,
    MachineContract,
    MemoryContract,
    DefinitionContract,
    ReadingContract,
    RebuildContract,
    ResizeContract,
    StorageContract,
    SnapshotContract,
    HostContract,
    StatsContract,
    ConnectionContract,
):
    """All of it."""
