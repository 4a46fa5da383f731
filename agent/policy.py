"""What the agent does of its own accord, as each instance's policy says: when its guest ends by itself, crashes or is
paused by a full disk, and when the host has booted.

What is known of an instance is looked at whenever it changes, never by the clock. Where the policy asks for something,
one task pursues it: it waits until no operation has the instance in hand, and for the back-off, looks again, and gives
the command. The cause is gone as soon as a controller stops or deletes the instance, or the hypervisor cannot be asked;
then nothing is done. What is wanted follows from the records alone, so a restarted agent takes it up again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import structlog

from agent.core.context import Context
from agent.core.issue import issue
from agent.core.reconcile import reconcile
from agent.core.runner import Runner
from agent.core.waiting import happens
from agent.errors import ComputeError
from agent.messages.commands import InstanceResume, InstanceStart
from agent.messages.events import InstancePolicy
from agent.messages.verb import CommandData
from agent.store.base import Change, InstanceRecord

log = structlog.get_logger("policy")

Cause = Literal["on-stop", "on-crash", "on-io-error", "on-host-boot"]

BOOT_KEY = "host.boot_id"
"""The journal's setting that tells which boot of the host the policies have seen to."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
BOOT_ATTEMPTS = 5
"""How often an instance is tried to be started after a host boot: what it needs may come up late."""
PLENTY_MIB = 64
"""With so much room a guest runs on, however much there was when it was paused."""
_CRASHED = frozenset({"crashed", "failed", "panicked", "daemon"})
"""Reasons of a stop that the guest did not want. `daemon`: its QEMU had died when the hypervisor came back."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast the agent acts, in seconds.

    The first action comes at once, the next after `first_s`, then twice as long each time up to `longest_s`; a guest
    that went on for `stable_s` begins anew. Free space is looked at every `look_s` while a guest waits for it; where it
    does not tell enough, the guest is tried every `anyway_s`.
    """

    first_s: float = 1.0
    longest_s: float = 300.0
    stable_s: float = 120.0
    look_s: float = 1.0
    anyway_s: float = 60.0

    def delay_s(self, attempts: int) -> float:
        """The least time between the last of so many actions and the next one."""
        return min(self.longest_s, self.first_s * 2.0 ** min(attempts - 1, 30)) if attempts else 0.0


@dataclass(slots=True)
class _Past:
    """What was done about one instance, and what was seen since. Times are the loop's."""

    attempts: int = 0
    last: float = float("-inf")
    armed: float = 0.0
    least_mib: int | None = None
    enough: bool = False


