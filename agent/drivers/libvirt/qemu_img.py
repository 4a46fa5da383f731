"""Runs qemu-img, with explicit formats, a time limit and translated errors."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Sequence

from agent.drivers.libvirt.settings import LibvirtSettings
from agent.errors import ComputeError, DeadlineExceeded, Internal, ResourceExhausted, Unsupported


def run(settings: LibvirtSettings, arguments: Sequence[str], *, timeout_s: float | None = None) -> str:
    """Run `qemu-img` with these arguments and return what it printed.

    Raises `Unsupported` (`qemu_img_missing`), `DeadlineExceeded` (`qemu_img_timeout`), `ResourceExhausted`
    (`no_space`), `Internal` (`qemu_img_failed`).
    """
    limit = timeout_s or settings.qemu_img_timeout_s
    try:
        done = subprocess.run(
            [settings.qemu_img, *arguments], stdin=subprocess.DEVNULL, capture_output=True, timeout=limit, check=False,
            env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"},
        )  # fmt: skip
    except FileNotFoundError as exc:
        raise Unsupported("qemu-img is not installed on this host", code="qemu_img_missing") from exc
    except subprocess.TimeoutExpired as exc:
        raise DeadlineExceeded(f"qemu-img took more than {limit:g} s", code="qemu_img_timeout") from exc
    if done.returncode != 0:
        raise failure(done.stderr.decode(errors="replace").strip())
    return done.stdout.decode(errors="replace")


def failure(message: str) -> ComputeError:
    """Return the error for what qemu-img complained of."""
    if os.strerror(errno.ENOSPC) in message or os.strerror(errno.EDQUOT) in message:
        return ResourceExhausted("no space left for the disk", code="no_space")
    return Internal(f"qemu-img failed: {message[-500:]}", code="qemu_img_failed")
