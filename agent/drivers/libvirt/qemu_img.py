"""Runs qemu-img, with explicit formats, a time limit and translated errors. Keys never are arguments."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from agent.drivers.base import CallContext
from agent.drivers.libvirt import programs
from agent.drivers.libvirt.encryption import Key
from agent.drivers.libvirt.settings import LibvirtSettings
from agent.errors import ComputeError, Internal, ResourceExhausted

_SECRET: Final = "key"  # noqa: S105 - the name under which QEMU gets it
_ATTEMPTS: Final = 40
_UNLUCKY: Final = "Unable to get accurate CPU usage"
"""Before QEMU 9 measuring the key derivation fails, at once, on every second try where the CPU is fast: it looks at the
time that the kernel counts in ticks."""


def run(
    settings: LibvirtSettings,
    arguments: Sequence[str],
    *,
    timeout_s: float | None = None,
    key: Key | None = None,
    call: CallContext | None = None,
) -> str:
    """Run `qemu-img` with these arguments, subcommand first, and return what it printed.

    Raises `Unsupported` (`qemu_img_missing`), `DeadlineExceeded` (`qemu_img_timeout`), `ResourceExhausted`
    (`no_space`), `Internal` (`qemu_img_failed`), `Cancelled`.
    """
    limit = timeout_s or settings.qemu_img_timeout_s
    if key is None:
        command = [settings.qemu_img, *arguments]
        return programs.run(command, timeout_s=limit, call=call, prefix="qemu_img")
    with key.descriptor() as number:
        # The very bytes that were checked, which are in no file that could be exchanged and in no argument.
        secret = ["--object", f"secret,id={_SECRET},file=/proc/self/fd/{number}"]
        command = [settings.qemu_img, arguments[0], *secret, *arguments[1:]]
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return programs.run(command, timeout_s=limit, call=call, pass_fds=[number], prefix="qemu_img")
            except Internal as exc:
                if attempt == _ATTEMPTS or _UNLUCKY not in exc.message:
                    raise
    raise Internal("unreachable")


def opened(path: Path, format: str, *, locked: bool, block: bool = False) -> str:
    """Image options that open a volume of this format; `locked`: with the key given to `run`."""
    # A comma ends an option, two are one.
    parts = [f"file.driver={'host_device' if block else 'file'}", f"file.filename={str(path).replace(',', ',,')}"]
    if format == "qcow2":
        parts.insert(0, "driver=qcow2")
        parts += [f"encrypt.key-secret={_SECRET}"] if locked else []
    else:
        parts.insert(0, "driver=luks" if locked else "driver=raw")
        parts += [f"key-secret={_SECRET}"] if locked else []
    return ",".join(parts)


def create_encrypted(settings: LibvirtSettings, path: Path, format: str, size_bytes: int, key: Key) -> None:
    """Make an empty volume with LUKS: inside qcow2, or around raw bytes."""
    prefix = "encrypt." if format == "qcow2" else ""
    options = f"{prefix}key-secret={_SECRET},{prefix}iter-time={settings.luks_iter_time_ms}"
    if format == "qcow2":
        options = f"encrypt.format=luks,{options}"
    made_as = "qcow2" if format == "qcow2" else "luks"
    run(settings, ["create", "-q", "-f", made_as, "-o", options, "--", str(path), str(size_bytes)], key=key)


def virtual_size(settings: LibvirtSettings, path: Path, format: str, key: Key | None) -> int:
    """The size that a guest sees, in bytes. Also while a guest runs."""
    if key is None or format == "qcow2":  # qcow2's header is in the clear
        shown = run(settings, ["info", "-U", "-f", format, "--output=json", "--", str(path)])
    else:
        options = opened(path, format, locked=True, block=path.is_block_device())
        shown = run(settings, ["info", "-U", "--output=json", "--image-opts", options], key=key)
    return int(json.loads(shown)["virtual-size"])


def failure(message: str) -> ComputeError:
    """Return the error for what qemu-img complained of."""
    if os.strerror(errno.ENOSPC) in message or os.strerror(errno.EDQUOT) in message:
        return ResourceExhausted("no space left for the disk", code="no_space")
    return Internal(f"qemu-img failed: {message[-500:]}", code="qemu_img_failed")