class Policies:
    """Watches every instance from `begin` to `end`."""

    def __init__(self, ctx: Context, runner: Runner, *, pace: Pace | None = None) -> None:
        self._ctx = ctx
        self._runner = runner
        self._pace = pace or Pace()
        self._boot_id: str | None = None
        self._begun = False
        self._booted = False
        self._booting: dict[str, int] = {}
        self._pursuits: dict[str, asyncio.Event] = {}
        self._past: dict[str, _Past] = {}
        self._thirsty: set[str] = set()
        self._watcher: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        ctx.instances.changed = self.notice
        runner.idle = self.notice

    # --- life -------------------------------------------------------------------------------------------------

    async def begin(self, kept_boot_id: str | None) -> None:
        """Look at every instance, and from now on at every change. `kept_boot_id` is what the journal has."""
        self._boot_id = await asyncio.to_thread(_read, BOOT_ID)
        self._begun = True
        if self._boot_id is not None and kept_boot_id is None:
            await self._seen_to()
        self._booted = self._boot_id is not None and kept_boot_id not in (None, self._boot_id)
        for record in self._ctx.instances.all():
            self.notice(record.id)
        self.connected()

    def connected(self) -> None:
        """The hypervisor can be asked, and everything was read again."""
        if self._begun and self._booted and self._ctx.state.connected.is_set():
            self._booted = False
            self._own(self._host_booted(), "policy host-boot")

    async def end(self) -> None:
        """Do nothing more. What is wanted still is taken up by the next `begin`."""
        self._begun = False
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def notice(self, instance_id: str) -> None:
        """Something about this instance changed, or an operation has let go of it."""
        if not self._begun:
            return
        pursuit = self._pursuits.get(instance_id)
        if pursuit is not None:
            pursuit.set()
        elif self._ctx.instances.find(instance_id) is None:
            self._past.pop(instance_id, None)
        elif self._cause(instance_id) is not None:
            self._pursuits[instance_id] = asyncio.Event()
            self._own(self._pursue(instance_id), f"policy {instance_id}")

    # --- what is wanted ---------------------------------------------------------------------------------------

    def _cause(self, instance_id: str) -> Cause | None:
        """Why something is to be done about an instance, from what is known of it now."""
        record = self._ctx.instances.find(instance_id)
        if record is None or not self._ctx.state.connected.is_set() or record.observed == "unknown":
            return None
        if record.desired == "deleted" or record.life.shelf is not None or record.life.soft_delete is not None:
            return None
        if self._wanted_at_boot(record):
            return "on-host-boot"
        if record.desired != "running":
            return None
        policy = record.spec.policy
        if record.observed == "paused":
            wanted = record.reason == "io-error" and policy.on_io_error == "pause-and-retry"
            return "on-io-error" if wanted else None
        if record.observed == "crashed" or (record.observed == "stopped" and record.reason in _CRASHED):
            return "on-crash" if policy.on_crash == "restart" else None
        if record.observed == "stopped" and record.reason == "shutdown":
            return "on-stop" if policy.on_stop == "restart" else None
        return None

    def _wanted_at_boot(self, record: InstanceRecord) -> bool:
        attempts = self._booting.get(record.id)
        if attempts is None or attempts >= BOOT_ATTEMPTS or record.reason == "missing":
            return False
        # One that was tried once is in a controller's hands if it is not wanted running any more.
        wanted = record.desired == "running" or (record.spec.policy.on_host_boot == "start" and attempts == 0)
        down = record.observed in ("stopped", "crashed", "suspended")
        return wanted and down and record.spec.policy.on_host_boot != "stay-stopped"

    # --- doing it ---------------------------------------------------------------------------------------------

    async def _pursue(self, instance_id: str) -> None:
        """Act for as long as there is a cause."""
        changed = self._pursuits[instance_id]
        past = self._past.setdefault(instance_id, _Past())
        clock = asyncio.get_running_loop().time
        if clock() - past.last >= self._pace.stable_s:
            past.attempts = 0
        past.armed, past.least_mib, past.enough = clock(), None, False
        told = 0
        try:
            while (cause := self._cause(instance_id)) is not None:
                changed.clear()
                due_in_s = past.last + self._pace.delay_s(past.attempts) - clock()
                if instance_id in self._runner.open.busy_instances():
                    await changed.wait()  # no limit: whoever has it in hand lets go of it or changes it
                elif told <= past.attempts:
                    told = past.attempts + 1
                    await self._tell(instance_id, cause, past, max(0.0, due_in_s))
                elif due_in_s > 0:
                    await happens(changed, due_in_s)
                elif cause == "on-io-error" and not past.enough:
                    self._watch_room(instance_id)
                    await changed.wait()  # no limit: the watcher gives up waiting after a while
                else:
                    await self._act(instance_id, cause, past, changed)
        finally:
            del self._pursuits[instance_id]
            self._thirsty.discard(instance_id)
            if self._ctx.instances.find(instance_id) is None:
                self._past.pop(instance_id, None)
            await self._boot_done(instance_id)

    async def _act(self, instance_id: str, cause: Cause, past: _Past, changed: asyncio.Event) -> None:
        """Give the command and wait for its end."""
        operation_id = self._operation_id(instance_id, cause, past)
        accepted = await issue(self._ctx, self._runner, _command(cause), instance_id=instance_id, id=operation_id)
        # Between the end of `issue` and here nothing else has run, so our command has not begun.
        overtaken = self._cause(instance_id) != cause or self._runner.open.acting_on(instance_id) != [operation_id]
        past.attempts += 1
        past.last = past.armed = asyncio.get_running_loop().time()
        past.least_mib, past.enough = None, False
        if cause == "on-host-boot":
            self._booting[instance_id] += 1
        if not accepted:
            return  # a former process gave it; what came of it is in the record
        if overtaken:
            # A controller's command was accepted while ours was being written: theirs is what counts.
            with suppress(ComputeError):
                await self._runner.cancel(operation_id)
        while self._runner.find(operation_id) is not None:
            changed.clear()
            await changed.wait()  # no limit: an operation always ends, and tells when

    def _operation_id(self, instance_id: str, cause: Cause, past: _Past) -> str:
        record = self._ctx.instances.get(instance_id)
        occasion = self._boot_id if cause == "on-host-boot" else str(int(record.updated_at.timestamp() * 1000))
        attempt = self._booting[instance_id] if cause == "on-host-boot" else past.attempts
        return f"policy/{instance_id}/{cause}/{occasion}/{attempt + 1}"

    async def _tell(self, instance_id: str, cause: Cause, past: _Past, delay_s: float) -> None:
        event = InstancePolicy(
            instance_id=instance_id,
            cause=cause,
            action="resume" if cause == "on-io-error" else "start",
            attempt=past.attempts + 1,
            delay_s=round(delay_s, 3),
            operation_id=self._operation_id(instance_id, cause, past),
        )
        log.info("policy.due", instance=instance_id, cause=cause, attempt=event.attempt, delay_s=event.delay_s)
        await self._ctx.journal.commit(Change(events=[self._ctx.journal.event(event, subject=instance_id)]))

    # --- full disks -------------------------------------------------------------------------------------------

    def _watch_room(self, instance_id: str) -> None:
        self._thirsty.add(instance_id)
        if self._watcher is None or self._watcher.done():
            self._watcher = self._own(self._look_for_room(), "policy room")

    async def _look_for_room(self) -> None:
        """Look at the free space, with one call for all guests that wait for it, until none does."""
        clock = asyncio.get_running_loop().time
        while self._thirsty:
            records = [record for one in self._thirsty if (record := self._ctx.instances.find(one)) is not None]
            # An adopted guest's disks are where they were: the room beside our own says nothing about them.
            specs = {record.id: record.spec for record in records if record.life.adopted is None}
            try:
                rooms = await self._ctx.executor.call(
                    "query", self._ctx.driver.room_mib, specs, deadline_s=self._ctx.deadlines.query_s
                )
            except ComputeError as exc:
                log.info("policy.room_unknown", code=exc.code)
                rooms = {}
            for instance_id in tuple(self._thirsty):
                past = self._past[instance_id]
                if self._is_enough(past, rooms.get(instance_id), clock()):
                    past.enough = True
                    self._thirsty.discard(instance_id)
                    self.notice(instance_id)
            await asyncio.sleep(self._pace.look_s)

    def _is_enough(self, past: _Past, room_mib: int | None, at: float) -> bool:
        if room_mib is not None:
            past.least_mib = room_mib if past.least_mib is None else min(past.least_mib, room_mib)
            if room_mib >= PLENTY_MIB or room_mib > past.least_mib:
                return True
        return room_mib != 0 and at - past.armed >= self._pace.anyway_s

    # --- host boot --------------------------------------------------------------------------------------------

    async def _host_booted(self) -> None:
        """Start what the policies want running, now that it is known what is there."""
        log.info("policy.host_booted", boot_id=self._boot_id)
        while not await reconcile(self._ctx, self._runner, resync=True):
            if not self._ctx.state.connected.is_set():
                self._booted = True
                return  # `connected` begins anew
            await asyncio.sleep(self._pace.first_s)
        self._booting = {record.id: 0 for record in self._ctx.instances.all()}
        for instance_id in tuple(self._booting):
            self.notice(instance_id)
            if instance_id not in self._pursuits:
                del self._booting[instance_id]
        if not self._booting:
            await self._seen_to()

    async def _boot_done(self, instance_id: str) -> None:
        lost = not self._begun or not self._ctx.state.connected.is_set()
        if self._booting.get(instance_id) is None or lost:
            return
        del self._booting[instance_id]
        if not self._booting:
            await self._seen_to()

    async def _seen_to(self) -> None:
        """Note that nothing is left to do about this boot: a mere restart of the agent starts nothing."""
        await self._ctx.journal.commit(Change(settings={BOOT_KEY: self._boot_id or ""}))

    # --- tasks ------------------------------------------------------------------------------------------------

    def _own(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("policy.failed", task=task.get_name(), exc_info=error)


def _command(cause: Cause) -> CommandData:
    return InstanceResume() if cause == "on-io-error" else InstanceStart()


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").strip() or None
    except (OSError, UnicodeDecodeError):
        return None
