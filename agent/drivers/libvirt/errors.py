"""Translates libvirt's errors into the agent's, in one table.

The code decides, and, where libvirt has only a general code for a cause that a person can act on, a phrase of the
message. Names stand for constants, so that the table can be read by a binding that is older than a name.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from agent.drivers.libvirt.binding import constant
from agent.errors import (
    AlreadyExists,
    ComputeError,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
    Unsupported,
)

_LOST_DOMAINS: Final = ("VIR_FROM_REMOTE", "VIR_FROM_RPC")
_LOST_CODES: Final = ("VIR_ERR_SYSTEM_ERROR", "VIR_ERR_INTERNAL_ERROR", "VIR_ERR_NO_CONNECT", "VIR_ERR_INVALID_CONN")


@dataclass(frozen=True, slots=True)
class Rule:
    """One row: an error with this libvirt code (and phrase, if given) becomes `becomes` with `agent_code`."""

    code: str
    becomes: type[ComputeError]
    agent_code: str | None = None
    phrase: str | None = None


RULES: Final[tuple[Rule, ...]] = (
    Rule("VIR_ERR_NO_DOMAIN", NotFound),
    Rule("VIR_ERR_NO_DOMAIN_SNAPSHOT", NotFound, "unknown_snapshot"),
    Rule("VIR_ERR_DOM_EXIST", AlreadyExists),
    Rule("VIR_ERR_OPERATION_FAILED", AlreadyExists, phrase="already exists with uuid"),
    Rule("VIR_ERR_OPERATION_FAILED", AlreadyExists, phrase="is already defined with uuid"),
    Rule("VIR_ERR_OPERATION_FAILED", Internal, "hypervisor_operation_failed"),
    Rule("VIR_ERR_OPERATION_INVALID", FailedPrecondition),
    Rule("VIR_ERR_OPERATION_ABORTED", FailedPrecondition, "operation_aborted"),
    Rule("VIR_ERR_OPERATION_DENIED", FailedPrecondition, "hypervisor_access_denied"),
    Rule("VIR_ERR_ACCESS_DENIED", FailedPrecondition, "hypervisor_access_denied"),
    Rule("VIR_ERR_AUTH_FAILED", Unavailable, "hypervisor_login_failed"),
    Rule("VIR_ERR_AUTH_CANCELLED", Unavailable, "hypervisor_login_failed"),
    Rule("VIR_ERR_AUTH_UNAVAILABLE", Unavailable, "hypervisor_login_failed"),
    Rule("VIR_ERR_RESOURCE_BUSY", FailedPrecondition, "resource_busy"),
    Rule("VIR_ERR_OPERATION_TIMEOUT", DeadlineExceeded, "hypervisor_timeout"),
    Rule("VIR_ERR_AGENT_UNRESPONSIVE", Unavailable, "guest_agent_unresponsive"),
    Rule("VIR_ERR_AGENT_UNSYNCED", Unavailable, "guest_agent_unresponsive"),
    Rule("VIR_ERR_NO_SUPPORT", Unsupported),
    Rule("VIR_ERR_OPERATION_UNSUPPORTED", Unsupported),
    Rule("VIR_ERR_CONFIG_UNSUPPORTED", Unsupported, "config_unsupported"),
    Rule("VIR_ERR_ARGUMENT_UNSUPPORTED", Unsupported),
    Rule("VIR_ERR_NO_NETWORK", FailedPrecondition, "network_missing"),
    Rule("VIR_ERR_XML_ERROR", InvalidArgument, "definition_refused"),
    Rule("VIR_ERR_XML_DETAIL", InvalidArgument, "definition_refused"),
    Rule("VIR_ERR_XML_INVALID_SCHEMA", InvalidArgument, "definition_refused"),
    Rule("VIR_ERR_RPC", InvalidArgument, "definition_too_large", phrase="too large"),
    Rule("VIR_ERR_NO_CONNECT", Unavailable, "hypervisor_unreachable"),
    Rule("VIR_ERR_INVALID_CONN", Unavailable, "hypervisor_unreachable"),
    Rule("VIR_ERR_NO_MEMORY", ResourceExhausted, "host_memory"),
    Rule("VIR_ERR_SYSTEM_ERROR", ResourceExhausted, "no_space", phrase="No space left on device"),
    Rule("VIR_ERR_SYSTEM_ERROR", FailedPrecondition, "bridge_missing", phrase="Cannot get interface MTU on"),
    Rule("VIR_ERR_SYSTEM_ERROR", FailedPrecondition, "file_missing", phrase="No such file or directory"),
    Rule("VIR_ERR_SYSTEM_ERROR", FailedPrecondition, "file_access_denied", phrase="Permission denied"),
    Rule("VIR_ERR_SYSTEM_ERROR", Unavailable, "qemu_does_not_end", phrase="Failed to terminate process"),
    Rule("VIR_ERR_INTERNAL_ERROR", ResourceExhausted, "host_memory", phrase="Cannot allocate memory"),
    Rule("VIR_ERR_INTERNAL_ERROR", ResourceExhausted, "host_memory", phrase="cannot set up guest memory"),
    Rule("VIR_ERR_INTERNAL_ERROR", ResourceExhausted, "no_space", phrase="No space left on device"),
    Rule("VIR_ERR_INTERNAL_ERROR", FailedPrecondition, "disk_in_use", phrase='Failed to get "write" lock'),
)
"""Searched from the top; the connection-lost test comes before it, and what matches no row is `Internal`."""


@cache
def _numbers(names: tuple[str, ...]) -> frozenset[int]:
    return frozenset(number for number in map(constant, names) if number is not None)


def is_code(exc: Any, *names: str) -> bool:
    """Tell whether a `libvirtError` has one of the named codes."""
    return exc.get_error_code() in _numbers(names)


def is_lost(exc: Any) -> bool:
    """Tell whether a `libvirtError` means that the connection is gone (the test that nova and vdsm use)."""
    return exc.get_error_domain() in _numbers(_LOST_DOMAINS) and is_code(exc, *_LOST_CODES)


def translate(exc: Any) -> ComputeError:
    """Return the agent's error for a `libvirtError`; to be raised `from` it."""
    message = exc.get_error_message() or str(exc)
    code, domain = exc.get_error_code(), exc.get_error_domain()
    if is_lost(exc):
        return Unavailable(f"the hypervisor cannot be reached: {message}", code="hypervisor_unreachable")
    for rule in RULES:
        if code == constant(rule.code) and (rule.phrase is None or rule.phrase in message):
            return rule.becomes(f"libvirt: {message}", code=rule.agent_code)
    return Internal(f"libvirt: {message}", code="hypervisor_error", libvirt_code=code, libvirt_domain=domain)
