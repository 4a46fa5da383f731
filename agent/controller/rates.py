"""What an instance does in a second: the difference between two of its statistics."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

_DISK: Final = ("read_bytes", "read_requests", "write_bytes", "write_requests")
_NIC: Final = ("rx_bytes", "rx_packets", "tx_bytes", "tx_packets")

Result = Mapping[str, Any]


def rates(before: Result, after: Result) -> dict[str, Any]:
    """Rates between two results of `instance.stats`, `<counter>_s` each, and `cpu_percent` (100 is one whole CPU).

    A rate is None where a counter is not known, or fell: it began anew with the guest. Disks by name, NICs by place.
    """
    seconds = (_moment(after) - _moment(before)).total_seconds()
    busy = _rate(before["cpu"], after["cpu"], "cpu_time_ns", seconds)
    return {
        "seconds": seconds,
        "cpu_percent": None if busy is None else round(busy / 1e7, 1),
        "disks": _all(before["disks"], after["disks"], "name", _DISK, seconds),
        "nics": _all(before["nics"], after["nics"], "nic", _NIC, seconds),
    }


def _moment(result: Result) -> datetime:
    return datetime.fromisoformat(result["at"])


def _all(
    before: list[Result], after: list[Result], key: str, counters: tuple[str, ...], seconds: float
) -> list[dict[str, Any]]:
    earlier = {item[key]: item for item in before}
    return [
        {key: item[key]} | {f"{name}_s": _rate(earlier.get(item[key], {}), item, name, seconds) for name in counters}
        for item in after
    ]


def _rate(before: Result, after: Result, name: str, seconds: float) -> float | None:
    old, new = before.get(name), after.get(name)
    if old is None or new is None or new < old or seconds <= 0:
        return None
    return float(round((new - old) / seconds, 1))
