"""Fixtures of the bus contract: every test runs on both brokers and both event loops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import uvloop
from bus_world import MemoryWorld, Names, RabbitWorld, World

from devstack.rabbitmq import PrivateBroker


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture(scope="session")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateBroker]:
    broker = PrivateBroker(tmp_path_factory.mktemp("rabbitmq"))
    with broker:
        yield broker


@pytest.fixture(params=["memory", "rabbitmq"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    made: World
    if request.param == "memory":
        made = MemoryWorld()
    else:
        broker = request.getfixturevalue("rabbitmq")
        await asyncio.to_thread(broker.start)
        made = RabbitWorld(broker)
    yield made
    await made.close()


@pytest.fixture
def names() -> Names:
    return Names()
