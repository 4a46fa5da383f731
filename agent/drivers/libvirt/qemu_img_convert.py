"""Copies a whole disk with `qemu-img convert`: with progress, cancelling, and an end that is the agent's own."""

from __future__ import annotations

import os
import re
import selectors
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final

from agent.drivers.libvirt import qemu_img
from agent.drivers.libvirt.settings import LibvirtSettings
from agent.errors import Cancelled, DeadlineExceeded, Unsupported
from agent.messages.types import DiskFormat

_POLL_S: Final = 0.2
_REPORT_S: Final = 0.1
_PERCENT: Final = re.compile(rb"\((\d+(?:\.\d+)?)/100%\)")
_MAX_STDERR: Final = 64 * 1024


def convert(
    settings: LibvirtSettings,
    source: tuple[DiskFormat, Path],
    target: tuple[DiskFormat, Path],
    *,
    compress: bool,
    percent: Callable[[float], None],
    cancelled: Callable[[], bool],
    limit_s: float,
) -> None:
    """Copy `source` with all that is below it to a new file. What a run leaves that did not succeed is the caller's.

    Raises as `qemu_img.run`, and `Cancelled`.
    """
    command = [settings.qemu_img, "convert", "-p", "-f", source[0], "-O", target[0], *(["-c"] if compress else [])]
    command += ["--", str(source[1]), str(target[1])]
    if (setpriv := shutil.which("setpriv")) is not None:
        # A convert that outlived a killed agent would keep the lock of the disk, and the guest from starting.
        command = [setpriv, "--pdeathsig", "KILL", *command]
    environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
        )
    except FileNotFoundError as exc:
        raise Unsupported("qemu-img is not installed on this host", code="qemu_img_missing") from exc
    with process:
        try:
            complaint = _watch(process, percent, cancelled, time.monotonic() + limit_s, limit_s)
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        raise qemu_img.failure(complaint.decode(errors="replace").strip())


def _watch(
    process: subprocess.Popen[bytes],
    percent: Callable[[float], None],
    cancelled: Callable[[], bool],
    deadline: float,
    limit_s: float,
) -> bytes:
    """Read what it prints until it ends; what it wrote to stderr."""
    assert process.stdout is not None and process.stderr is not None  # noqa: S101, PT018 - pipes were asked for
    complaint, told = b"", 0.0
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        selector.register(process.stderr, selectors.EVENT_READ)
        while selector.get_map():
            if cancelled():
                raise Cancelled("cancelled while a disk was copied")
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"qemu-img took more than {limit_s:g} s", code="qemu_img_timeout")
            for key, _events in selector.select(_POLL_S):
                pipe: IO[bytes] = key.fileobj  # type: ignore[assignment]
                data = os.read(pipe.fileno(), 4096)
                if not data:
                    selector.unregister(pipe)
                elif pipe is process.stderr:
                    complaint = (complaint + data)[-_MAX_STDERR:]
                elif time.monotonic() - told >= _REPORT_S and (found := _PERCENT.findall(data)):
                    told = time.monotonic()
                    percent(float(found[-1]))
    return complaint
