"""What `agent.store.base.Store` promises, on every store."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta

import pytest
from store_world import AT, StoreKind, big, ended, event, instance, operation

from agent.errors import FailedPrecondition, Unavailable
from agent.messages.spec import ImageSource, InstanceSpec, NetworkNic, RootDisk, Seed
from agent.store.base import Change, OperationRecord, StepRecord


async def find(kind: StoreKind, id: str) -> OperationRecord:
    found = await kind.store.operation(id)
    assert found is not None
    return found


# --- identity -----------------------------------------------------------------------------------------------------


async def test_identity_and_epoch_outlive_a_restart(kind: StoreKind) -> None:
    one = await kind.open()
    two = await kind.open()
    assert one == two
    assert one.epoch


@pytest.mark.parametrize("who", [{"compute_id": "other"}, {"host": "other"}])
async def test_another_host_s_journal_is_refused(kind: StoreKind, who: dict[str, str]) -> None:
    with pytest.raises(FailedPrecondition) as refused:
        await kind.open(**who)
    assert refused.value.code == "journal_foreign"
    await kind.open()


async def test_a_new_journal_is_empty(kind: StoreKind) -> None:
    store = kind.store
    assert await store.last_sequence() == 0
    assert await store.operations() == await store.operations(unfinished=True) == []
    assert await store.instances() == []
    assert await store.backlog(0, 10) == []
    assert await store.settings() == {}
    assert await store.operation("x") is None
    assert await store.steps("x") == []


async def test_close_is_idempotent(kind: StoreKind) -> None:
    await kind.store.close()
    await kind.store.close()


# --- claims -------------------------------------------------------------------------------------------------------


async def test_a_claim_is_read_back_whole(kind: StoreKind) -> None:
    record = operation(attempt=2, started_at=AT, cancel_requested=True, error_code="e")
    (done,) = await kind.store.commit([Change(claim=record)])
    assert done.known is None
    assert await find(kind, "op") == record
    await kind.open()
    assert await find(kind, "op") == record


async def test_a_known_id_applies_nothing(kind: StoreKind) -> None:
    await kind.store.commit([Change(claim=operation())])
    (done,) = await kind.store.commit(
        [
            Change(
                claim=operation(body=b"other", state="rejected"),
                events=[event("e")],
                instances=[instance()],
                settings={"k": "v"},
                steps=[StepRecord("op", 0, "a", "started")],
                final_of="op",
            )
        ]
    )
    assert done.known == operation()
    assert done.events == []
    assert await kind.store.last_sequence() == 0
    assert await kind.store.instances() == []
    assert await kind.store.settings() == {}
    assert await kind.store.steps("op") == []


async def test_the_second_of_two_equal_claims_in_one_commit_is_known(kind: StoreKind) -> None:
    first, second = await kind.store.commit([Change(claim=operation(), events=[event("1")]), Change(claim=operation())])
    assert first.known is None
    assert second.known == operation()


async def test_of_many_claims_at_once_one_wins(kind: StoreKind) -> None:
    done = await asyncio.gather(*(kind.store.commit([Change(claim=operation())]) for _ in range(20)))
    assert sum(result.known is None for (result,) in done) == 1


async def test_a_known_record_carries_its_answer(kind: StoreKind) -> None:
    await kind.store.commit([Change(claim=ended(), events=[event("a"), event("final")], final_of="op")])
    (done,) = await kind.store.commit([Change(claim=operation())])
    assert done.known is not None
    assert (done.known.final_body, done.known.final_sequence) == (b"final", 2)


# --- updates ------------------------------------------------------------------------------------------------------


async def test_an_update_touches_the_state_only(kind: StoreKind) -> None:
    await kind.store.commit([Change(claim=operation())])
    await kind.store.commit([Change(operation=ended(), events=[event("f")], final_of="op")])
    late = ended(body=b"other", reply_to="other", undo_pending=True, final_sequence=None)
    await kind.store.commit([Change(operation=late)])
    record = await find(kind, "op")
    assert record == replace(ended(), undo_pending=True, final_sequence=1)


async def test_a_final_operation_stays_final(kind: StoreKind) -> None:
    """A commit that had to wait for the disk must not make an ended operation run again."""
    await kind.store.commit([Change(claim=operation())])
    await kind.store.commit([Change(operation=ended())])
    await kind.store.commit([Change(operation=operation(state="running", cancel_requested=True))])
    assert await find(kind, "op") == ended()
    assert await kind.store.operations(unfinished=True) == []


async def test_an_update_of_an_unknown_operation_does_nothing(kind: StoreKind) -> None:
    await kind.store.commit([Change(operation=operation("nobody"))])
    assert await kind.store.operation("nobody") is None


async def test_the_caller_s_record_is_not_the_store_s(kind: StoreKind) -> None:
    record = operation()
    await kind.store.commit([Change(claim=record)])
    record.state = "running"
    assert (await find(kind, "op")).state == "accepted"
    (await find(kind, "op")).state = "running"
    assert (await find(kind, "op")).state == "accepted"


async def test_steps_are_replaced_by_index_and_read_in_order(kind: StoreKind) -> None:
    def step(index: int, name: str, state: str, output: bytes | None = None) -> StepRecord:
        return StepRecord("op", index, name, state, output)  # type: ignore[arg-type]

    await kind.store.commit([Change(steps=[step(1, "b", "started"), step(0, "a", "started")])])
    await kind.store.commit([Change(steps=[step(0, "a", "done", b'{"x":1}')])])
    assert await kind.store.steps("op") == [step(0, "a", "done", b'{"x":1}'), step(1, "b", "started")]


async def test_an_instance_with_everything_in_it_is_read_back(kind: StoreKind) -> None:
    spec = InstanceSpec(
        name="n", vcpus=2, memory_mib=64,
        root_disk=RootDisk(size_mib=1, image=ImageSource(url="https://x/y", sha256="0" * 64, format="qcow2")),
        nics=[NetworkNic(type="network", network="default", mac="52:54:00:00:00:01")],
        seed=Seed(hostname="h", user_data="#cloud-config\n€", meta_data={"k": "v"}),
        labels={"a": "b"},
    )  # fmt: skip
    record = instance(spec=spec)
    await kind.store.commit([Change(instances=[record])])
    await kind.open()
    assert await kind.store.instances() == [record]


async def test_a_removed_instance_is_gone_and_wins_over_its_own_change(kind: StoreKind) -> None:
    await kind.store.commit([Change(instances=[instance("a"), instance("b")])])
    await kind.store.commit([Change(instances=[instance("a")], removed_instances=["a", "nobody"])])
    assert [record.id for record in await kind.store.instances()] == ["b"]


async def test_settings_are_replaced(kind: StoreKind) -> None:
    await kind.store.commit([Change(settings={"a": "1", "b": "2"})])
    await kind.store.commit([Change(settings={"a": "3"})])
    await kind.open()
    assert await kind.store.settings() == {"a": "3", "b": "2"}


# --- events -------------------------------------------------------------------------------------------------------


async def test_sequences_have_no_gap_and_follow_the_order_of_commits(kind: StoreKind) -> None:
    results = await asyncio.gather(
        *(kind.store.commit([Change(events=[event(f"{n}a"), event(f"{n}b")]), Change()]) for n in range(50))
    )
    ids = [(item.sequence, item.event.id) for result in results for done in result for item in done.events]
    assert ids == [(2 * n + 1 + half, f"{n}{'ab'[half]}") for n in range(50) for half in (0, 1)]
    assert await kind.store.last_sequence() == 100


async def test_events_are_read_back_whole_from_where_one_left_off(kind: StoreKind) -> None:
    (done,) = await kind.store.commit([Change(events=[event("1"), event("2", cc=(), correlation_id=None), event("3")])])
    assert await kind.store.backlog(0, 100) == done.events
    assert await kind.store.backlog(1, 1) == done.events[1:2]
    assert await kind.store.backlog(3, 10) == []


async def test_published_events_are_forgotten_and_their_numbers_not_given_out_again(kind: StoreKind) -> None:
    await kind.store.commit([Change(events=[event("1"), event("2"), event("3")])])
    kind.store.published([1, 3])
    await kind.store.commit([Change()])
    assert [item.sequence for item in await kind.store.backlog(0, 10)] == [2]
    kind.store.published([2])
    await kind.open()
    assert await kind.store.backlog(0, 10) == []
    assert await kind.store.last_sequence() == 3
    (done,) = await kind.store.commit([Change(events=[event("4")])])
    assert done.events[0].sequence == 4


async def test_the_final_event_s_sequence_is_the_last_of_its_change(kind: StoreKind) -> None:
    await kind.store.commit([Change(claim=operation(), events=[event("accepted")])])
    await kind.store.commit([Change(operation=ended(), events=[event("state"), event("final")], final_of="op")])
    assert (await find(kind, "op")).final_sequence == 3


async def test_a_commit_whose_waiter_was_cancelled_is_in_the_backlog(kind: StoreKind) -> None:
    task = asyncio.ensure_future(kind.store.commit([Change(events=[event("1")])]))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    (done,) = await kind.store.commit([Change(events=[event("2")])])
    assert done.events[0].sequence == 2
    assert [item.event.id for item in await kind.store.backlog(0, 10)] == ["1", "2"]


# --- lists, pruning, requests -------------------------------------------------------------------------------------


async def test_unfinished_operations_come_in_order_of_arrival(kind: StoreKind) -> None:
    for name in ("c", "a", "b"):
        await kind.store.commit([Change(claim=operation(name))])
    await kind.store.commit([Change(claim=ended("over"))])
    await kind.store.commit([Change(claim=ended("left", undo_pending=True))])
    await kind.store.commit([Change(operation=operation("a", state="undoing"))])
    assert [r.id for r in await kind.store.operations(unfinished=True)] == ["c", "a", "b", "left"]
    assert [r.id for r in await kind.store.operations(limit=2)] == ["left", "over"]


async def test_prune_forgets_what_ended_long_ago_and_nothing_else(kind: StoreKind) -> None:
    old, new = AT - timedelta(days=9), AT
    await kind.store.commit(
        [
            Change(claim=ended("old", finished_at=old), steps=[StepRecord("old", 0, "a", "done")]),
            Change(claim=ended("old2", finished_at=old)),
            Change(claim=ended("new", finished_at=new)),
            Change(claim=ended("left", finished_at=old, undo_pending=True)),
            Change(claim=operation("open", accepted_at=old)),
        ]
    )
    assert await kind.store.prune(AT - timedelta(days=1), 1) == 1
    assert await kind.store.prune(AT - timedelta(days=1), 10) == 1
    assert {r.id for r in await kind.store.operations()} == {"new", "left", "open"}
    assert await kind.store.steps("old") == []


async def test_requests_are_taken_once(kind: StoreKind) -> None:
    assert await kind.store.take_requests() == []
    await kind.request("op")
    assert await kind.store.take_requests() == ["op"]
    assert await kind.store.take_requests() == []


# --- no space -----------------------------------------------------------------------------------------------------


async def test_a_full_disk_refuses_the_whole_change_and_works_again_after(kind: StoreKind) -> None:
    await kind.store.commit([Change(claim=operation("before"), events=[event("1")])])
    await kind.fill_disk()
    for _ in range(3):
        with pytest.raises(Unavailable) as refused:
            await kind.store.commit([big("x")])
        assert refused.value.code == "journal_full"
        assert refused.value.retryable
    assert await kind.store.operation("x") is None
    assert await kind.store.last_sequence() == 1
    assert (await find(kind, "before")).id == "before"
    await kind.free_disk()
    (done,) = await kind.store.commit([big("x")])
    assert done.known is None
    assert done.events[0].sequence == 2
    await kind.open()
    assert (await find(kind, "x")).body == b"x" * 200_000
