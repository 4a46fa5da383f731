"""Declares a topology on throw-away channels: a refusal closes the channel it is asked on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import structlog
from aiormq import Channel
from aiormq.exceptions import (
    ChannelAccessRefused,
    ChannelClosed,
    ChannelLockedResource,
    ChannelNotFoundEntity,
    ChannelPreconditionFailed,
)

from agent.bus.amqp.session import Session
from agent.bus.base import Binding, Exchange, Queue, Topology
from agent.errors import FailedPrecondition, Unavailable

log = structlog.get_logger("bus")


class Declarations:
    """All topologies declared so far, in order. A `Part`: declares them again on a new connection."""

    required = False

    def __init__(self) -> None:
        self._kept: list[Topology] = []
        self._done = False

    @property
    def is_open(self) -> bool:
        return self._done

    def describe(self) -> str:
        return "topology"

    def keep(self, topology: Topology) -> None:
        if topology not in self._kept:
            self._kept.append(topology)

    def forget(self, topology: Topology) -> None:
        if topology in self._kept:
            self._kept.remove(topology)

    def lost(self) -> None:
        self._done = False

    async def open(self, session: Session) -> None:
        for topology in self._kept:
            await declare(session, topology)
        self._done = True


async def declare(session: Session, topology: Topology) -> None:
    """Declare; use what exists where the broker refuses to make or to change it.

    Raises `FailedPrecondition` naming what is missing, `Unavailable`.
    """
    declarer = _Declarer(session)
    try:
        for exchange in topology.exchanges:
            await declarer.exchange(exchange)
        for queue in topology.queues:
            await declarer.queue(queue)
        for binding in topology.bindings:
            await declarer.bind(binding)
    finally:
        await declarer.close()


async def retract(session: Session, topology: Topology) -> None:
    """Delete the non-durable queues of a topology; what is gone already is no error. Raises `Unavailable`."""
    for queue in topology.queues:
        if queue.durable:
            continue
        async with session.throw_away() as channel:
            with contextlib.suppress(ChannelClosed):
                await session.ask(channel.queue_delete(queue.name))


async def queue_depth(session: Session, queue: str) -> int | None:
    """Ask how many messages are ready in a queue; None if there is none of that name."""
    async with session.throw_away() as channel:
        try:
            answer = await session.ask(channel.queue_declare(queue, passive=True))
        except ChannelNotFoundEntity:
            return None
        except ChannelClosed as exc:
            raise Unavailable(f"The broker does not tell the depth of {queue}.", code="bus_refused") from exc
        return answer.message_count or 0


def queue_arguments(queue: Queue) -> dict[str, Any]:
    """Say it in RabbitMQ's words."""
    arguments: dict[str, Any] = {}
    if queue.durable:
        arguments["x-queue-type"] = "quorum"
    if queue.single_active:
        arguments["x-single-active-consumer"] = True
    if queue.delivery_limit is not None and queue.durable:
        arguments["x-delivery-limit"] = queue.delivery_limit
    if queue.dead_letter_exchange is not None:
        arguments["x-dead-letter-exchange"] = queue.dead_letter_exchange
        if queue.durable:
            # Dead letters are not to be lost either; RabbitMQ demands this overflow behaviour for it.
            arguments["x-dead-letter-strategy"] = "at-least-once"
            arguments["x-overflow"] = "reject-publish"
    return arguments


class _Declarer:
    """Declares on one channel for as long as the broker lets it, then on another."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._channel: Channel | None = None

    async def close(self) -> None:
        if self._channel is not None:
            await self._session.close_channel(self._channel)
            self._channel = None

    async def exchange(self, exchange: Exchange) -> None:
        arguments = {"alternate-exchange": exchange.alternate} if exchange.alternate else None
        await self._declare(
            f"exchange {exchange.name}",
            lambda channel, passive: channel.exchange_declare(
                exchange.name, exchange_type="topic", durable=True, passive=passive, arguments=arguments
            ),
        )

    async def queue(self, queue: Queue) -> None:
        arguments = queue_arguments(queue)
        await self._declare(
            f"queue {queue.name}",
            lambda channel, passive: channel.queue_declare(
                queue.name,
                passive=passive,
                durable=queue.durable,
                exclusive=not queue.durable,
                arguments=arguments,
            ),
        )

    async def bind(self, binding: Binding) -> None:
        what = f"binding of queue {binding.queue} to exchange {binding.exchange}"
        try:
            await self._ask(lambda channel: channel.queue_bind(binding.queue, binding.exchange, binding.pattern))
        except ChannelNotFoundEntity as exc:
            raise _missing(what) from exc
        except ChannelAccessRefused:
            # There is no way to ask whether a binding exists. Who may not bind relies on the operator's.
            log.info("bus.bind_refused", queue=binding.queue, exchange=binding.exchange, key=binding.pattern)
        except ChannelClosed as exc:
            raise FailedPrecondition(f"The broker refuses the {what}: {exc}", code="bus_topology") from exc

    async def _declare(self, what: str, request: Callable[[Channel, bool], Any]) -> None:
        try:
            await self._ask(lambda channel: request(channel, False))
            return
        except ChannelLockedResource as exc:
            # Ours from before, most likely: the broker has not yet noticed that the old connection is dead.
            raise Unavailable(f"Another connection holds {what}.", code="bus_locked") from exc
        except (ChannelAccessRefused, ChannelPreconditionFailed) as exc:
            log.info("bus.declare_refused", what=what, reason=str(exc))
            refusal = exc
        try:
            await self._ask(lambda channel: request(channel, True))
        except ChannelClosed as exc:
            raise _missing(what, str(refusal)) from exc

    async def _ask(self, request: Callable[[Channel], Any]) -> None:
        if self._channel is None:
            self._channel = await self._session.channel()
        try:
            await self._session.ask(request(self._channel))
        except BaseException:
            # Whatever it was, aiormq has closed this channel or is about to.
            await self.close()
            raise


def _missing(what: str, refusal: str = "") -> FailedPrecondition:
    why = f" and refuses to make it ({refusal})" if refusal else ""
    return FailedPrecondition(
        f"The broker has no {what}{why}. Let an operator declare it (see deploy/).", code="bus_topology"
    )
