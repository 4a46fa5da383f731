"""Runs the programs that make disks: explicit arguments, a time limit, cancelling, translated errors."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Sequence
from typing import Final

from agent.drivers.base import CallContext
from agent.errors import Cancelled, ComputeError, DeadlineExceeded, Internal, ResourceExhausted, Unsupported

_POLL_S: Final = 0.25
_SYSTEM: Final = ":/usr/sbin:/sbin"
_FULL: Final = (
    os.strerror(errno.ENOSPC),
    os.strerror(errno.EDQUOT),
    "insufficient free space",  # LVM's words
    "insufficient suitable",
)


def run(
    command: Sequence[str],
    *,
    timeout_s: float,
    call: CallContext | None = None,
    pass_fds: Sequence[int] = (),
    prefix: str = "program",
) -> str:
    """Run a program and return what it printed. A cancel of `call` ends it.

    Raises, with codes that begin with `prefix`: `Unsupported` (`…_missing`), `DeadlineExceeded` (`…_timeout`),
    `Internal` (`…_failed`); also `ResourceExhausted` (`no_space`) and `Cancelled`.
    """
    path = os.environ.get("PATH", os.defpath) + _SYSTEM
    name = os.path.basename(command[0])  # noqa: PTH119 - a word, not a path
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={"PATH": path, "LC_ALL": "C"}, pass_fds=pass_fds,
        )  # fmt: skip
    except FileNotFoundError as exc:
        raise Unsupported(f"{name} is not installed on this host", code=f"{prefix}_missing") from exc
    except OSError as exc:
        raise Internal(f"{name} could not be started: {exc}", code=f"{prefix}_failed") from exc
    output, errors = _wait(process, name, timeout_s, call, prefix)
    if process.returncode != 0:
        raise failure(name, errors.decode(errors="replace").strip(), prefix)
    return output.decode(errors="replace")


def _wait(
    process: subprocess.Popen[bytes], name: str, timeout_s: float, call: CallContext | None, prefix: str
) -> tuple[bytes, bytes]:
    deadline = time.monotonic() + timeout_s
    with process:
        try:
            while True:
                left = deadline - time.monotonic()
                try:
                    return process.communicate(timeout=max(0.0, min(left, _POLL_S)))
                except subprocess.TimeoutExpired:
                    if call is not None and call.cancelled():
                        raise Cancelled("cancelled while the instance's files were made") from None
                    if left <= 0:
                        message = f"{name} took more than {timeout_s:g} s"
                        raise DeadlineExceeded(message, code=f"{prefix}_timeout") from None
        except BaseException:
            process.kill()
            raise


def failure(name: str, message: str, prefix: str = "program") -> ComputeError:
    """What a program's last words mean."""
    if any(words in message for words in _FULL):
        return ResourceExhausted("no space left for the disk", code="no_space")
    return Internal(f"{name} failed: {message[-500:]}", code=f"{prefix}_failed")
