from __future__ import annotations

import pytest

from agent import errors as agent_errors

libvirt = pytest.importorskip("libvirt", reason="the Python binding of libvirt is not installed")

from agent.drivers.libvirt import errors  # noqa: E402


def libvirt_error(code: str, domain: str = "VIR_FROM_QEMU", message: str = "some text"):
    error = libvirt.libvirtError(message)
    error.err = (getattr(libvirt, code), getattr(libvirt, domain), message, 2, None, None, None, -1, -1)
    return error


# Written out again, so that a row that is lost or changed is noticed.
EXPECTED = [
    ("VIR_ERR_NO_DOMAIN", None, "NotFound", "not_found"),
    ("VIR_ERR_NO_DOMAIN_SNAPSHOT", None, "NotFound", "unknown_snapshot"),
    ("VIR_ERR_DOM_EXIST", None, "AlreadyExists", "already_exists"),
    ("VIR_ERR_OPERATION_FAILED", "already exists with uuid", "AlreadyExists", "already_exists"),
    ("VIR_ERR_OPERATION_FAILED", "is already defined with uuid", "AlreadyExists", "already_exists"),
    ("VIR_ERR_OPERATION_FAILED", "guest CPU doesn't match", "FailedPrecondition", "cpu_unsupported"),
    ("VIR_ERR_CPU_INCOMPATIBLE", None, "FailedPrecondition", "cpu_unsupported"),
    ("VIR_ERR_OPERATION_FAILED", None, "Internal", "hypervisor_operation_failed"),
    ("VIR_ERR_OPERATION_INVALID", None, "FailedPrecondition", "failed_precondition"),
    ("VIR_ERR_OPERATION_ABORTED", None, "FailedPrecondition", "operation_aborted"),
    ("VIR_ERR_OPERATION_DENIED", None, "FailedPrecondition", "hypervisor_access_denied"),
    ("VIR_ERR_ACCESS_DENIED", None, "FailedPrecondition", "hypervisor_access_denied"),
    ("VIR_ERR_AUTH_FAILED", None, "Unavailable", "hypervisor_login_failed"),
    ("VIR_ERR_AUTH_CANCELLED", None, "Unavailable", "hypervisor_login_failed"),
    ("VIR_ERR_AUTH_UNAVAILABLE", None, "Unavailable", "hypervisor_login_failed"),
    ("VIR_ERR_RESOURCE_BUSY", None, "FailedPrecondition", "resource_busy"),
    ("VIR_ERR_OPERATION_TIMEOUT", None, "DeadlineExceeded", "hypervisor_timeout"),
    ("VIR_ERR_AGENT_UNRESPONSIVE", None, "Unavailable", "guest_agent_unresponsive"),
    ("VIR_ERR_AGENT_UNSYNCED", None, "Unavailable", "guest_agent_unresponsive"),
    ("VIR_ERR_NO_SUPPORT", None, "Unsupported", "unsupported"),
    ("VIR_ERR_OPERATION_UNSUPPORTED", None, "Unsupported", "unsupported"),
    ("VIR_ERR_CONFIG_UNSUPPORTED", "unknown CPU feature", "FailedPrecondition", "cpu_unsupported"),
    ("VIR_ERR_CONFIG_UNSUPPORTED", None, "Unsupported", "config_unsupported"),
    ("VIR_ERR_ARGUMENT_UNSUPPORTED", None, "Unsupported", "unsupported"),
    ("VIR_ERR_NO_NETWORK", None, "FailedPrecondition", "network_missing"),
    ("VIR_ERR_XML_ERROR", None, "InvalidArgument", "definition_refused"),
    ("VIR_ERR_XML_DETAIL", None, "InvalidArgument", "definition_refused"),
    ("VIR_ERR_XML_INVALID_SCHEMA", None, "InvalidArgument", "definition_refused"),
    ("VIR_ERR_RPC", "too large", "InvalidArgument", "definition_too_large"),
    ("VIR_ERR_NO_CONNECT", None, "Unavailable", "hypervisor_unreachable"),
    ("VIR_ERR_INVALID_CONN", None, "Unavailable", "hypervisor_unreachable"),
    ("VIR_ERR_NO_MEMORY", None, "ResourceExhausted", "host_memory"),
    ("VIR_ERR_SYSTEM_ERROR", "No space left on device", "ResourceExhausted", "no_space"),
    ("VIR_ERR_SYSTEM_ERROR", "Cannot get interface MTU on", "FailedPrecondition", "bridge_missing"),
    ("VIR_ERR_SYSTEM_ERROR", "No such file or directory", "FailedPrecondition", "file_missing"),
    ("VIR_ERR_SYSTEM_ERROR", "Permission denied", "FailedPrecondition", "file_access_denied"),
    ("VIR_ERR_SYSTEM_ERROR", "Failed to terminate process", "Unavailable", "qemu_does_not_end"),
    ("VIR_ERR_INTERNAL_ERROR", "cannot limit locked memory", "Unsupported", "option_unsupported"),
    ("VIR_ERR_INTERNAL_ERROR", "Unknown CPU feature", "FailedPrecondition", "cpu_unsupported"),
    ("VIR_ERR_INTERNAL_ERROR", "Cannot allocate memory", "ResourceExhausted", "host_memory"),
    ("VIR_ERR_INTERNAL_ERROR", "cannot set up guest memory", "ResourceExhausted", "host_memory"),
    ("VIR_ERR_INTERNAL_ERROR", "No space left on device", "ResourceExhausted", "no_space"),
    ("VIR_ERR_INTERNAL_ERROR", "Child process (tc ", "Unsupported", "nic_limits_failed"),
    ("VIR_ERR_INTERNAL_ERROR", 'Failed to get "write" lock', "FailedPrecondition", "disk_in_use"),
]


