"""Everything that agents publish, recorded from the broker itself, and judged.

The recorder speaks to the broker with aio-pika and not with the agent's own bus, so that both cannot be wrong in
the same way. Its queue is durable: what is published while the broker restarts is kept for it.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

import aio_pika
from aio_pika.abc import AbstractIncomingMessage
from pydantic import ValidationError

from agent.controller.failures import FINAL_KINDS
from agent.messages import routing
from agent.messages.events import Event, HostHeartbeat, parse_event
from support.agent_process import WAIT_S


@dataclass(frozen=True, slots=True)
class Recorded:
    """One message. `event` is None for what is no event, `copy` true for one that only answers a duplicate."""

    routing_key: str
    body: bytes
    headers: dict[str, Any]
    event: Event | None
    copy: bool


class Recorder:
    """Records `compute.events` and `compute.dead` of one broker from `__aenter__` on."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._name = f"test.recorder.{uuid.uuid4().hex[:12]}"
        self.messages: list[Recorded] = []
        self.dead: list[Recorded] = []
        self._changed = asyncio.Event()
        self._bound = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._connection: Any = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="recorder")
        async with asyncio.timeout(WAIT_S):
            await self._bound.wait()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        with suppress(Exception):
            async with asyncio.timeout(3):
                connection = await aio_pika.connect(self._url)
                channel = await connection.channel()
                for name in (self._name, f"{self._name}.dead"):
                    await channel.queue_delete(name)
                await connection.close()

    # --- reading --------------------------------------------------------------------------------------------------

    def events(self, host: str, *kinds: str, since: int = 0) -> list[Event]:
        """First arrivals of a host's events, in order; repeats (same id) and answers to duplicates left out."""
        seen: set[str] = set()
        found = []
        for message in self.messages[since:]:
            event = message.event
            if event is None or message.copy or event.host != host or event.id in seen:
                continue
            seen.add(event.id)
            if not kinds or event.kind in kinds:
                found.append(event)
        return found

    def finals(self, host: str) -> dict[str, list[Event]]:
        """Operation → its final events, by distinct id."""
        found: dict[str, list[Event]] = defaultdict(list)
        for event in self.events(host, *FINAL_KINDS):
            found[event.data["operation_id"]].append(event)
        return found

    @property
    def mark(self) -> int:
        """The present end of the record."""
        return len(self.messages)

    async def wait_for(
        self, host: str, kind: str | Collection[str], *, timeout_s: float = WAIT_S, since: int = 0,
        where: Callable[[Event], bool] = lambda _event: True,
    ) -> Event:  # fmt: skip
        """Wait for an event of `host` and `kind` after the mark `since`."""
        kinds = {kind} if isinstance(kind, str) else set(kind)
        position = since
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    changed = self._changed
                    for message in self.messages[position:]:
                        position += 1
                        event = message.event
                        if event is None or message.copy or event.host != host:
                            continue
                        if event.kind in kinds and where(event):
                            return event
                    await changed.wait()
        except TimeoutError:
            told = [event for event in self.events(host) if event.kind != HostHeartbeat.kind]
            tail = "\n".join(map(describe, told[-25:]))
            raise AssertionError(f"no {'/'.join(sorted(kinds))} of {host} within {timeout_s:g} s; last:\n{tail}") from None

    async def wait_final(self, host: str, operation_id: str, *, timeout_s: float = WAIT_S) -> Event:
        """Wait for the final event of an operation."""
        return await self.wait_for(
            host, FINAL_KINDS, timeout_s=timeout_s, where=lambda event: event.data["operation_id"] == operation_id
        )

    async def wait_finals(self, host: str, operation_ids: Iterable[str], *, timeout_s: float = WAIT_S) -> dict[str, Event]:
        """Wait for the final events of many operations."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        return {
            each: await self.wait_final(host, each, timeout_s=max(0.01, deadline - loop.time()))
            for each in operation_ids
        }

    async def heartbeat(self, host: str, *, timeout_s: float = WAIT_S, where: Callable[[HostHeartbeat], bool]) -> HostHeartbeat:
        """Wait for a heartbeat from now on."""
        event = await self.wait_for(
            host, HostHeartbeat.kind, timeout_s=timeout_s, since=self.mark,
            where=lambda found: where(HostHeartbeat.model_validate(found.data)),
        )  # fmt: skip
        return HostHeartbeat.model_validate(event.data)

    # --- judging --------------------------------------------------------------------------------------------------

    def problems(self, host: str, commands: Collection[str] = ()) -> list[str]:
        """What contradicts the promises: one final per command, contiguous sequences in order, nothing after a final."""
        found = self._sequence_problems(host)
        finals = self.finals(host)
        for command in commands:
            if command not in finals:
                found.append(f"command {command} has no final event")
        for operation_id, events in finals.items():
            if len(events) > 1 and operation_id:
                found.append(f"operation {operation_id} has {len(events)} final events: {', '.join(map(describe, events))}")
        ended: dict[str, Event] = {}
        for event in self.events(host):
            operation_id = event.data.get("operation_id")
            if not event.kind.startswith("operation.") or not operation_id:
                continue
            if operation_id in ended and event.kind not in FINAL_KINDS:
                found.append(f"{describe(event)} comes after {describe(ended[operation_id])}")
            if event.kind in FINAL_KINDS:
                ended[operation_id] = event
        return found

    def check(self, host: str, commands: Collection[str] = ()) -> None:
        """Fail with all problems there are."""
        found = self.problems(host, commands)
        if found:
            raise AssertionError(f"{len(found)} problems with the events of {host}:\n" + "\n".join(found[:20]))

    def _sequence_problems(self, host: str) -> list[str]:
        found: list[str] = []
        ids: dict[tuple[str, int], str] = {}
        bodies: dict[str, bytes] = {}
        last: dict[str, int] = defaultdict(int)
        for message in self.messages:
            event = message.event
            if event is None or message.copy or event.host != host or event.kind == HostHeartbeat.kind:
                continue
            if event.sequence is None or event.epoch is None:
                found.append(f"{describe(event)} has no sequence")
                continue
            if bodies.setdefault(event.id, message.body) != message.body:
                found.append(f"{describe(event)} was sent again with another body")
            if ids.setdefault((event.epoch, event.sequence), event.id) != event.id:
                found.append(f"{describe(event)}: another event had this number")
            if event.sequence > last[event.epoch] + 1:
                found.append(f"{describe(event)} comes after number {last[event.epoch]}: a gap or wrong order")
            last[event.epoch] = max(last[event.epoch], event.sequence)
        return found

    # --- inside ---------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            try:
                await self._record()
            except (OSError, aio_pika.exceptions.AMQPError, TimeoutError):
                # The broker is away: nothing announces its return.
                await asyncio.sleep(0.1)

    async def _record(self) -> None:
        connection = await aio_pika.connect(self._url, timeout=30)
        closed = asyncio.Event()
        try:
            connection.close_callbacks.add(lambda *_: closed.set())
            channel = await connection.channel()
            channel.close_callbacks.add(lambda *_: closed.set())
            await channel.set_qos(prefetch_count=200)
            for exchange, name, callback in (
                (routing.EVENTS_EXCHANGE, self._name, self._on_event),
                (routing.DEAD_EXCHANGE, f"{self._name}.dead", self._on_dead),
            ):
                await channel.declare_exchange(exchange, aio_pika.ExchangeType.TOPIC, durable=True)
                queue = await channel.declare_queue(name, durable=True, arguments={"x-queue-type": "quorum"})
                await queue.bind(exchange, "#")
                await queue.consume(callback)
            self._bound.set()
            await closed.wait()  # no limit: until the connection is lost or the recorder is cancelled
        finally:
            with suppress(Exception):
                async with asyncio.timeout(2):
                    await connection.close()

    async def _on_event(self, message: AbstractIncomingMessage) -> None:
        self._take(message, self.messages)
        await self._ack(message)

    async def _on_dead(self, message: AbstractIncomingMessage) -> None:
        self._take(message, self.dead)
        await self._ack(message)

    async def _ack(self, message: AbstractIncomingMessage) -> None:
        with suppress(aio_pika.exceptions.AMQPError, RuntimeError):
            await message.ack()

    def _take(self, message: AbstractIncomingMessage, into: list[Recorded]) -> None:
        key = message.routing_key or ""
        try:
            event = parse_event(message.body)
        except ValidationError:
            event = None
        copy = event is not None and key != routing.event_key(event.kind, event.host)
        into.append(Recorded(key, message.body, dict(message.headers), event, copy))
        self._changed.set()
        self._changed = asyncio.Event()


def describe(event: Event) -> str:
    """One line for a message of failure."""
    data = event.data
    detail = data.get("operation_id") or data.get("instance_id") or data.get("state") or ""
    more = {key: data[key] for key in ("phase", "observed", "reason", "resync", "error", "connected") if key in data}
    return f"#{event.sequence} {event.kind} {detail} {more or ''}".rstrip()
