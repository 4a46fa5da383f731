"""The hand-written frames against pamqp's, and the tap against every way in which a stream can be cut."""

from __future__ import annotations

import asyncio
import datetime as dt
from typing import Any

import pamqp.frame
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp import commands, header
from pamqp.body import ContentBody
from pamqp.heartbeat import Heartbeat

from agent.bus.amqp import faults, wire
from agent.bus.amqp.consumer import AmqpDelivery, ConsumerChannel
from agent.bus.amqp.transport import Tap
from agent.bus.base import Outgoing
from agent.errors import InvalidArgument

names = st.text(max_size=60)
optional_names = st.none() | names
headers = st.dictionaries(
    st.text(min_size=1, max_size=20), st.none() | st.booleans() | st.integers(-(2**62), 2**62) | names, max_size=4
)
messages = st.builds(
    Outgoing,
    exchange=names,
    routing_key=names,
    body=st.binary(max_size=60),
    message_id=names,
    correlation_id=optional_names,
    reply_to=optional_names,
    cc=st.lists(names, max_size=3),
    headers=headers,
    persistent=st.booleans(),
    mandatory=st.booleans(),
    expiration_s=st.none() | st.floats(0, 1e6),
)


def frames(data: bytes) -> list[tuple[int, Any]]:
    found = []
    while data:
        used, channel, frame = pamqp.frame.unmarshal(data)
        found.append((channel, frame))
        data = data[used:]
    return found


@given(messages, st.integers(1, 65535))
def test_what_is_published_is_what_pamqp_reads(message: Outgoing, channel: int) -> None:
    (_, method), (_, head), *bodies = found = frames(wire.publish(channel, message, 16))
    assert {number for number, _ in found} == {channel}
    assert isinstance(method, commands.Basic.Publish)
    assert (method.exchange, method.routing_key, method.mandatory) == (
        message.exchange, message.routing_key, message.mandatory,
    )  # fmt: skip
    read = head.properties
    assert (read.content_type, read.message_id) == (message.content_type, message.message_id)
    assert (read.correlation_id, read.reply_to) == (message.correlation_id, message.reply_to)
    assert read.delivery_mode == (2 if message.persistent else 1)
    wanted: dict[str, Any] = dict(message.headers)
    if message.cc:
        wanted["CC"] = list(message.cc)
    assert (read.headers or {}) == wanted
    if message.expiration_s is None:
        assert read.expiration is None
    else:
        assert int(read.expiration) == round(message.expiration_s * 1000)
    assert head.body_size == len(message.body)
    assert all(len(body.value) <= 8 for _, body in bodies)
    assert b"".join(body.value for _, body in bodies) == message.body


@given(
    st.builds(
        commands.Basic.Properties,
        content_type=optional_names,
        content_encoding=optional_names,
        headers=st.none() | headers,
        delivery_mode=st.none() | st.sampled_from([1, 2]),
        priority=st.none() | st.integers(0, 255),
        correlation_id=optional_names,
        reply_to=optional_names,
        expiration=optional_names,
        message_id=optional_names,
        timestamp=st.none() | st.just(dt.datetime(2025, 1, 1, tzinfo=dt.UTC)),
        message_type=optional_names,
        user_id=optional_names,
        app_id=optional_names,
    )
)
def test_what_pamqp_writes_is_what_we_read(written: commands.Basic.Properties) -> None:
    # pamqp writes no empty properties, so an empty name reads as none.
    read = wire.properties(header.ContentHeader(body_size=5, properties=written).marshal())
    assert dict(read.headers) == (written.headers or {})
    assert (read.correlation_id or None) == (written.correlation_id or None)
    assert (read.reply_to or None) == (written.reply_to or None)
    assert (read.message_id or None) == (written.message_id or None)


@given(st.integers(1, 65535), st.integers(0, 2**63 - 1), st.booleans())
def test_settlements(channel: int, tag: int, flag: bool) -> None:
    [(number, frame)] = frames(wire.ack(channel, tag, multiple=flag))
    assert isinstance(frame, commands.Basic.Ack)
    assert (number, frame.delivery_tag, frame.multiple) == (channel, tag, flag)
    [(number, frame)] = frames(wire.reject(channel, tag, requeue=flag))
    assert isinstance(frame, commands.Basic.Reject)
    assert (number, frame.delivery_tag, frame.requeue) == (channel, tag, flag)


@pytest.mark.parametrize("field", ["exchange", "routing_key", "message_id", "correlation_id", "reply_to"])
def test_too_long_names_are_refused(field: str) -> None:
    fields = {"exchange": "", "routing_key": "", "message_id": ""} | {field: "ü" * 128}
    with pytest.raises(InvalidArgument):
        wire.publish(1, Outgoing(body=b"", **fields), 4096)


