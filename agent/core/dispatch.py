"""From a delivery to a journaled, acknowledged operation in its lane. Deliveries are taken in order, in batches:
whatever arrived while the last batch was being committed is the next one, so commits grow with the load.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import structlog

from agent import metrics
from agent.bus.base import Bus, Delivery, Outgoing
from agent.core.announcement import accepted
from agent.core.conclusion import conclude
from agent.core.context import Context, now
from agent.core.failpoints import failpoint
from agent.core.outcome import problem_of, state_of
from agent.core.registry import Registry
from agent.core.runner import Runner
from agent.errors import ComputeError, Conflict, Expired, Internal, InvalidArgument, StaleGeneration
from agent.messages import routing
from agent.messages.commands import Command, Refused, parse_command
from agent.messages.events import OperationRejected, seal
from agent.store.base import Change, Committed, OperationRecord

log = structlog.get_logger("dispatch")
BATCH_LIMIT = 256
MAX_REPLIES = 16
"""Addresses one answer goes to: with more, its headers would outgrow a frame and nothing could be published."""
_REPLY_TO = re.compile(rf"{re.escape(routing.REPLY_PREFIX)}[!-~]{{1,200}}")


@dataclass(slots=True)
class _Arrival:
    """One delivery on its way into the journal. `record` is final already where nothing remains to be run."""

    delivery: Delivery
    change: Change
    command: Command[Any] | None = None
    record: OperationRecord | None = None
    burial: asyncio.Future[None] | None = None
    reply: tuple[str, bytes] | None = None


class Dispatcher:
    """Takes deliveries from the bus. `on_delivery` is the bus's callback; `run` is the one task that works them."""

    def __init__(self, ctx: Context, bus: Bus, registry: Registry, runner: Runner) -> None:
        self._ctx = ctx
        self._bus = bus
        self._registry = registry
        self._runner = runner
        self._arrived: deque[Delivery] = deque()
        self._again: list[Delivery] = []
        self._batch: set[str] = set()
        self._wake = asyncio.Event()

    def on_delivery(self, delivery: Delivery) -> None:
        """Queue a delivery; returns at once."""
        self._arrived.append(delivery)
        self._wake.set()

    async def run(self) -> None:
        """Work deliveries until cancelled. What is cut off was not acknowledged and is delivered again."""
        while True:
            await self._wake.wait()  # no limit: woken by the next delivery
            self._wake.clear()
            while self._arrived:
                count = min(len(self._arrived), BATCH_LIMIT)
                self._batch.clear()
                found = [await self._read_safely(self._arrived.popleft()) for _ in range(count)]
                arrivals = [arrival for arrival in found if arrival is not None]
                burials = [arrival.burial for arrival in arrivals if arrival.burial is not None]
                if burials:
                    await asyncio.wait(burials)  # each has a limit of its own
                await self._commit(arrivals)
                if self._again:
                    await asyncio.sleep(0)
                    self._arrived.extend(self._again)
                    self._again.clear()

    async def _commit(self, arrivals: list[_Arrival]) -> None:
        try:
            done = await self._ctx.journal.commit(*(arrival.change for arrival in arrivals))
        except Internal as exc:
            if len(arrivals) == 1:
                self._poison(arrivals[0].delivery, exc)
                return
            # One that cannot be stored must not keep its neighbours out.
            for arrival in arrivals:
                await self._commit([arrival])
            return
        for arrival, committed in zip(arrivals, done, strict=True):
            self._committed(arrival, committed)

    def _poison(self, delivery: Delivery, exc: Exception) -> None:
        """Give up a message that our own code fails on; the broker keeps it among the dead letters."""
        log.error("dispatch.poison", error=str(exc), exc_info=exc)
        metrics.DEAD_LETTERS.labels("internal").inc()
        delivery.reject(requeue=False)

    async def _read_safely(self, delivery: Delivery) -> _Arrival | None:
        try:
            return await self._read(delivery)
        except ComputeError:
            raise  # the journal is closing: nothing was acknowledged
        except Exception as exc:
            self._poison(delivery, exc)
            return None

    async def _is_known(self, operation_id: str) -> bool:
        """Whether a command with this id was accepted before, or is about to be."""
        if operation_id in self._batch or self._runner.find(operation_id) is not None:
            return True
        store = self._ctx.journal.store
        return await self._ctx.journal.read(lambda: store.operation(operation_id)) is not None

    # --- before the commit ------------------------------------------------------------------------------------

    async def _read(self, delivery: Delivery) -> _Arrival:
        try:
            command = parse_command(delivery.body)
        except Refused as exc:
            return await self._refuse(delivery, exc)
        record = OperationRecord(
            id=command.id,
            verb=command.verb,
            instance_id=command.subject,
            body=delivery.body,
            reply_to=_reply_to(delivery),
            correlation_id=_short(delivery.correlation_id),
            state="accepted",
            accepted_at=now(),
        )
        change = Change()
        try:
            await self._fence(command, change)
            route = self._registry[command.verb]
            if route.inline is not None:
                result = route.inline(self._ctx, command)
                record.state = "succeeded"
                body = result.model_dump(mode="json", exclude_none=True) if result is not None else {}
                conclude(self._ctx.journal, record, command, change, result=body)
        except Exception as exc:  # also a defect in an inline handler: it must not stop the intake
            if not isinstance(exc, ComputeError):
                log.exception("dispatch.unexpected_error", verb=command.verb, operation=command.id)
            record.state = state_of(exc, begun=False)
            record.error_code = problem_of(exc).code
            change = Change()
            conclude(self._ctx.journal, record, command, change, error=exc)
        self._batch.add(record.id)
        change.claim = replace(record)
        if not record.final and command.reportprogress:
            change.events.append(self._ctx.journal.event_of(record, command, accepted(record)))
        return _Arrival(delivery, change, command, record)

    async def _fence(self, command: Command[Any], change: Change) -> None:
        """Refuse what is not for us, too late or out of date; note a newer generation."""
        if command.host is not None and command.host not in (self._ctx.host, routing.BROADCAST):
            raise InvalidArgument(
                f"the command is for host {command.host}, this is {self._ctx.host}", code="wrong_host"
            )
        if command.is_expired(now()):
            raise Expired("the command's expirytime had passed when it arrived; send it again if it is still wanted")
        instance = self._ctx.instances.find(command.subject) if command.subject else None
        if command.generation is None or instance is None:
            return
        if command.generation < instance.generation:
            raise StaleGeneration(
                f"the command has generation {command.generation}, the instance is at {instance.generation}:"
                " read its state before commanding it again",
                generation=instance.generation,
            )
        # A repeat, or another command under a known id, is not accepted and must not make others stale.
        if command.generation > instance.generation and not await self._is_known(command.id):
            change.instances.append(self._ctx.instances.update(instance.id, generation=command.generation))

    async def _refuse(self, delivery: Delivery, exc: Refused) -> _Arrival:
        """Answer what is no command, and keep its bytes where people can look at them."""
        log.warning("dispatch.refused", code=exc.code, error=exc.message, key=delivery.routing_key, id=exc.command_id)
        metrics.DEAD_LETTERS.labels(exc.code).inc()
        burial = self._bury(delivery, exc)
        rejected = OperationRejected(
            operation_id=exc.command_id or _short(delivery.message_id) or "",
            verb="unknown",
            instance_id=exc.subject,
            error=problem_of(exc),
        )
        reply_to = _reply_to(delivery)
        event = self._ctx.journal.event(
            rejected, subject=exc.subject, reply_to=reply_to, correlation_id=_short(delivery.correlation_id)
        )
        if exc.command_id is not None and await self._is_known(exc.command_id):
            # The id's one final event belongs to the command that came first: only the sender is told.
            return _Arrival(delivery, Change(), burial=burial, reply=(reply_to, event.body) if reply_to else None)
        return _Arrival(delivery, Change(events=[event]), burial=burial)

    def _bury(self, delivery: Delivery, exc: ComputeError) -> asyncio.Future[None]:
        """Copy a message to the dead-letter exchange with the reason."""
        copy = Outgoing(
            exchange=routing.DEAD_EXCHANGE,
            routing_key=delivery.routing_key,
            body=delivery.body,
            message_id=_short(delivery.message_id) or "",
            correlation_id=_short(delivery.correlation_id),
            headers={
                "compute-host": self._ctx.host,
                "compute-code": exc.code,
                "compute-reason": exc.message[:1000],
                "compute-exchange": delivery.exchange,
            },
        )
        return self._bus.publish_soon(copy, timeout_s=5.0)

    # --- after the commit -------------------------------------------------------------------------------------

    def _committed(self, arrival: _Arrival, committed: Committed) -> None:
        if arrival.record is not None:
            failpoint(f"{arrival.record.verb}:accept:after")
        if arrival.record is None or arrival.command is None:
            self._buried(arrival)
            return
        if committed.known is not None:
            if self._duplicate(arrival, arrival.record, committed.known):
                arrival.delivery.ack()
            return
        arrival.delivery.ack()
        if arrival.record.final:
            record = arrival.record
            metrics.COMMANDS.labels(record.verb, record.state).inc()
            log.info(
                "message.done",
                verb=record.verb,
                operation=record.id,
                instance=record.instance_id,
                outcome=record.state,
                code=record.error_code,
            )
        else:
            self._runner.submit(arrival.record, arrival.command)

    def _buried(self, arrival: _Arrival) -> None:
        failed = None if arrival.burial is None or arrival.burial.cancelled() else arrival.burial.exception()
        if failed is not None:
            log.warning("dispatch.dead_letter_failed", error=str(failed))
            arrival.delivery.reject(requeue=False)  # the broker keeps it then, if without the reason
        else:
            arrival.delivery.ack()
        if arrival.reply is not None:
            address, body = arrival.reply
            self._reply(address, body, _short(arrival.delivery.correlation_id))

    def _duplicate(self, arrival: _Arrival, record: OperationRecord, known: OperationRecord) -> bool:
        """Answer a command that came before: the recorded answer, the one still to come, or a conflict.

        False: its result is being committed just now. Ask again with the next batch.
        """
        if not _same_command(known.body, record.body):
            self._conflict(arrival, record)
            return True
        running = self._runner.find(record.id)
        if running is not None and running.record.final:
            self._again.append(arrival.delivery)
            return False
        metrics.DUPLICATES.inc()
        if running is not None:
            others = running.more_replies
            if (
                record.reply_to
                and record.reply_to not in (running.record.reply_to, *others)
                and len(others) < MAX_REPLIES
            ):
                others.append(record.reply_to)
        elif known.final_body is not None and known.final_sequence is not None and record.reply_to:
            body = seal(known.final_body, known.final_sequence, self._ctx.journal.epoch)
            self._reply(record.reply_to, body, record.correlation_id)
        return True

    def _conflict(self, arrival: _Arrival, record: OperationRecord) -> None:
        """Tell only the sender: the id's one final event belongs to the command that came first."""
        error = Conflict(
            f"a different command with the id {record.id} was accepted before; give every command its own id"
        )
        log.warning("dispatch.conflict", operation=record.id, verb=record.verb)
        metrics.DEAD_LETTERS.labels(error.code).inc()
        if record.reply_to:
            rejected = OperationRejected(
                operation_id=record.id, verb=record.verb, instance_id=record.instance_id, error=problem_of(error)
            )
            event = self._ctx.journal.event(rejected, subject=record.instance_id)
            self._reply(record.reply_to, event.body, record.correlation_id)
        copy = Outgoing(
            exchange=routing.DEAD_EXCHANGE,
            routing_key=arrival.delivery.routing_key,
            body=record.body,
            message_id=f"conflict-{record.id}",
            headers={"compute-host": self._ctx.host, "compute-code": error.code, "compute-reason": error.message},
        )
        self._bus.publish_soon(copy).add_done_callback(_log_failed_reply)

    def _reply(self, reply_to: str, body: bytes, correlation_id: str | None) -> None:
        message = Outgoing(
            exchange=routing.EVENTS_EXCHANGE,
            routing_key=reply_to,
            body=body,
            message_id=f"reply-{uuid.uuid4()}",
            correlation_id=correlation_id,
        )
        # Unsent is harmless: whoever still waits sends the command again.
        self._bus.publish_soon(message).add_done_callback(_log_failed_reply)


def _log_failed_reply(future: asyncio.Future[None]) -> None:
    if not future.cancelled() and (error := future.exception()) is not None:
        log.info("dispatch.reply_failed", error=str(error))


def _reply_to(delivery: Delivery) -> str | None:
    """Where the answer goes. Any other address than the contract's is ignored: an answer travels on the events
    exchange, and one that the broker refuses there would hold up all that follow.
    """
    if delivery.reply_to and _REPLY_TO.fullmatch(delivery.reply_to):
        return delivery.reply_to
    return None


def _short(text: str | None) -> str | None:
    """A text that can be stored and sent as an AMQP short string; any other is dropped."""
    if text is None:
        return None
    try:
        return text if len(text.encode()) <= 255 else None
    except UnicodeEncodeError:
        return None


def _same_command(one: bytes, other: bytes) -> bool:
    """Whether two bodies ask for the same: `time`, `traceparent` and the like may differ between sendings."""
    if one == other:
        return True
    try:
        a, b = parse_command(one), parse_command(other)
    except Refused:
        return False  # another version accepted the first; this one cannot read it
    return (a.type, a.subject, a.generation, a.data) == (b.type, b.subject, b.generation, b.data)
