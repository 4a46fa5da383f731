"""From a delivery to a journaled, acknowledged operation in its lane. Deliveries are taken in order, in batches:
whatever arrived while the last batch was being committed is the next one, so commits grow with the load.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import structlog

from agent import metrics
from agent.bus.base import Bus, Delivery, Outgoing
from agent.core.context import Context, now
from agent.core.failpoints import failpoint
from agent.core.outcome import final_event, problem_of, state_of
from agent.core.registry import Registry
from agent.core.runner import Runner
from agent.errors import ComputeError, Conflict, Expired, InvalidArgument, StaleGeneration
from agent.messages import routing
from agent.messages.commands import Command, Refused, parse_command
from agent.messages.events import OperationRejected, seal
from agent.store.base import Change, Committed, OperationRecord, PendingEvent

log = structlog.get_logger("dispatch")
BATCH_LIMIT = 256
_REPLY_TO = re.compile(r"^[!-~]{1,255}$")


@dataclass(slots=True)
class _Arrival:
    """One delivery on its way into the journal. `record` is final already where nothing remains to be run."""

    delivery: Delivery
    change: Change
    command: Command[Any] | None = None
    record: OperationRecord | None = None


class Dispatcher:
    """Takes deliveries from the bus. `on_delivery` is the bus's callback; `run` is the one task that works them."""

    def __init__(self, ctx: Context, bus: Bus, registry: Registry, runner: Runner) -> None:
        self._ctx = ctx
        self._bus = bus
        self._registry = registry
        self._runner = runner
        self._arrived: deque[Delivery] = deque()
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
                arrivals = [await self._read(self._arrived.popleft()) for _ in range(count)]
                done = await self._ctx.journal.commit(*(arrival.change for arrival in arrivals))
                for arrival, committed in zip(arrivals, done, strict=True):
                    self._committed(arrival, committed)

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
            correlation_id=delivery.correlation_id,
            state="accepted",
            accepted_at=now(),
        )
        change = Change()
        try:
            self._fence(command, change)
            route = self._registry[command.verb]
            if route.inline is not None:
                result = route.inline(self._ctx, command)
                record.state = "succeeded"
                self._end(record, command, change, None, result.model_dump(mode="json") if result is not None else {})
        except ComputeError as exc:
            change = Change()
            record.state = state_of(exc, begun=False)
            record.error_code = exc.code
            self._end(record, command, change, exc, {})
        except Exception as exc:  # a defect in an inline handler must not stop the intake
            log.exception("dispatch.unexpected_error", verb=command.verb, operation=command.id)
            change = Change()
            record.state = "failed"
            self._end(record, command, change, exc, {})
        change.claim = replace(record)
        if not record.final and command.reportprogress:
            change.events.append(self._event(record, command, self._runner.accepted(record)))
        return _Arrival(delivery, change, command, record)

    def _fence(self, command: Command[Any], change: Change) -> None:
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
        if command.generation > instance.generation:
            change.instances.append(self._ctx.instances.update(instance.id, generation=command.generation))

    def _end(
        self,
        record: OperationRecord,
        command: Command[Any],
        change: Change,
        error: BaseException | None,
        result: dict[str, Any],
    ) -> None:
        at = record.finished_at = now()
        pending = self._event(record, command, final_event(record, error, result, at=at))
        record.final_body = pending.body
        change.events.append(pending)
        change.final_of = record.id

    def _event(self, record: OperationRecord, command: Command[Any], data: Any) -> PendingEvent:
        return self._ctx.journal.event(
            data,
            subject=record.instance_id,
            traceparent=command.traceparent,
            reply_to=record.reply_to,
            correlation_id=record.correlation_id,
        )

    async def _refuse(self, delivery: Delivery, exc: Refused) -> _Arrival:
        """Answer what is no command, and keep its bytes where people can look at them."""
        log.warning("dispatch.refused", code=exc.code, error=exc.message, key=delivery.routing_key, id=exc.command_id)
        metrics.DEAD_LETTERS.labels(exc.code).inc()
        await self._bury(delivery, exc)
        rejected = OperationRejected(
            operation_id=exc.command_id or delivery.message_id or "",
            verb="unknown",
            instance_id=exc.subject,
            error=problem_of(exc),
        )
        event = self._ctx.journal.event(
            rejected, subject=exc.subject, reply_to=_reply_to(delivery), correlation_id=delivery.correlation_id
        )
        return _Arrival(delivery, Change(events=[event]))

    async def _bury(self, delivery: Delivery, exc: ComputeError) -> None:
        """Copy a message to the dead-letter exchange with the reason. Without a broker it comes again anyway."""
        copy = Outgoing(
            exchange=routing.DEAD_EXCHANGE,
            routing_key=delivery.routing_key,
            body=delivery.body,
            message_id=delivery.message_id or "",
            correlation_id=delivery.correlation_id,
            headers={
                "compute-host": self._ctx.host,
                "compute-code": exc.code,
                "compute-reason": exc.message[:1000],
                "compute-exchange": delivery.exchange,
            },
        )
        try:
            await self._bus.publish(copy, timeout_s=5.0)
        except ComputeError as failed:
            log.warning("dispatch.dead_letter_failed", code=failed.code, error=failed.message)

    # --- after the commit -------------------------------------------------------------------------------------

    def _committed(self, arrival: _Arrival, committed: Committed) -> None:
        if arrival.record is not None:
            failpoint(f"{arrival.record.verb}:accept:after")
        arrival.delivery.ack()
        if arrival.record is None or arrival.command is None:
            return
        if committed.known is not None:
            self._duplicate(arrival, arrival.record, committed.known)
        elif arrival.record.final:
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

    def _duplicate(self, arrival: _Arrival, record: OperationRecord, known: OperationRecord) -> None:
        """Answer a command that came before: the recorded answer, the one still to come, or a conflict."""
        metrics.DUPLICATES.inc()
        if not _same_command(known.body, record.body):
            self._conflict(arrival, record)
            return
        running = self._runner.find(record.id)
        if running is not None:
            if record.reply_to and record.reply_to != running.record.reply_to:
                running.more_replies.append(record.reply_to)
        elif known.final_body is not None and known.final_sequence is not None and record.reply_to:
            body = seal(known.final_body, known.final_sequence, self._ctx.journal.epoch)
            self._reply(record, body)

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
            self._reply(record, self._ctx.journal.event(rejected, subject=record.instance_id).body)
        copy = Outgoing(
            exchange=routing.DEAD_EXCHANGE,
            routing_key=arrival.delivery.routing_key,
            body=record.body,
            message_id=f"conflict-{record.id}",
            headers={"compute-host": self._ctx.host, "compute-code": error.code, "compute-reason": error.message},
        )
        self._bus.publish_soon(copy).add_done_callback(_log_failed_reply)

    def _reply(self, record: OperationRecord, body: bytes) -> None:
        message = Outgoing(
            exchange=routing.EVENTS_EXCHANGE,
            routing_key=record.reply_to or "",
            body=body,
            message_id=f"reply-{record.id}",
            correlation_id=record.correlation_id,
        )
        # Unsent is harmless: whoever still waits sends the command again.
        self._bus.publish_soon(message).add_done_callback(_log_failed_reply)


def _log_failed_reply(future: asyncio.Future[None]) -> None:
    if not future.cancelled() and (error := future.exception()) is not None:
        log.info("dispatch.reply_failed", error=str(error))


def _reply_to(delivery: Delivery) -> str | None:
    """Where the answer goes; an address that no queue can have is ignored."""
    if delivery.reply_to and _REPLY_TO.match(delivery.reply_to):
        return delivery.reply_to
    return None


def _same_command(one: bytes, other: bytes) -> bool:
    """Whether two bodies ask for the same: `time`, `traceparent` and the like may differ between sendings."""
    if one == other:
        return True
    a, b = parse_command(one), parse_command(other)
    return (a.type, a.subject, a.generation, a.data) == (b.type, b.subject, b.generation, b.data)
