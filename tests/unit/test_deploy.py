"""The files under deploy/ and docker-compose.yml: they parse, and they agree with the program."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from agent import config
from agent.bus.amqp.topology import queue_arguments
from agent.bus.topology import host_topology, shared_topology
from agent.cli import EXIT_CONFIG
from agent.drivers.fake.settings import parse_settings as fake_settings
from agent.drivers.libvirt.settings import parse_settings as libvirt_settings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
HOST = "node1.example"
CONTROLLER = "controller.example"


@pytest.fixture(scope="module")
def definitions() -> dict[str, Any]:
    return json.loads((DEPLOY / "rabbitmq-definitions.json").read_text("utf-8"))


def _compose(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text("utf-8"))


def test_definitions_are_what_the_agent_declares(definitions: dict[str, Any]) -> None:
    shared, host = shared_topology(), host_topology(HOST)
    assert {
        (e["name"], e["type"], e["durable"], e["arguments"].get("alternate-exchange")) for e in definitions["exchanges"]
    } == {(e.name, "topic", True, e.alternate) for e in shared.exchanges}
    assert {q["name"]: q["arguments"] for q in definitions["queues"]} == {
        q.name: queue_arguments(q) for q in (*shared.queues, *host.queues)
    }
    assert {(b["source"], b["routing_key"], b["destination"]) for b in definitions["bindings"]} == {
        (b.exchange, b.pattern, b.queue) for b in (*shared.bindings, *host.bindings)
    }


def test_example_users_have_no_password(definitions: dict[str, Any]) -> None:
    assert {user["name"] for user in definitions["users"]} == {HOST, CONTROLLER}
    assert all(user["password_hash"] == "" and user["tags"] == [] for user in definitions["users"])


@pytest.mark.parametrize(
    ("user", "exchange", "right", "key", "allowed"),
    [
        (HOST, "compute.events", "write", f"instance.state.{HOST}", True),
        (HOST, "compute.events", "write", f"host.heartbeat.{HOST}", True),
        (HOST, "compute.events", "write", "compute.reply.3f1c", True),
        (HOST, "compute.events", "write", "instance.state.node2.example", False),
        (HOST, "compute.events", "write", "instance.state.node1xexample", False),
        (HOST, "compute.events", "write", "compute.watch.3f1c", False),
        (HOST, "compute.commands", "write", f"instance.delete.{HOST}", False),
        (HOST, "compute.commands", "read", f"*.*.{HOST}", True),
        (HOST, "compute.commands", "read", "*.*.all", True),
        (HOST, "compute.commands", "read", "#", False),
        (HOST, "compute.commands", "read", "*.*.node2.example", False),
        (HOST, "compute.dead", "write", f"instance.create.{HOST}", True),
        (HOST, "compute.dead", "write", "instance.create.node2.example", False),
    ],
)
def test_topic_rights(
    definitions: dict[str, Any], user: str, exchange: str, right: str, key: str, allowed: bool
) -> None:
    rights = [r for r in definitions["topic_permissions"] if (r["user"], r["exchange"]) == (user, exchange)]
    assert len(rights) == 1
    assert bool(re.search(rights[0][right], key)) is allowed


@pytest.mark.parametrize(
    ("user", "right", "name", "allowed"),
    [
        (HOST, "configure", f"compute.agent.{HOST}", True),
        (HOST, "configure", "compute.commands", False),
        (HOST, "configure", "compute.agent.node2.example", False),
        (HOST, "read", "compute.agent.node2.example", False),
        (HOST, "read", "compute.dead-letters", False),
        (HOST, "write", "compute.commands", False),
        (HOST, "write", "", False),
        (CONTROLLER, "configure", "compute.reply.3f1c", True),
        (CONTROLLER, "configure", f"compute.agent.{HOST}", False),
        (CONTROLLER, "write", "compute.commands", True),
        (CONTROLLER, "write", "compute.events", False),
        (CONTROLLER, "read", f"compute.agent.{HOST}", False),
        (CONTROLLER, "read", "compute.events", True),
    ],
)
def test_rights(definitions: dict[str, Any], user: str, right: str, name: str, allowed: bool) -> None:
    rights = [r for r in definitions["permissions"] if r["user"] == user]
    assert len(rights) == 1
    assert bool(re.search(rights[0][right], name)) is allowed


def test_example_configuration_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    settings = config.load(DEPLOY / "agent.example.toml")
    assert settings.bus.mechanism == "EXTERNAL"
    assert libvirt_settings(settings.driver.settings).uri == "qemu:///system"


@pytest.mark.parametrize("name", ["compose.agent.toml", "compose.libvirt.toml"])
def test_compose_configuration_is_valid(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = _compose("docker-compose.yml")["services"]["agent"]["environment"]
    monkeypatch.setenv(
        "COMPUTE_AGENT_BUS__URL", environment["COMPUTE_AGENT_BUS__URL"].replace("${", "").replace("}", "")
    )
    settings = config.load(DEPLOY / name)
    assert settings.health.listen.endswith(":9177")
    {"fake": fake_settings, "libvirt": libvirt_settings}[settings.driver.name](settings.driver.settings)


def test_compose_listens_only_here() -> None:
    compose = _compose("docker-compose.yml")
    assert set(compose["services"]) == {"rabbitmq", "agent"}
    assert "healthcheck" in compose["services"]["rabbitmq"]
    ports = [port for service in compose["services"].values() for port in service["ports"]]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_compose_override_lies_over_the_agent() -> None:
    override = _compose("deploy/docker-compose.libvirt.yml")
    assert set(override["services"]) == {"agent"}
    assert (DEPLOY / "compose.libvirt.toml").name in str(override["services"]["agent"]["volumes"])


def test_files_of_the_image_are_let_through() -> None:
    ignore = (DEPLOY / "Dockerfile.dockerignore").read_text("utf-8").splitlines()
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (DEPLOY / "Dockerfile").read_text("utf-8"), re.MULTILINE)
    for name in " ".join(copied).split():
        assert (ROOT / name).exists(), name
        assert f"!{name}" in ignore


def test_unit_agrees_with_the_program() -> None:
    unit = dict(
        line.split("=", 1)
        for line in (DEPLOY / "compute-agent.service").read_text("utf-8").splitlines()
        if "=" in line and not line.startswith("#")
    )
    assert unit["Type"] == "notify"
    assert unit["TimeoutStartSec"] == "infinity"
    assert int(unit["RestartPreventExitStatus"]) == EXIT_CONFIG
    assert int(unit["TimeoutStopSec"]) > config.AgentSection().drain_timeout_s + 60
    assert unit["LoadCredential"].startswith("bus__url:")
    assert config.AgentSection().state_dir.name == unit["StateDirectory"]
