"""What holds after an agent has died in the middle of a command and come back."""

from __future__ import annotations

from pathlib import Path

from agent.drivers.fake.live import limits_json
from agent.store.base import InstanceRecord
from support.world import World


async def agrees(world: World, operation_id: str, instance_id: str, power: str) -> None:
    """One final event, the state that was asked for, the same in memory, journal and hypervisor; nothing left."""
    await world.quiet()
    assert [event.kind for event in world.finals(operation_id)] == ["operation.succeeded"]
    assert world.of(operation_id)[-1].kind == "operation.succeeded"
    assert await world.power(instance_id) == power
    kept = {record.id: record for record in await world.cut.instances()}
    known = {record.id: record for record in world.agent.ctx.instances.all()}
    assert kept == known
    dumps = sorted(path.name for path in (world.folder / "state" / "fake" / "dumps").glob("*"))
    made = world.finals(operation_id)[0].data["result"].get("path", "")
    assert [name for name in dumps if name.endswith(".part")] == []
    assert not made or Path(made).name in dumps
    if power == "gone":
        assert known == {}
        assert world.owned_files() == []
    else:
        assert known[instance_id].observed == power
        await same_everywhere(world, known[instance_id])
        assert world.owned_files() == [f"domains/{instance_id}.json", f"instances/{instance_id}"]
    assert await world.cut.operations(unfinished=True) == []
    assert [event for event in world.events if event.kind == "host.drift"] == []
    world.check_sequence()


async def same_everywhere(world: World, record: InstanceRecord) -> None:
    """The journal, the domain's definition and the guest have the same sizes and limits."""
    info = await world.ask(world.driver.get, record.id)
    assert (info.spec, info.life) == (record.spec, record.life)
    sizes = await world.ask(world.driver.disk_sizes, record.id, record.spec)
    assert sizes["root"] == record.spec.root_disk.size_mib
    assert all(sizes[disk.name] == disk.size_mib for disk in record.spec.disks if disk.kind != "cdrom")
    if info.power in ("running", "paused"):
        live = world.driver._hypervisor.find(record.id).live
        assert (live.vcpus, live.memory_mib) == (record.spec.vcpus, record.spec.memory_mib)
        assert live.limits_json == limits_json(record.spec)