@pytest.mark.parametrize(("code", "phrase", "becomes", "agent_code"), EXPECTED)
def test_row(code, phrase, becomes, agent_code):
    foreign = libvirt_error(code, "VIR_FROM_QEMU", f"libvirt said: {phrase or 'nothing special'}")
    translated = errors.translate(foreign)
    assert type(translated) is getattr(agent_errors, becomes)
    assert translated.code == agent_code
    assert "libvirt said" in translated.message


def test_every_row_of_the_table_is_tested():
    rows = [(rule.code, rule.phrase, rule.becomes.__name__) for rule in errors.RULES]
    assert rows == [row[:3] for row in EXPECTED]


def test_every_name_of_the_table_exists_in_the_binding():
    assert all(hasattr(libvirt, rule.code) for rule in errors.RULES)


@pytest.mark.parametrize("domain", ["VIR_FROM_RPC", "VIR_FROM_REMOTE"])
@pytest.mark.parametrize(
    "code",
    ["VIR_ERR_SYSTEM_ERROR", "VIR_ERR_INTERNAL_ERROR", "VIR_ERR_NO_CONNECT", "VIR_ERR_INVALID_CONN"],
)
def test_a_lost_connection_is_unavailable_and_retryable(domain, code):
    foreign = libvirt_error(code, domain)
    assert errors.is_lost(foreign)
    translated = errors.translate(foreign)
    assert type(translated) is agent_errors.Unavailable
    assert translated.retryable
    assert translated.code == "hypervisor_unreachable"


@pytest.mark.parametrize(
    ("code", "domain"),
    [
        ("VIR_ERR_INTERNAL_ERROR", "VIR_FROM_QEMU"),
        ("VIR_ERR_NO_DOMAIN", "VIR_FROM_REMOTE"),
        ("VIR_ERR_OPERATION_INVALID", "VIR_FROM_RPC"),
    ],
)
def test_other_errors_are_no_lost_connection(code, domain):
    assert not errors.is_lost(libvirt_error(code, domain))


def test_what_is_in_no_row_is_internal_and_keeps_the_numbers():
    translated = errors.translate(libvirt_error("VIR_ERR_INTERNAL_ERROR", "VIR_FROM_QEMU", "who knows"))
    assert type(translated) is agent_errors.Internal
    assert translated.details == {
        "libvirt_code": libvirt.VIR_ERR_INTERNAL_ERROR,
        "libvirt_domain": libvirt.VIR_FROM_QEMU,
    }


def test_an_error_without_fields_is_internal():
    error = libvirt.libvirtError("bare")
    error.err = None
    assert type(errors.translate(error)) is agent_errors.Internal
