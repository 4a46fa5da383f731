"""What of the contract may change between releases: two AsyncAPI documents in, broken promises out.

A reader of events knew the old document and gets messages of the new one. A sender of commands knew the old
document and its messages must be taken by the new one. So events may gain and commands may loosen; never the
other way round. New values in an enumeration of events are allowed: readers are told to expect them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]

LOWER_IS_TIGHTER = ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties")
HIGHER_IS_TIGHTER = ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties")


@dataclass
class Shape:
    """A schema with its references followed and its `allOf` and `anyOf` folded."""

    types: set[str] = field(default_factory=set)
    properties: dict[str, list[Any]] = field(default_factory=dict)
    required: set[str] = field(default_factory=set)
    items: list[Any] = field(default_factory=list)
    members: list[Any] = field(default_factory=list)
    values: set[Any] | None = None
    limits: Json = field(default_factory=dict)
    pattern: str | None = None
    variants: dict[str, Any] = field(default_factory=dict)


def broken(old: Json, new: Json) -> list[str]:
    """Name every promise of `old` that `new` breaks; empty if readers and senders of `old` can live with `new`."""
    return sorted({*_addresses(old, new), *_vanished(old, new), *_payloads(old, new), *_codes(old, new)})


def _addresses(old: Json, new: Json) -> Iterator[str]:
    for name, channel in old["channels"].items():
        other = new["channels"].get(name)
        if other is None:
            yield f"channel {name} vanished"
            continue
        if other["address"] != channel["address"]:
            yield f"channel {name} changed its address from {channel['address']} to {other['address']}"
        if other.get("bindings") != channel.get("bindings"):
            yield f"channel {name} changed its exchange or queue"
        for message in channel["messages"].keys() - other["messages"].keys():
            yield f"channel {name} no longer carries {message}"


def _vanished(old: Json, new: Json) -> Iterator[str]:
    for name, operation in old["operations"].items():
        other = new["operations"].get(name)
        if other is None:
            yield f"operation {name} vanished"
        elif other["action"] != operation["action"] or other["channel"] != operation["channel"]:
            yield f"operation {name} changed its direction or channel"
    for name, message in old["components"]["messages"].items():
        other = new["components"]["messages"].get(name)
        if other is None:
            yield f"message {name} vanished"
        elif other["name"] != message["name"]:
            yield f"message {name} changed its type from {message['name']} to {other['name']}"


def _codes(old: Json, new: Json) -> Iterator[str]:
    for code, entry in old["x-error-codes"].items():
        other = new["x-error-codes"].get(code)
        if other is None:
            yield f"error code {code} vanished"
        elif other["retryable"] != entry["retryable"]:
            yield f"error code {code} changed whether a retry can help"


def _payloads(old: Json, new: Json) -> Iterator[str]:
    commands = {
        message
        for name, channel in old["channels"].items()
        if name.startswith("command.")
        for message in channel["messages"]
    }
    for name, message in old["components"]["messages"].items():
        other = new["components"]["messages"].get(name)
        if other is None:
            continue
        check = _command if name in commands else _event
        yield from check(name, _shape(old, [message["payload"]]), _shape(new, [other["payload"]]), old, new)


def _event(path: str, before: Shape, after: Shape, old: Json, new: Json) -> Iterator[str]:
    if before.types and not _within(after.types, before.types):
        yield f"event field {path} was retyped from {_list(before.types)} to {_list(after.types)}"
    for name in before.required - after.required:
        if name in after.properties:
            yield f"event field {path}.{name} was always there and is optional now"
    for name, schemas in before.properties.items():
        if name not in after.properties:
            yield f"event field {path}.{name} was removed"
            continue
        yield from _event(f"{path}.{name}", _shape(old, schemas), _shape(new, after.properties[name]), old, new)
    if before.items and after.items:
        yield from _event(f"{path}[]", _shape(old, before.items), _shape(new, after.items), old, new)
    if before.members and after.members:
        yield from _event(f"{path}.*", _shape(old, before.members), _shape(new, after.members), old, new)
    for key in before.variants.keys() & after.variants.keys():
        yield from _event(
            f"{path}<{key}>", _shape(old, [before.variants[key]]), _shape(new, [after.variants[key]]), old, new
        )


def _command(path: str, before: Shape, after: Shape, old: Json, new: Json) -> Iterator[str]:
    if after.types and not _within(before.types, after.types):
        yield f"command field {path} was retyped from {_list(before.types)} to {_list(after.types)}"
    for name in after.required - before.required:
        yield f"command field {path}.{name} is required now"
    if after.values is not None and (before.values is None or before.values - after.values):
        lost = "any other" if before.values is None else _list(map(str, before.values - after.values))
        yield f"command field {path} no longer takes {lost}"
    yield from _tightened(path, before, after)
    for name, schemas in before.properties.items():
        if name not in after.properties:
            yield f"command field {path}.{name} was removed"
            continue
        yield from _command(f"{path}.{name}", _shape(old, schemas), _shape(new, after.properties[name]), old, new)
    if before.items and after.items:
        yield from _command(f"{path}[]", _shape(old, before.items), _shape(new, after.items), old, new)
    if before.members and after.members:
        yield from _command(f"{path}.*", _shape(old, before.members), _shape(new, after.members), old, new)
    for key, schema in before.variants.items():
        if key not in after.variants:
            yield f"command field {path} no longer takes the variant {key}"
            continue
        yield from _command(f"{path}<{key}>", _shape(old, [schema]), _shape(new, [after.variants[key]]), old, new)


def _tightened(path: str, before: Shape, after: Shape) -> Iterator[str]:
    for key in LOWER_IS_TIGHTER:
        if key in after.limits and (key not in before.limits or after.limits[key] < before.limits[key]):
            yield f"command field {path} has a tighter {key}"
    for key in HIGHER_IS_TIGHTER:
        if key in after.limits and (key not in before.limits or after.limits[key] > before.limits[key]):
            yield f"command field {path} has a tighter {key}"
    if after.pattern is not None and after.pattern != before.pattern:
        yield f"command field {path} has another pattern"


def _shape(document: Json, schemas: list[Any]) -> Shape:
    shape = Shape()
    for schema in schemas:
        _fold(document, schema, shape)
    return shape


def _fold(document: Json, schema: Any, shape: Shape) -> None:
    if not isinstance(schema, dict):
        return
    if "$ref" in schema:
        _fold(document, document["components"]["schemas"][schema["$ref"].rpartition("/")[2]], shape)
    if isinstance(schema.get("type"), str):
        shape.types.add(schema["type"])
    for name, value in schema.get("properties", {}).items():
        shape.properties.setdefault(name, []).append(value)
    shape.required.update(schema.get("required", ()))
    if "items" in schema:
        shape.items.append(schema["items"])
    shape.members += schema.get("patternProperties", {}).values()
    if isinstance(schema.get("additionalProperties"), dict):
        shape.members.append(schema["additionalProperties"])
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if values is not None:
        shape.values = set(values) if shape.values is None else shape.values & set(values)
    for key in (*LOWER_IS_TIGHTER, *HIGHER_IS_TIGHTER):
        if key in schema:
            shape.limits[key] = schema[key]
    shape.pattern = schema.get("pattern", shape.pattern)
    for part in schema.get("allOf", ()):
        _fold(document, part, shape)
    for part in schema.get("anyOf", ()):  # a value and null, or several plain types
        _fold(document, part, shape)
    for part in schema.get("oneOf", ()):
        inner = _shape(document, [part])
        tag = _shape(document, inner.properties.get("type", []))
        shape.variants[_list(map(str, tag.values or {"?"}))] = part


def _within(some: set[str], all_of: set[str]) -> bool:
    """Whether every one of `some` is among `all_of`; an integer is a number."""
    return all(kind in all_of or (kind == "integer" and "number" in all_of) for kind in some)


def _list(items: Any) -> str:
    return "|".join(sorted(items)) or "anything"
