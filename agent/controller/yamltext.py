"""Reads YAML as the plain data that JSON can say, with the line of every field. Pure.

Values are those of YAML 1.2's core schema, so a MAC address is no number and `no` is no truth value. What has no
place in a spec is refused: tags, duplicate keys, keys that are no text, expansion by aliases without a bound.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

Path = tuple[str | int, ...]
Lines = dict[Path, int]

MAX_NODES = 20_000
"""Values in a file, aliases expanded: far above the largest spec, far below what hurts."""

MAX_DEPTH = 32

_CONSTANTS = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
}  # fmt: skip
# Long digits stay text: a checksum is no number. So do leading zeros, which are octal to some and decimal to others.
_INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,18})")
_FLOAT = re.compile(r"[-+]?(\.[0-9]{1,18}|(0|[1-9][0-9]{0,17})(\.[0-9]{0,18})?)([eE][-+]?[0-9]{1,3})?")
_PLAIN_TAGS = frozenset({f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map")})


class YamlError(Exception):
    """The text is not usable. `line` counts from 1; `path` is the field, as far as it is known."""

    def __init__(self, message: str, *, line: int | None, path: Path = ()) -> None:
        super().__init__(message)
        self.message = message
        self.line = line
        self.path = path


def parse_yaml(text: str) -> tuple[Any, Lines]:
    """Return the document's value and the line of each of its fields. Raises `YamlError`."""
    try:
        root = yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        what = ": ".join(part for part in (exc.context, exc.problem) if part)
        raise YamlError(f"not valid YAML: {what}", line=mark.line + 1 if mark else None) from exc
    except (yaml.YAMLError, RecursionError) as exc:
        what = "nested too deeply" if isinstance(exc, RecursionError) else str(exc).partition("\n")[0]
        raise YamlError(f"not valid YAML: {what}", line=None) from exc
    if root is None:
        raise YamlError("the file is empty", line=None)
    reader = _Reader()
    return reader.value(root, ()), reader.lines


class _Reader:
    def __init__(self) -> None:
        self.lines: Lines = {}
        self._count = 0

    def value(self, node: yaml.Node, path: Path) -> Any:
        line = node.start_mark.line + 1
        self.lines.setdefault(path, line)
        self._count += 1
        if self._count > MAX_NODES or len(path) > MAX_DEPTH:
            raise YamlError("too large or nested too deeply for a spec", line=line, path=path)
        if node.tag not in _PLAIN_TAGS:
            raise YamlError(f"the tag {node.tag} is not allowed in a spec", line=line, path=path)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)  # noqa: S101 (there are three kinds of node)
        return _scalar(node)

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag not in _PLAIN_TAGS:
                raise YamlError("a key must be plain text", line=line, path=path)
            key = str(key_node.value)
            if key in found:
                raise YamlError("the key is there twice", line=line, path=(*path, key))
            self.lines[*path, key] = line
            found[key] = self.value(value_node, (*path, key))
        return found


def _scalar(node: yaml.ScalarNode) -> Any:
    text = str(node.value)
    if node.style is not None:
        return text
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text
