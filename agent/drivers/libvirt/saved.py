"""A guest's saved memory (libvirt's managed save image): whether it can be used, and starting from it."""

from __future__ import annotations

from typing import Any, Final

from agent.drivers.libvirt import errors
from agent.drivers.libvirt.binding import libvirt
from agent.errors import FailedPrecondition

_INCOMPLETE: Final = "save image is incomplete"
_DAMAGE: Final = (_INCOMPLETE, "image magic is incorrect", "failed to read qemu header", "load of migration failed")


def is_saved(domain: Any) -> bool:
    """Whether there is a saved state that a start would restore; hypervisors that save nothing have none."""
    try:
        return bool(domain.hasManagedSaveImage())
    except libvirt.libvirtError as exc:
        if errors.is_code(exc, "VIR_ERR_NO_SUPPORT"):
            return False
        raise


def create(domain: Any) -> None:
    """Start a domain that does not run, from its saved memory if there is some. Raises `libvirtError`.

    Raises `FailedPrecondition` (`saved_state_damaged`) where the saved memory cannot be used. libvirt by itself would
    throw an incomplete image away without a word and boot the guest anew.
    """
    saved = is_saved(domain)
    if saved:
        check(domain)
    try:
        domain.create()
    except libvirt.libvirtError as exc:
        if errors.is_lost(exc):
            raise
        if domain.isActive():
            return  # another was faster
        if saved and _is_damage(exc):
            raise _damaged(exc) from exc
        raise


def check(domain: Any) -> None:
    """Read the head of the saved memory. Raises `FailedPrecondition` (`saved_state_damaged`), `libvirtError`."""
    try:
        domain.managedSaveGetXMLDesc(0)
    except libvirt.libvirtError as exc:
        if errors.is_code(exc, "VIR_ERR_NO_SUPPORT"):
            return  # the simulation, whose saved memory is never damaged
        if _is_damage(exc):
            raise _damaged(exc) from exc
        raise


def is_incomplete(domain: Any) -> bool:
    """Whether the saving was cut off, so that what there is was never the guest's saved memory."""
    try:
        domain.managedSaveGetXMLDesc(0)
    except libvirt.libvirtError as exc:
        if errors.is_lost(exc):
            raise
        return _INCOMPLETE in (exc.get_error_message() or "")
    return False


def _is_damage(exc: Any) -> bool:
    message = exc.get_error_message() or ""
    return any(phrase in message for phrase in _DAMAGE)


def _damaged(exc: Any) -> FailedPrecondition:
    cause = (exc.get_error_message() or "unknown").strip().splitlines()[-1]
    return FailedPrecondition(
        f"the guest's saved memory is damaged ({cause}); start it with discard_saved to boot it anew without it",
        code="saved_state_damaged",
    )
