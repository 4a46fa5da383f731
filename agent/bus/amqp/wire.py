"""The AMQP 0-9-1 frames that occur per message, to and from bytes. Pure functions.

Everything else of the protocol is aiormq's. Written out by hand because a generic codec takes most of the
time that a message costs; the tests compare it with pamqp, frame by frame.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple, cast

from pamqp import decode, encode
from pamqp.common import FieldTable

from agent.bus.base import Outgoing
from agent.errors import InvalidArgument

METHOD, HEADER, BODY = 1, 2, 3
END_BYTE = 0xCE
END = bytes((END_BYTE,))
OVERHEAD = 8
"""Bytes of a frame that are not payload."""

DELIVER = 60 << 16 | 60
RETURN = 60 << 16 | 50
ACK = 60 << 16 | 80
NACK = 60 << 16 | 120
CANCEL = 60 << 16 | 30
CHANNEL_CLOSE = 20 << 16 | 40
CONNECTION_CLOSE = 10 << 16 | 50
CONNECTION_BLOCKED = 10 << 16 | 60
CONNECTION_UNBLOCKED = 10 << 16 | 61

FRAME_HEAD = struct.Struct(">BHI")
METHOD_INDEX = struct.Struct(">I")
HEARTBEAT = FRAME_HEAD.pack(8, 0, 0) + END

_SETTLE = struct.Struct(">BHIHHQBB")
_CONTENT_HEAD = struct.Struct(">HHQH")
_CONTENT_SIZE = struct.Struct(">Q")
_TAG = struct.Struct(">Q")
_SHORT = struct.Struct(">H")
_PUBLISH_HEAD = struct.pack(">HHH", 60, 40, 0)

_SHORT_STRING_MAX = 255


def ack(channel: int, tag: int, *, multiple: bool) -> bytes:
    """Encode Basic.Ack."""
    return _SETTLE.pack(METHOD, channel, 13, 60, 80, tag, multiple, END_BYTE)


def reject(channel: int, tag: int, *, requeue: bool) -> bytes:
    """Encode Basic.Reject."""
    return _SETTLE.pack(METHOD, channel, 13, 60, 90, tag, requeue, END_BYTE)


def publish(channel: int, message: Outgoing, frame_max: int) -> bytes:
    """Encode Basic.Publish with its header and body. Raises `InvalidArgument` for a name over 255 bytes."""
    method = _publish_method(message.exchange, message.routing_key, message.mandatory)
    body = message.body
    properties = _properties(message, len(body))
    parts = [
        FRAME_HEAD.pack(METHOD, channel, len(method)), method, END,
        FRAME_HEAD.pack(HEADER, channel, len(properties)), properties, END,
    ]  # fmt: skip
    piece = frame_max - OVERHEAD
    if len(body) <= piece:
        if body:
            parts += (FRAME_HEAD.pack(BODY, channel, len(body)), body, END)
    else:
        for start in range(0, len(body), piece):
            part = body[start : start + piece]
            parts += (FRAME_HEAD.pack(BODY, channel, len(part)), part, END)
    return b"".join(parts)


@lru_cache(maxsize=4096)
def _publish_method(exchange: str, routing_key: str, mandatory: bool) -> bytes:
    return _PUBLISH_HEAD + short_string(exchange) + short_string(routing_key) + bytes((mandatory,))


def short_string(text: str) -> bytes:
    """Encode a name. Raises `InvalidArgument` if it is longer than AMQP allows."""
    data = text.encode()
    if len(data) > _SHORT_STRING_MAX:
        raise InvalidArgument(
            f"A routing key, id or name for the broker has {len(data)} bytes; at most 255 are possible.",
            code="bus_name_too_long",
        )
    return bytes((len(data),)) + data


def _properties(message: Outgoing, size: int) -> bytes:
    """Encode a content header; the properties stand in the order of their flag bits."""
    flags = 0x8000 | 0x1000 | 0x0080
    fields = [short_string(message.content_type)]
    if message.headers or message.cc:
        flags |= 0x2000
        fields.append(_table(message))
    fields.append(b"\x02" if message.persistent else b"\x01")
    if message.correlation_id is not None:
        flags |= 0x0400
        fields.append(short_string(message.correlation_id))
    if message.reply_to is not None:
        flags |= 0x0200
        fields.append(short_string(message.reply_to))
    if message.expiration_s is not None:
        flags |= 0x0100
        fields.append(short_string(str(max(0, round(message.expiration_s * 1000)))))
    fields.append(short_string(message.message_id))
    return _CONTENT_HEAD.pack(60, 0, size, flags) + b"".join(fields)


def _table(message: Outgoing) -> bytes:
    headers: dict[str, Any] = dict(message.headers)
    if message.cc:
        headers["CC"] = list(message.cc)
    return encode.field_table(cast("FieldTable", headers))


class Properties(NamedTuple):
    """What a reader needs of a content header."""

    headers: Mapping[str, Any]
    correlation_id: str | None
    reply_to: str | None
    message_id: str | None


def content_size(header: bytes) -> int:
    """Return the size of the body that follows a content header, in bytes."""
    return int(_CONTENT_SIZE.unpack_from(header, 4)[0])


def properties(header: bytes) -> Properties:
    """Decode a content header."""
    flags = _SHORT.unpack_from(header, 12)[0]
    at = 14
    headers: Mapping[str, Any] = {}
    found: dict[int, str] = {}
    for bit in (0x8000, 0x4000):  # content type and encoding
        if flags & bit:
            at += 1 + header[at]
    if flags & 0x2000:
        used, table = decode.field_table(header[at:])
        headers = table
        at += used
    at += (flags & 0x1000 != 0) + (flags & 0x0800 != 0)  # delivery mode, priority
    for bit in (0x0400, 0x0200, 0x0100, 0x0080):  # correlation id, reply to, expiration, message id
        if flags & bit:
            end = at + 1 + header[at]
            found[bit] = header[at + 1 : end].decode()
            at = end
    return Properties(headers, found.get(0x0400), found.get(0x0200), found.get(0x0080))


def deliver_tag(payload: bytes) -> tuple[int, bool, int]:
    """Return delivery tag, redelivered flag and where the exchange's name begins, from a Basic.Deliver."""
    at = 1 + payload[0]
    return _TAG.unpack_from(payload, at)[0], payload[at + 8] & 1 == 1, at + 9


def two_strings(payload: bytes, at: int) -> tuple[str, str]:
    """Decode two names that stand one after the other (exchange and routing key)."""
    middle = at + 1 + payload[at]
    return payload[at + 1 : middle].decode(), payload[middle + 1 : middle + 1 + payload[middle]].decode()


def confirm_tag(payload: bytes) -> tuple[int, bool]:
    """Decode a Basic.Ack or Basic.Nack of the broker: tag, and whether it covers all before it."""
    return _TAG.unpack_from(payload)[0], payload[8] & 1 == 1


def returned_to(payload: bytes) -> tuple[str, str]:
    """Decode exchange and routing key of a Basic.Return."""
    return two_strings(payload, 3 + payload[2])


def close_reason(payload: bytes) -> tuple[int, str]:
    """Decode code and text of a Channel.Close or Connection.Close."""
    return _SHORT.unpack_from(payload)[0], payload[3 : 3 + payload[2]].decode(errors="replace")


def blocked_reason(payload: bytes) -> str:
    """Decode the text of a Connection.Blocked."""
    return payload[1 : 1 + payload[0]].decode(errors="replace")
