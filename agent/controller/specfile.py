"""Reads a spec, or a part of one, from a file's text, YAML or JSON; says what is wrong by field and line. Pure."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from agent.controller.yamltext import Lines, Path, YamlError, parse_yaml
from agent.errors import InvalidArgument
from agent.messages.commands import MAX_COMMAND_BYTES
from agent.messages.spec import InstanceSpec

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong. `field` is dotted, "" for the file as a whole; `line` counts from 1."""

    field: str
    line: int | None
    message: str


class InvalidSpec(InvalidArgument):
    """The file is no valid spec; nothing was sent. `findings` has all that is wrong."""

    default_code = "invalid_spec"

    def __init__(self, name: str, findings: list[Finding]) -> None:
        self.findings = findings
        lines = []
        for finding in findings:
            place = name if finding.line is None else f"{name}:{finding.line}"
            lines.append(": ".join(part for part in (place, finding.field, finding.message) if part))
        super().__init__("\n".join(lines))


def load_spec(name: str, content: bytes) -> InstanceSpec:
    """Read and validate a spec. `name` is the file's, for messages and to tell JSON from YAML by its ending.

    Raises `InvalidSpec`, with every wrong field where the text as such can be read.
    """
    return load(InstanceSpec, name, content, what="a spec")


def load(model: type[M], name: str, content: bytes, *, what: str) -> M:
    """As `load_spec`, for any model; `what` names it in messages."""
    if len(content) > MAX_COMMAND_BYTES:
        raise InvalidSpec(name, [Finding("", None, f"larger than {MAX_COMMAND_BYTES} bytes: not {what}")])
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        line = content[: exc.start].count(b"\n") + 1
        raise InvalidSpec(name, [Finding("", line, "not UTF-8 text")]) from exc
    try:
        value, lines = _parse(name, text)
    except YamlError as exc:
        raise InvalidSpec(name, [Finding(_dotted(exc.path), exc.line, exc.message)]) from exc
    if not isinstance(value, dict):
        raise InvalidSpec(name, [Finding("", None, f"{what} is a mapping of fields to values")])
    try:
        return model.model_validate_json(json.dumps(value))
    except ValidationError as exc:
        found = exc.errors(include_url=False, include_input=False)
        raise InvalidSpec(name, [_finding(value, lines, e["loc"], _message(e)) for e in found]) from None


def _parse(name: str, text: str) -> tuple[Any, Lines]:
    is_yaml = name.endswith((".yaml", ".yml"))
    if is_yaml or not (name.endswith(".json") or text.lstrip().startswith("{")):
        return parse_yaml(text)
    try:
        value = json.loads(text, object_pairs_hook=_distinct, parse_constant=_no_constant)
    except json.JSONDecodeError as exc:
        raise YamlError(f"not valid JSON: {exc.msg}", line=exc.lineno) from exc
    except RecursionError as exc:
        raise YamlError("not valid JSON: nested too deeply", line=None) from exc
    except ValueError as exc:
        raise YamlError(f"not valid JSON: {exc}", line=None) from exc
    lines: Lines = {}
    # Nearly all JSON is YAML, whose parser knows the lines. Without them the fields' names must do.
    with suppress(YamlError):
        lines = parse_yaml(text)[1]
    return value, lines


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise YamlError("the key is there twice", line=None, path=(key,))
        found[key] = value
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _finding(value: Any, lines: Lines, loc: tuple[int | str, ...], message: str) -> Finding:
    """Find the field in the file that pydantic means: its path also holds the names of union members."""
    path: Path = ()
    here = value
    for position, part in enumerate(loc):
        last = position == len(loc) - 1
        if isinstance(here, dict) and part == here.get("type") and not last:
            continue
        known_key = isinstance(here, dict) and part in here
        if known_key or (isinstance(here, list) and isinstance(part, int) and part < len(here)):
            here, path = here[part], (*path, part)
        elif last and part != "[key]":
            path = (*path, part)
    known = path
    while known and known not in lines:
        known = known[:-1]
    return Finding(_dotted(path), lines.get(known), message)


def _message(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return "no such field"
    if error["type"] == "missing":
        return "missing"
    message = str(error["msg"])
    return message.removeprefix("Value error, ")


def _dotted(path: Path) -> str:
    return ".".join(str(part) for part in path)
