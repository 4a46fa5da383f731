"""Translates what aiormq, TLS and sockets raise, and waits for aiormq's answers with a limit.

Channel errors (403, 404, 405, 406) stay aiormq's within this package: declaring reacts to them.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Iterator
from typing import TypeVar

from aiormq.exceptions import (
    AMQPChannelError,
    AMQPError,
    AuthenticationError,
    ChannelInvalidStateError,
    ProbableAuthenticationError,
)

from agent.errors import ComputeError, InvalidArgument, Unavailable

T = TypeVar("T")

_NOT_ALLOWED = 530
_ACCESS_REFUSED = 403
_GONE = (AMQPError, ChannelInvalidStateError, OSError, RuntimeError)
_CUT_SHORT = (ssl.SSLEOFError, ssl.SSLZeroReturnError)


async def answer(request: Awaitable[T], timeout_s: float) -> T:
    """Await what aiormq asks of the broker.

    Raises `Unavailable` if the connection goes or the time is over (aiormq then closes the channel), and
    aiormq's `AMQPChannelError` where the broker refuses.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await request
    except TimeoutError as exc:
        raise Unavailable(f"The broker did not answer within {timeout_s:g} s.", code="bus_timeout") from exc
    except asyncio.CancelledError as exc:
        # aiormq ends waits by CancelledError when a connection closes. Only our own cancellation is ours.
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise Unavailable("The connection to the broker was lost.", code="bus_unavailable") from exc
    except AMQPChannelError:
        raise
    except Exception as exc:
        # A wait without a better reason is ended with a bare Exception.
        if type(exc) is not Exception and not isinstance(exc, _GONE):
            raise
        raise Unavailable("The connection to the broker was lost.", code="bus_unavailable") from exc


def connect_error(error: BaseException, close: tuple[int, str] | None, address: str) -> ComputeError:
    """Say why a connection could not be made. `close` is what the broker gave as its reason, if it did.

    `InvalidArgument` means that no retry helps before somebody changes something; `Unavailable` that one may.
    """
    chain = list(_causes(error))
    for cause in chain:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return InvalidArgument(
                f"The certificate of the broker {address} is not accepted: {cause.verify_message}",
                code="bus_tls",
            )
    for cause in chain:
        if isinstance(cause, ssl.SSLError) and not isinstance(cause, _CUT_SHORT):
            return InvalidArgument(
                f"TLS with the broker {address} failed: {cause.reason or 'handshake refused'}. "
                "Check the port and the client's certificate.",
                code="bus_tls",
            )
    if close is not None and close[0] in (_NOT_ALLOWED, _ACCESS_REFUSED) and "limit" not in close[1]:
        return _refused(address, close[1])
    if any(isinstance(cause, ProbableAuthenticationError) for cause in chain):
        return _refused(address, "wrong user, password or certificate")
    if any(isinstance(cause, AuthenticationError) for cause in chain):
        return _refused(address, "it does not offer this way to log in (SASL mechanism)")
    reason = close[1] if close else _first_words(chain)
    return Unavailable(f"The broker {address} cannot be reached: {reason.rstrip('.')}.", code="bus_unavailable")


def _refused(address: str, reason: str) -> InvalidArgument:
    return InvalidArgument(f"The broker {address} refuses access: {reason.rstrip('.')}.", code="bus_access_refused")


def _first_words(chain: list[BaseException]) -> str:
    for cause in chain:
        if isinstance(cause, TimeoutError):
            return "no answer in time"
        if isinstance(cause, OSError) and (words := cause.strerror or str(cause)):
            return words.removeprefix("Multiple exceptions: ")  # of a name with several addresses
    return type(chain[0]).__name__


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or following.__context__
