"""The scripted faults: which of them strikes a call, and how often it still may.

Faults come from the settings, from `inject`, from labels, and from `faults.json`, by which a test in another
process steers an agent that runs. Safe from all threads; file access is a `stat` per call.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import structlog
from pydantic import BaseModel, ConfigDict, ValidationError

from agent.drivers.fake.settings import Fault

_log = structlog.get_logger(__name__)


class FaultFile(BaseModel):
    """`<state_dir>/fake/faults.json`. Read again when it changes; a file that is gone means no faults.

    `disconnected`: the hypervisor is away, as after `disconnect()`. How often a fault has struck is kept in
    `fired.log` beside it, so that `times` holds over a restart of the agent; a rewritten file counts anew.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    disconnected: bool = False
    faults: list[Fault] = []


@dataclass(slots=True)
class _Armed:
    fault: Fault
    left: int | None
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Struck:
    """A fault that strikes a call. `release` is set when faults are cleared: the call hangs no longer then."""

    fault: Fault
    release: threading.Event


class FaultPlan:
    """All scripted faults of one driver."""

    def __init__(self, configured: Iterable[Fault], file: Path | None) -> None:
        self.disconnected = False
        """What the file says about the connection; read by `refresh`."""
        self._file = file
        self._fired = None if file is None else file.with_name("fired.log")
        self._lock = threading.Lock()
        self._armed = [_Armed(fault, fault.times) for fault in configured]
        self._from_file: list[_Armed] = []
        self._stamp: tuple[int, int, int] | None = None
        self._by_label: dict[tuple[str, Fault], int] = {}
        self._release = threading.Event()

    def inject(self, fault: Fault) -> None:
        """Add a fault; it comes after those that are there."""
        with self._lock:
            self._armed.append(_Armed(fault, fault.times))

    def clear(self) -> None:
        """Take back every fault but those of labels and of the file, and let hanging calls go on."""
        with self._lock:
            self._armed.clear()
            self._release.set()
            self._release = threading.Event()

    @property
    def release(self) -> threading.Event:
        """Set by the next `clear`: what a call waits on that is to take a time."""
        return self._release

    def forget(self, instance_id: str) -> None:
        """Drop the counts of an instance's labels."""
        with self._lock:
            for known in [key for key in self._by_label if key[0] == instance_id]:
                del self._by_label[known]

    def strike(self, call: str, instance_id: str | None, name: str | None, labels: Sequence[Fault]) -> Struck | None:
        """Pick the fault that strikes this call, and count it."""
        if not (labels or self._armed or self._from_file):
            return None
        with self._lock:
            for fault in labels:
                if fault.call == call and instance_id is not None:
                    struck = self._by_label.get((instance_id, fault), 0)
                    if fault.times is None or struck < fault.times:
                        self._by_label[instance_id, fault] = struck + 1
                        return Struck(fault, self._release)
            for armed in (*self._armed, *self._from_file):
                if armed.left != 0 and _matches(armed.fault, call, instance_id, name):
                    self._count(armed)
                    return Struck(armed.fault, self._release)
        return None

    def refresh(self) -> None:
        """Read the file again if it has changed."""
        if self._file is None:
            return
        try:
            stat = self._file.stat()
            stamp = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        except FileNotFoundError:
            stamp = None
        if stamp == self._stamp:
            return
        with self._lock:
            self._read(self._file, stamp)

    def _read(self, file: Path, stamp: tuple[int, int, int] | None) -> None:
        if stamp is None:
            found = FaultFile()
        else:
            try:
                raw = json.loads(file.read_bytes())
                found = FaultFile.model_validate({"faults": raw} if isinstance(raw, list) else raw)
            except FileNotFoundError:
                return
            except (ValueError, ValidationError) as exc:
                # It may be half written: the old faults stay, and the next call tries again.
                _log.warning("fake.bad_faults_file", path=str(file), error=str(exc))
                return
        self._stamp = stamp
        self.disconnected = found.disconnected
        fired = self._read_fired()
        self._from_file = []
        for index, fault in enumerate(found.faults):
            key = f"{stamp[0]}:{index}" if stamp else ""
            left = None if fault.times is None else max(0, fault.times - fired.count(key))
            self._from_file.append(_Armed(fault, left, key))

    def _read_fired(self) -> list[str]:
        try:
            return self._fired.read_text().split() if self._fired else []
        except FileNotFoundError:
            return []

    def _count(self, armed: _Armed) -> None:
        if armed.left is None:
            return
        armed.left -= 1
        if armed.key and self._fired:
            with self._fired.open("a") as log:
                log.write(armed.key + "\n")


def _matches(fault: Fault, call: str, instance_id: str | None, name: str | None) -> bool:
    if fault.call != call and not (fault.call == "*" and call != "connect"):
        return False
    if fault.instance is None:
        return True
    return any(value is not None and fnmatchcase(value, fault.instance) for value in (name, instance_id))
