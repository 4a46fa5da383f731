"""The whole agent under everything at once, driven by hypothesis, against the promises of the design.

Rules send commands (also twice, also nonsense), let the driver fail, guests crash, the hypervisor, the broker and the
disk go away, and the agent die at any commit. `quiesce` puts right what only the outside can, waits for every answer
and compares: one final event per command, order per instance, a whole sequence, and journal, memory and hypervisor of
one mind.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
import tempfile
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, rule
from support.world import HOST, World, new_id, spec, until

from agent.controller.envelope import render_command
from agent.core import operation
from agent.drivers.fake.settings import Fault
from agent.errors import ComputeError, Unavailable
from agent.messages import routing
from agent.messages.commands import (
    HostPing,
    InstanceCreate,
    InstanceDelete,
    InstancePause,
    InstanceReboot,
    InstanceResume,
    InstanceShow,
    InstanceStart,
    InstanceStop,
    OperationCancel,
    parse_command,
)
from agent.messages.verb import CommandData
from agent.store.base import InstanceRecord

POWER: dict[type[CommandData], str] = {
    InstanceStart: "running",
    InstanceStop: "stopped",
    InstancePause: "paused",
    InstanceResume: "running",
    InstanceReboot: "running",
    InstanceDelete: "gone",
}
VERBS: list[CommandData] = [
    InstanceStart(),
    InstanceStop(timeout_s=0.05),
    InstanceStop(force=True),
    InstancePause(),
    InstanceResume(),
    InstanceReboot(mode="hard"),
    InstanceReboot(timeout_s=0.05),
    InstanceDelete(),
    InstanceShow(),
]
CALLS = ["get", "create_storage", "define", "start", "destroy", "undefine", "delete_storage", "shutdown", "pause", "recover"]


@dataclass
class Sent:
    id: str
    data: CommandData
    instance_id: str | None
    body: bytes


class CoreMachine(RuleBasedStateMachine):
    """See the module."""

    operations = Bundle("operations")

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.folder = Path(tempfile.mkdtemp(prefix="core-machine-"))
        self.sent: list[Sent] = []
        self.instances: list[str] = []
        self.names = itertools.count()
        self.crashed_guests: set[str] = set()
        self.pauses = (operation.UNDO_PAUSE_S, operation.CALL_PAUSE_S)
        operation.UNDO_PAUSE_S = operation.CALL_PAUSE_S = 0.0

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(work)

    @initialize(store=st.sampled_from(["memory", "sqlite"]), ignores=st.booleans())
    def begin(self, store: str, ignores: bool) -> None:
        async def begin() -> None:
            driver: dict[str, Any] = {"guest_shutdown_s": None if ignores else 0.0, "cpus": 64}
            self.world = await World(self.folder, store=store, driver=driver).open()
            await self.world.start()

        self.do(begin())

    def teardown(self) -> None:
        try:
            if hasattr(self, "world"):
                self.quiesce()

                async def end() -> None:
                    await self.world.stop()
                    await self.world.close()

                self.do(end())
        finally:
            operation.UNDO_PAUSE_S, operation.CALL_PAUSE_S = self.pauses
            self.runner.close()
            shutil.rmtree(self.folder, ignore_errors=True)

    # --- commands ---------------------------------------------------------------------------------------------

    def _send(self, data: CommandData, instance_id: str | None) -> Sent:
        command_id = new_id()
        body = render_command(data, id=command_id, source="/machine", host=HOST, instance_id=instance_id)
        sent = Sent(command_id, data, instance_id, body)
        self.sent.append(sent)
        self._put(sent)
        return sent

    def _put(self, sent: Sent) -> None:
        async def put() -> None:
            self.world.put(sent.body, key=routing.command_key(sent.data.verb, HOST), message_id=sent.id)

        self.do(put())

    def _instance(self, number: int) -> str:
        return self.instances[number % len(self.instances)] if self.instances else new_id()

    @rule(target=operations, start=st.booleans(), again=st.booleans(), number=st.integers(0, 9))
    def create(self, start: bool, again: bool, number: int) -> Sent:
        """Make an instance; `again`: under an id that was used before."""
        instance_id = self._instance(number) if again else new_id()
        if instance_id not in self.instances:
            self.instances.append(instance_id)
        return self._send(InstanceCreate(spec=spec(f"m{next(self.names)}"), start=start), instance_id)

    @rule(target=operations, data=st.sampled_from(VERBS), number=st.integers(0, 9))
    def act(self, data: CommandData, number: int) -> Sent:
        return self._send(data, self._instance(number))

    @rule(target=operations, data=st.lists(st.sampled_from(VERBS[:-2]), min_size=2, max_size=4), number=st.integers(0, 9))
    def act_in_a_row(self, data: list[CommandData], number: int) -> Sent:
        instance_id = self._instance(number)
        return [self._send(one, instance_id) for one in data][-1]

    @rule(target=operations)
    def ping(self) -> Sent:
        return self._send(HostPing(), None)

    @rule(sent=operations)
    def repeat(self, sent: Sent) -> None:
        self._put(sent)

    @rule(sent=consumes(operations))
    def cancel(self, sent: Sent) -> None:
        self._send(OperationCancel(operation_id=sent.id), None)

    @rule(body=st.sampled_from([b"junk", b"{}", b'{"specversion":"1.0","id":"x","type":"y"}']))
    def nonsense(self, body: bytes) -> None:
        async def put() -> None:
            self.world.put(body)

        self.do(put())

    # --- the outside ------------------------------------------------------------------------------------------

    @rule(
        call=st.sampled_from(CALLS),
        error=st.sampled_from(["internal", "unavailable", "bug", "failed_precondition"]),
        after=st.booleans(),
        times=st.sampled_from([1, 1, 2, 20]),
    )
    def driver_fails(self, call: str, error: str, after: bool, times: int) -> None:
        self.world.driver.inject(Fault.model_validate(
            {"call": call, "error": error, "crash_after": after, "times": times}
        ))  # fmt: skip

    @rule()
    def driver_recovers(self) -> None:
        self.world.driver.clear_faults()

    @rule(number=st.integers(0, 9))
    def guest_crashes(self, number: int) -> None:
        instance_id = self._instance(number)
        self.crashed_guests.add(instance_id)
        try:
            self.world.driver.simulate_crash(instance_id)
        except ComputeError:
            return

    @rule(away=st.booleans())
    def hypervisor(self, away: bool) -> None:
        if away:
            self.world.driver.disconnect()
        else:
            self.world.driver.reconnect()

    @rule(how=st.sampled_from(["drop", "down", "up", "twice", "lost confirms", "mix"]))
    def broker(self, how: str) -> None:
        async def change() -> None:
            broker = self.world.broker
            match how:
                case "drop":
                    broker.drop_connections(self.world.bus.name)
                case "down":
                    broker.refusing = True
                    broker.drop_connections(self.world.bus.name)
                case "up":
                    broker.refuse(False)
                case "twice":
                    broker.duplicate_next(3)
                case "lost confirms":
                    broker.lose_confirms(2)
                case _:
                    broker.reorder(lambda out: parse_key(out.body))

        self.do(change())

    @rule(turns=st.integers(1, 50))
    def disk_is_full_for_a_while(self, turns: int) -> None:
        async def full() -> None:
            inner = self.world.cut.inner
            if not hasattr(inner, "fail_with"):
                return
            inner.fail_with = Unavailable("no space is left", code="journal_full")
            for _ in range(turns):
                await asyncio.sleep(0)
            inner.fail_with = None

        self.do(full())

    @rule(turns=st.integers(1, 200))
    def time_passes(self, turns: int) -> None:
        async def turn() -> None:
            for _ in range(turns):
                await asyncio.sleep(0)
            await self._mend()

        self.do(turn())

    # --- death ------------------------------------------------------------------------------------------------

    @rule(commits=st.integers(0, 6), applied=st.booleans())
    def doom(self, commits: int, applied: bool) -> None:
        """Let the agent die at a commit to come."""
        self.world.cut.after(commits, applied=applied)

    @rule()
    def die(self) -> None:
        async def die() -> None:
            await self.world.crash()
            await self.world.start(wait=False)

        self.do(die())

    async def _mend(self) -> None:
        if self.world.cut.happened.is_set():
            await self.world.crash()
            await self.world.start(wait=False)

    # --- looking ----------------------------------------------------------------------------------------------

    @rule()
    def quiesce(self) -> None:
        self.do(self._quiesce())

    async def _quiesce(self) -> None:
        world = self.world
        world.cut._left = None
        await self._mend()
        world.broker.reorder(None)
        world.broker.confirms_to_lose = 0
        world.broker.refuse(False)
        await world.ask(world.driver.clear_faults)
        await world.ask(world.driver.reconnect)
        open_ids = {sent.id for sent in self.sent}

        def answered() -> bool:
            state = world.agent.ctx.state
            if open_ids and state.ready and state.connected.is_set():
                open_ids.difference_update([one for one in open_ids if world.finals(one)])
            return not open_ids and state.ready and state.connected.is_set() and not world.cut.struck

        try:
            # The cut may strike yet, where it was on its way.
            while not answered():
                await until(lambda: answered() or world.cut.happened.is_set())
                await self._mend()
        except TimeoutError:
            raise AssertionError(f"no final event: {[s for s in self.sent if s.id in open_ids]}") from None
        await world.quiet()
        await world.agent._retry_undo()
        await world.quiet()
        # What a delete that failed left is the business of the next one.
        for record in world.agent.ctx.instances.all():
            if self._is_half_deleted(record):
                done = await world.do(InstanceDelete(), instance_id=record.id)
                assert done.kind == "operation.succeeded", done.data
                self.crashed_guests.add(record.id)
        await world.agent._events.connected("looked at")
        await world.quiet()
        self._check_answers()
        await self._check_state()

    def _is_half_deleted(self, record: InstanceRecord) -> bool:
        return record.desired == "deleted"

    def _check_answers(self) -> None:
        for sent in self.sent:
            finals = self.world.finals(sent.id)
            assert len(finals) == 1, (sent, [event.data for event in finals])
            assert self.world.of(sent.id)[-1] is finals[0], "something followed the final event"
        self.world.check_sequence()
        place = {s.id: event.sequence or 0 for s in self.sent for event in self.world.finals(s.id)}
        for instance_id in self.instances:
            lane = [s for s in self.sent if s.instance_id == instance_id and not isinstance(s.data, InstanceShow)]
            ran = [s for s in lane if self.world.finals(s.id)[0].kind != "operation.cancelled"]
            assert [place[s.id] for s in ran] == sorted(place[s.id] for s in ran), "out of order"

    async def _check_state(self) -> None:
        world = self.world
        records = {record.id: record for record in world.agent.ctx.instances.all()}
        assert {record.id: record for record in await world.cut.instances()} == records
        domains = {domain.id: domain for domain in await world.ask(world.driver.recover)}
        assert set(domains) == set(records)
        believed = {record.id: record.observed for record in records.values()}
        assert believed == {domain.id: domain.power for domain in domains.values()}
        files = sorted([f"domains/{one}.json" for one in records] + [f"instances/{one}" for one in records])
        assert world.owned_files() == files
        assert await world.cut.operations(unfinished=True) == []
        assert [e.data for e in world.events if e.kind == "host.drift"] == []
        for instance_id in self.instances:
            if (expected := self._expected(instance_id)) is not None:
                found = domains[instance_id].power if instance_id in domains else "gone"
                assert found == expected, f"{instance_id} is {found} and not {expected}"

    def _expected(self, instance_id: str) -> str | None:
        """The power that the answers, in order, lead to; None where a failure or a crash left it open."""
        power: str | None = "gone"
        for sent in self.sent:
            if sent.instance_id != instance_id:
                continue
            kind = self.world.finals(sent.id)[0].kind
            if kind == "operation.succeeded" and isinstance(sent.data, InstanceCreate):
                power = "running" if sent.data.start else "stopped"
            elif kind == "operation.succeeded":
                power = POWER.get(type(sent.data), power)
            elif kind in ("operation.failed", "operation.cancelled") and not isinstance(sent.data, (InstanceCreate, InstanceShow)):
                power = None
        return None if instance_id in self.crashed_guests else power


def parse_key(body: bytes) -> str:
    """What the broker may mix: messages of one instance keep their order, and so do repeats of one command."""
    try:
        parsed = parse_command(body)
    except ComputeError:
        return "nonsense"
    return parsed.subject or "none"


TestCoreMachine = CoreMachine.TestCase
TestCoreMachine.settings = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
