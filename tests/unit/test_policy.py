"""What happens by itself: a whole agent on the simulated hypervisor, whose guests end, crash and run out of disk."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from support.world import ROUNDS, World, new_id, until

from agent import policy
from agent.drivers.fake.settings import Fault
from agent.messages.commands import InstanceDelete, InstancePause, InstanceStart, InstanceStop
from agent.messages.events import Event
from agent.messages.spec_policy import Policy
from agent.messages.verbs_memory import InstanceSetPolicy, InstanceSuspend
from agent.policy import BOOT_KEY, Pace
from agent.store.base import Change

RESTART = Policy(on_stop="restart", on_crash="restart")
FAST = Pace(first_s=0.05, longest_s=0.4, stable_s=60, look_s=0.02, anyway_s=60)
SLOW = Pace(first_s=3600, longest_s=3600, stable_s=7200, look_s=0.02, anyway_s=3600)


@pytest.fixture
async def world(tmp_path: Path, no_blocking: object, unannounced: None, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    boot_id = tmp_path / "boot_id"
    boot_id.write_text(f"{new_id()}\n")
    monkeypatch.setattr(policy, "BOOT_ID", boot_id)
    made = await World(tmp_path).open()
    await start(made)
    yield made
    await made.stop()
    await made.close()


async def start(world: World, pace: Pace = FAST) -> None:
    await world.start()
    world.agent._policies._pace = pace


def told(world: World, instance_id: str) -> list[dict[str, Any]]:
    """What the agent said it was about to do, repeats dropped."""
    found = {event.id: event for event in world.events if event.kind == "instance.policy"}
    return [event.data for event in found.values() if event.subject == instance_id]


def started(world: World, instance_id: str) -> list[Event]:
    """Final events of the commands that the agent gave itself."""
    found = {event.id: event for event in world.events if event.subject == instance_id}
    return [
        event
        for event in found.values()
        if str(event.data.get("operation_id", "")).startswith("policy/") and event.kind == "operation.succeeded"
    ]


async def is_power(world: World, instance_id: str, observed: str) -> None:
    await until(lambda: world.agent.ctx.instances.get(instance_id).observed == observed)


async def idle(world: World) -> None:
    """Until nothing is pursued any more."""
    await until(lambda: not world.agent._policies._pursuits)
    await world.quiet()


@pytest.mark.parametrize("way", ["simulate_guest_shutdown", "simulate_crash", "simulate_panic"])
async def test_a_guest_that_ends_comes_back(world: World, way: str) -> None:
    instance_id = await world.create(policy=RESTART)
    await world.ask(getattr(world.driver, way), instance_id)
    await until(lambda: started(world, instance_id))
    await idle(world)
    assert await world.power(instance_id) == "running"
    cause = "on-stop" if way == "simulate_guest_shutdown" else "on-crash"
    (said,) = told(world, instance_id)
    assert (said["cause"], said["action"], said["attempt"], said["delay_s"]) == (cause, "start", 1, 0.0)
    (done,) = started(world, instance_id)
    assert done.data["operation_id"] == said["operation_id"]
    assert said["operation_id"].startswith(f"policy/{instance_id}/{cause}/")
    states = [event.data["observed"] for event in world.events if event.kind == "instance.state"]
    assert states[-2:] == [("stopped" if cause == "on-stop" else "crashed"), "running"]
    world.check_sequence()


@pytest.mark.parametrize("way", ["simulate_guest_shutdown", "simulate_crash"])
async def test_without_policy_it_stays_as_it_is(world: World, way: str) -> None:
    other = Policy(on_crash="restart") if way == "simulate_guest_shutdown" else Policy(on_stop="restart")
    for kept in (Policy(), other):
        instance_id = await world.create(policy=kept)
        await world.ask(getattr(world.driver, way), instance_id)
        await world.quiet()
        assert await world.power(instance_id) != "running"
        assert told(world, instance_id) == []


async def test_what_a_command_ends_stays_down(world: World) -> None:
    """A guest that obeyed a stop is not taken for one that ended by itself."""
    for stop in (InstanceStop(timeout_s=30), InstanceStop(force=True)):
        instance_id = await world.create(policy=RESTART)
        assert (await world.do(stop, instance_id=instance_id)).kind == "operation.succeeded"
        await world.quiet()
        assert await world.power(instance_id) == "stopped"
        assert told(world, instance_id) == []


async def test_ended_by_somebody_else_is_no_end_by_itself(world: World) -> None:
    instance_id = await world.create(policy=RESTART)
    await world.ask(world.driver.destroy, instance_id)
    await world.quiet()
    assert (await world.power(instance_id), told(world, instance_id)) == ("stopped", [])


@pytest.mark.parametrize("applied", [False, True])
async def test_a_stop_that_is_cut_off_by_a_crash(world: World, applied: bool) -> None:
    """At each commit of the stop, also while the guest is down already: it stays down, by one final event."""
    for commits in range(ROUNDS):
        instance_id = await world.create(policy=RESTART, labels={"fake.guest-shutdown-s": "0.02"})
        world.cut.after(commits, applied=applied)
        operation_id = world.send(InstanceStop(timeout_s=30), instance_id=instance_id)
        died = await world.cut_or_final(operation_id)
        await asyncio.sleep(0.03)  # the guest goes down meanwhile, and nobody is told
        await world.crash()
        await start(world)
        await world.final(operation_id)
        await idle(world)
        assert await world.power(instance_id) == "stopped"
        record = world.agent.ctx.instances.get(instance_id)
        assert (record.desired, record.observed) == ("stopped", "stopped")
        assert told(world, instance_id) == []
        if not died:
            return
    raise AssertionError("there were more commits than this test has rounds")


async def test_desired_stays_where_a_stop_fails(world: World) -> None:
    instance_id = await world.create()
    world.driver.inject(Fault(call="destroy", error="internal"))
    failed = await world.do(InstanceStop(force=True), instance_id=instance_id)
    assert failed.kind == "operation.failed"
    record = world.agent.ctx.instances.get(instance_id)
    assert (record.desired, record.observed) == ("running", "running")
    assert {event.data["desired"] for event in world.events if event.kind == "instance.state"} == {"running"}


async def test_a_crash_loop_backs_off(world: World) -> None:
    """Ever longer pauses, told before they begin; never a hot loop."""
    instance_id = await world.create(policy=RESTART)
    for round_ in range(1, 5):
        await is_power(world, instance_id, "running")
        await idle(world)
        await world.ask(world.driver.simulate_crash, instance_id)
        await until(lambda n=round_: len(told(world, instance_id)) == n)
    await until(lambda: len(started(world, instance_id)) == 4)
    delays = [said["delay_s"] for said in told(world, instance_id)]
    assert delays[0] == 0.0
    # What is left of the pause when it is told, which on a slow machine is little.
    assert all(0.0 <= delay <= limit for delay, limit in zip(delays[1:], (0.05, 0.1, 0.2), strict=True)), delays
    assert [said["attempt"] for said in told(world, instance_id)] == [1, 2, 3, 4]
    assert len({said["operation_id"] for said in told(world, instance_id)}) == 4


async def test_a_guest_that_went_on_for_long_begins_anew(world: World) -> None:
    world.agent._policies._pace = Pace(first_s=3600, longest_s=3600, stable_s=0.0)
    instance_id = await world.create(policy=RESTART)
    for count in (1, 2):
        await world.ask(world.driver.simulate_crash, instance_id)
        await until(lambda n=count: len(started(world, instance_id)) == n)
        await idle(world)
    assert [said["attempt"] for said in told(world, instance_id)] == [1, 1]


async def test_a_start_that_fails_is_tried_again(world: World) -> None:
    instance_id = await world.create(policy=RESTART)
    world.driver.inject(Fault(call="start", error="resource_exhausted", times=2))
    await world.ask(world.driver.simulate_crash, instance_id)
    await until(lambda: started(world, instance_id))
    await idle(world)
    assert [said["attempt"] for said in told(world, instance_id)] == [1, 2, 3]
    assert await world.power(instance_id) == "running"


@pytest.mark.parametrize("command", [InstanceStop(), InstanceDelete(), InstanceSetPolicy(on_crash="keep")])
async def test_a_command_ends_the_waiting(world: World, command: Any) -> None:
    instance_id = await world.create(policy=RESTART)
    await world.ask(world.driver.simulate_crash, instance_id)
    await until(lambda: started(world, instance_id))
    await idle(world)
    world.agent._policies._pace = SLOW
    await world.ask(world.driver.simulate_crash, instance_id)
    await until(lambda: len(told(world, instance_id)) == 2)
    assert told(world, instance_id)[1]["delay_s"] > 3000
    assert (await world.do(command, instance_id=instance_id)).kind == "operation.succeeded"
    await idle(world)
    assert await world.power(instance_id) == ("gone" if isinstance(command, InstanceDelete) else "crashed")
    assert len(started(world, instance_id)) == 1


@pytest.mark.parametrize("ended", [False, True])
async def test_a_command_that_is_accepted_meanwhile_comes_first(world: World, ended: bool) -> None:
    """A stop that reached the lane, or went through it, while the agent's own start was being written."""
    instance_id = await world.create(policy=RESTART)
    journal, commit, stopped = world.agent.ctx.journal, world.agent.ctx.journal.commit, ""

    async def slow(*changes: Change) -> Any:
        nonlocal stopped
        if not stopped and any(one.claim is not None and one.claim.id.startswith("policy/") for one in changes):
            if not ended:
                world.driver.inject(Fault(call="get", hang_s=0.3, instance=instance_id, times=1))
            stopped = world.send(InstanceStop(), instance_id=instance_id)
            await until(lambda: world.finals(stopped) if ended else world.agent._runner.find(stopped))
        return await commit(*changes)

    journal.commit = slow  # type: ignore[method-assign]
    await world.ask(world.driver.simulate_crash, instance_id)
    await until(lambda: stopped and world.finals(stopped))
    await idle(world)
    assert await world.power(instance_id) == "crashed"
    assert world.agent.ctx.instances.get(instance_id).desired == "stopped"
    ours = [event for event in world.events if str(event.data.get("operation_id", "")).startswith("policy/")]
    assert "operation.cancelled" in {event.kind for event in ours}
    assert started(world, instance_id) == []


