"""Every error that crosses a layer of the agent.

One class per way in which the caller has to act differently; `code` says which refusal it is in detail. Whether
a retry can help is a class attribute, so wrapping or re-raising cannot lose it. Foreign exceptions (libvirt,
AMQP, SQLite, operating system) are translated into these once, at the edge that owns the foreign library, with
`raise ... from exc`. This module imports nothing of the agent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

Detail = str | int | float | bool | None


class ComputeError(Exception):
    """Root of all errors that a command can end with.

    `message` is one sentence that a person can act on; it never holds a secret. `code` is stable and part of the
    wire contract; `details` carries the figures behind the sentence (what is short, what was expected).
    """

    default_code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, code: str | None = None, **details: Detail) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.details: Mapping[str, Detail] = details


class InvalidArgument(ComputeError):
    """The command itself is wrong; the same command will always be refused."""

    default_code = "invalid_argument"


class ImageRejected(InvalidArgument):
    """The image's bytes are not what the command said, or are not safe to use."""

    default_code = "image_rejected"


class NotFound(ComputeError):
    """The named thing does not exist on this host, and the hypervisor has positively said so."""

    default_code = "not_found"


class AlreadyExists(ComputeError):
    """The name or id is taken by another thing."""

    default_code = "already_exists"


class Conflict(ComputeError):
    """The same command id arrived with another body, or the definition changed under the operation."""

    default_code = "conflict"


class StaleGeneration(ComputeError):
    """The command carries a generation lower than the instance's; the current one is in `details`."""

    default_code = "stale_generation"


class Expired(ComputeError):
    """The command's expiry time passed before its work began."""

    default_code = "expired"


class FailedPrecondition(ComputeError):
    """The verb is impossible in the present state; another command has to come first."""

    default_code = "failed_precondition"


class Unsupported(ComputeError):
    """This driver, hypervisor or guest cannot do it, whatever the state."""

    default_code = "unsupported"


class ResourceExhausted(ComputeError):
    """Something is short on this host (vCPU, memory, disk, space); `details` says what and by how much."""

    default_code = "resource_exhausted"
    retryable = True


class Unavailable(ComputeError):
    """A service the work needs (hypervisor, broker, image source, journal) cannot be reached now."""

    default_code = "unavailable"
    retryable = True


class DeadlineExceeded(ComputeError):
    """The work did not end within its limit; its effect is not known until the state is read back."""

    default_code = "deadline_exceeded"
    retryable = True


class Cancelled(ComputeError):
    """The operation was cancelled by a command and what it had done was undone."""

    default_code = "cancelled"


class Internal(ComputeError):
    """A defect of the agent or an answer of the hypervisor that it does not know; look into the log."""

    default_code = "internal"


class Unroutable(ComputeError):
    """The broker has no queue for a mandatory message: nobody with that name listens."""

    default_code = "unroutable"
