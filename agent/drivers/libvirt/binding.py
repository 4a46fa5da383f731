"""The one place that imports the libvirt binding, which is an optional extra and has no types."""

from __future__ import annotations

from typing import Any

from agent.errors import Unsupported

libvirt: Any = None
try:
    import libvirt as _libvirt
except ImportError:
    pass
else:
    libvirt = _libvirt
    # Without a handler libvirt prints every error, also expected ones, to stderr.
    libvirt.registerErrorHandler(lambda *_: None, None)


class LibvirtMissing(Unsupported, ImportError):
    """The Python binding of libvirt is not installed; a retry cannot help."""

    default_code = "libvirt_missing"


def require() -> None:
    """Raise `LibvirtMissing` if the binding is not installed."""
    if libvirt is None:
        raise LibvirtMissing("the libvirt driver needs the Python binding of libvirt; install compute-agent[libvirt]")


def constant(name: str) -> int | None:
    """Return a constant of the binding, or None where it is older than the constant."""
    value = getattr(libvirt, name, None)
    return None if value is None else int(value)