async def test_nothing_is_done_while_the_state_is_unknown(world: World) -> None:
    instance_id = await world.create(policy=RESTART)
    await world.ask(world.driver.disconnect)
    await is_power(world, instance_id, "unknown")
    await world.ask(world.driver.simulate_crash, instance_id)
    await world.quiet()
    assert told(world, instance_id) == []
    await world.ask(world.driver.reconnect)
    await until(lambda: started(world, instance_id))
    assert await world.power(instance_id) == "running"


async def test_what_ended_while_the_agent_was_away_comes_back(world: World) -> None:
    instance_id = await world.create(policy=RESTART)
    driver = world.driver
    await world.crash()
    await world.ask(driver.connect)
    await world.ask(driver.simulate_guest_shutdown, instance_id)
    await world.ask(driver.close)
    await start(world)
    await until(lambda: started(world, instance_id))
    assert await world.power(instance_id) == "running"


@pytest.mark.parametrize("applied", [False, True])
async def test_the_agent_dies_at_every_commit_of_a_restart(world: World, applied: bool) -> None:
    for commits in range(ROUNDS):
        instance_id = await world.create(policy=RESTART)
        await world.quiet()
        world.cut.after(commits, applied=applied)
        await world.ask(world.driver.simulate_guest_shutdown, instance_id)
        await until(lambda i=instance_id: world.cut.happened.is_set() or started(world, i))
        died = world.cut.happened.is_set()
        await world.crash()
        await start(world)
        await is_power(world, instance_id, "running")
        await idle(world)
        assert await world.power(instance_id) == "running"
        assert len(started(world, instance_id)) == 1
        assert await world.cut.operations(unfinished=True) == []
        world.check_sequence()
        if not died:
            return
    raise AssertionError("there were more commits than this test has rounds")


