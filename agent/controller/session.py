"""One run of `computectl`: its settings, its connection, and how errors become an exit status.

Exit status: 0 success; 1 the command was refused or failed; 2 wrong usage or an invalid spec; 3 no answer in time
or no broker; 130 interrupted.
"""

from __future__ import annotations

import asyncio
import platform
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import click
from pydantic import SecretStr, ValidationError

from agent.bus.base import Bus
from agent.controller import render
from agent.controller.client import ComputeClient
from agent.controller.failures import CommandError
from agent.errors import ComputeError, DeadlineExceeded, FailedPrecondition, InvalidArgument, Unavailable

T = TypeVar("T")

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_NO_ANSWER = 3
EXIT_INTERRUPTED = 130

USAGE = "usage"
"""The code of what click refuses."""

CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Address:
    """Where the broker is and how to log in. The URL may hold a password: it is never printed."""

    url: str = "amqp://localhost/"
    cafile: Path | None = None
    certfile: Path | None = None
    keyfile: Path | None = None


def amqp_bus(address: Address) -> Bus:
    """Make the bus for an address. Raises `InvalidArgument` on what is no AMQP URL."""
    # Imported late: the AMQP library takes longer to load than --help takes to print.
    from agent.bus.amqp import AmqpBus, AmqpSettings  # noqa: PLC0415

    try:
        settings = AmqpSettings(
            url=SecretStr(address.url),
            cafile=address.cafile,
            certfile=address.certfile,
            keyfile=address.keyfile,
            reconnect_min_s=0.5,
            reconnect_max_s=2.0,
        )
    except ValidationError as exc:
        found = exc.errors(include_url=False, include_input=False, include_context=False)
        sentence = "; ".join(str(e["msg"]).removeprefix("Value error, ") for e in found)
        raise InvalidArgument(f"--amqp: {sentence}") from None
    return AmqpBus(settings, name=f"computectl@{platform.node()}")


@dataclass(slots=True)
class Session:
    """What the root command hands down. `timeout_s` None: each command has its own limit."""

    address: Address = field(default_factory=Address)
    timeout_s: float | None = None
    as_json: bool = False
    make_bus: Callable[[Address], Bus] = amqp_bus
    waiting_for: str | None = None
    """The operation that is awaited, for whoever interrupts."""

    def limit(self, default_s: float) -> float:
        """Seconds to wait for an answer."""
        return default_s if self.timeout_s is None else self.timeout_s

    def run(self, body: Callable[[ComputeClient], Awaitable[T]]) -> T:
        """Connect, run `body` on a loop of its own, and disconnect."""

        async def main() -> T:
            bus = self.make_bus(self.address)
            source = f"/compute/controllers/computectl@{platform.node()}"
            connect_s = min(CONNECT_TIMEOUT_S, self.limit(CONNECT_TIMEOUT_S))
            async with ComputeClient(bus, source=source, connect_timeout_s=connect_s) as client:
                return await body(client)

        return asyncio.run(main())


pass_session = click.make_pass_decorator(Session)


class RootGroup(click.Group):
    """The root command: the one place where errors become a message and an exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        session = ctx.ensure_object(Session)
        as_json = "--json" in ctx.args  # a mistake may be found before the flag is
        try:
            return super().invoke(ctx)
        except click.UsageError as exc:
            if not (as_json or session.as_json):
                raise
            wrong = InvalidArgument(exc.format_message(), code=USAGE)
            render.document({"error": error_document(wrong)})
            ctx.exit(EXIT_USAGE)
        except ComputeError as exc:
            if session.as_json:
                render.document({"error": error_document(exc)})
            else:
                click.echo(_sentence(exc), err=True)
            ctx.exit(exit_status(exc))
        except KeyboardInterrupt:
            if session.waiting_for is not None:
                click.echo(f"interrupted; operation {session.waiting_for} goes on", err=True)
            ctx.exit(EXIT_INTERRUPTED)


def exit_status(exc: ComputeError) -> int:
    """The one table from errors to exit statuses."""
    if isinstance(exc, CommandError):
        return EXIT_FAILED
    if isinstance(exc, Unavailable | DeadlineExceeded | FailedPrecondition) or exc.code.startswith("bus_"):
        return EXIT_NO_ANSWER
    return EXIT_USAGE if isinstance(exc, InvalidArgument) else EXIT_FAILED


def error_document(exc: ComputeError) -> dict[str, Any]:
    """Describe an error as JSON."""
    document: dict[str, Any] = {
        "code": exc.code,
        "message": exc.message,
        "retryable": exc.retryable,
        "details": dict(exc.details),
    }
    if isinstance(exc, CommandError):
        document |= {"state": exc.state, "operation_id": exc.operation_id, "instance_id": exc.instance_id}
    findings = getattr(exc, "findings", None)
    if findings is not None:
        document["findings"] = [{"field": f.field, "line": f.line, "message": f.message} for f in findings]
    return document


def _sentence(exc: ComputeError) -> str:
    """`error: <code>: <sentence>`, with what to do next where that is known."""
    message = f"error: {exc.code}: {render.clean(exc.message)}"
    if isinstance(exc, CommandError) and exc.details:
        message += " (" + ", ".join(f"{key}: {render.clean(value)}" for key, value in exc.details.items()) + ")"
    if isinstance(exc, CommandError) and exc.retryable:
        message += "\nA later try can succeed."
    operation_id = exc.details.get("operation_id")
    if operation_id is not None and isinstance(exc, DeadlineExceeded):
        message += f"\nSee: computectl operation show {operation_id}"
    return message
