"""The AsyncAPI document: valid, committed, true of what the agent sends, and kind to readers of the last release."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from asyncapi_rules import broken

from agent.app import Agent
from agent.bus.base import Binding, Delivery, Queue, Topology
from agent.bus.memory import MemoryBroker, MemoryBus
from agent.bus.topology import host_topology, shared_topology
from agent.config import Settings
from agent.controller import CommandRefused, ComputeClient
from agent.drivers.fake import FakeDriver
from agent.messages import asyncapi, routing
from agent.messages.codes import ERROR_CODES
from agent.messages.commands import (
    COMMANDS,
    ENVELOPES,
    ConsoleLog,
    HostPing,
    HostSetEnabled,
    HostShow,
    InstanceCreate,
    InstanceDelete,
    InstanceList,
    InstancePause,
    InstanceReboot,
    InstanceResume,
    InstanceShow,
    InstanceStart,
    InstanceStop,
    OperationShow,
    type_of,
)
from agent.messages.events import EVENTS
from agent.messages.results import RESULTS
from agent.messages.spec import ImageSource, InstanceSpec, RootDisk, Seed, UserNic
from agent.messages.spec_limits import DiskLimits
from agent.messages.verbs_host import HostAudit, HostDrain, InstanceAdopt
from agent.messages.verbs_image import ImageList, ImagePrefetch, ImageRemove, ImageVerify
from agent.messages.verbs_memory import (
    InstanceMemoryDump,
    InstanceReset,
    InstanceSetPolicy,
    InstanceSuspend,
    InstanceTriggerCrashDump,
)
from agent.messages.verbs_rebuild import (
    InstanceRebuild,
    InstanceRescue,
    InstanceRestore,
    InstanceShelve,
    InstanceUnrescue,
    InstanceUnshelve,
)
from agent.messages.verbs_resize import (
    InstanceConfirmResize,
    InstanceResize,
    InstanceRevertResize,
    InstanceSetLimits,
    InstanceSetMemoryTarget,
)
from agent.messages.verbs_snapshot import (
    ExportTarget,
    InstanceBackup,
    InstanceExport,
    InstanceListBackups,
    SnapshotCreate,
    SnapshotDelete,
    SnapshotList,
    SnapshotRevert,
)
from agent.messages.verbs_stats import InstanceStats

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "docs" / "asyncapi.json"
RELEASED = ROOT / "docs" / "asyncapi-released.json"
META_SCHEMA = ROOT / "tests" / "data" / "asyncapi-3.0.0.schema.json"
REGENERATE = "compute-agent asyncapi > docs/asyncapi.json"

Json = dict[str, Any]


@pytest.fixture(scope="module")
def document() -> Json:
    return json.loads(asyncapi.render())


@pytest.fixture(scope="module")
def meta() -> jsonschema.Draft7Validator:
    return jsonschema.Draft7Validator(json.loads(META_SCHEMA.read_text("utf-8")))


# --- drift -------------------------------------------------------------------------------------------------------


def test_committed_document_is_current() -> None:
    current = asyncapi.render() == COMMITTED.read_text("utf-8")  # a plain bool: the difference is a job for git diff
    assert current, f"docs/asyncapi.json is not what the models say; run: {REGENERATE}"


def test_rendering_is_stable() -> None:
    text = asyncapi.render()
    assert text == asyncapi.render()
    assert text.endswith("}\n")


# --- validity ----------------------------------------------------------------------------------------------------


def test_document_is_valid_asyncapi_3(document: Json, meta: jsonschema.Draft7Validator) -> None:
    errors = [f"{list(error.absolute_path)}: {error.message[:200]}" for error in meta.iter_errors(document)]
    assert not errors


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: d.pop("info"),
        lambda d: d.update(asyncapi="2.6.0"),
        lambda d: d["channels"]["host"].update(adress="x"),
        lambda d: d["operations"]["send.host.heartbeat"].update(action="publish"),
        lambda d: d["channels"]["host"]["bindings"]["amqp"].update({"is": "exchange"}),
        lambda d: d["components"]["schemas"]["Event"].update(type="thing"),
    ],
)
def test_meta_schema_can_say_no(
    document: Json, meta: jsonschema.Draft7Validator, spoil: Callable[[Json], object]
) -> None:
    spoiled = copy.deepcopy(document)
    spoil(spoiled)
    assert not meta.is_valid(spoiled)


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from _references(value)
    elif isinstance(node, list):
        for value in node:
            yield from _references(value)


def _resolve(document: Json, reference: str) -> Any:
    node: Any = document
    for part in reference.removeprefix("#/").split("/"):
        node = node[part]
    return node


def test_every_reference_leads_somewhere(document: Json) -> None:
    for reference in set(_references(document)):
        assert reference.startswith("#/")
        assert _resolve(document, reference)


def test_every_schema_is_used_and_valid(document: Json) -> None:
    used = {reference.rpartition("/")[2] for reference in _references(document) if "/schemas/" in reference}
    assert used == set(document["components"]["schemas"])
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft7Validator.check_schema(schema)


def test_messages_of_an_operation_belong_to_its_channel(document: Json) -> None:
    for operation in document["operations"].values():
        places = [(operation["channel"], operation["messages"])]
        if "reply" in operation:
            places.append((operation["reply"]["channel"], operation["reply"]["messages"]))
        for channel, messages in places:
            assert all(message["$ref"].startswith(channel["$ref"] + "/messages/") for message in messages)


# --- completeness ------------------------------------------------------------------------------------------------


def test_all_verbs_events_and_results_are_there(document: Json) -> None:
    assert set(RESULTS) == {data.verb for data in COMMANDS}
    operations = set(document["operations"])
    assert operations == {
        *(f"receive.{data.verb}" for data in COMMANDS),
        *(f"send.{data.kind}" for data in EVENTS),
        "send.dead-letter",
    }
    for data in COMMANDS:
        channel = document["channels"][f"command.{data.verb}"]
        assert channel["address"] == routing.command_key(data.verb, "{host}")
    for event in EVENTS:
        assert document["channels"][f"event.{event.kind}"]["address"] == routing.event_key(event.kind, "{host}")


def test_topology_is_what_the_agent_declares(document: Json) -> None:
    exchanges, queues = {}, {}
    for channel in document["channels"].values():
        binding = channel.get("bindings", {}).get("amqp", {})
        if binding.get("is") == "routingKey":
            exchanges[binding["exchange"]["name"]] = binding["exchange"]
        elif binding.get("is") == "queue":
            queues[binding["queue"]["name"]] = binding["queue"]
    declared = {exchange.name for exchange in shared_topology().exchanges}
    assert exchanges.keys() <= declared
    assert all(exchange["type"] == "topic" and exchange["durable"] for exchange in exchanges.values())
    declared_queues = [*shared_topology().queues, *host_topology("{host}").queues]
    assert queues.keys() == {queue.name for queue in declared_queues}
    assert all(queues[queue.name]["durable"] == queue.durable for queue in declared_queues)


def test_error_codes_are_unique() -> None:
    codes = [code.code for code in ERROR_CODES]
    assert len(codes) == len(set(codes))
    assert all(re.fullmatch(r"[a-z][a-z_]*", code) for code in codes)


def test_commands_and_schemas_agree(document: Json) -> None:
    """What the agent takes, the document allows; what it refuses for its form, the document refuses."""
    spec = {"name": "web-1", "vcpus": 1, "memory_mib": 128, "root_disk": {"size_mib": 64}}
    good: Json = {
        "specversion": "1.0",
        "id": "c-1",
        "source": "/test",
        "type": type_of("instance.create"),
        "subject": "11111111-2222-3333-4444-555555555555",
        "data": {"spec": spec | {"nics": [{"type": "bridge", "bridge": "br0"}]}},
    }
    assert ENVELOPES[good["type"]].model_validate_json(json.dumps(good))
    assert not list(_payload_errors(document, "InstanceCreateCommand", good))
    for wrong in (
        {**good, "subject": None},
        {**good, "more": 1},
        {**good, "data": {"spec": spec | {"vcpus": 0}}},
        {**good, "data": {"spec": spec | {"vcpus": "2"}}},
        {**good, "data": {"spec": spec | {"nics": [{"type": "bridge", "network": "default"}]}}},
    ):
        with pytest.raises(ValueError, match="InstanceCreateCommand"):
            ENVELOPES[good["type"]].model_validate_json(json.dumps(wrong))
        assert list(_payload_errors(document, "InstanceCreateCommand", wrong))


def _payload_errors(document: Json, message: str, payload: Any) -> Iterator[str]:
    reference = document["components"]["messages"][message]["payload"]["$ref"]
    validator = jsonschema.Draft7Validator({"$ref": reference, "components": document["components"]})
    for error in validator.iter_errors(payload):
        yield f"{message} {list(error.absolute_path)}: {error.message[:200]}"


# --- what the agent really sends ---------------------------------------------------------------------------------


async def test_agent_sends_what_the_document_says(document: Json, tmp_path: Path) -> None:
    """Every message that a whole life on the simulated hypervisor brings forth is valid under its schema."""
    settings = Settings.model_validate(
        {
            "agent": {"host": "h1", "state_dir": tmp_path, "drain_timeout_s": 5},
            "bus": {"url": "amqp://unused/"},
            "driver": {"name": "fake"},
            "health": {"listen": ""},
            "images": {"file_roots": [str(tmp_path)]},
            "exports": {"stores": {"main": str(tmp_path)}},
        }
    )
    path = tmp_path / "tiny.raw"
    path.write_bytes(b"tiny" + bytes(1024 * 1024 - 4))
    image = ImageSource(url=path.as_uri(), sha256=hashlib.sha256(path.read_bytes()).hexdigest(), format="raw")
    broker = MemoryBroker()
    watcher = MemoryBus(broker, name="watcher")
    await watcher.connect(timeout_s=1)
    await watcher.declare(shared_topology())
    bodies: list[bytes] = []

    def take(delivery: Delivery) -> None:
        bodies.append(delivery.body)
        delivery.ack()

    everything = Binding(routing.EVENTS_EXCHANGE, "#", "watch")
    await watcher.declare(Topology(queues=(Queue("watch", durable=False),), bindings=(everything,)))
    await watcher.consume("watch", take, prefetch=100)
    agent = Agent(settings, MemoryBus(broker, name="agent"))
    await agent.start()
    try:
        await agent.wait_ready(10)
        assert isinstance(agent.ctx.driver, FakeDriver)
        foreign = agent.ctx.driver.add_foreign("legacy")
        await _use_every_verb(broker, foreign, image)
    finally:
        await agent.stop()
        await watcher.close()
    sent = [json.loads(body) for body in bodies]
    wrong = [error for message in sent for error in _event_errors(document, message)]
    assert not wrong
    kinds = {message["type"] for message in sent}
    assert {type_of(kind) for kind in ("operation.progress", "operation.rejected", "host.heartbeat")} <= kinds
    done = {m["data"]["verb"] for m in sent if m["type"] == type_of("operation.succeeded")}
    assert done >= {data.verb for data in COMMANDS} - {"operation.cancel"}


def _event_errors(document: Json, message: Json) -> Iterator[str]:
    kind = next(event for event in EVENTS if type_of(event.kind) == message["type"])
    yield from _payload_errors(document, kind.__name__, message)
    if message["type"] == type_of("operation.succeeded"):
        verb = next(data for data in COMMANDS if data.verb == message["data"]["verb"])
        yield from _payload_errors(document, f"{verb.__name__}Succeeded", message)


async def _use_every_verb(broker: MemoryBroker, foreign: str, image: ImageSource) -> None:
    spec = InstanceSpec(
        name="web-1",
        vcpus=1,
        memory_mib=128,
        root_disk=RootDisk(size_mib=64),
        nics=[UserNic(type="user")],
        seed=Seed(hostname="web-1"),
    )
    one = str(uuid.uuid4())
    async with ComputeClient(MemoryBus(broker, name="controller"), source="/test") as client:
        made = await client.call(InstanceCreate(spec=spec), host="h1", instance_id=one, progress=True)
        for data in (
            InstanceStart(),
            InstancePause(),
            InstanceResume(),
            InstanceReboot(mode="hard"),
            InstanceReset(),
            InstanceTriggerCrashDump(),
            InstanceMemoryDump(),
            InstanceSetPolicy(on_stop="restart"),
            InstanceSuspend(),
            InstanceStart(),
            InstanceShow(),
            InstanceStats(),
            ConsoleLog(),
            InstanceSetMemoryTarget(memory_mib=64),
            InstanceSetLimits(disks={"root": DiskLimits(total_iops=5)}),
            InstanceResize(vcpus=2),
            InstanceRevertResize(),
            InstanceResize(disks_mib={"root": 128}, timeout_s=0),
            InstanceConfirmResize(),
            SnapshotCreate(name="one"),
            SnapshotList(),
            SnapshotRevert(name="one"),
            SnapshotDelete(name="one"),
            InstanceExport(target=ExportTarget(store="main", name="copy")),
            InstanceBackup(series="daily", keep=1, store="main"),
            InstanceListBackups(),
            InstanceRebuild(image=image, force=True),
            InstanceRescue(image=image, force=True),
            InstanceUnrescue(force=True),
            InstanceShelve(target=ExportTarget(store="main", name="shelf"), force=True),
            InstanceUnshelve(),
            InstanceDelete(restore_within_s=60, timeout_s=0),
            InstanceRestore(),
            InstanceStop(force=True),
        ):
            await client.call(data, host="h1", instance_id=one)
        for asked in (
            InstanceList(include_foreign=True),
            HostPing(echo="hello"),
            HostPing(),
            HostShow(),
            HostSetEnabled(enabled=False, reason="a test"),
            HostAudit(),
            HostDrain(),
            OperationShow(operation_id=made.operation_id),
            ImagePrefetch(image=image),
            ImageList(),
            ImageVerify(sha256=image.sha256),
        ):
            await client.call(asked, host="h1")
        with pytest.raises(CommandRefused, match="takes no new instances"):
            other = spec.model_copy(update={"name": "web-2"})
            await client.call(InstanceCreate(spec=other), host="h1", instance_id=str(uuid.uuid4()))
        await client.call(InstanceAdopt(), host="h1", instance_id=foreign)
        await client.call(InstanceDelete(), host="h1", instance_id=one)
        await client.call(ImageRemove(sha256=image.sha256), host="h1")


# --- breaking change -----------------------------------------------------------------------------------------------


def test_readers_and_senders_of_the_last_release_can_go_on(document: Json) -> None:
    assert broken(json.loads(RELEASED.read_text("utf-8")), document) == []


def _schema(document: Json, name: str) -> Json:
    return document["components"]["schemas"][name]


Change = Callable[[Json], object]


def _make_optional(document: Json, schema: str, field: str) -> None:
    _schema(document, schema)["required"].remove(field)


def _require(document: Json, schema: str, field: str) -> None:
    _schema(document, schema).setdefault("required", []).append(field)


def _remove(document: Json, schema: str, field: str) -> None:
    del _schema(document, schema)["properties"][field]
    required = _schema(document, schema).get("required", [])
    if field in required:
        required.remove(field)


BREAKING: dict[str, tuple[Change, str]] = {
    "an event field is removed": (
        lambda d: _remove(d, "InstanceState", "reason"),
        "event field InstanceState.data.reason was removed",
    ),
    "an envelope field is removed": (
        lambda d: _remove(d, "Event", "host"),
        "event field InstanceState.host was removed",
    ),
    "an event field is retyped": (
        lambda d: _schema(d, "InstanceState")["properties"]["generation"].update(type="string"),
        "event field InstanceState.data.generation was retyped from integer to string",
    ),
    "an event field becomes nullable": (
        lambda d: _schema(d, "InstanceState")["properties"].update(
            generation={"anyOf": [{"type": "integer"}, {"type": "null"}]}
        ),
        "event field InstanceState.data.generation was retyped from integer to integer|null",
    ),
    "an integer of an event becomes any number": (
        lambda d: _schema(d, "Inventory")["properties"]["total"].update(type="number"),
        "event field HostHeartbeat.data.inventory.*.total was retyped from integer to number",
    ),
    "an event field is optional now": (
        lambda d: _make_optional(d, "InstanceState", "reason"),
        "event field InstanceState.data.reason was always there and is optional now",
    ),
    "a field of a result is removed": (
        lambda d: _remove(d, "PowerResult", "changed"),
        "event field InstanceStartSucceeded.data.result.changed was removed",
    ),
    "a field deep in a result is removed": (
        lambda d: _remove(d, "StepView", "state"),
        "event field OperationShowSucceeded.data.result.steps[].state was removed",
    ),
    "an event loses its number": (
        lambda d: _schema(d, "InstanceStateEnvelope")["allOf"][1]["required"].remove("sequence"),
        "event field InstanceState.sequence was always there and is optional now",
    ),
    "a command needs a new field": (
        lambda d: (
            _schema(d, "InstanceStop")["properties"].update(why={"type": "string"}),
            _require(d, "InstanceStop", "why"),
        ),
        "command field InstanceStopCommand.data.why is required now",
    ),
    "a command needs a field that was optional": (
        lambda d: _require(d, "InstanceStop", "force"),
        "command field InstanceStopCommand.data.force is required now",
    ),
    "a command's field is removed": (
        lambda d: _remove(d, "InstanceStop", "force"),
        "command field InstanceStopCommand.data.force was removed",
    ),
    "a command's field is retyped": (
        lambda d: _schema(d, "InstanceStop")["properties"]["force"].update(type="string"),
        "command field InstanceStopCommand.data.force was retyped from boolean to string",
    ),
    "a command's value is no longer taken": (
        lambda d: _schema(d, "InstanceReboot")["properties"]["mode"]["enum"].remove("hard"),
        "command field InstanceRebootCommand.data.mode no longer takes hard",
    ),
    "a command's field gets a fixed set of values": (
        lambda d: _schema(d, "HostPing")["properties"]["echo"]["anyOf"][0].update(enum=["a"]),
        "command field HostPingCommand.data.echo no longer takes any other",
    ),
    "a command's limit is tightened": (
        lambda d: _schema(d, "InstanceSpec")["properties"]["vcpus"].update(maximum=64),
        "command field InstanceCreateCommand.data.spec.vcpus has a tighter maximum",
    ),
    "a command's lower limit is raised": (
        lambda d: _schema(d, "InstanceSpec")["properties"]["memory_mib"].update(minimum=64),
        "command field InstanceCreateCommand.data.spec.memory_mib has a tighter minimum",
    ),
    "a limit of a map in a command is tightened": (
        lambda d: next(iter(_schema(d, "InstanceSpec")["properties"]["labels"]["patternProperties"].values())).update(
            maxLength=8
        ),
        "command field InstanceCreateCommand.data.spec.labels.* has a tighter maxLength",
    ),
    "a command's pattern changes": (
        lambda d: _schema(d, "InstanceSpec")["properties"]["name"].update(pattern="^a$"),
        "command field InstanceCreateCommand.data.spec.name has another pattern",
    ),
    "a variant of a command is no longer taken": (
        lambda d: _schema(d, "InstanceSpec")["properties"]["nics"]["items"]["oneOf"].pop(0),
        "command field InstanceCreateCommand.data.spec.nics[] no longer takes the variant network",
    ),
    "a variant of a command needs a new field": (
        lambda d: _require(d, "BridgeNic", "mac"),
        "command field InstanceCreateCommand.data.spec.nics[]<bridge>.mac is required now",
    ),
    "a message type vanishes": (
        lambda d: (
            d["components"]["messages"].pop("InstanceBalloon"),
            d["channels"].pop("event.instance.balloon"),
            d["operations"].pop("send.instance.balloon"),
        ),
        "message InstanceBalloon vanished",
    ),
    "a message's type is renamed": (
        lambda d: d["components"]["messages"]["HostPingCommand"].update(name="compute.host.ping.v2"),
        "message HostPingCommand changed its type from compute.host.ping.v1 to compute.host.ping.v2",
    ),
    "a channel vanishes": (
        lambda d: d["channels"].pop("command.host.ping"),
        "channel command.host.ping vanished",
    ),
    "an operation vanishes": (
        lambda d: d["operations"].pop("receive.host.ping"),
        "operation receive.host.ping vanished",
    ),
    "an operation changes its direction": (
        lambda d: d["operations"]["receive.host.ping"].update(action="send"),
        "operation receive.host.ping changed its direction or channel",
    ),
    "a routing key changes": (
        lambda d: d["channels"]["command.host.ping"].update(address="host.{host}.ping"),
        "channel command.host.ping changed its address from host.ping.{host} to host.{host}.ping",
    ),
    "an exchange changes": (
        lambda d: d["channels"]["command.host.ping"]["bindings"]["amqp"]["exchange"].update(name="other"),
        "channel command.host.ping changed its exchange or queue",
    ),
    "an answer no longer comes": (
        lambda d: d["channels"]["replies"]["messages"].pop("OperationExpired"),
        "channel replies no longer carries OperationExpired",
    ),
    "an error code vanishes": (
        lambda d: d["x-error-codes"].pop("name_taken"),
        "error code name_taken vanished",
    ),
    "an error code changes whether a retry helps": (
        lambda d: d["x-error-codes"]["no_space"].update(retryable=False),
        "error code no_space changed whether a retry can help",
    ),
}


@pytest.mark.parametrize("name", BREAKING)
def test_breaking_change_is_noticed(document: Json, name: str) -> None:
    change, finding = BREAKING[name]
    changed = copy.deepcopy(document)
    change(changed)
    found = broken(document, changed)
    assert any(finding in sentence for sentence in found), found


HARMLESS: dict[str, Change] = {
    "nothing": lambda d: None,
    "an event gains a field": lambda d: (
        _schema(d, "InstanceState")["properties"].update(colour={"type": "string"}),
        _require(d, "InstanceState", "colour"),
    ),
    "an event field is always there now": lambda d: _require(d, "InstanceState", "previous"),
    "an event gains a value": lambda d: _schema(d, "InstanceState")["properties"]["observed"]["enum"].append("busy"),
    "any number of an event becomes an integer": lambda d: _schema(d, "OperationSucceeded")["properties"][
        "duration_ms"
    ].update(type="integer"),
    "a command gains an optional field": lambda d: _schema(d, "InstanceStop")["properties"].update(
        why={"type": "string"}
    ),
    "a command's field becomes optional": lambda d: _make_optional(d, "HostSetEnabled", "enabled"),
    "a command takes more values": lambda d: _schema(d, "InstanceReboot")["properties"]["mode"]["enum"].append("cold"),
    "a command's limit is raised": lambda d: _schema(d, "InstanceSpec")["properties"]["vcpus"].update(maximum=4096),
    "a message is added": lambda d: (
        d["components"]["messages"].update(New={"name": "compute.host.new.v1", "payload": {}}),
        d["channels"].update({"event.host.new": {"address": "host.new.{host}", "messages": {}}}),
    ),
    "an error code is added": lambda d: d["x-error-codes"].update(new={"retryable": False}),
    "texts change": lambda d: _schema(d, "InstanceState").update(description="Other words."),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_change_is_let_pass(document: Json, name: str) -> None:
    changed = copy.deepcopy(document)
    HARMLESS[name](changed)
    assert broken(document, changed) == []