# --- full disks -------------------------------------------------------------------------------------------------------


async def test_a_full_disk_that_is_freed(world: World) -> None:
    instance_id = await world.create()
    await world.ask(world.driver.simulate_full, 3)
    await world.ask(world.driver.simulate_io_error, instance_id)
    await until(lambda: world.agent._policies._thirsty)
    await asyncio.sleep(0.1)  # several looks
    assert await world.power(instance_id) == "paused"
    await world.ask(world.driver.simulate_full, 4)
    await until(lambda: started(world, instance_id))
    await idle(world)
    assert await world.power(instance_id) == "running"
    (said,) = told(world, instance_id)
    assert (said["cause"], said["action"]) == ("on-io-error", "resume")
    assert world.agent._policies._thirsty == set()
    watcher = world.agent._policies._watcher
    assert watcher is not None
    await until(watcher.done)  # nobody looks any more


async def test_full_disks_are_looked_at_with_one_call_for_all(world: World) -> None:
    guests = [await world.create() for _ in range(5)]
    await world.ask(world.driver.simulate_full, 0)
    asked: list[int] = []
    room_mib = world.driver.room_mib

    def counted(instances: Any) -> dict[str, int]:
        asked.append(len(instances))
        return room_mib(instances)

    world.driver.room_mib = counted  # type: ignore[method-assign]
    for guest in guests:
        await world.ask(world.driver.simulate_io_error, guest)
    await until(lambda: asked and asked[-1] == 5)
    looks = len(asked)
    await until(lambda: len(asked) >= looks + 3)
    assert set(asked[looks:]) == {5}
    await world.ask(world.driver.simulate_full, 1000)
    for guest in guests:
        await is_power(world, guest, "running")


