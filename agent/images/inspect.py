"""Decide, as the bytes stream by, whether an image is what it claims to be and safe to give to QEMU.

The decision about the format falls on the first MiB, so that a wrong image is refused before the rest is
fetched; what needs the whole file (length, tables) is checked at the end. oslo.utils' inspector does the
recognition. It is loaded when the first image needs it. Everything here runs in the download's one worker
thread.
"""

from __future__ import annotations

import io
import re
from typing import Any

from agent.errors import ImageRejected
from agent.images import qcow2, vhdx, vmdk
from agent.images.policy import MIB, ImagePolicy
from agent.messages.types import ImageFormat

HEAD_BYTES = MIB
"""All signatures that the inspector knows lie well inside; the largest it needs ends at 320 KiB."""

# What a guest's own disk looks like: partition tables and file systems are content, not a container.
_RAW_CONTENT = frozenset({"raw", "gpt", "iso"})

# Containers that oslo does not know. QEMU would recognise the first three if it ever probed; the others are
# images that somebody forgot to decompress.
_OTHER_MAGIC = (
    (b"WithoutFreeSpace", "parallels"),
    (b"WithouFreSpacExt", "parallels"),
    (b"Bochs Virtual HD Image", "bochs"),
    (b"\x1f\x8b\x08", "gzip"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"BZh", "bzip2"),
    (b"PK\x03\x04", "zip"),
)

# A text-only VMDK names other files of the host. oslo misses it where NULs follow, QEMU's probe does not.
_VMDK_TEXT = re.compile(rb"# Disk DescriptorFile|(?:#[^\n]*\n| *\r?\n)*version=[123]\r?\n")


def check_virtual_size(virtual_bytes: int, policy: ImagePolicy) -> None:
    """Refuse a virtual size above the policy's limit: `ImageRejected` with code `image_too_large`."""
    limit = policy.max_virtual_size_mib
    if limit is not None and virtual_bytes > limit * MIB:
        raise ImageRejected(
            f"the image's virtual size is {virtual_bytes} bytes, above the limit of {limit} MiB",
            code="image_too_large",
            virtual_size_bytes=virtual_bytes,
            limit_mib=limit,
        )


class Inspector:
    """Inspects one image. Feed it every chunk in order, then call `finish` once. Not for several threads.

    Refusals are `ImageRejected`, which a retry cannot help: `image_format_mismatch`, `image_unsafe`,
    `image_corrupt`, `image_too_large`.
    """

    def __init__(self, declared: ImageFormat | None, policy: ImagePolicy) -> None:
        """`declared` None: the file is no disk image, and may hold whatever it likes."""
        self._declared = declared
        self._policy = policy
        self._head = bytearray()
        self._judged = declared is None
        self._qcow2: qcow2.Qcow2Header | None = None
        self._virtual: int | None = None

    def feed(self, chunk: bytes | bytearray) -> None:
        """Look at the next bytes; raises as soon as the image cannot be accepted."""
        if self._judged:
            return
        self._head += memoryview(chunk)[: HEAD_BYTES - len(self._head)]
        if len(self._head) >= HEAD_BYTES:
            self._judge()

    def finish(self, fd: int, file_bytes: int) -> int:
        """Check what needs the whole file, open as `fd`, and return the virtual size in bytes."""
        if not self._judged:
            self._judge()
        if file_bytes == 0:
            raise qcow2.corrupt("the image is empty")
        if self._qcow2 is not None:
            qcow2.check_tables(self._qcow2, fd, file_bytes)
            virtual = self._qcow2.virtual_size_bytes
        elif self._virtual is not None:
            vmdk.check_tables(self._head, fd, file_bytes)
            virtual = self._virtual
        else:
            virtual = vhdx.check_file(fd, file_bytes) if self._declared == "vhdx" else file_bytes
        check_virtual_size(virtual, self._policy)
        return virtual

    def _judge(self) -> None:
        self._judged = True
        head, self._head = self._head, bytearray()
        found = _recognise(head)
        if self._declared == "raw":
            alien = sorted(set(found) - _RAW_CONTENT)
            if alien:
                raise _mismatch("raw", alien)
            return
        declared = str(self._declared)
        if declared not in found:
            raise _mismatch(declared, sorted(found))
        if len(found) > 1:
            raise qcow2.unsafe(f"the image is of several formats at once: {', '.join(sorted(found))}")
        if declared == "vhdx":
            return  # its tables lie anywhere: see `finish`
        if declared == "vmdk":
            self._head = head[:512]
            self._virtual = vmdk.check_head(head)
            check_virtual_size(self._virtual, self._policy)
        _check_safety(found[declared], complete=declared == "qcow2")
        if declared == "qcow2":
            self._qcow2 = qcow2.parse_header(head)
            check_virtual_size(self._qcow2.virtual_size_bytes, self._policy)


def _mismatch(declared: str, found: list[str]) -> ImageRejected:
    names = ", ".join(found)
    return ImageRejected(
        f"the image is declared as {declared} but its content is {names}",
        code="image_format_mismatch",
        declared=declared,
        found=names,
    )


def _recognise(head: bytearray) -> dict[str, Any]:
    """Return every format that the bytes match, by name, with oslo's inspector if any; at least raw."""
    from oslo_utils.imageutils import format_inspector  # noqa: PLC0415 - loaded when needed

    wrapper = format_inspector.InspectWrapper(io.BytesIO(head))
    try:
        wrapper.read(len(head))
        wrapper.close()
        found: dict[str, Any] = {str(one): one for one in wrapper.formats or []}
    except Exception as exc:  # the parser met bytes that it was not written for
        raise qcow2.unsafe(f"the image's format cannot be determined ({type(exc).__name__})") from exc
    if qcow2.is_qcow2(head) and "qcow2" not in found:
        raise qcow2.corrupt("the qcow2 image is shorter than its header")
    found |= {name: None for magic, name in _OTHER_MAGIC if head.startswith(magic)}
    if _VMDK_TEXT.match(head, 0, 4096):
        found.setdefault("vmdk", None)
    if len(found) > 1:
        found.pop("raw", None)
    return found


def _check_safety(inspector: Any, *, complete: bool) -> None:
    from oslo_utils.imageutils import format_inspector  # noqa: PLC0415

    try:
        inspector.safety_check()
    except format_inspector.SafetyCheckFailed as exc:
        # A footer is not among the first bytes; `vmdk.check_tables` looks at it when it has come.
        failures = {name: why for name, why in exc.failures.items() if complete or name != "footer"}
        if failures:
            reasons = "; ".join(f"{name}: {failure}" for name, failure in sorted(failures.items()))
            raise qcow2.unsafe(f"the {inspector} image is not safe to use ({reasons})") from exc
    except format_inspector.ImageFormatError as exc:
        raise qcow2.unsafe(f"the {inspector} image cannot be checked ({exc})") from exc
