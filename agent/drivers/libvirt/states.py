"""What libvirt's states and lifecycle events mean in the agent's words. Pure tables, no calls.

Names stand for constants, so that a binding that is older than a name only lacks that row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Final, NamedTuple

from agent.drivers.libvirt.binding import constant
from agent.messages.events import PowerState


class Power(NamedTuple):
    """A power state and the reason for it, in lower-case words joined by dashes."""

    power: PowerState
    reason: str


_STATES: Final[Mapping[str, PowerState]] = {
    "NOSTATE": "unknown",
    "RUNNING": "running",
    "BLOCKED": "running",
    "PAUSED": "paused",
    # Shutting down: its QEMU still lives.
    "SHUTDOWN": "running",
    "SHUTOFF": "stopped",
    "CRASHED": "crashed",
    "PMSUSPENDED": "suspended",
}

_REASONS: Final[Mapping[str, Mapping[str, str]]] = {
    "RUNNING": {
        "BOOTED": "booted",
        "MIGRATED": "migrated",
        "RESTORED": "restored",
        "FROM_SNAPSHOT": "from-snapshot",
        "UNPAUSED": "resumed",
        "MIGRATION_CANCELED": "migration-cancelled",
        "SAVE_CANCELED": "save-cancelled",
        "WAKEUP": "wakeup",
        "CRASHED": "resumed-from-crash",
        "POSTCOPY": "post-copy",
        "POSTCOPY_FAILED": "post-copy-failed",
    },
    "PAUSED": {
        "USER": "paused",
        "MIGRATION": "migration",
        "SAVE": "saving",
        "DUMP": "dumping",
        "IOERROR": "io-error",
        "WATCHDOG": "watchdog",
        "FROM_SNAPSHOT": "from-snapshot",
        "SHUTTING_DOWN": "shutting-down",
        "SNAPSHOT": "snapshot",
        "CRASHED": "guest-panic",
        "STARTING_UP": "starting-up",
        "POSTCOPY": "post-copy",
        "POSTCOPY_FAILED": "post-copy-failed",
        "API_ERROR": "api-error",
    },
    "SHUTDOWN": {"USER": "shutting-down"},
    "SHUTOFF": {
        "SHUTDOWN": "shutdown",
        "DESTROYED": "destroyed",
        "CRASHED": "crashed",
        "MIGRATED": "migrated",
        "SAVED": "saved",
        "FAILED": "failed",
        "FROM_SNAPSHOT": "from-snapshot",
        "DAEMON": "daemon",
    },
    "CRASHED": {"PANICKED": "panicked"},
    "PMSUSPENDED": {},
}


def _names(prefix: str, names: Iterable[str]) -> dict[int, str]:
    """Number → name of the constants `<prefix>_<name>` that this libvirt has."""
    numbers = {constant(f"{prefix}_{name}"): name for name in names}
    return {number: name for number, name in numbers.items() if number is not None}


def _words(prefix: str, groups: Mapping[str, Mapping[str, str]]) -> dict[tuple[str, int], str]:
    """(Group, number) → word of the constants `<prefix>_<group>_<name>` that this libvirt has."""
    return {
        (group, number): words[name]
        for group, words in groups.items()
        for number, name in _names(f"{prefix}_{group}", words).items()
    }


@cache
def _state_table() -> dict[int, str]:
    return _names("VIR_DOMAIN", _STATES)


@cache
def _reason_table() -> dict[tuple[str, int], str]:
    return _words("VIR_DOMAIN", _REASONS)


def of_state(state: int, reason: int, *, managed_save: bool) -> Power:
    """Translate what `virDomain.state()` answers; `managed_save` tells whether the domain has a saved image."""
    name = _state_table().get(state, "NOSTATE")
    power, word = _STATES[name], _reason_table().get((name, reason), "unknown")
    if name == "SHUTOFF" and managed_save:
        return Power("suspended", "saved")
    if name == "SHUTOFF" and word == "crashed":
        return Power("crashed", word)
    return Power(power, word)


# Lifecycle event → (power, {detail: reason}). SHUTDOWN is left out: the STOPPED that follows is the change.
_EVENTS: Final[Mapping[str, tuple[PowerState, Mapping[str, str]]]] = {
    # A definition says nothing about power: a running domain can be redefined.
    "DEFINED": ("unknown", {}),
    "UNDEFINED": ("unknown", {}),
    "STARTED": (
        "running",
        {
            "BOOTED": "booted",
            "MIGRATED": "migrated",
            "RESTORED": "restored",
            "FROM_SNAPSHOT": "from-snapshot",
            "WAKEUP": "wakeup",
            "RECOVERED": "recovered",
        },
    ),
    "SUSPENDED": (
        "paused",
        {
            "PAUSED": "paused",
            "MIGRATED": "migrated",
            "IOERROR": "io-error",
            "WATCHDOG": "watchdog",
            "RESTORED": "restored",
            "FROM_SNAPSHOT": "from-snapshot",
            "API_ERROR": "api-error",
            "POSTCOPY": "post-copy",
            "POSTCOPY_FAILED": "post-copy-failed",
        },
    ),
    "RESUMED": (
        "running",
        {
            "UNPAUSED": "resumed",
            "MIGRATED": "migrated",
            "FROM_SNAPSHOT": "from-snapshot",
            "POSTCOPY": "post-copy",
            "POSTCOPY_FAILED": "post-copy-failed",
        },
    ),
    "STOPPED": (
        "stopped",
        {
            "SHUTDOWN": "shutdown",
            "DESTROYED": "destroyed",
            "CRASHED": "crashed",
            "MIGRATED": "migrated",
            "SAVED": "saved",
            "FAILED": "failed",
            "FROM_SNAPSHOT": "from-snapshot",
        },
    ),
    "PMSUSPENDED": ("suspended", {"MEMORY": "suspended-to-memory", "DISK": "suspended-to-disk"}),
    "CRASHED": ("crashed", {"PANICKED": "panicked", "CRASHLOADED": "crash-loaded"}),
}

# FAILED is what libvirt reports when a QEMU dies under it (kill -9); the state then says "crashed".
_STOPPED_POWER: Final[Mapping[str, PowerState]] = {"crashed": "crashed", "failed": "crashed", "saved": "suspended"}
_WITHOUT_DETAIL: Final[Mapping[str, str]] = {"DEFINED": "defined", "UNDEFINED": "undefined"}


@cache
def _event_table() -> dict[int, str]:
    return _names("VIR_DOMAIN_EVENT", _EVENTS)


@cache
def _detail_table() -> dict[tuple[str, int], str]:
    return _words("VIR_DOMAIN_EVENT", {event: words for event, (_power, words) in _EVENTS.items()})


def of_event(event: int, detail: int) -> Power | None:
    """Translate a lifecycle event; None where it is no change of power."""
    name = _event_table().get(event)
    if name is None:
        return None
    power = _EVENTS[name][0]
    reason = _WITHOUT_DETAIL.get(name) or _detail_table().get((name, detail), "unknown")
    if name == "STOPPED":
        power = _STOPPED_POWER.get(reason, power)
    return Power(power, reason)
