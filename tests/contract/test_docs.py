"""The pages under docs/ against the program: error codes, configuration, metrics, verbs, events, links."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

import agent
from agent import config, errors, metrics
from agent.bus.amqp import AmqpSettings
from agent.drivers.libvirt.settings import LibvirtSettings
from agent.errors import ComputeError
from agent.exports.policy import ExportPolicy
from agent.images.policy import ImagePolicy
from agent.messages.codes import ERROR_CODES
from agent.messages.commands import COMMANDS
from agent.messages.events import EVENTS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
CONTRACT = (DOCS / "contract.md").read_text("utf-8")
OPERATING = (DOCS / "operating.md").read_text("utf-8")
PAGES = [*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]

CLASSES: dict[str, type[ComputeError]] = {
    name: found for name, found in vars(errors).items() if isinstance(found, type) and issubclass(found, ComputeError)
}


def _constants(node: ast.AST) -> list[str]:
    """The texts that an expression can have as its value."""
    match node:
        case ast.Constant(value=str(text)):
            return [text] if re.fullmatch(r"[a-z][a-z_]*", text) else []
        case ast.IfExp(body=body, orelse=orelse):
            return _constants(body) + _constants(orelse)
        case ast.BoolOp(values=values):
            return [text for value in values for text in _constants(value)]
    return []


def _name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _codes_of(tree: ast.AST) -> list[tuple[str, str]]:
    """Every code that a module can give an error, with the class that it is given to ("" if not visible)."""
    found: list[tuple[str, str]] = []
    assigned = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    named = {name: node.value for node in assigned if (name := _name(node.targets[0])).isupper()}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = _name(node.func)
            for keyword in node.keywords:
                if keyword.arg == "code":
                    value = named.get(_name(keyword.value), keyword.value)
                    found += [(code, called) for code in _constants(value)]
            if called in CLASSES and not any(keyword.arg == "code" for keyword in node.keywords):
                found.append((CLASSES[called].default_code, called))
            if called == "Rule" and len(node.args) > 2:  # the libvirt driver's table: code, class, our code
                found += [(code, _name(node.args[1])) for code in _constants(node.args[2])]
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            pairs = [(target, node.value) for target in targets]
            if isinstance(targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(targets[0].elts, node.value.elts, strict=True))
            for target, value in pairs:
                if _name(target) in {"code", "error_code", "default_code"}:
                    found += [(code, "") for code in _constants(value)]
    return found


def _raised() -> dict[str, set[str]]:
    codes: dict[str, set[str]] = defaultdict(set)
    for path in Path(agent.__file__).parent.rglob("*.py"):
        if path.name == "codes.py":
            continue
        for code, called in _codes_of(ast.parse(path.read_text("utf-8"))):
            codes[code].add(called)
    return codes


RAISED = _raised()
ROWS = {
    code: retry == "yes" for code, retry in re.findall(r"^\| `(\w+)` \| (yes|no) \| .+ \|$", CONTRACT, re.MULTILINE)
}


def test_every_code_of_the_program_is_in_the_page() -> None:
    missing = sorted(RAISED.keys() - ROWS.keys())
    assert not missing, (
        f"docs/contract.md has no row for {missing}: add those that reach controllers to ERROR_CODES in"
        " agent/messages/codes.py and to the first table, the others to the second table"
    )


def test_every_code_in_the_page_is_in_the_program() -> None:
    assert not sorted(ROWS.keys() - RAISED.keys()), "docs/contract.md has codes that nothing raises"


@pytest.mark.parametrize("code", sorted(ROWS))
def test_page_says_rightly_whether_a_retry_helps(code: str) -> None:
    classes = {CLASSES[name] for name in RAISED[code] if name in CLASSES}
    assert {found.retryable for found in classes} <= {ROWS[code]}


def test_table_of_answers_is_that_of_the_asyncapi_document() -> None:
    answers = CONTRACT.partition("### In answers")[2].partition("### Outside of answers")[0]
    rows = re.findall(r"^\| `(\w+)` \| (yes|no) \| (.+) \|$", answers, re.MULTILINE)
    assert rows == [(code.code, "yes" if code.retryable else "no", code.meaning) for code in ERROR_CODES]


def test_all_verbs_and_events_are_in_the_page() -> None:
    for command in COMMANDS:
        assert f"| `{command.verb}` |" in CONTRACT
    for event in EVENTS:
        assert f"`{event.kind}`" in CONTRACT


def test_configuration_reference_is_current() -> None:
    current = (DOCS / "config.toml").read_text("utf-8") == config.document()
    assert current, "docs/config.toml is not what the program says; run: compute-agent config > docs/config.toml"


@pytest.mark.parametrize(("section", "model"), [("bus", AmqpSettings), ("images", ImagePolicy), ("exports", ExportPolicy)])
def test_keys_of_the_larger_sections_are_explained(section: str, model: Any) -> None:
    for key in model.model_fields:
        assert f"| `{section}.{key}` |" in OPERATING


def test_each_setting_of_the_libvirt_driver_is_explained_once() -> None:
    table = OPERATING.partition("## The libvirt driver")[2].partition("### Back ends")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == sorted(LibvirtSettings.model_fields)


def test_all_metrics_are_in_the_page() -> None:
    listed = set(re.findall(r"^\| `(compute_\w+)` \|", OPERATING, re.MULTILINE))
    known = set()
    for family in metrics.REGISTRY.collect():
        known.add(f"{family.name}_total" if family.type == "counter" else family.name)
    assert listed == known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target
    for target, anchor in re.findall(r"\]\(([^)#\s:]*)#([^)]+)\)", text):
        other = (page.parent / target if target else page).read_text("utf-8")
        anchors = {
            re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
            for title in re.findall(r"^#+ (.+)$", other, re.MULTILINE)
        }
        assert anchor in anchors, f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_no_path_of_a_build_machine(page: Path) -> None:
    assert not re.search(r"/(work|tmp|root)/", page.read_text("utf-8"))