async def test_a_full_disk_across_a_restart_and_a_reconnect(world: World) -> None:
    instance_id = await world.create()
    await world.ask(world.driver.simulate_full, 0)
    await world.ask(world.driver.simulate_io_error, instance_id)
    await until(lambda: world.agent._policies._thirsty)
    await world.crash()
    await start(world)
    await until(lambda: world.agent._policies._thirsty)
    await world.ask(world.driver.disconnect)
    await is_power(world, instance_id, "unknown")
    await until(lambda: not world.agent._policies._thirsty)
    await world.ask(world.driver.simulate_full, 100)
    await world.ask(world.driver.reconnect)
    await is_power(world, instance_id, "running")


async def test_a_disk_that_fills_up_again_and_again(world: World) -> None:
    instance_id = await world.create()
    for round_ in range(1, 4):
        await world.ask(world.driver.simulate_io_error, instance_id)
        await until(lambda n=round_: len(started(world, instance_id)) == n)
        await idle(world)
    assert [said["attempt"] for said in told(world, instance_id)] == [1, 2, 3]
    assert told(world, instance_id)[2]["delay_s"] > 0


@pytest.mark.parametrize("how", ["kept", "paused"])
async def test_a_full_disk_that_is_left_alone(world: World, how: str) -> None:
    instance_id = await world.create(policy=Policy(on_io_error="keep" if how == "kept" else "pause-and-retry"))
    await world.ask(world.driver.simulate_full, 0)
    await world.ask(world.driver.simulate_io_error, instance_id)
    await is_power(world, instance_id, "paused")
    if how == "paused":
        await world.do(InstancePause(), instance_id=instance_id)
    await world.ask(world.driver.simulate_full, 100)
    await idle(world)
    assert await world.power(instance_id) == "paused"


# --- host boot --------------------------------------------------------------------------------------------------------


async def boot_host(world: World) -> None:
    """Let the host boot: all guests are gone, and the agent finds another boot than it knew."""
    driver = world.driver
    await world.crash()
    await world.ask(driver.connect)
    for info in await world.ask(driver.recover):
        if info.power not in ("stopped", "suspended"):
            await world.ask(driver.destroy, info.id)
    await world.ask(driver.close)
    policy.BOOT_ID.write_text(f"{new_id()}\n")


