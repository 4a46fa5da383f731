"""Dedicated CPUs and pages through a whole agent: refused, claimed, told in heartbeats, known without a journal."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from support.world import HOST, World, command, new_id, spec, until

from agent.messages import routing
from agent.messages.commands import HostShow, InstanceCreate, InstanceDelete
from agent.messages.events import Event

SETTINGS = {"cpus": 8, "cpu_dedicated_set": "4-7", "pages": {"2048": 256}, "shares": ["data"]}


@pytest.fixture
async def world(tmp_path: Path, no_blocking: object) -> AsyncIterator[World]:
    made = await World(tmp_path, store="sqlite", driver=SETTINGS).open()
    await made.start()
    yield made
    await made.stop()
    await made.close()


def own(vcpus: int = 1) -> dict[str, Any]:
    return {"vcpus": vcpus, "cpu": {"placement": "dedicated"}}


def made_of(**fields: Any) -> InstanceCreate:
    return InstanceCreate.model_validate({"spec": spec().model_dump() | fields})


async def create(world: World, **fields: Any) -> str:
    instance_id = new_id()
    done = await world.do(made_of(**fields), instance_id=instance_id)
    assert done.kind == "operation.succeeded", done.data
    return instance_id


async def inventory(world: World) -> dict[str, dict[str, Any]]:
    shown = await world.do(HostShow())
    beat: dict[str, Any] = shown.data["result"]["heartbeat"]
    assert isinstance(beat["numa_cells"], list)
    return {**beat["inventory"], "cell": beat["numa_cells"][0]}


def refused(event: Event, code: str, *, retryable: bool) -> dict[str, Any]:
    assert event.kind == "operation.rejected", event.data
    assert (event.data["error"]["code"], event.data["error"]["retryable"]) == (code, retryable)
    return dict(event.data["error"]["details"])


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"shares": [{"source": "other", "tag": "x"}]}, "share_unknown"),
        ({"memory_backing": {"hugepages_kib": 1024}}, "hugepages_missing"),
    ],
    ids=["share", "pages"],
)
async def test_what_the_host_never_has_is_rejected_before_anything_is_made(
    world: World, fields: dict[str, Any], code: str
) -> None:
    refused(await world.do(made_of(**fields), instance_id=new_id()), code, retryable=False)
    assert world.owned_files() == []
    assert world.agent.ctx.instances.all() == []


async def test_a_contradiction_is_rejected(world: World) -> None:
    body = {"spec": spec().model_dump() | {"numa": [{"vcpus": [0], "memory_mib": 16}]}}
    operation_id = new_id()
    key = routing.command_key("instance.create", HOST)
    world.put(command("instance.create", body, id=operation_id, subject=new_id()), key=key, message_id=operation_id)
    refused(await world.final(operation_id), "invalid_argument", retryable=False)


async def test_dedicated_cpus_and_pages_are_claimed_and_told(world: World) -> None:
    first = await create(world, **own(3))
    await create(world, memory_mib=384, memory_backing={"hugepages_kib": 2048}, vcpus=2)
    told = await inventory(world)
    assert {name: (told[name]["total"], told[name]["used"]) for name in told if name != "cell"} == {
        "VCPU": (4, 2),
        "PCPU": (4, 3),
        "MEMORY_MB": (262_144, 256),
        "DISK_GB": (4096, 2),
        "CUSTOM_MEMORY_PAGE_2048": (256, 192),
    }
    assert told["MEMORY_MB"]["reserved"] == 512 + 512  # the pool is half a GiB
    assert told["cell"]["free_dedicated_cpus"] == [7]
    assert told["cell"]["pages"] == [{"size_kib": 2048, "total": 256, "free": 64}]
    short = await world.do(made_of(**own(2)), instance_id=new_id())
    assert refused(short, "does_not_fit", retryable=True) == {"PCPU": 1}
    pages = {"memory_mib": 130, "memory_backing": {"hugepages_kib": 2048}}
    short = await world.do(made_of(**pages), instance_id=new_id())
    assert refused(short, "does_not_fit", retryable=True) == {"CUSTOM_MEMORY_PAGE_2048": 1}
    done = await world.do(InstanceDelete(), instance_id=first)
    assert done.kind == "operation.succeeded"
    assert (await inventory(world))["cell"]["free_dedicated_cpus"] == [4, 5, 6, 7]
    await create(world, **own(4))


async def test_creates_at_once_never_share_a_cpu(world: World) -> None:
    ended = await asyncio.gather(*(world.do(made_of(**own(1)), instance_id=new_id()) for _ in range(10)))
    kinds = sorted(event.kind for event in ended)
    assert kinds == ["operation.rejected"] * 6 + ["operation.succeeded"] * 4
    given = sorted(cpu for info in await world.ask(world.driver.recover) for cpu in info.dedicated_cpus)
    assert given == [4, 5, 6, 7]


async def test_claims_survive_the_loss_of_the_journal(world: World) -> None:
    instance_id = await create(world, **own(3))
    await world.quiet()
    await world.crash()
    for file in (world.folder / "state").glob("journal.sqlite*"):
        file.unlink()
    shutil.rmtree(world.folder / "state" / "images", ignore_errors=True)
    await world.start()
    await until(lambda: world.agent.ctx.instances.find(instance_id))
    told = await inventory(world)
    assert (told["PCPU"]["used"], told["cell"]["free_dedicated_cpus"]) == (3, [7])
    short = await world.do(made_of(**own(2)), instance_id=new_id())
    assert refused(short, "does_not_fit", retryable=True) == {"PCPU": 1}


async def test_a_check_that_is_slow_does_not_let_two_have_the_same_name(world: World) -> None:
    from agent.drivers.fake.settings import Fault  # noqa: PLC0415

    world.driver.inject(Fault(call="check", hang_s=0.2, times=2))
    ended = await asyncio.gather(*(world.do(made_of(name="same"), instance_id=new_id()) for _ in range(2)))
    assert sorted(event.kind for event in ended) == ["operation.rejected", "operation.succeeded"]
    rejected = next(event for event in ended if event.kind == "operation.rejected")
    assert rejected.data["error"]["code"] == "name_taken"
