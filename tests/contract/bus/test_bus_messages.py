"""The bus contract: what happens to messages. Routing, settling, dead letters, confirms."""

from __future__ import annotations

import asyncio

import pytest
from bus_world import WAIT_S, Inbox, Names, World, ack, depth_becomes

from agent.bus.base import Binding, Delivery, Exchange, Outgoing, Queue, Topology
from agent.errors import FailedPrecondition, InvalidArgument, Unavailable, Unroutable


async def test_a_message_arrives_as_it_was_sent(world: World, names: Names) -> None:
    bus = await world.bus()
    await bus.declare(names.topology())
    inbox = Inbox(ack)
    await bus.consume(names.queue, inbox, prefetch=10)
    await bus.publish(
        names.command(
            b'{"a":1}',
            message_id="id-1",
            correlation_id="cor-1",
            reply_to="reply.queue",
            headers={"traceparent": "00-ab", "n": 7, "flag": True, "none": None},
        )
    )
    delivery = await inbox.one()
    assert isinstance(delivery, Delivery)
    assert delivery.body == b'{"a":1}'
    assert (delivery.exchange, delivery.routing_key) == (names.exchange, f"instance.start.{names.host}")
    assert (delivery.message_id, delivery.correlation_id) == ("id-1", "cor-1")
    assert delivery.reply_to == "reply.queue"
    assert dict(delivery.headers) == {"traceparent": "00-ab", "n": 7, "flag": True, "none": None}
    assert delivery.redelivered is False


@pytest.mark.parametrize("size", [0, 1, 131_063, 131_064, 131_065, 1_000_000])
async def test_bodies_of_any_size(world: World, names: Names, size: int) -> None:
    bus = await world.bus()
    await bus.declare(names.topology())
    inbox = Inbox(ack)
    await bus.consume(names.queue, inbox, prefetch=10)
    body = bytes(index % 251 for index in range(size))
    await bus.publish(names.command(body))
    await bus.publish(names.command(b"after"))
    assert [delivery.body for delivery in await inbox.count(2)] == [body, b"after"]


async def test_absent_properties_are_none(world: World, names: Names) -> None:
    bus = await world.bus()
    await bus.declare(names.topology())
    inbox = Inbox(ack)
    await bus.consume(names.queue, inbox, prefetch=10)
    await bus.publish(names.command())
    delivery = await inbox.one()
    assert (delivery.correlation_id, delivery.reply_to, dict(delivery.headers)) == (None, None, {})


async def test_order_is_kept(world: World, names: Names) -> None:
    bus = await world.bus()
    await bus.declare(names.topology())
    inbox = Inbox(ack)
    await bus.consume(names.queue, inbox, prefetch=50)
    bodies = [str(number).encode() for number in range(500)]
    await asyncio.gather(*(bus.publish_soon(names.command(body)) for body in bodies))
    await inbox.count(500)
    assert inbox.bodies == bodies
    await depth_becomes(bus, names.queue, 0)


async def test_a_thousand_concurrent_publishes_are_all_confirmed(world: World, names: Names) -> None:
    bus = await world.bus()
    await bus.declare(names.topology())
    await asyncio.gather(*(bus.publish(names.command()) for _ in range(1000)))
    await depth_becomes(bus, names.queue, 1000)


async def test_acknowledged_messages_are_gone_others_come_again(world: World, names: Names) -> None:
    first = await world.bus("first")
    await first.declare(names.topology())
    inbox = Inbox()
    await first.consume(names.queue, inbox, prefetch=20)
    await asyncio.gather(*(first.publish_soon(names.command(b"%d" % number)) for number in range(10)))
    deliveries = await inbox.count(10)
    for number in (9, 0, 3, 1, 5):  # with gaps and out of order
        deliveries[number].ack()
        deliveries[number].ack()  # a second settlement changes nothing
    await first.close()
    second = await world.bus("second")
    again = Inbox(ack)
    await second.consume(names.queue, again, prefetch=20)
    await again.count(5)
    assert again.bodies == [b"2", b"4", b"6", b"7", b"8"]
    assert all(delivery.redelivered for delivery in again.all)
    await depth_becomes(second, names.queue, 0)


async def test_acknowledgements_between_rejections(world: World, names: Names) -> None:
    bus = await world.bus()
    await bus.declare(names.topology())
    inbox = Inbox()
    await bus.consume(names.queue, inbox, prefetch=20)
    await asyncio.gather(*(bus.publish_soon(names.command(b"%d" % number)) for number in range(8)))
    for number, delivery in enumerate(await inbox.count(8)):
        if number % 3 == 1:
            delivery.reject(requeue=False)
        else:
            delivery.ack()
    await depth_becomes(bus, names.dead, 3)
    dead = Inbox(ack)
    await bus.consume(names.dead, dead, prefetch=10)
    await dead.count(3)
    assert sorted(dead.bodies) == [b"1", b"4", b"7"]