def delivered(channel: int, tag: int, body: bytes, pieces: int = 1) -> bytes:
    method = commands.Basic.Deliver("tag", tag, tag % 2 == 1, "exchange", f"key.{tag}")
    head = header.ContentHeader(body_size=len(body), properties=commands.Basic.Properties(message_id=f"id-{tag}"))
    size = max(1, -(-len(body) // pieces))
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(pamqp.frame.marshal(frame, channel) for frame in (method, head, *map(ContentBody, parts)))


class FakeSession:
    def __init__(self) -> None:
        self.tap = self
        self.written: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.written.append(data)


class FakeTransport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.aborted = False

    def is_closing(self) -> bool:
        return self.aborted

    def abort(self) -> None:
        self.aborted = True


async def tapped() -> tuple[Tap, asyncio.StreamReader, list[AmqpDelivery], FakeTransport]:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(loop=loop)
    tap = Tap(reader, loop)
    transport = FakeTransport()
    tap.connection_made(transport)
    got: list[AmqpDelivery] = []
    session: Any = FakeSession()
    tap.sinks[7] = ConsumerChannel(session, 7, got.append, on_gone=lambda *_: None, on_idle=lambda *_: None)
    return tap, reader, got, transport


STREAM = (
    pamqp.frame.marshal(Heartbeat(), 0)
    + delivered(7, 1, b"one")
    + pamqp.frame.marshal(commands.Basic.QosOk(), 7)
    + delivered(7, 2, b"")
    + delivered(9, 3, b"not ours")
    + delivered(7, 4, b"in several pieces", pieces=4)
    + pamqp.frame.marshal(commands.Connection.Blocked("short of memory"), 0)
)
LEFT_FOR_AIORMQ = (
    pamqp.frame.marshal(Heartbeat(), 0)
    + pamqp.frame.marshal(commands.Basic.QosOk(), 7)
    + delivered(9, 3, b"not ours")
    + pamqp.frame.marshal(commands.Connection.Blocked("short of memory"), 0)
)


@pytest.mark.parametrize("size", [1, 2, 7, 8, 13, 64, 10_000])
async def test_the_tap_takes_only_its_frames_however_the_stream_is_cut(size: int) -> None:
    tap, reader, got, _ = await tapped()
    for start in range(0, len(STREAM), size):
        tap.data_received(STREAM[start : start + size])
    tap.connection_lost(None)
    assert await reader.read() == LEFT_FOR_AIORMQ
    assert [(each.tag, each.body, each.redelivered) for each in got] == [
        (1, b"one", True), (2, b"", False), (4, b"in several pieces", False),
    ]  # fmt: skip
    assert [(each.exchange, each.routing_key, each.message_id) for each in got] == [
        ("exchange", f"key.{tag}", f"id-{tag}") for tag in (1, 2, 4)
    ]
    assert (tap.blocked, tap.blocked_count) == (True, 1)


@pytest.mark.parametrize(
    "stream",
    [
        pytest.param(delivered(7, 1, b"x")[:-1] + b"\x00", id="no end mark"),
        pytest.param(
            b"\x01\x00\x07\x00\x00\x00\x05\x00\x3c\x00\x3c\xff\xce" + delivered(7, 1, b"")[-27:], id="cut short"
        ),
    ],
)
async def test_a_frame_that_makes_no_sense_ends_the_connection(stream: bytes) -> None:
    tap, _, got, transport = await tapped()
    tap.data_received(stream)
    assert transport.aborted
    assert got == []


async def test_another_protocol_is_left_to_aiormq() -> None:
    tap, reader, _, _ = await tapped()
    tap.data_received(b"AMQP\x00\x00\x09\x01")
    tap.data_received(b"more")
    tap.connection_lost(None)
    assert await reader.read() == b"AMQP\x00\x00\x09\x01more"


async def test_settlements_of_a_turn_leave_in_one_write() -> None:
    tap, _, got, _ = await tapped()
    sink: Any = tap.sinks[7]
    for tag in range(1, 11):
        tap.data_received(delivered(7, tag, b"x"))
    for tag in (1, 2, 4, 6, 3):
        got[tag - 1].ack()
    got[7].reject(requeue=True)
    got[7].ack()  # settled already
    await asyncio.sleep(0)
    session = sink._session
    assert len(session.written) == 1
    read = [
        (type(frame).__name__, frame.delivery_tag, getattr(frame, "multiple", None))
        for _, frame in frames(session.written[0])
    ]
    assert read == [("Reject", 8, None), ("Ack", 6, False), ("Ack", 4, True)]
    for tag in (5, 7, 9, 10):
        got[tag - 1].ack()
    await asyncio.sleep(0)
    assert [frame.delivery_tag for _, frame in frames(session.written[1])] == [10]
    sink.on_closed(0, "gone")
    tap.data_received(delivered(7, 11, b"late"))
    got[-1].ack()
    await asyncio.sleep(0)
    assert len(session.written) == 2


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(111, "Connect call failed"), "The broker b:1 cannot be reached: Connect call failed."),
        (OSError("Multiple exceptions: [Errno 111] x, [Errno 111] y"),
         "The broker b:1 cannot be reached: [Errno 111] x, [Errno 111] y."),
        (TimeoutError(), "The broker b:1 cannot be reached: no answer in time."),
    ],
)  # fmt: skip
def test_a_broker_that_cannot_be_reached_is_told_with_the_reason(error: OSError, sentence: str) -> None:
    told = faults.connect_error(error, None, "b:1")
    assert (told.code, told.message) == ("bus_unavailable", sentence)


def test_a_reason_of_the_broker_ends_with_one_full_stop() -> None:
    told = faults.connect_error(OSError(), (403, "Login was refused. See the log."), "b:1")
    assert told.code == "bus_access_refused"
    assert told.message == "The broker b:1 refuses access: Login was refused. See the log."
