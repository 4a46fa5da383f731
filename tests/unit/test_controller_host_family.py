"""`computectl host audit`, `host drain`, `instance adopt`."""

from __future__ import annotations

import json

import pytest
from controller_agent import HOST, INSTANCE, SPEC, Ctl, reject, succeed


@pytest.fixture
def ctl() -> Ctl:
    return Ctl()


def test_audit_shows_a_table(ctl: Ctl) -> None:
    item = {"finding": "unowned", "kind": "folder", "name": "/x", "proof": "manifest", "action": "removed"}
    ctl.answers = {"host.audit": succeed({"items": [item], "more": 0, "busy": ["a"], "removed": 1})}
    result = ctl("host", "audit", HOST, "--repair")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "unowned" in result.stdout
    assert result.stdout.endswith("1 found, 1 removed, 1 busy and left out\n")
    assert ctl.commands[-1].data.repair
    assert json.loads(ctl("host", "audit", HOST, "--json").stdout)["result"]["removed"] == 1
    assert not ctl.commands[-1].data.repair


def test_drain(ctl: Ctl) -> None:
    ctl.answers = {"host.drain": succeed({"stopped": ["a"], "running": [], "waited_s": 1.0})}
    result = ctl("host", "drain", HOST, "--stop-instances", "--at-once", "2", "--timeout-s", "5", "--reason", "kernel")
    assert (result.exit_code, result.stdout) == (0, f"{HOST} is drained: 1 guests stopped, 0 still run\n")
    assert ctl.commands[-1].data.model_dump() == {
        "timeout_s": 5.0, "stop_instances": True, "stop_timeout_s": 60.0, "at_once": 2, "reason": "kernel",
    }  # fmt: skip
    assert ctl("host", "drain", HOST, "--reason", "x" * 201).exit_code == 2
    ctl.answers = {"host.drain": reject("drain_timeout", "too late")}
    assert ctl("host", "drain", HOST).exit_code == 1


def test_adopt(ctl: Ctl) -> None:
    view = {"id": INSTANCE, "name": "legacy", "observed": "running", "life": {"adopted": {"kept": ["device sound"]}}}
    ctl.answers = {"instance.adopt": succeed(view)}
    result = ctl("instance", "adopt", INSTANCE, "--own-disks", "-f", "-", input=SPEC)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "legacy adopted; it is running\nkept as it is: device sound\n"
    assert (ctl.commands[-1].data.own_disks, ctl.commands[-1].data.spec.name) == (True, "a")
    assert ctl("instance", "adopt", INSTANCE).exit_code == 0
    assert ctl.commands[-1].data.spec is None