async def test_after_a_host_boot(world: World) -> None:
    ran = await world.create("ran")
    was_paused = await world.create("was-paused")
    await world.do(InstancePause(), instance_id=was_paused)
    stopped = await world.create("stopped", start=False)
    stays = await world.create("stays", policy=Policy(on_host_boot="stay-stopped"))
    always = await world.create("always", start=False, policy=Policy(on_host_boot="start"))
    saved = await world.create("saved")
    await world.do(InstanceSuspend(), instance_id=saved)
    saved_start = await world.create("saved-start", policy=Policy(on_host_boot="start"))
    await world.do(InstanceSuspend(), instance_id=saved_start)
    await boot_host(world)
    await start(world)
    await until(lambda: all(started(world, one) for one in (ran, always, saved_start)))
    await idle(world)
    powers = [await world.power(one) for one in (ran, was_paused, stopped, stays, always, saved, saved_start)]
    assert powers == ["running", "stopped", "stopped", "stopped", "running", "suspended", "running"]
    assert {said["cause"] for one in (ran, always, saved_start) for said in told(world, one)} == {"on-host-boot"}
    assert (await world._memory.settings())[BOOT_KEY] == world.agent._policies._boot_id


async def test_a_mere_restart_starts_nothing(world: World) -> None:
    instance_id = await world.create(start=False, policy=Policy(on_host_boot="start"))
    ended = await world.create()
    await world.ask(world.driver.destroy, ended)
    await world.quiet()
    await world.crash()
    await start(world)
    await idle(world)
    assert (await world.power(instance_id), await world.power(ended)) == ("stopped", "stopped")
    assert not [event for event in world.events if event.kind == "instance.policy"]


async def test_the_hypervisor_comes_up_after_the_agent(world: World) -> None:
    instance_id = await world.create()
    await boot_host(world)
    (world.folder / "state" / "fake" / "faults.json").write_text('{"disconnected": true}')
    await start(world)
    await world.quiet()
    assert told(world, instance_id) == []
    (world.folder / "state" / "fake" / "faults.json").unlink()
    await until(lambda: started(world, instance_id))
    assert await world.power(instance_id) == "running"


@pytest.mark.parametrize("applied", [False, True])
async def test_the_agent_dies_at_every_commit_after_a_host_boot(world: World, applied: bool) -> None:
    instance_id = await world.create(start=False, policy=Policy(on_host_boot="start"))
    for commits in range(ROUNDS):
        await boot_host(world)
        await world.start(wait=False)
        world.agent._policies._pace = FAST
        world.cut.after(commits, applied=applied)
        count = len(started(world, instance_id))
        await until(lambda n=count: world.cut.happened.is_set() or len(started(world, instance_id)) > n)
        died = world.cut.happened.is_set()
        await world.crash()
        await start(world)
        await is_power(world, instance_id, "running")
        await idle(world)
        assert await world.power(instance_id) == "running"
        assert await world.cut.operations(unfinished=True) == []
        done = await world.do(InstanceStop(force=True), instance_id=instance_id)
        assert done.kind == "operation.succeeded"
        if not died:
            return
    raise AssertionError("there were more commits than this test has rounds")


async def test_made_without_a_start_is_made(world: World) -> None:
    """Its reason is not `creating` for ever: `show` would ask the hypervisor nothing about it."""
    instance_id = await world.create(start=False)
    assert world.agent.ctx.instances.get(instance_id).reason == "created"


async def test_a_start_after_a_host_boot_that_fails_for_long_ends(world: World) -> None:
    instance_id = await world.create()
    await boot_host(world)
    await world.start(wait=False)
    world.agent._policies._pace = FAST
    world.driver.inject(Fault(call="start", error="internal"))
    await until(lambda: len(told(world, instance_id)) == 5)
    await idle(world)
    assert len(told(world, instance_id)) == 5
    assert await world.power(instance_id) == "stopped"
    world.driver.clear_faults()
    assert (await world.do(InstanceStart(), instance_id=instance_id)).kind == "operation.succeeded"
