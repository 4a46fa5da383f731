"""One conversion of a vmdk or vhdx into a qcow2, by qemu-img within limits.

qemu-img reads bytes that a stranger made. It gets the formats by name, an address space, CPU time and a file size
that it cannot exceed, and ends with the agent. `run` blocks and belongs in a worker thread; `cancel` may be called
from any other.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

from agent.errors import (
    Cancelled,
    ComputeError,
    DeadlineExceeded,
    ImageRejected,
    Internal,
    ResourceExhausted,
    Unsupported,
)
from agent.images.policy import MIB, ImagePolicy
from agent.messages.types import ImageFormat

_PERCENT = re.compile(rb"\((\d{1,3}\.\d\d)/100%\)")
_ROUND_MIB = 64
_CPU_S = 60
_MIB_PER_CPU_S = 20
"""The slowest progress per second of CPU that is put up with: decompressing on an old machine is faster."""


class Conversion:
    """For one `run`. `report(share)` is called in its thread, with the share that is done, from 0 to 1."""

    def __init__(self, policy: ImagePolicy, report: Callable[[float], None]) -> None:
        self._policy = policy
        self._report = report
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._cancelled = False
        self._late = False

    def run(self, source: Path, source_format: ImageFormat, target: Path, virtual_bytes: int) -> None:
        """Write `target`, which must not exist or is replaced.

        Raises `ImageRejected` (`image_corrupt`: qemu-img cannot read it within the limits), `DeadlineExceeded`
        (`image_timeout`), `ResourceExhausted` (`no_space`), `Unsupported` (`qemu_img_missing`), `Internal`
        (`qemu_img_failed`), and `Cancelled` after `cancel`.
        """
        limit_s = self._policy.convert_timeout_s
        child = self._start(self._command(source, source_format, target, virtual_bytes))
        timer = threading.Timer(limit_s, self._too_late)
        timer.daemon = True
        timer.start()
        try:
            said = self._follow(child)
        finally:
            timer.cancel()
            self._kill()
            child.wait()
        if self._cancelled:
            raise Cancelled("the conversion was cancelled")
        if self._late:
            raise DeadlineExceeded(f"qemu-img did not convert the image within {limit_s:g} s", code="image_timeout")
        if child.returncode != 0:
            raise _translate(child.returncode, said)

    def cancel(self) -> None:
        """End the conversion now, or keep it from beginning."""
        with self._lock:
            self._cancelled = True
        self._kill()

    def _command(self, source: Path, source_format: str, target: Path, virtual_bytes: int) -> list[str]:
        virtual_mib = -(-virtual_bytes // MIB)
        # What can be written: all of the data, an eighth for tables, and something for small images.
        file_bytes = (virtual_mib + virtual_mib // 8 + _ROUND_MIB) * MIB
        cpu_s = _CPU_S + virtual_mib // _MIB_PER_CPU_S
        return [
            *("setpriv", "--pdeathsig", "KILL", "--no-new-privs"),
            *("prlimit", f"--as={self._policy.convert_memory_mib * MIB}", f"--cpu={cpu_s}", f"--fsize={file_bytes}"),
            *("--core=0", "--nofile=64"),
            *("qemu-img", "convert", "-p", "-f", source_format, "-O", "qcow2", "-o", "compat=1.1"),
            *(str(source), str(target)),
        ]

    def _start(self, command: list[str]) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._cancelled:
                raise Cancelled("the conversion was cancelled")
            try:
                self._child = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                    # An arena for each of its up to 64 threads would use up the address space on a slow disk.
                    env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "MALLOC_ARENA_MAX": "1"},
                )  # fmt: skip
            except FileNotFoundError as exc:
                raise Unsupported(
                    "setpriv and prlimit (util-linux) are not installed", code="qemu_img_missing"
                ) from exc
            return self._child

    def _follow(self, child: subprocess.Popen[bytes]) -> str:
        """Report progress until the output ends; return the last of what is no progress."""
        assert child.stdout is not None  # noqa: S101 - asked for above
        said = b""
        with child.stdout as output:
            while data := output.read1(4096):  # type: ignore[attr-defined]
                said = (said + data)[-4096:]
                found = _PERCENT.findall(data)
                if found:
                    self._report(float(found[-1]) / 100)
        return _PERCENT.sub(b"", said).decode(errors="replace").strip()

    def _too_late(self) -> None:
        self._late = True
        self._kill()

    def _kill(self) -> None:
        with self._lock:
            if self._child is not None and self._child.poll() is None:
                self._child.kill()


def _translate(status: int, said: str) -> ComputeError:
    if os.strerror(errno.ENOSPC) in said or os.strerror(errno.EDQUOT) in said:
        return ResourceExhausted("no space is left for the converted image", code="no_space")
    if "failed to execute qemu-img" in said:
        return Unsupported("qemu-img is not installed on this host", code="qemu_img_missing")
    if status in {-signal.SIGXCPU, -signal.SIGKILL, -signal.SIGXFSZ} or os.strerror(errno.EFBIG) in said:
        return ImageRejected(
            "qemu-img cannot convert the image within its limits of time and size", code="image_corrupt"
        )
    if status == -signal.SIGABRT or os.strerror(errno.ENOMEM) in said or os.strerror(errno.EAGAIN) in said:
        # It aborts where it cannot have memory or a thread: rather the limit or the host than the image.
        return Internal(f"qemu-img gave up within images.convert_memory_mib: {_reason(said)}", code="qemu_img_failed")
    if status < 0:
        name = signal.Signals(-status).name
        return ImageRejected(f"qemu-img was ended by {name} as it read the image", code="image_corrupt")
    if "Could not open" in said or "error while reading" in said or "Invalid" in said:
        return ImageRejected(f"qemu-img cannot read the image: {_reason(said)}", code="image_corrupt")
    return Internal(f"qemu-img failed: {_reason(said)}", code="qemu_img_failed")


def _reason(said: str) -> str:
    """The last line, without the paths of this host."""
    last = said.splitlines()[-1] if said else "it said nothing"
    return re.sub(r"'?/[^\s':]+'?:?", "", last)[-300:].strip()
