"""The end of a soft delete: the agent's own command at the deadline, and what a lost journal leaves of it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from support.world import World, until

from agent.core.context import now
from agent.handlers import restore
from agent.handlers.due import issue_due
from agent.messages.commands import InstanceDelete
from agent.messages.life import Life, SoftDelete
from agent.messages.verbs_rebuild import InstanceRestore


async def test_the_deadline_removes_the_instance(world: World) -> None:
    instance_id = await world.create("vm")
    await world.do(InstanceDelete(restore_within_s=3600), instance_id=instance_id)
    agent = world.agent
    await issue_due(agent.ctx, agent._runner, now() + timedelta(seconds=3500))
    await world.quiet()
    assert await world.power(instance_id) == "stopped"
    mark = agent.ctx.instances.get(instance_id).life.soft_delete
    assert mark is not None
    # The deadline is the instance's own: let it be in the past.
    past = mark.model_copy(update={"restore_until": now() - timedelta(seconds=1)})
    agent.ctx.instances.update(instance_id, life=Life(soft_delete=past))
    for _ in range(2):
        await issue_due(agent.ctx, agent._runner, now())
    await until(lambda: agent.ctx.instances.find(instance_id) is None)
    await world.quiet()
    assert await world.power(instance_id) == "gone"
    assert world.owned_files() == []
    assert [event.kind for event in world.events].count("instance.removed") == 1


async def test_a_delete_that_failed_is_given_again_later(world: World) -> None:
    instance_id = await world.create("vm")
    await world.do(InstanceDelete(restore_within_s=0.001), instance_id=instance_id)
    record = world.agent.ctx.instances.get(instance_id)
    mark = record.life.soft_delete
    assert mark is not None
    ids = [
        [command_id for command_id, _ in restore.overdue(record, mark.restore_until + timedelta(seconds=after_s))]
        for after_s in (-1, 0, 1, restore.RETRY_S)
    ]
    assert ids[0] == []
    assert ids[1] == ids[2] != ids[3]
    assert all(len(one) == 1 and len(one[0]) <= 128 for one in ids[1:])


async def test_a_lost_journal_forgets_no_deadline(tmp_path: Path, no_blocking: object) -> None:
    world = await World(tmp_path, store="sqlite").open()
    await world.start()
    instance_id = await world.create("vm")
    done = await world.do(InstanceDelete(restore_within_s=3600), instance_id=instance_id)
    await world.stop()
    for path in (tmp_path / "state").glob("journal.sqlite*"):
        path.unlink()
    await world.start()
    record = world.agent.ctx.instances.get(instance_id)
    assert record.desired == "deleted"
    assert record.life.soft_delete == SoftDelete(
        restore_until=datetime.fromisoformat(done.data["result"]["restore_until"]).astimezone(UTC), was_running=True
    )
    assert (await world.do(InstanceRestore(), instance_id=instance_id)).kind == "operation.succeeded"
    assert await world.power(instance_id) == "running"
    await world.stop()
    await world.close()
