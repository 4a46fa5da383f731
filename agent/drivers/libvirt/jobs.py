"""Jobs of a domain (save, dump): progress while they run, and their end by a cancel.

The call that begins a job blocks its thread until the job ends, so another thread looks at it. A job outlives the agent
that began it: libvirtd goes on.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, Final

from agent.drivers.base import CallContext
from agent.drivers.libvirt import domains, errors
from agent.drivers.libvirt.binding import constant, libvirt
from agent.drivers.libvirt.connection import Link
from agent.errors import ComputeError, FailedPrecondition

_LOOK_S: Final = 0.25
_JOIN_S: Final = 2.0


@contextlib.contextmanager
def watched(link: Link, instance_id: str, call: CallContext) -> Iterator[None]:
    """While the block runs, tell the progress of the domain's job, and abort it when the call is cancelled."""
    done, news = threading.Event(), threading.Event()
    watcher = threading.Thread(
        target=_watch, args=(link, instance_id, call, done, news), name="libvirt-job", daemon=True
    )
    watcher.start()
    try:
        yield
    finally:
        done.set()
        news.set()
        # Not for ever: it may hang in a call to a QEMU that is frozen, and nothing depends on it.
        watcher.join(_JOIN_S)


def wait_ended(link: Link, instance_id: str, call: CallContext) -> None:
    """Wait until no job runs on the domain: one that a former process began. A cancel aborts what can be aborted.

    Has no limit of its own; the caller's call has one. Raises `Unavailable`, `NotFound`.
    """
    with link.listening(instance_id, call) as news:
        while True:
            news.clear()
            if not _look(link, instance_id, call):
                return
            news.wait(_LOOK_S)


def _watch(link: Link, instance_id: str, call: CallContext, done: threading.Event, news: threading.Event) -> None:
    with call.waking(news):
        while True:
            news.wait(_LOOK_S)  # libvirt has no event of a job's progress
            news.clear()
            if done.is_set():
                return
            try:
                _look(link, instance_id, call)
            except ComputeError:
                continue  # the call that we watch finds out for itself


def _look(link: Link, instance_id: str, call: CallContext) -> bool:
    """Look at the job once. False if there is none."""
    with link.call() as connection:
        domain = domains.find(connection, instance_id)
        try:
            stats = domain.jobStats()
        except libvirt.libvirtError as exc:
            if errors.is_code(exc, "VIR_ERR_OPERATION_INVALID", "VIR_ERR_NO_SUPPORT"):
                return False  # it does not run, or the hypervisor has no jobs
            raise
        if stats.get("type", 0) in (0, constant("VIR_DOMAIN_JOB_NONE")):
            return False
        _tell(stats, call)
        if call.cancelled():
            # A dump of memory alone cannot be aborted: it is left to end, and removed.
            with contextlib.suppress(libvirt.libvirtError):
                domain.abortJob()
        return True


def _tell(stats: dict[str, Any], call: CallContext) -> None:
    total, done = stats.get("memory_total", 0), stats.get("memory_processed", 0)
    if total and done <= total:
        left = stats.get("memory_remaining", total - done)
        # Of a save, `processed` does not count pages of zeros, and of a dump nothing else says what remains.
        call.progress(round(100.0 * (total - min(left, total)) / total, 1))


def require_active(domain: Any) -> None:
    """Raise `FailedPrecondition` (`instance_not_running`) unless there is a guest in memory."""
    if not domain.isActive():
        raise FailedPrecondition("the instance does not run; start it first", code="instance_not_running")
