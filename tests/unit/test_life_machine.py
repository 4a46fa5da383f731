"""The whole life of instances under everything at once: `test_core_machine`, with every verb that has a situation.

Resize, rescue, shelf, soft delete, suspend, snapshots, rebuild, exports, backups, policies and deadlines, in every
situation and on top of each other, with driver faults, crashes at any commit and cancels. At rest the journal, the
domain's metadata and the hypervisor have the same spec and life, the disks are those of the spec and of the situation,
the stores hold what the shelves name and no more, and an audit finds nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from typing import Any

import pytest
from support.world import World, new_id
from test_core_machine import VERBS, CoreMachine, Sent

from agent.core.capacity import disk_sizes
from agent.core.context import now
from agent.drivers.fake.disks import RESCUE
from agent.handlers import halt, memory
from agent.handlers.due import issue_due
from agent.messages.commands import HostSetEnabled, InstanceCreate, InstanceDelete
from agent.messages.spec import ImageSource, InstanceSpec, RootDisk
from agent.messages.spec_disks import DataDisk, EphemeralDisk
from agent.messages.spec_limits import CpuLimits
from agent.messages.verb import CommandData
from agent.messages.verbs_host import HostAudit, HostDrain
from agent.messages.verbs_memory import (
    InstanceMemoryDump,
    InstanceReset,
    InstanceSetPolicy,
    InstanceSuspend,
)
from agent.messages.verbs_rebuild import (
    InstanceRebuild,
    InstanceRescue,
    InstanceRestore,
    InstanceShelve,
    InstanceUnrescue,
    InstanceUnshelve,
)
from agent.messages.verbs_resize import (
    InstanceConfirmResize,
    InstanceResize,
    InstanceRevertResize,
    InstanceSetLimits,
    InstanceSetMemoryTarget,
)
from agent.messages.verbs_snapshot import (
    ExportTarget,
    InstanceBackup,
    InstanceExport,
    SnapshotCreate,
    SnapshotDelete,
    SnapshotRevert,
)
from agent.messages.verbs_stats import InstanceStats
from agent.store.base import InstanceRecord

IMAGES = [name.encode().ljust(1024 * 1024, b"\0") for name in ("one", "two")]
VERB_COUNT = 33
"""How many `LifeMachine._verbs` gives."""
SOON_S = 0.05
"""For a guest that ignores its button."""
CALLS = [
    "get", "define", "start", "destroy", "undefine", "delete_storage", "shutdown", "resume", "recover", "suspend", "restore",
    "discard_saved", "grow_disk", "disk_sizes", "prepare_rebuild", "apply_rebuild", "discard_rebuild", "create_rescue_disk",
    "remove_rescue_disk", "shelve_storage", "import_disk", "create_storage", "export_disks", "abort_export",
    "create_snapshot", "delete_snapshot", "revert_snapshot", "list_snapshots", "request_vcpus", "request_memory", "guest_sizes", "apply_limits", "remove_memory_dump", "remove_artifact", "memory_dump", "ledger",
]  # fmt: skip


class LifeMachine(CoreMachine):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self.dues: list[asyncio.Future[None]] = []
        self.loose = False
        self.waits = (halt.RESTART_WAIT_S, memory.PROOF_S)
        halt.RESTART_WAIT_S, memory.PROOF_S = 0.05, 0.05

    def begin(self, store: str, ignores: bool) -> None:
        async def begin() -> None:
            shelf = self.folder / "shelf"
            shelf.mkdir()
            self.images: list[ImageSource] = []
            for number, content in enumerate(IMAGES):
                path = self.folder / f"{number}.raw"
                path.write_bytes(content)
                self.images.append(
                    ImageSource(url=path.as_uri(), sha256=hashlib.sha256(content).hexdigest(), format="raw")
                )
            driver: dict[str, Any] = {"guest_shutdown_s": None if ignores else 0.0, "cpus": 64}
            self.world = await World(
                self.folder, store=store, driver=driver, exports={"stores": {"shelf": shelf}}
            ).open()
            await self.world.start()

        self.do(begin())

    def teardown(self) -> None:
        try:
            super().teardown()
        finally:
            halt.RESTART_WAIT_S, memory.PROOF_S = self.waits

    def _spec(self) -> InstanceSpec:
        return InstanceSpec(
            name=f"m{next(self.names)}", vcpus=1, max_vcpus=4, memory_mib=256, max_memory_mib=1024,
            root_disk=RootDisk(size_mib=1024), disks=[DataDisk(kind="data", name="data", size_mib=10), EphemeralDisk(kind="ephemeral", name="eph", size_mib=10)],
        )  # fmt: skip

    def _verbs(self, one: int, image: int) -> list[CommandData]:
        target = ExportTarget(store="shelf", name=f"e{one}")
        source = self.images[image]
        return [
            InstanceResize(vcpus=1 + one % 4, timeout_s=SOON_S),
            InstanceResize(memory_mib=256 + one, disks_mib={"root": 1024 + one, "data": 10 + one}, timeout_s=SOON_S),
            InstanceResize(vcpus=2 + one % 3, confirm_within_s=0, timeout_s=SOON_S),
            InstanceResize(vcpus=1 + one % 8, confirm_within_s=0.01, timeout_s=SOON_S),
            InstanceResize(vcpus=1 + one % 4, mode="live", timeout_s=SOON_S),
            InstanceResize(memory_mib=256 + 128 * (one % 4), mode="live", timeout_s=SOON_S),
            InstanceConfirmResize(),
            InstanceRevertResize(timeout_s=SOON_S),
            InstanceSetMemoryTarget(memory_mib=200, timeout_s=SOON_S),
            InstanceSetLimits(cpu=CpuLimits(shares=100 + one)),
            InstanceSuspend(),
            InstanceReset(),
            InstanceMemoryDump(),
            InstanceSetPolicy(on_host_boot=("start", "last-state", "stay-stopped")[one % 3]),
            InstanceRebuild(image=source, timeout_s=SOON_S),
            InstanceRescue(image=source, timeout_s=SOON_S),
            InstanceUnrescue(timeout_s=SOON_S),
            InstanceUnrescue(force=True),
            InstanceShelve(target=target, timeout_s=SOON_S),
            InstanceUnshelve(),
            InstanceUnshelve(keep_exports=True),
            InstanceRestore(),
            InstanceDelete(restore_within_s=0.01, timeout_s=SOON_S),
            InstanceDelete(restore_within_s=3600, timeout_s=SOON_S),
            InstanceExport(target=target, disks=["root", "data"]),
            InstanceBackup(series="s", keep=1, store="shelf"),
            SnapshotCreate(name="a"),
            SnapshotCreate(name="b", memory=False),
            SnapshotRevert(name="a"),
            SnapshotRevert(name="b", start=True),
            SnapshotDelete(name="a"),
            SnapshotDelete(name="b"),
            InstanceStats(),
        ]

    def create_large(self, start: bool) -> Sent:
        """Make an instance with room to grow, and with disks of several kinds."""
        instance_id = new_id()
        self.instances.append(instance_id)
        return self._send(InstanceCreate(spec=self._spec(), start=start), instance_id)

    def live(self, verb: int, one: int, image: int, number: int) -> Sent:
        return self._send(self._verbs(one, image)[verb], self._instance(number))

    def live_in_a_row(self, verbs: list[int], one: int, number: int) -> Sent:
        instance_id = self._instance(number)
        return [self._send(self._verbs(one + place, place % 2)[verb], instance_id) for place, verb in enumerate(verbs)][
            -1
        ]

    def audit(self, repair: bool) -> Sent:
        return self._send(HostAudit(repair=repair), None)

    def drain(self, stop: bool) -> Sent:
        return self._send(HostDrain(timeout_s=0.3, stop_instances=stop, stop_timeout_s=SOON_S), None)

    def enable(self) -> None:
        self._send(HostSetEnabled(enabled=True), None)

    def due(self) -> None:
        """Let what is due by now come, beside all else."""

        async def due() -> None:
            ctx = self.world.agent.ctx
            if ctx.state.ready:
                self.dues.append(asyncio.ensure_future(issue_due(ctx, self.world.agent._runner, now())))
                await asyncio.sleep(0)

        self.do(due())

    def _check_answers(self) -> None:
        for sent in self.sent:
            finals = self.world.finals(sent.id)
            assert len(finals) == 1, (sent, [event.data for event in finals])
            assert self.world.of(sent.id)[-1] is finals[0], "something followed the final event"
            error = finals[0].data.get("error") or {}
            if (
                error.get("code") == "internal"
                and "RuntimeError" not in str(error)
                and "scripted fault" not in str(error)
                and "restarted" not in str(error)
            ):
                raise AssertionError((sent.data, finals[0].data))
        self.world.check_sequence()

    def _is_half_deleted(self, record: InstanceRecord) -> bool:
        return record.desired == "deleted" and (record.life.soft_delete is None or self._failed_for_good(record.id))

    def _failed_for_good(self, instance_id: str) -> bool:
        """Whether something failed past its point of no return: what it left is only known by its error."""
        return any(
            sent.instance_id == instance_id and self.world.finals(sent.id)[0].data.get("undone") is False
            for sent in self.sent
        )

    async def _check_state(self) -> None:
        world = self.world
        # What is due by now comes now, and not while it is looked.
        await issue_due(world.agent.ctx, world.agent._runner, now())
        await world.quiet()
        records = {record.id: record for record in world.agent.ctx.instances.all()}
        kept = {record.id: record for record in await world.cut.instances()}
        assert kept == records, [
            (kept.get(one), records.get(one))
            for one in kept.keys() | records.keys()
            if kept.get(one) != records.get(one)
        ]
        domains = {domain.id: domain for domain in await world.ask(world.driver.recover)}
        assert set(domains) == set(records)
        believed = {record.id: record.observed for record in records.values()}
        assert believed == {domain.id: domain.power for domain in domains.values()}
        open_now = await world.cut.operations(unfinished=True)
        assert open_now == [], [
            (
                one.id,
                one.verb,
                one.state,
                one.undo_pending,
                one.error_code,
                [(s.name, s.state) for s in await world.cut.steps(one.id)],
            )
            for one in open_now
        ]
        drift = [e.data for e in world.events if e.kind == "host.drift"]
        assert drift == [], drift
        for instance_id, record in records.items():
            if self._failed_for_good(instance_id):
                continue
            domain, life = domains[instance_id], record.life
            assert (domain.spec, domain.life) == (record.spec, life), instance_id
            assert record.reason != "creating"
            assert (record.desired == "deleted") == (life.soft_delete is not None)
            disks = {name: disk.size_mib for name, disk in world.driver._hypervisor.disks.all(instance_id).items()}
            if life.shelf is not None:
                assert not life.shelf.returning
                assert disks == {}
                assert domain.power in ("stopped", "crashed")
                for disk in life.shelf.disks:
                    assert (self.folder / "shelf" / disk.url.rsplit("/", 1)[1]).is_file()
                continue
            assert disks.pop(RESCUE, None) is not None if life.rescue is not None else RESCUE not in disks
            assert disks == disk_sizes(record.spec), instance_id
        files = sorted(
            [f"domains/{one}.json" for one in records]
            + [f"instances/{one}" for one, r in records.items() if r.life.shelf is None]
        )
        left = [
            name
            for name in world.owned_files()
            if not self._failed_for_good(name.rsplit("/", 1)[1].removesuffix(".json"))
        ]
        assert [one for one in left if one not in files] == []
        if not any(self._failed_for_good(one) for one in self.instances):
            assert left == files
            self._check_stores(records)
            audit = await world.do(HostAudit())
            assert audit.kind == "operation.succeeded", audit.data
            assert audit.data["result"]["items"] == []
        staging = self.folder / "state" / "exports"
        assert not staging.is_dir() or list(staging.iterdir()) == []

    def _check_stores(self, records: Any) -> None:
        names = {path.name.removesuffix(".sha256") for path in (self.folder / "shelf").iterdir()}
        assert [name for name in names if name.endswith((".part", ".claim", ".lock"))] == []
        kept = {
            disk.url.rsplit("/", 1)[1]
            for record in records.values()
            if record.life.shelf
            for disk in record.life.shelf.disks
        }
        for sent in self.sent:
            final = self.world.finals(sent.id)[0]
            if isinstance(sent.data, (InstanceExport, InstanceUnshelve)) and final.kind == "operation.succeeded":
                result = final.data["result"]
                kept |= {disk["url"].rsplit("/", 1)[1] for disk in result.get("disks", [])}
            if isinstance(sent.data, InstanceUnshelve) and sent.data.keep_exports:
                self.loose = True
            if isinstance(sent.data, InstanceBackup):
                self.loose = True
        if not self.loose:
            assert names <= kept, (names, kept)

    def _expected(self, instance_id: str) -> str | None:
        return None

    async def _quiesce(self) -> None:
        await asyncio.wait([asyncio.ensure_future(asyncio.sleep(0)), *self.dues], timeout=0.5)
        for task in self.dues:
            task.cancel()  # it may wait for a journal that was cut off
        await asyncio.gather(*self.dues, return_exceptions=True)
        self.dues.clear()
        await super()._quiesce()

    def walk(self, seed: int, steps: int, faulty: float) -> None:
        """Do what a seed says."""
        rng = random.Random(seed)
        self.begin(rng.choice(["memory", "sqlite"]), rng.random() < 0.3)
        begun = [self.create_large(rng.random() < 0.8) for _ in range(rng.randint(1, 3))]
        if rng.random() < 0.8:
            self.quiesce()
        for _ in range(steps):
            sent = self._step(rng, begun, faulty)
            if sent is not None:
                begun.append(sent)
        self.quiesce()

    def _step(self, rng: random.Random, begun: list[Sent], faulty: float) -> Sent | None:
        chance = {
            "live": 45, "row": 10, "act": 7, "create": 2, "audit": 3, "drain": 0.5, "enable": 1.5, "due": 3, "time": 6,
            "cancel": 2, "repeat": 1, "recovers": 4, "quiesce": 4, "fails": 70 * faulty, "doom": 13 * faulty,
            "die": 6 * faulty, "crash": 3 * faulty, "away": 3 * faulty,
        }  # fmt: skip
        match rng.choices(list(chance), list(chance.values()))[0]:
            case "live":
                return self.live(rng.randrange(VERB_COUNT), rng.randrange(20), rng.randrange(2), rng.randrange(3))
            case "row":
                row = [rng.randrange(VERB_COUNT) for _ in range(rng.randint(2, 5))]
                return self.live_in_a_row(row, rng.randrange(20), rng.randrange(3))
            case "act":
                return self.act(rng.choice(VERBS), rng.randrange(3))
            case "create":
                return self.create_large(rng.random() < 0.5)
            case "audit":
                return self.audit(rng.random() < 0.7)
            case "drain":
                return self.drain(rng.random() < 0.5)
            case "cancel":
                self.cancel(rng.choice(begun[-6:]))
            case "repeat":
                self.repeat(rng.choice(begun[-6:]))
            case "fails":
                error = rng.choice(["internal", "unavailable", "bug", "failed_precondition"])
                times = rng.choice([1, 1, 2, 5])
                self.driver_fails(rng.choice(CALLS), error, rng.random() < 0.5, times)
            case "doom":
                self.doom(rng.randrange(7), rng.random() < 0.5)
            case other:
                self._plain(other, rng)
        return None

    def _plain(self, what: str, rng: random.Random) -> None:
        match what:
            case "enable":
                self.enable()
            case "due":
                self.due()
            case "time":
                self.time_passes(rng.randint(1, 200))
            case "recovers":
                self.driver_recovers()
            case "die":
                self.die()
            case "crash":
                self.guest_crashes(rng.randrange(3))
            case "away":
                self.hypervisor(rng.random() < 0.5)
            case _:
                self.quiesce()


@pytest.mark.parametrize("faulty", [0.0, 0.15, 0.4])
@pytest.mark.parametrize("seed", range(4))
def test_life(seed: int, faulty: float) -> None:
    """To look for what these seeds do not find: more of them, or more steps."""
    machine = LifeMachine()
    try:
        machine.walk(seed, 30, faulty)
    finally:
        machine.teardown()
