"""Spec files: what is accepted, and how what is not is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from agent.controller.specfile import InvalidSpec, load_spec
from agent.controller.yamltext import YamlError, parse_yaml
from agent.messages.spec import InstanceSpec

EXAMPLES = Path(__file__).parents[2] / "deploy" / "examples"
GOOD = b"name: a\nvcpus: 1\nmemory_mib: 64\nroot_disk: {size_mib: 1}\n"


def findings(content: bytes, name: str = "spec.yaml") -> list[tuple[str, int | None, str]]:
    with pytest.raises(InvalidSpec) as caught:
        load_spec(name, content)
    return [(f.field, f.line, f.message) for f in caught.value.findings]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda p: p.name)
def test_the_examples_are_valid(path: Path) -> None:
    load_spec(path.name, path.read_bytes())


def test_the_full_example_has_every_field() -> None:
    spec = load_spec("full.yaml", (EXAMPLES / "full.yaml").read_bytes())
    assert _unset(spec) == []
    assert {nic.type for nic in spec.nics} == {"network", "bridge", "user"}


def test_the_minimal_example_is_minimal() -> None:
    spec = load_spec("minimal.yaml", (EXAMPLES / "minimal.yaml").read_bytes())
    assert spec.model_fields_set == {n for n, f in InstanceSpec.model_fields.items() if f.is_required()}


def _unset(model: BaseModel) -> list[str]:
    """Fields that no model of their class sets: some exclude each other, and are shown side by side."""
    classes: dict[type[BaseModel], set[str]] = {}

    def look(item: BaseModel) -> None:
        classes.setdefault(type(item), set()).update(item.model_fields_set)
        for name in type(item).model_fields:
            value = getattr(item, name)
            for part in value if isinstance(value, list) else [value]:
                if isinstance(part, BaseModel):
                    look(part)

    look(model)
    shown = {(parent, name) for cls, names in classes.items() for parent in cls.__mro__ for name in names}
    declared = {(next(p for p in reversed(cls.__mro__) if name in getattr(p, "model_fields", {})), name)
                for cls in classes for name in cls.model_fields}
    return sorted(f"{cls.__name__}.{name}" for cls, name in declared - shown)


def test_json_and_yaml_say_the_same() -> None:
    text = b'{"name": "a",\n\t"vcpus": 1, "memory_mib": 64, "root_disk": {"size_mib": 1}}'
    assert load_spec("spec.json", text) == load_spec("standard input", text) == load_spec("x.yaml", GOOD)
    assert load_spec("standard input", GOOD).name == "a"


def test_every_wrong_field_is_named_with_its_line() -> None:
    text = b"name: a\nvcpus: 0\ncpus: 1\nroot_disk:\n  size_mib: '5'\nnics:\n- type: bridge\n  mac: 52:54:00:12:34:56\n"
    found = findings(text)
    assert [(field, line) for field, line, _ in found] == [
        ("vcpus", 2),
        ("memory_mib", 1),
        ("root_disk.size_mib", 5),
        ("nics.0.bridge", 7),
        ("cpus", 3),
    ]
    assert found[-1][2] == "no such field"
    assert found[1][2] == "missing"


def test_the_sentence_begins_with_file_and_line() -> None:
    with pytest.raises(InvalidSpec, match=r"^spec\.yaml:2: vcpus: Input should be") as caught:
        load_spec("spec.yaml", GOOD.replace(b"vcpus: 1", b"vcpus: 0"))
    assert caught.value.code == "invalid_spec"


def test_json_findings_have_lines_too() -> None:
    text = b'{"name": "a",\n "vcpus": 0, "memory_mib": 64, "root_disk": {"size_mib": 1}}'
    assert findings(text, "spec.json")[0][:2] == ("vcpus", 2)


def test_a_rule_over_several_fields() -> None:
    nic = b"- {type: user, mac: 52:54:00:12:34:56}\n"
    assert findings(GOOD + b"nics:\n" + nic + nic)[0][2].startswith("two NICs have the same mac")


@pytest.mark.parametrize(
    ("content", "field", "line", "message"),
    [
        (b"name: a\nname: b\n", "name", 2, "twice"),
        (b"seed:\n  datasource: nocloud\n  datasource: x\n", "seed.datasource", 3, "twice"),
        (b"name: !!python/object/apply:os.system [x]\n", "name", 1, "tag"),
        (b"name: !!int 5\n", "name", 1, "tag"),
        (b"? [a]\n: 1\n", "", 1, "plain text"),
        (b"a: &x [*x]\n", None, 1, "too large"),
        (b"a: [\n", "", 2, "not valid YAML"),
        (b"a: 1\n---\nb: 1\n", "", 2, "single document"),
        (b"a: \x01", "", None, "not valid YAML"),
        (b"[" * 1000, "", None, "deep"),
        (b"", "", None, "empty"),
        (b"- 1\n", "", None, "mapping"),
        (b"a: 1\nb: \xff\n", "", 2, "UTF-8"),
        (b" " * (1024 * 1024 + 1), "", None, "larger"),
    ],
)
def test_unusable_yaml(content: bytes, field: str | None, line: int | None, message: str) -> None:
    [(found_field, found_line, found_message)] = findings(content)
    assert field is None or found_field == field
    assert found_line == line
    assert message in found_message


@pytest.mark.parametrize(
    ("content", "message"),
    [(b'{"a": 1, "a": 2}', "twice"), (b'{"a": NaN}', "NaN"), (b'{"a": ', "not valid JSON"), (b"[" * 200_000, "deep")],
)
def test_unusable_json(content: bytes, message: str) -> None:
    assert message in findings(content, "spec.json")[0][2]


def test_aliases_are_bounded() -> None:
    bomb = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 10)}]\n" for i in range(8)
    )
    with pytest.raises(YamlError, match="too large"):
        parse_yaml(bomb)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("52:54:00:12:34:56", "52:54:00:12:34:56"),
        ("no", "no"),
        ("2001-01-01", "2001-01-01"),
        ("010", "010"),
        ("1_000", "1_000"),
        ("12", 12),
        ("-3", -3),
        ("1.5", 1.5),
        ("1e3", 1000.0),
        ("true", True),
        ("~", None),
        ("", None),
        ("'12'", "12"),
        ('"true"', "true"),
        ("1" * 64, "1" * 64),
        ("1" * 30 + "e" + "1" * 33, "1" * 30 + "e" + "1" * 33),
        (".inf", ".inf"),
        (".", "."),
        ("<<", "<<"),
    ],
)
def test_plain_values(text: str, value: Any) -> None:
    parsed = parse_yaml(f"key: {text}\n")[0]["key"]
    assert (parsed, type(parsed)) == (value, type(value))