async def test_rejected_is_dead_lettered_with_its_history(world: World, names: Names) -> None:
    bus = await world.bus()
    await bus.declare(names.topology())
    await bus.consume(names.queue, Inbox(lambda delivery: delivery.reject(requeue=False)), prefetch=10)
    dead = Inbox(ack)
    await bus.consume(names.dead, dead, prefetch=10)
    sent = names.command(b"bad")
    await bus.publish(sent)
    delivery = await dead.one()
    assert (delivery.body, delivery.message_id) == (b"bad", sent.message_id)
    assert delivery.routing_key == sent.routing_key
    death = delivery.headers["x-death"][0]
    assert (death["queue"], death["reason"], death["count"]) == (names.queue, "rejected", 1)
    assert death["exchange"] == names.exchange
    assert delivery.headers["x-first-death-queue"] == names.queue


async def test_requeued_too_often_is_dead_lettered(world: World, names: Names) -> None:
    bus = await world.bus()
    await bus.declare(names.topology(limit=2))
    tries = Inbox(lambda delivery: delivery.reject(requeue=True))
    await bus.consume(names.queue, tries, prefetch=10)
    dead = Inbox(ack)
    await bus.consume(names.dead, dead, prefetch=10)
    await bus.publish(names.command(b"poison"))
    delivery = await dead.one()
    assert delivery.body == b"poison"
    assert delivery.headers["x-death"][0]["reason"] == "delivery_limit"
    assert [each.redelivered for each in tries.all] == [False, True, True]
    assert [each.headers.get("x-delivery-count", 0) for each in tries.all] == [0, 1, 2]


async def test_a_failing_callback_dead_letters_and_does_not_stall(world: World, names: Names) -> None:
    def fail_once(delivery: Delivery) -> None:
        if delivery.body == b"bad":
            raise RuntimeError("a defect")
        delivery.ack()

    bus = await world.bus()
    await bus.declare(names.topology())
    inbox = Inbox(fail_once)
    await bus.consume(names.queue, inbox, prefetch=1)
    await bus.publish(names.command(b"bad"))
    await bus.publish(names.command(b"good"))
    await inbox.count(2)
    await depth_becomes(bus, names.dead, 1)


async def test_an_unroutable_command_goes_to_the_alternate_exchange(world: World, names: Names) -> None:
    bus = await world.bus()
    await bus.declare(names.topology())
    strayed = Inbox(ack)
    await bus.consume(names.unroutable, strayed, prefetch=10)
    await bus.publish(names.command(routing_key="instance.start.nobody", mandatory=True))
    assert (await strayed.one()).routing_key == "instance.start.nobody"


async def test_mandatory_without_a_queue_is_unroutable(world: World, names: Names) -> None:
    bus = await world.bus()
    await bus.declare(names.topology())
    with pytest.raises(Unroutable) as caught:
        await bus.publish(names.command(exchange="", routing_key="no.such.queue", mandatory=True))
    assert caught.value.details["routing_key"] == "no.such.queue"
    await bus.publish(names.command(exchange="", routing_key="no.such.queue"))  # not mandatory: dropped, confirmed
    await bus.publish(names.command(mandatory=True))  # and what has a queue arrives
    await depth_becomes(bus, names.queue, 1)


async def test_two_in_flight_with_one_id_keep_their_outcomes(world: World, names: Names) -> None:
    bus = await world.bus()
    await bus.declare(names.topology())
    for _ in range(20):
        outcomes = await asyncio.gather(
            bus.publish_soon(names.command(message_id="same", mandatory=True)),
            bus.publish_soon(names.command(message_id="same", exchange="", routing_key="none", mandatory=True)),
            bus.publish_soon(names.command(message_id="same")),
            bus.publish_soon(names.command(message_id="same", exchange="", routing_key="none", mandatory=True)),
            bus.publish_soon(names.command(message_id="same", mandatory=True)),
            return_exceptions=True,
        )
        assert [type(outcome) for outcome in outcomes] == [
            type(None), Unroutable, type(None), Unroutable, type(None),
        ]  # fmt: skip
    await depth_becomes(bus, names.queue, 60)


