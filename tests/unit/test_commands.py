"""Bodies that are no commands: each kind has its code, and nothing but `Refused` ever comes out of the parser."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.world import command, new_id

from agent.messages.commands import COMMANDS, MAX_COMMAND_BYTES, Command, Refused, parse_command, type_of

INSTANCE = "11111111-2222-3333-4444-555555555555"


def create(**changes: Any) -> dict[str, Any]:
    spec: dict[str, Any] = {"name": "vm", "vcpus": 1, "memory_mib": 64, "root_disk": {"size_mib": 10}}
    return {"spec": {key: value for key, value in (spec | changes).items() if value is not ...}}


def refused(body: bytes) -> Refused:
    with pytest.raises(Refused) as caught:
        parse_command(body)
    return caught.value


def test_a_good_command_is_read() -> None:
    parsed = parse_command(command("instance.create", create(), subject=INSTANCE, generation=3))
    assert (parsed.verb, parsed.subject, parsed.generation) == ("instance.create", INSTANCE, 3)


@pytest.mark.parametrize("data", COMMANDS, ids=lambda data: data.verb)
def test_every_type_is_known(data: Any) -> None:
    needs: dict[str, Any] = {"subject": INSTANCE} if data.subject_required else {}
    fill = {"instance.create": create(), "host.set-enabled": {"enabled": True}}
    fill["instance.set-policy"] = {"on_stop": "restart"}
    fill |= {"instance.resize": {"vcpus": 2}, "instance.set-memory-target": {"memory_mib": 64}}
    fill |= {"instance.set-limits": {"disks": {"root": None}}}
    fill |= {verb: {"operation_id": "x"} for verb in ("operation.show", "operation.cancel")}
    fill |= {verb: {"sha256": "0" * 64} for verb in ("image.remove", "image.verify")}
    fill["image.prefetch"] = {"image": {"url": "https://x/y", "sha256": "0" * 64, "format": "raw"}}
    image = {"image": {"url": "file:///a", "sha256": "0" * 64, "format": "raw"}}
    target = {"target": {"store": "main", "name": "one"}}
    fill |= {"instance.rebuild": image, "instance.rescue": image, "instance.shelve": target, "instance.export": target}
    fill |= {"instance.backup": {"series": "daily", "keep": 1, "store": "main"}}
    fill |= {f"snapshot.{verb}": {"name": "one"} for verb in ("create", "revert", "delete")}
    assert parse_command(command(data.verb, fill.get(data.verb, {}), **needs)).type == type_of(data.verb)


@pytest.mark.parametrize(
    "body",
    [b"", b"not json", b"{", b"\xff\xfe", b'{"a":NaN}', b'{"a":Infinity}', b'{"a":"\\ud800"}', b"\x00" * 100, b'{"a":1}x'],
)
def test_not_json(body: bytes) -> None:
    assert refused(body).code == "bad_json"


@pytest.mark.parametrize(
    "body",
    [
        b"[]", b"1", b'"x"', b"null", b"{}",
        command("host.ping", specversion=...), command("host.ping", specversion="0.3"), command("host.ping", specversion=1),
        command("host.ping", id=...), command("host.ping", type=...),
    ],
    ids=range(10),
)  # fmt: skip
def test_no_cloudevent(body: bytes) -> None:
    assert refused(body).code == "bad_envelope"


@pytest.mark.parametrize("type", ["", "compute.instance.explode.v1", "compute.host.ping.v2", None, 7, [], {"a": 1}, "x" * 100_000])
def test_unknown_type(type: Any) -> None:
    error = refused(command("host.ping", type=type, id="known-id"))
    assert error.code == "unknown_type"
    assert error.command_id == "known-id"
    assert len(error.message) < 300


def test_a_number_of_a_million_digits_as_type() -> None:
    body = command("host.ping", type="T").replace(b'"T"', b"9" * 500_000)
    assert refused(body).code in ("bad_json", "unknown_type")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (command("host.ping", {"surprise": 1}), "surprise"),
        (command("host.ping", colour="red"), "colour"),
        (command("instance.create", create(cpus=1), subject=INSTANCE), "cpus"),
        (command("instance.create", create(root_disk={"size_mib": 1, "path": "/etc"}), subject=INSTANCE), "path"),
    ],
)
def test_unknown_fields_are_named(body: bytes, field: str) -> None:
    error = refused(body)
    assert error.code == "unknown_field"
    assert field in error.message


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"vcpus": 0}, "vcpus"), ({"vcpus": -1}, "vcpus"), ({"vcpus": "1"}, "vcpus"), ({"vcpus": 1.5}, "vcpus"),
        ({"vcpus": True}, "vcpus"), ({"vcpus": 10**30}, "vcpus"), ({"vcpus": None}, "vcpus"),
        ({"memory_mib": 1024**3}, "memory_mib"), ({"memory_mib": 0}, "memory_mib"), ({"memory_mib": -5}, "memory_mib"),
        ({"root_disk": {"size_mib": 0}}, "size_mib"), ({"root_disk": {"size_mib": 2**63}}, "size_mib"),
        ({"root_disk": []}, "root_disk"), ({"name": ...}, "name"), ({"nics": [{"type": "magic"}]}, "nics"),
        ({"labels": {"a b": "c"}}, "labels"), ({"labels": {"a": "x" * 257}}, "labels"),
        ({"seed": {"user_data": "x" * 70_000}}, "user_data"), ({"seed": {"ssh_keys": ["ssh-rsa"]}}, "ssh_keys"),
        ({"nics": [{"type": "user", "mac": "52:54:00:00:00:01"}] * 2}, "mac"),
        ({"nics": [{"type": "user", "mac": "01:00:00:00:00:01"}]}, "mac"),
        ({"nics": [{"type": "user"}] * 17}, "nics"),
    ],
)  # fmt: skip
def test_wrong_types_and_absurd_sizes(changes: dict[str, Any], field: str) -> None:
    error = refused(command("instance.create", create(**changes), subject=INSTANCE))
    assert error.code == "invalid_argument"
    assert field in error.message
    assert not error.retryable


EVIL = [
    "", " ", "a b", "a;rm -rf /", "$(reboot)", "`id`", "a|b", "a&b", "a>b", "a\nb", "a\n", "a\0b", "../x", "a/b", "/etc", "..",
    "<name/>", "a'b", 'a"b', "&amp;", "]]>", "-rf", ".hidden", "%s", "{}", "a\\b", "ä", "a\u202eb", "x" * 64, "~", "*", "?",
]  # fmt: skip


@pytest.mark.parametrize("name", EVIL)
def test_metacharacters_in_names(name: str) -> None:
    assert refused(command("instance.create", create(name=name), subject=INSTANCE)).code == "invalid_argument"
    nic = {"type": "network", "network": name}
    assert refused(command("instance.create", create(nics=[nic]), subject=INSTANCE)).code == "invalid_argument"
    bridge = {"type": "bridge", "bridge": name}
    assert refused(command("instance.create", create(nics=[bridge]), subject=INSTANCE)).code == "invalid_argument"
    if len(name) < 64:
        assert refused(command("host.ping", host=name)).code == "invalid_argument"


@pytest.mark.parametrize("name", EVIL)
def test_metacharacters_in_ids(name: str) -> None:
    if name in {"a/b", "x" * 64}:
        return  # an id may hold some of these; it is never a path
    assert refused(command("host.ping", id=name)).command_id is None
    assert refused(command("instance.start", subject=name)).subject is None


@pytest.mark.parametrize(
    "url",
    ["", "x", "ftp://x/y", "file:/etc/passwd", "http://", "http://a b", "http://a\n", "http://ä/", "javascript:1", "https://" + "x" * 2001],
)
def test_image_urls(url: str) -> None:
    image = {"url": url, "sha256": "0" * 64, "format": "qcow2"}
    body = command("instance.create", create(root_disk={"size_mib": 1, "image": image}), subject=INSTANCE)
    assert refused(body).code == "invalid_argument"


@pytest.mark.parametrize("subject", [..., None, "", "x", INSTANCE.upper() + "A", INSTANCE + "\n", "{" + INSTANCE + "}"])
def test_an_instance_verb_needs_an_instance(subject: Any) -> None:
    assert refused(command("instance.start", subject=subject)).code == "invalid_argument"


@pytest.mark.parametrize(
    "changes",
    [
        {"generation": -1}, {"generation": 2**63}, {"generation": "1"}, {"expirytime": "tomorrow"},
        {"expirytime": "2026-01-01T00:00:00"}, {"traceparent": "x"}, {"datacontenttype": "text/xml"}, {"source": ""},
        {"source": "x" * 257}, {"reportprogress": "yes"}, {"data": None}, {"data": []}, {"host": "x" * 300},
    ],
)  # fmt: skip
def test_wrong_envelopes(changes: dict[str, Any]) -> None:
    error = refused(command("host.ping", **changes))
    assert error.code == "invalid_argument"
    assert next(iter(changes)) in error.message


def test_ten_mebibytes_are_refused_before_they_are_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    body = b'{"a":"' + b"x" * (10 * 1024 * 1024) + b'"}'
    with monkeypatch.context() as patched:
        patched.setattr("agent.messages.commands.from_json", lambda _body: pytest.fail("it was parsed"))
        assert refused(body).code == "too_large"
    assert refused(b" " * (MAX_COMMAND_BYTES + 1)).code == "too_large"
    assert refused(b" " * MAX_COMMAND_BYTES).code == "bad_json"


@pytest.mark.parametrize("opening", ["[", '{"a":', '[{"a":'])
def test_a_hundred_thousand_nesting_levels(opening: str) -> None:
    assert refused(opening.encode() * 100_000).code == "bad_json"
    inside = command("host.ping", source="S").replace(b'"S"', opening.encode() * 100_000)
    assert refused(inside).code == "bad_json"


def test_the_findings_are_told_briefly() -> None:
    labels = {f"bad label {n}": "x" * 300 for n in range(64)}
    error = refused(command("instance.create", create(labels=labels), subject=INSTANCE))
    assert "more)" in error.message
    assert len(error.message) < 1500


def test_a_refusal_never_repeats_a_secret() -> None:
    error = refused(command("instance.create", create(seed={"user_data": ["hunter2"]}), subject=INSTANCE))
    assert "hunter2" not in error.message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def parses_or_refuses(body: bytes) -> None:
    error: Refused | None = None
    try:
        assert isinstance(parse_command(body), Command)
    except Refused as exc:
        error = exc
    if error is not None:
        assert error.code in {"too_large", "bad_json", "bad_envelope", "unknown_type", "unknown_field", "invalid_argument"}
        assert error.message.encode()


@given(st.binary(max_size=200))
def test_any_bytes(body: bytes) -> None:
    parses_or_refuses(body)


@given(JSON)
def test_any_json(value: Any) -> None:
    parses_or_refuses(json.dumps(value).encode())


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from([data.verb for data in COMMANDS]),
    st.dictionaries(
        st.sampled_from(["id", "subject", "type", "data", "time", "generation", "host", "expirytime", "source", "x"]), JSON,
        max_size=3,
    ),
    JSON,
)  # fmt: skip
def test_any_envelope(verb: str, changes: dict[str, Any], data: Any) -> None:
    parses_or_refuses(command(verb, **({"subject": new_id(), "data": data} | changes)))
