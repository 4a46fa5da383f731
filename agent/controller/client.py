"""The client of the compute agents: sends commands, awaits their final events, opens streams of events.

Runs on one event loop and starts no tasks: replies arrive by the bus's callback, and each call waits for its
own. A command's id is its idempotency key, so the client may send the same bytes again whenever an answer is
overdue: the agent answers a repeat from its journal and never runs it twice.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from contextlib import suppress
from typing import Self, Unpack

import structlog
from pydantic import ValidationError

from agent.bus.base import Binding, Bus, Delivery, Outgoing, Queue, Subscription, Topology
from agent.bus.topology import shared_topology
from agent.controller.envelope import CommandOptions, render_command
from agent.controller.failures import verdict
from agent.controller.pending import EventCallback, Pending
from agent.controller.stream import EventStream
from agent.errors import Conflict, DeadlineExceeded, Internal, InvalidArgument, Unavailable, Unroutable
from agent.messages import routing
from agent.messages.events import HostHeartbeat, OperationSucceeded, parse_event
from agent.messages.verb import CommandData

_log = structlog.get_logger("controller")
_REPLY_PREFETCH = 256


class ComputeClient:
    """Talks to every agent on one broker. An async context manager over a bus, which it connects if need be.

    `source` is this controller's CloudEvents source, as agents log it. The bus is closed on exit only if it
    was connected on entry. Any number of calls may be under way at once.
    """

    def __init__(self, bus: Bus, *, source: str, connect_timeout_s: float = 10.0) -> None:
        self._bus = bus
        self._source = source
        self._connect_timeout_s = connect_timeout_s
        self._client_id = str(uuid.uuid4())
        self._reply_to = f"compute.reply.{self._client_id}"
        self._pending: dict[str, Pending] = {}
        self._streams: set[EventStream] = set()
        self._known_hosts: set[str] = set()
        self._subscription: Subscription | None = None
        self._owns_bus = False
        self._open = False
        self._was_away = False
        self._stream_count = 0

    async def __aenter__(self) -> Self:
        """Connect, and declare the reply queue.

        Raises `Unavailable` (a retry helps), `InvalidArgument` (the broker refuses the login) and
        `FailedPrecondition` (an exchange is missing and this login may not declare it).
        """
        try:
            if not self._bus.connected:
                self._owns_bus = True
                await self._bus.connect(timeout_s=self._connect_timeout_s)
            async with asyncio.timeout(self._connect_timeout_s):
                await self._open_reply_queue()
        except BaseException as exc:
            await self._close_bus()
            if isinstance(exc, TimeoutError):
                raise Unavailable("the broker did not let us declare the reply queue in time") from exc
            raise
        self._open = True
        self._bus.on_state(self._on_state)
        return self

    async def __aexit__(self, *_exc: object) -> None:
        """End streams and calls (they raise `Unavailable`) and give back the bus."""
        self._open = False
        for pending in self._pending.values():
            pending.end(Unavailable("the client was closed before the answer came"))
        for stream in tuple(self._streams):
            await stream.close()
        if self._subscription is not None:
            await self._subscription.cancel()
        await self._close_bus()

    async def send(
        self,
        data: CommandData,
        *,
        host: str,
        id: str | None = None,
        progress: bool = False,
        **options: Unpack[CommandOptions],
    ) -> str:
        """Send a command, await the broker's confirm, and return the command's id: that of its operation too.

        `host` may be `all`. Sending the same id again is safe and has no second effect. Raises
        `InvalidArgument`, `Unroutable` (no agent has ever served that host), and `Unavailable` or
        `DeadlineExceeded`, after which it is not known whether the command went out: send it again with the
        same id.
        """
        message = self._message(data, host, id, progress=progress, **options)
        await self._publish(message, host)
        return message.message_id

    async def call(
        self,
        data: CommandData,
        *,
        host: str,
        id: str | None = None,
        progress: bool = False,
        timeout_s: float = 90.0,
        resend_after_s: float = 15.0,
        on_event: EventCallback | None = None,
        **options: Unpack[CommandOptions],
    ) -> OperationSucceeded:
        """Send a command and await its success.

        `on_event` is called on the loop with each event of the operation, the final one included, repeats
        excluded; `progress` asks the agent for them from the start. The command is sent again, with the same
        bytes, when the connection returns and after `resend_after_s` without a sign of life.

        Raises `CommandRefused` and `CommandFailed` with the agent's code; `Unavailable` if it could not be
        sent within `timeout_s`; `DeadlineExceeded` if it was sent and no final event came: it may still take
        effect, and `details["operation_id"]` is what to call again or to look up. Otherwise as `send`.
        """
        if host == routing.BROADCAST:
            raise InvalidArgument("a broadcast has many answers: use send() and read the events")
        message = self._message(data, host, id, progress=progress or on_event is not None, **options)
        command_id = message.message_id
        if command_id in self._pending:
            raise Conflict(f"this client already waits for command {command_id}")
        pending = self._pending[command_id] = Pending(on_event, resend_after_s)
        try:
            async with asyncio.timeout(timeout_s) as limit:
                return await self._converse(message, host, pending)
        except TimeoutError:
            if not limit.expired():
                raise
            raise _overdue(pending, command_id, host, timeout_s) from pending.trouble
        finally:
            del self._pending[command_id]

    def events(
        self, kinds: Sequence[str] = (), *, host: str | None = None, instance_id: str | None = None
    ) -> EventStream:
        """Return a stream of events, to be entered with `async with`; see `EventStream`.

        `kinds` are `<noun>.<event>` or `<noun>.*`; none means all, and only then gaps in the sequence are
        seen. Raises `InvalidArgument` on what is no kind.
        """
        self._stream_count += 1
        name = f"compute.watch.{self._client_id}.{self._stream_count}"
        stream = EventStream(self._bus, name, kinds=kinds, host=host, instance_id=instance_id)
        self._streams = {known for known in self._streams if not known.ended} | {stream}
        return stream

    def heartbeats(self, host: str | None = None) -> EventStream:
        """Return a stream of heartbeats; `HostHeartbeat.model_validate(event.data)` reads one."""
        return self.events((HostHeartbeat.kind,), host=host)

    def _message(
        self,
        data: CommandData,
        host: str,
        id: str | None,
        *,
        progress: bool,
        **options: Unpack[CommandOptions],
    ) -> Outgoing:
        command_id = id or str(uuid.uuid4())
        body = render_command(data, id=command_id, source=self._source, host=host, progress=progress, **options)
        return Outgoing(
            exchange=routing.COMMANDS_EXCHANGE,
            routing_key=routing.command_key(data.verb, host),
            body=body,
            message_id=command_id,
            correlation_id=command_id,
            reply_to=self._reply_to,
            mandatory=True,
        )

    async def _publish(self, message: Outgoing, host: str) -> None:
        """Publish to a host that has a queue.

        `mandatory` alone does not tell: the alternate exchange takes what no queue of a host does, and the
        broker then confirms. So the queue is asked for, once per host and again whenever an answer is
        overdue.
        """
        if not self._open:
            raise Unavailable("the client is not open")
        if host not in self._known_hosts and host != routing.BROADCAST:
            if await self._bus.queue_depth(routing.host_queue(host)) is None:
                raise Unroutable(f"no agent has ever served host {host}: look at its name", host=host)
            self._known_hosts.add(host)
        await self._bus.publish(message)

    async def _converse(self, message: Outgoing, host: str, pending: Pending) -> OperationSucceeded:
        """Send until there is an answer. The caller sets the limit."""
        clock = asyncio.get_running_loop().time
        while not pending.ended:
            pending.changed.clear()
            try:
                await self._publish(message, host)
            except (Unavailable, DeadlineExceeded) as exc:
                await _wait(pending, pending.not_sent(exc))
                continue
            pending.sent(clock())
            while not pending.changed.is_set() and (left := pending.silence_left(clock())) > 0:
                await _wait(pending, left)
            pending.resent()
            self._known_hosts.discard(host)
        if pending.failure is not None:
            raise pending.failure
        assert pending.answer is not None  # noqa: S101 (what `ended` means)
        try:
            return verdict(pending.answer)
        except ValidationError as exc:
            raise Internal(f"the agent's final event {pending.answer.kind} is malformed: {exc}") from exc

    async def _open_reply_queue(self) -> None:
        await self._bus.declare(shared_topology())
        binding = Binding(routing.EVENTS_EXCHANGE, self._reply_to, self._reply_to)
        await self._bus.declare(Topology(queues=(Queue(self._reply_to, durable=False),), bindings=(binding,)))
        self._subscription = await self._bus.consume(self._reply_to, self._on_reply, prefetch=_REPLY_PREFETCH)

    def _on_reply(self, delivery: Delivery) -> None:
        """Hand an event of an operation to its call. Answers nobody waits for any more are dropped."""
        delivery.ack()
        try:
            event = parse_event(delivery.body)
        except ValidationError as exc:
            _log.warning("controller.bad_reply", message_id=delivery.message_id, error=str(exc))
            return
        operation_id = delivery.correlation_id
        if operation_id not in self._pending:
            operation_id = str(event.data.get("operation_id"))
        pending = self._pending.get(operation_id)
        if pending is not None:
            pending.take(event, asyncio.get_running_loop().time())

    def _on_state(self, connected: bool) -> None:
        """What was published while the connection was away is lost: ask again, and mark the gap."""
        if not connected:
            self._was_away = True
            return
        if not self._was_away or not self._open:
            return
        self._was_away = False
        for pending in self._pending.values():
            pending.changed.set()
        for stream in self._streams:
            stream.connection_returned()

    async def _close_bus(self) -> None:
        if self._owns_bus:
            await self._bus.close()


async def _wait(pending: Pending, seconds: float) -> None:
    """Wait for an answer, an end or a reconnect, at most so long."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await pending.changed.wait()


def _overdue(pending: Pending, command_id: str, host: str, timeout_s: float) -> Unavailable | DeadlineExceeded:
    if not pending.published:
        why = f": {pending.trouble.message}" if pending.trouble else ""
        return Unavailable(f"the command could not be sent within {timeout_s:g} s{why}", operation_id=command_id)
    return DeadlineExceeded(
        f"host {host} gave no final answer within {timeout_s:g} s; the command may still take effect",
        operation_id=command_id,
    )
