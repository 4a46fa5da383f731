"""The verbs' pages and the tables of docs/contract.md against the messages: every example, every field."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from agent.messages.commands import COMMANDS, parse_command
from agent.messages.events import EVENTS, Problem
from agent.messages.results import RESULTS, InstanceView, OperationView, PowerResult
from agent.messages.spec import InstanceSpec

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted([*DOCS.glob("verbs-*.md"), DOCS / "machine.md"])
CONTRACT = (DOCS / "contract.md").read_text("utf-8")

DATA = {command.verb: command for command in COMMANDS}
EVENT = {event.kind: event for event in EVENTS}
EXAMPLES = [
    pytest.param(kind or "", text, id=f"{page.stem}-{place}")
    for page in PAGES
    for place, (kind, text) in enumerate(
        re.findall(
            r"(?:^<!-- json: (.+?) -->\n)?^```json\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE
        )
    )
]
ROWS: list[tuple[str, str, str]] = [
    (verb, data, result)
    for verb, _subject, data, result in re.findall(
        r"^\| `([a-z]+\.[a-z-]+)` \| ([^|]*)\| ([^|]*)\| ([^|]*) \|$",
        CONTRACT.partition("## Commands")[2].partition("## Answers")[0],
        re.MULTILINE,
    )
]


@pytest.mark.parametrize(("kind", "text"), EXAMPLES)
def test_example_is_valid(kind: str, text: str) -> None:
    """A block says above itself what it is, so that it can be checked."""
    text = re.sub(r'("sha256": ")[0-9a-f]*…"', rf'\g<1>{"a" * 64}"', text)
    what, _, name = kind.partition(" ")
    match what:
        case "command":
            parse_command(text.encode())
        case "data":
            DATA[name].model_validate_json(text)
        case "result":
            _is_complete(RESULTS[name], json.loads(text))
        case "event":
            _is_complete(EVENT[name], json.loads(text))
        case "error":
            _is_complete(Problem, json.loads(text) | {"message": ""})
        case "spec":
            rest = {"name": "example", "vcpus": 1, "memory_mib": 128}
            InstanceSpec.model_validate_json(json.dumps(rest | json.loads(text)))
        case _:
            pytest.fail("put <!-- json: command | data VERB | result VERB | event KIND | error | spec --> above it")


def _is_complete(model: Any, example: dict[str, Any]) -> None:
    """What the agent sends has no field that the model does not know; readers may ignore such, examples may not."""
    model.model_validate_json(json.dumps(example))
    assert example.keys() <= model.model_fields.keys()


def test_every_verb_has_one_row() -> None:
    assert sorted(verb for verb, *_ in ROWS) == sorted(DATA)


@pytest.mark.parametrize(("verb", "data"), [pytest.param(verb, data, id=verb) for verb, data, _ in ROWS])
def test_row_has_all_data(verb: str, data: str) -> None:
    fields = DATA[verb].model_fields
    names = re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)", "", data))
    assert sorted(names) == sorted(fields)
    needed = {name for name, field in fields.items() if field.is_required()}
    assert set(re.findall(r"\*\*`(\w+)`\*\*", data)) == needed


@pytest.mark.parametrize(("verb", "result"), [pytest.param(verb, result, id=verb) for verb, _, result in ROWS])
def test_row_has_the_result(verb: str, result: str) -> None:
    model = RESULTS[verb]
    if result.startswith("the instance"):
        assert model is InstanceView
    elif result.startswith("the operation"):
        assert model is OperationView
    elif result.startswith("as "):
        assert model is RESULTS[result.strip("as `")]
    else:
        named = {*re.findall(r"`(\w+)`", result)}
        assert named <= model.model_fields.keys()
        left_out = {"instance_id"} | ({"forced"} if model is PowerResult else set())  # most power verbs force nothing
        assert model.model_fields.keys() - named <= left_out


@pytest.mark.parametrize("page", [DOCS / "index.md", DOCS.parent / "README.md"], ids=lambda page: page.name)
def test_table_of_families_has_every_verb(page: Path) -> None:
    """Within a cell the noun is said once and holds until the next."""
    found: set[str] = set()
    for line in page.read_text("utf-8").splitlines():
        noun = ""
        for before, verb in re.findall(r"`(?:(\w+)\.)?([a-z-]+)`", line):
            noun = before or noun
            found.add(f"{noun}.{verb}")
    assert sorted(DATA.keys() - found) == []
