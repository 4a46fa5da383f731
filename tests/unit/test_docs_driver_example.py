"""The minimal driver of docs/drivers.md, taken from the page and run under an agent."""

from __future__ import annotations

import re
import sys
import types
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent import app
from agent.app import Agent
from agent.bus.memory import MemoryBroker, MemoryBus
from agent.config import Settings
from agent.controller import CommandRefused, ComputeClient
from agent.drivers.base import CallContext, Driver, DriverContext, DriverEvent, PowerChanged
from agent.errors import AlreadyExists, InvalidArgument, NotFound, Unavailable
from agent.messages.commands import (
    InstanceCreate,
    InstanceDelete,
    InstanceList,
    InstancePause,
    InstanceShow,
    InstanceStart,
    InstanceStop,
)
from agent.messages.spec import InstanceSpec, RootDisk
from agent.messages.verbs_memory import InstanceSetPolicy
from agent.messages.verbs_rebuild import InstanceRestore

PAGE = Path(__file__).parents[2] / "docs" / "drivers.md"
SPEC = InstanceSpec(name="web-1", vcpus=1, memory_mib=128, root_disk=RootDisk(size_mib=64))


@pytest.fixture(scope="module")
def toy_class() -> type[Driver]:
    source = re.findall(r"<!-- example: toy -->\n```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert len(source) == 1
    module = types.ModuleType("docs_toy_driver")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(compile(source[0], str(PAGE), "exec"), module.__dict__)
    found: type[Driver] = module.ToyDriver
    return found


@pytest.fixture
async def client(
    toy_class: type[Driver], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[ComputeClient]:
    monkeypatch.setattr(app, "load_driver", lambda _name: toy_class)
    settings = Settings.model_validate(
        {
            "agent": {"host": "h1", "state_dir": tmp_path, "drain_timeout_s": 5},
            "bus": {"url": "amqp://unused/"},
            "driver": {"name": "toy"},
            "health": {"listen": ""},
        }
    )
    broker = MemoryBroker()
    agent = Agent(settings, MemoryBus(broker, name="agent"))
    await agent.start()
    try:
        await agent.wait_ready(10)
        async with ComputeClient(MemoryBus(broker, name="controller"), source="/test") as made:
            yield made
    finally:
        await agent.stop()


async def test_an_instance_lives_on_it(client: ComputeClient) -> None:
    one = str(uuid.uuid4())

    async def call(data: object) -> dict[str, object]:
        return (await client.call(data, host="h1", instance_id=one, timeout_s=10)).result

    assert (await call(InstanceCreate(spec=SPEC)))["observed"] == "running"
    assert (await call(InstanceStop()))["observed"] == "stopped"
    assert (await call(InstanceStart()))["changed"] is True
    assert (await call(InstanceStart()))["changed"] is False
    assert (await call(InstanceShow()))["observed"] == "running"
    with pytest.raises(CommandRefused) as refused:
        await call(InstancePause())
    assert refused.value.code == "verb_unsupported"
    policy = await call(InstanceSetPolicy(on_crash="restart"))
    assert InstanceSpec.model_validate(policy["spec"]).policy.on_crash == "restart"
    assert (await call(InstanceDelete(restore_within_s=600)))["restore_until"] is not None
    assert (await call(InstanceRestore()))["observed"] == "running"
    await call(InstanceDelete())
    listed = await client.call(InstanceList(), host="h1", timeout_s=10)
    assert listed.result["instances"] == []


def test_it_keeps_the_contract(toy_class: type[Driver], tmp_path: Path) -> None:
    events: list[DriverEvent] = []
    driver = toy_class(DriverContext(host="h1", state_dir=tmp_path, settings={}, emit=events.append))
    one, other = str(uuid.uuid4()), str(uuid.uuid4())
    with pytest.raises(Unavailable):
        driver.get(one)
    driver.connect()
    with pytest.raises(NotFound):
        driver.get(one)
    for _ in range(2):  # everything twice: the second time has no effect
        driver.create_storage(one, SPEC, {}, CallContext())
        driver.define(one, SPEC, generation=3)
    with pytest.raises(AlreadyExists):
        driver.define(other, SPEC, generation=1)
    for _ in range(2):
        driver.start(one)
    assert events == [PowerChanged(one, "running", "booted")]
    assert [(d.id, d.spec, d.generation) for d in driver.recover()] == [(one, SPEC, 3)]
    for _ in range(2):
        driver.destroy(one)
    for _ in range(2):
        driver.undefine(one)
        driver.delete_storage(one)
    assert driver.recover() == []
    driver.close()
    driver.close()


def test_settings_are_refused_by_name(toy_class: type[Driver], tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="colour"):
        toy_class(DriverContext(host="h", state_dir=tmp_path, settings={"colour": 1}, emit=lambda _e: None))