async def test_topics_with_dots_in_host_names(world: World, names: Names) -> None:
    bus = await world.bus()
    hosts = ("a.example.org", "b.example.org")
    queues = [f"{names.queue}.{host}" for host in hosts]
    await bus.declare(
        Topology(
            exchanges=(Exchange(names.exchange),),
            queues=[Queue(queue) for queue in queues],
            bindings=[
                Binding(names.exchange, pattern, queue)
                for queue, host in zip(queues, hosts, strict=True)
                for pattern in (f"*.*.{host}", "*.*.all")
            ],
        )
    )
    inboxes = [Inbox(ack), Inbox(ack)]
    for queue, inbox in zip(queues, inboxes, strict=True):
        await bus.consume(queue, inbox, prefetch=10)
    for key in ("instance.start.a.example.org", "instance.start.b.example.org", "host.ping.all"):
        await bus.publish(names.command(key.encode(), routing_key=key))
    # One word too many or too few for the two stars.
    await bus.publish(names.command(routing_key="instance.disk.start.a.example.org"))
    await bus.publish(names.command(routing_key="start.a.example.org"))
    await inboxes[0].count(2)
    await inboxes[1].count(2)
    assert inboxes[0].bodies == [b"instance.start.a.example.org", b"host.ping.all"]
    assert inboxes[1].bodies == [b"instance.start.b.example.org", b"host.ping.all"]


async def test_hash_matches_any_number_of_words(world: World, names: Names) -> None:
    bus = await world.bus()
    await bus.declare(
        Topology(
            exchanges=(Exchange(names.exchange),),
            queues=(Queue(names.queue),),
            bindings=(Binding(names.exchange, "a.#.z", names.queue),),
        )
    )
    for key in ("a.z", "a.b.z", "a.b.c.z", "a", "z", "a.b", "b.a.z"):
        await bus.publish(names.command(routing_key=key))
    await depth_becomes(bus, names.queue, 3)


async def test_cc_reaches_each_queue_once(world: World, names: Names) -> None:
    bus = await world.bus()
    other = f"{names.queue}.other"
    await bus.declare(
        Topology(
            exchanges=(Exchange(names.unroutable), Exchange(names.exchange, alternate=names.unroutable)),
            queues=(Queue(names.queue), Queue(other), Queue(names.unroutable)),
            bindings=(
                Binding(names.unroutable, "#", names.unroutable),
                Binding(names.exchange, "x.one", names.queue),
                Binding(names.exchange, "x.three", names.queue),
                Binding(names.exchange, "x.two", other),
            ),
        )
    )
    await bus.publish(names.command(b"both", routing_key="x.one", cc=("x.two", "x.three"), mandatory=True))
    await bus.publish(names.command(b"cc only", routing_key="x.none", cc=("x.two",), mandatory=True))
    first, second = Inbox(ack), Inbox(ack)
    await bus.consume(names.queue, first, prefetch=10)
    await bus.consume(other, second, prefetch=10)
    await second.count(2)
    await first.count(1)
    assert (first.bodies, second.bodies) == ([b"both"], [b"both", b"cc only"])
    assert first.all[0].routing_key == "x.one"
    await bus.publish(names.command(b"nobody's", routing_key="x.none", cc=("x.nothing",)))
    await depth_becomes(bus, names.unroutable, 1)
    await depth_becomes(bus, names.queue, 0)


async def test_old_messages_expire(world: World, names: Names) -> None:
    bus = await world.bus()
    await bus.declare(names.topology())
    await bus.publish(names.command(b"old", expiration_s=0.02))
    await depth_becomes(bus, names.queue, 0)
    await bus.publish(names.command(b"fresh", expiration_s=60))
    inbox = Inbox(ack)
    await bus.consume(names.queue, inbox, prefetch=1)
    assert (await inbox.one()).body == b"fresh"


async def test_a_missing_exchange_is_named_and_the_bus_goes_on(world: World, names: Names) -> None:
    bus = await world.bus()
    await bus.declare(names.topology())
    lost = names.command(exchange=f"{names.exchange}.missing")
    outcome, *_ = await asyncio.gather(
        bus.publish_soon(lost), bus.publish_soon(names.command()), return_exceptions=True
    )
    assert isinstance(outcome, FailedPrecondition)
    assert outcome.code == "bus_no_exchange"
    assert "missing" in outcome.message
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                await bus.publish(names.command(b"after"))
                break
            except Unavailable:
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("field", ["routing_key", "message_id", "correlation_id"])
async def test_a_name_that_amqp_cannot_carry_is_refused(world: World, names: Names, field: str) -> None:
    bus = await world.bus()
    await bus.declare(names.topology())
    for mandatory in (False, True):
        with pytest.raises(InvalidArgument) as caught:
            await bus.publish(names.command(mandatory=mandatory, **{field: "x" * 256}))
        assert caught.value.code == "bus_name_too_long"
    await bus.publish(Outgoing("", names.queue, b"x", "y" * 255, mandatory=True))
