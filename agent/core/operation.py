"""A durable operation: steps that are journaled before and after, undone in reverse on failure, resumed after a
crash.

A handler is a coroutine over `op.step(name, do, undo=...)`. A step's `do` looks before it acts, because after a
crash it runs again. That a step is done is written together with the beginning of the next one (or with the final
result), so a step costs one commit. After a crash the handler runs from its beginning; steps that were done give
their recorded output without running.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, TypeVar

import structlog
from pydantic_core import from_json, to_json

from agent.core.context import Context
from agent.core.failpoints import failpoint
from agent.core.progress import ProgressReports
from agent.drivers.base import CallContext
from agent.drivers.executor import PoolName
from agent.errors import (
    Cancelled,
    ComputeError,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    NotFound,
    Unavailable,
)
from agent.messages.commands import Command
from agent.messages.events import EventData, PowerState
from agent.store.base import Change, InstanceRecord, OperationRecord, StepRecord

T = TypeVar("T")
log = structlog.get_logger("operation")

Json = dict[str, Any] | None
Do = Callable[[], Awaitable[Json]]
Undo = Callable[[], Awaitable[None]]

UNDO_ATTEMPTS = 4
UNDO_PAUSE_S = 0.2
CALL_ATTEMPTS = 3
CALL_PAUSE_S = 0.2
AWAY = frozenset({"unavailable", "hypervisor_unreachable"})
"""Codes by which a driver says that the hypervisor is away: worth waiting for its return."""


class RollBack(Exception):
    """Raised into a handler whose operation is being rolled back after a crash, once its past is replayed."""


class Operation:
    """One run of one operation: what a handler works with."""

    def __init__(self, ctx: Context, record: OperationRecord, command: Command[Any], past: list[StepRecord]) -> None:
        self.ctx = ctx
        self.record = record
        self.command = command
        self._past = {step.index: step for step in past}
        self._undos: list[tuple[StepRecord, Undo]] = []
        self._unwritten: StepRecord | None = None
        self._rolling_back = False
        self._index = 0
        self._finished: StepRecord | None = None
        self._staged = Change()
        self._returned = False
        self._cancellable: asyncio.Task[Json] | None = None
        self._past_return = False
        self._lasting = False
        self._cancel_asked = asyncio.Event()
        self._reports = ProgressReports(ctx.journal, record, command)
        self._long_calls: list[CallContext] = []
        self.waits = False
        """Whether it waits for a guest or an image: for hours, if the command says so, and with a limit of its own."""

    # --- for handlers -----------------------------------------------------------------------------------------

    @property
    def id(self) -> str:
        """The command's id."""
        return self.record.id

    @property
    def instance_id(self) -> str:
        """The instance this is about. Only for verbs that have one."""
        if self.record.instance_id is None:
            raise Internal(f"{self.record.verb} has no instance")
        return self.record.instance_id

    @property
    def begun(self) -> bool:
        """Whether any step was ever started."""
        return self._index > 0 or bool(self._past)

    def done_before(self, name: str) -> bool:
        """Whether a step was started by a former run: what it checks has been checked then."""
        return any(step.name == name for step in self._past.values())

    async def step(
        self, name: str, do: Do, *, undo: Undo | None = None, cancellable: bool = False, harmless: bool = False
    ) -> Json:
        """Run one step durably and return its output, a JSON object or None.

        `undo` takes back what `do` did, wholly or in part; it must succeed where there is nothing to take back.
        `cancellable`: a cancel need not wait for the end of this step. `harmless`: it needs no undo, because it leaves
        nothing that is the instance's.
        """
        index, self._index = self._index, self._index + 1
        past = self._past.get(index)
        if past is not None and past.name != name:
            raise Internal(
                f"step {index} of {self.record.verb} is {name} now and was {past.name} when it was journaled"
            )
        begun = past or StepRecord(self.id, index, name, "started")
        if undo is not None and begun.state != "undone":
            self._undos.append((begun, undo))
        if past is None and self.record.state != "undoing":
            self._unwritten = begun
        self._lasting |= undo is None and not harmless
        if self.record.state == "undoing" and index + 1 not in self._past:
            raise RollBack  # the past ends here, also where this step was done: what comes after is not to be run
        if past is not None and past.state in ("done", "undone"):
            return from_json(past.output) if past.output is not None else None
        if self.record.state == "undoing":
            raise RollBack
        self._check_cancelled()
        if past is None or self._staged.operation is not None:
            # Also where the step was begun before: that this attempt began must be known if it kills the agent.
            await self._commit(Change(steps=[begun]))
        self._unwritten = None
        self._reports.enter(name)
        failpoint(f"{self.record.verb}:{name}:before")
        output = await self._do(do, cancellable=cancellable)
        failpoint(f"{self.record.verb}:{name}:after")
        self._finished = replace(begun, state="done", output=None if output is None else to_json(output))
        return output

    def point_of_no_return(self) -> None:
        """From here on the operation is finished, not taken back: neither failure nor cancel undoes anything.

        Raises `Cancelled` where a cancel was promised before, unless a former run has gone on from here.
        """
        if not self._past_return and self._index not in self._past:
            self._check_cancelled()
        self._past_return = True
        self._undos.clear()

    @property
    def lasting(self) -> bool:
        """Whether something was begun that undoing does not take back."""
        return self._past_return or self._lasting

    @property
    def can_be_cancelled(self) -> bool:
        """Whether a cancel would still take effect."""
        return not self._past_return and not self._returned

    def mark_returned(self) -> None:
        """The handler has succeeded: a cancel comes too late from now on."""
        self._returned = True

    def mark_started(self) -> None:
        """Record the beginning of this run with its first commit."""
        self._staged.operation = replace(self.record)

    def stage(
        self,
        *,
        instance: InstanceRecord | None = None,
        event: EventData | None = None,
        removed: str | None = None,
        settings: dict[str, str] | None = None,
    ) -> None:
        """Add to the next commit: with the next step's beginning, or with the final result."""
        if settings is not None:
            self._staged.settings.update(settings)
        if instance is not None:
            self._staged.instances.append(instance)
        if removed is not None:
            self._staged.removed_instances.append(removed)
        if event is not None:
            self._staged.events.append(
                self.ctx.journal.event(event, subject=self.record.instance_id, traceparent=self.command.traceparent)
            )

    async def query(self, call: Callable[..., T], *args: Any, deadline_s: float | None = None) -> T:
        """Call the driver to read. Raises what the driver raises, and `DeadlineExceeded`; its limit is that of reads
        unless another is given.
        """
        limit_s = self.ctx.deadlines.query_s if deadline_s is None else deadline_s
        return await self._retried(lambda: self.ctx.executor.call("query", call, *args, deadline_s=limit_s))

    async def mutate(self, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call the driver to change this instance. After `DeadlineExceeded` the lane waits for the thread."""
        return await self._keyed("mutate", call, args, kwargs, self.ctx.deadlines.mutate_s)

    async def long(self, call: Callable[..., T], *args: Any) -> T:
        """Call the driver for long work; the last argument it gets is a `CallContext`."""
        loop = asyncio.get_running_loop()

        def progress(percent: float) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, the thread was left behind
                loop.call_soon_threadsafe(self.progress, percent)

        context = CallContext(progress=progress, cancelled=self._may_stop)
        self._long_calls.append(context)
        try:
            return await self._keyed("long", call, (*args, context), {}, self.ctx.deadlines.long_s)
        finally:
            self._long_calls.remove(context)

    async def _keyed(
        self, pool: PoolName, call: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any], deadline_s: float
    ) -> T:
        def run() -> T:
            return call(*args, **kwargs)

        run.__name__ = getattr(call, "__name__", "call")
        key = self.record.instance_id
        return await self._retried(lambda: self.ctx.executor.call(pool, run, deadline_s=deadline_s, key=key))

    async def _retried(self, call: Callable[[], Awaitable[T]]) -> T:
        """Call the driver, and again when the hypervisor went away and came back: driver calls are idempotent."""
        for attempt in range(1, CALL_ATTEMPTS + 1):
            try:
                return await call()
            except Unavailable as exc:
                if attempt == CALL_ATTEMPTS or exc.code not in AWAY:
                    raise
                log.info("operation.call_retried", operation=self.id, attempt=attempt, code=exc.code)
                # A call may notice the loss some time before it is announced: do not spend all attempts until then.
                await asyncio.sleep(CALL_PAUSE_S * 2**attempt * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
                await self.ctx.state.wait_connected(self.ctx.deadlines.reconnect_s)
        raise Internal("unreachable")

    def _may_stop(self) -> bool:
        """Whether a long call may end early: not where it takes back, or finishes, what was begun."""
        return self.record.cancel_requested and not self._past_return and not self._rolling_back

    async def unless_cancelled(self, waited_for: asyncio.Future[T]) -> T:
        """Wait for a future, but no longer than until the operation is cancelled. Raises `Cancelled`."""
        asked = asyncio.ensure_future(self._cancel_asked.wait())
        both: set[asyncio.Future[Any]] = {asked, waited_for}
        self.waits = True
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.waits = False
            asked.cancel()
        self._check_cancelled()
        return waited_for.result()

    async def wait_observed(self, wanted: frozenset[PowerState], timeout_s: float) -> PowerState:
        """Wait for one of these power states. Raises `DeadlineExceeded`, `Cancelled`."""
        waiting = asyncio.ensure_future(self.ctx.instances.wait_observed(self.instance_id, wanted, timeout_s))
        try:
            return await self.unless_cancelled(waiting)
        finally:
            waiting.cancel()

    def progress(
        self, percent: float | None = None, *, done_bytes: int | None = None, total_bytes: int | None = None
    ) -> None:
        """Report how far the current step is; sent at most twice a second, and only where someone wants to know."""
        self._reports.advance(percent, done_bytes=done_bytes, total_bytes=total_bytes)

    # --- for the runner ---------------------------------------------------------------------------------------

    def speak_up(self) -> None:
        """Send progress from now on: the work outlasts what a controller waits in silence."""
        self._reports.speak_up()

    def cancel(self) -> None:
        """Ask the operation to end: at once if its step allows it, else before its next step."""
        self.record.cancel_requested = True
        self._cancel_asked.set()
        for context in self._long_calls:
            context.wake()
        if self._cancellable is not None and not self._past_return:
            self._cancellable.cancel()

    async def roll_back(self) -> bool:
        """Undo what was done, in reverse. True if all of it was.

        Ends at the first undo that does not succeed, and leaves it and all below it for a later try: no disk is removed
        from under a domain that could not be ended, and the claim outlives what it claims.
        """
        if not self._undos:
            return True
        self._rolling_back = True
        if self.record.state != "undoing":
            self.record.state = "undoing"
            # Also a step that a cancel kept from beginning: what its handler did before it is undone by it, if need be
            # by a later run, which finds it only here.
            unwritten = [step for step, _ in self._undos if step is self._unwritten]
            await self._commit(Change(operation=replace(self.record), steps=unwritten))
        for step, undo in reversed(self._undos):
            failpoint(f"{self.record.verb}:{step.name}:undo")
            if not await self._undo(step, undo):
                return False
            self._staged.steps.append(replace(step, state="undone"))
        return True

    def take_staged(self) -> Change:
        """What is to go into the final commit."""
        self._returned = True
        change, self._staged = self._staged, Change()
        # An event may have changed an instance since it was staged: what is committed is what is true now.
        staged = {record.id for record in change.instances}
        change.instances = [record for record in map(self.ctx.instances.find, staged) if record is not None]
        if self._finished is not None and not any(step.index == self._finished.index for step in change.steps):
            change.steps.append(self._finished)
        return change

    async def hush(self) -> None:
        """Send no more progress, and wait for the last report: none may come after the final event."""
        await self._reports.end()

    # --- inside -----------------------------------------------------------------------------------------------

    async def _do(self, do: Do, *, cancellable: bool) -> Json:
        if not cancellable:
            return await do()
        self._cancellable = asyncio.ensure_future(do())
        self.waits = True
        try:
            return await self._cancellable
        except asyncio.CancelledError:
            if not self.record.cancel_requested:
                self._cancellable.cancel()
                raise
            raise Cancelled("the operation was cancelled") from None
        finally:
            self.waits = False
            self._cancellable = None

    def _check_cancelled(self) -> None:
        if self.record.cancel_requested and not self._past_return:
            raise Cancelled("the operation was cancelled")

    async def _undo(self, step: StepRecord, undo: Undo) -> bool:
        for attempt in range(1, UNDO_ATTEMPTS + 1):
            try:
                if attempt == 1 and not await self._settled():
                    return False
                await undo()
                return True
            except NotFound:
                return True  # positive proof that there is nothing to take back
            except ComputeError as exc:
                log.warning("operation.undo_failed", operation=self.id, step=step.name, attempt=attempt, code=exc.code)
                if isinstance(exc, DeadlineExceeded):
                    return False
            except Exception:
                log.exception("operation.undo_failed", operation=self.id, step=step.name, attempt=attempt)
            if attempt < UNDO_ATTEMPTS:
                await asyncio.sleep(UNDO_PAUSE_S * 2**attempt * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
        return False

    async def _settled(self) -> bool:
        """Wait, with a limit, until no late driver call can still act on the instance."""
        if self.record.instance_id is None:
            return True
        return await self.ctx.executor.wait_settled(self.record.instance_id, self.ctx.deadlines.settle_s)

    async def _commit(self, change: Change) -> None:
        staged = self.take_staged()
        self._returned = False
        self._finished = None
        change.operation = change.operation or staged.operation
        change.steps = staged.steps + change.steps
        change.instances = staged.instances
        change.removed_instances = staged.removed_instances
        change.events = staged.events
        change.settings = staged.settings
        await self.ctx.journal.commit(change)


def require(condition: bool, sentence: str, code: str | None = None) -> None:
    """Raise `FailedPrecondition` with this sentence unless the condition holds."""
    if not condition:
        raise FailedPrecondition(sentence, code=code)
