"""The wire contract as one AsyncAPI 3 document, generated from the models of this package.

The models are the source; this module only arranges them. Everything is seen from the agent: it receives commands
and sends events. Knows nothing of a broker: exchanges and queues are named here as a reader needs them, and a test
compares them with what the agent declares. Pure, no I/O.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final, cast

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, JsonSchemaValue, models_json_schema
from pydantic_core import core_schema

from agent.messages import events, routing
from agent.messages.codes import ERROR_CODES
from agent.messages.commands import COMMANDS, ENVELOPES, type_of
from agent.messages.events import EVENTS, Event, EventData, HostHeartbeat, OperationEvent, OperationSucceeded
from agent.messages.results import RESULTS
from agent.messages.types import HOST_PATTERN
from agent.messages.verb import CommandData

CONTRACT_VERSION: Final = "1.0.0"
"""Of the contract, not of the agent. The second number rises when something is added, the first one never does
without new `.v2` types beside the old ones."""

_AMQP: Final = "0.3.0"
_REF: Final = "#/components/schemas/{model}"
_ANNOUNCING: Final = ("operation.accepted", "operation.started", "operation.progress")
_UNSUCCESSFUL: Final = ("operation.failed", "operation.rejected", "operation.cancelled", "operation.expired")
_UNSEALED: Final = frozenset({HostHeartbeat.kind, "operation.rejected"})
"""Events that come, or may come, without `sequence` and `epoch`: heartbeats, and the refusal of a command whose id is
known already, which goes to its sender only."""


def document() -> dict[str, Any]:
    """Build the document. The same models give the same document."""
    schemas, names = _schemas()
    messages: dict[str, Any] = {}
    channels: dict[str, Any] = {}
    operations: dict[str, Any] = {}
    _add_commands(schemas, names, messages, channels, operations)
    _add_events(schemas, names, messages, channels, operations)
    _add_replies(schemas, names, messages, channels)
    _add_queues(messages, channels, operations)
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "compute-agent",
            "version": CONTRACT_VERSION,
            "description": "The messages of one compute agent per hypervisor host: commands in, results, events and"
            " heartbeats out. CloudEvents 1.0 in structured JSON over AMQP 0-9-1 (RabbitMQ).",
            "license": {"name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"},
        },
        "defaultContentType": routing.CONTENT_TYPE,
        "channels": channels,
        "operations": operations,
        "components": {"schemas": schemas, "messages": messages},
        "x-error-codes": {
            code.code: {"retryable": code.retryable, "class": code.error.default_code, "description": code.meaning}
            for code in ERROR_CODES
        },
    }


def render() -> str:
    """Render the document as stable JSON: keys sorted, lists that mean sets sorted, a newline at the end."""
    return json.dumps(document(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


# --- schemas -----------------------------------------------------------------------------------------------------


class _Schemas(GenerateJsonSchema):
    """Pydantic's JSON schema, fitted to AsyncAPI's draft 07 and to what the agent really sends.

    Events are dumped without None, so every field that is not None by default is always there. Readers ignore
    what they do not know, so what the agent sends is never closed against further fields.
    """

    def field_is_required(self, field: Any, total: bool) -> bool:
        required = super().field_is_required(field, total)
        if self.mode == "validation" or required:
            return required
        return not _defaults_to_none(field["schema"])

    def field_title_should_be_set(self, _schema: Any) -> bool:
        return False

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        found = super().model_schema(schema)
        found.pop("title", None)
        if self.mode == "serialization" and found.get("additionalProperties") is False:
            del found["additionalProperties"]
        return found

    def tagged_union_schema(self, schema: core_schema.TaggedUnionSchema) -> JsonSchemaValue:
        found = super().tagged_union_schema(schema)
        found.pop("discriminator", None)  # AsyncAPI's is a bare name, and each branch has its constant anyway
        return found


def _defaults_to_none(schema: Any) -> bool:
    return schema.get("type") == "default" and schema.get("default", ...) is None and "default_factory" not in schema


def _schemas() -> tuple[dict[str, Any], dict[type[BaseModel], str]]:
    """Return all schemas by name, and the name of each model that a message is made of."""
    wanted: list[tuple[type[BaseModel], JsonSchemaMode]] = [(model, "validation") for model in ENVELOPES.values()]
    sent: tuple[type[BaseModel], ...] = (Event, *EVENTS, *RESULTS.values())
    wanted += [(model, "serialization") for model in sent]
    unique = list(dict.fromkeys(wanted))
    references, definitions = models_json_schema(unique, ref_template=_REF, schema_generator=_Schemas)
    renamed = {name: name.replace("-Input", "").replace("-Output", "View") for name in definitions["$defs"]}
    schemas = {renamed[name]: _tidy(schema, renamed) for name, schema in definitions["$defs"].items()}
    names = {
        cast("type[BaseModel]", model): renamed[str(reference["$ref"]).rpartition("/")[2]]
        for (model, _mode), reference in references.items()
    }
    return schemas, names


def _tidy(schema: Any, renamed: dict[str, str]) -> Any:
    """Rename references, take sets in a fixed order, and fold docstrings into lines of text."""
    if isinstance(schema, list):
        return [_tidy(item, renamed) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _tidy(value, renamed) for key, value in schema.items()}
    if isinstance(found.get("$ref"), str):
        name = found["$ref"].rpartition("/")[2]
        found["$ref"] = _REF.format(model=renamed[name])
    if isinstance(found.get("required"), list):
        found["required"] = sorted(found["required"])
    if isinstance(found.get("description"), str):
        found["description"] = _folded(found["description"])
    return found


def _folded(text: str | None) -> str:
    return re.sub(r"\s+", " ", text or "").strip()


def _ref(name: str) -> dict[str, str]:
    return {"$ref": _REF.format(model=name)}


# --- messages, channels, operations -------------------------------------------------------------------------------


def _add_commands(
    schemas: dict[str, Any],
    names: dict[type[BaseModel], str],
    messages: dict[str, Any],
    channels: dict[str, Any],
    operations: dict[str, Any],
) -> None:
    schemas["CommandProperties"] = {
        "type": "object",
        "description": "AMQP basic properties of a command.",
        "properties": {
            "content_type": {"const": routing.CONTENT_TYPE},
            "message_id": {"type": "string", "description": "Should be the command's id."},
            "correlation_id": {"type": "string", "description": "Comes back with every event of the operation."},
            "reply_to": {
                "type": "string",
                "pattern": "^[!-~]{1,255}$",
                "description": f"A queue bound to {routing.EVENTS_EXCHANGE} with its own name as the key.",
            },
        },
    }
    for data in COMMANDS:
        name, kind = names[ENVELOPES[type_of(data.verb)]], type_of(data.verb)
        messages[name] = {
            "name": kind,
            "title": data.verb,
            "summary": _folded(data.__doc__),
            "contentType": routing.CONTENT_TYPE,
            "correlationId": {"location": "$message.header#/correlation_id"},
            "headers": _ref("CommandProperties"),
            "payload": _ref(name),
        }
        channel = f"command.{data.verb}"
        channels[channel] = _routed_channel(
            routing.COMMANDS_EXCHANGE,
            data.verb,
            [name],
            f"{data.verb} for one host, or for all of them with `{routing.BROADCAST}` as the host.",
        )
        answers = [_success_name(data), *(_event_name(kind) for kind in (*_UNSUCCESSFUL, *_ANNOUNCING))]
        operations[f"receive.{data.verb}"] = {
            "action": "receive",
            "channel": {"$ref": f"#/channels/{channel}"},
            "summary": _folded(data.__doc__),
            "messages": [{"$ref": f"#/channels/{channel}/messages/{name}"}],
            "bindings": {"amqp": {"ack": True, "deliveryMode": 2, "bindingVersion": _AMQP}},
            "reply": {
                "address": {
                    "location": "$message.header#/reply_to",
                    "description": "Exactly one final event; accepted, started and progress before it where the"
                    " command asks for them or the work outlasts 200 ms.",
                },
                "channel": {"$ref": "#/channels/replies"},
                "messages": [{"$ref": f"#/channels/replies/messages/{answer}"} for answer in sorted(answers)],
            },
        }


def _add_events(
    schemas: dict[str, Any],
    names: dict[type[BaseModel], str],
    messages: dict[str, Any],
    channels: dict[str, Any],
    operations: dict[str, Any],
) -> None:
    for data in EVENTS:
        name = _event_name(data.kind)
        schemas[f"{name}Envelope"] = _envelope(names, data.kind, _ref(names[data]))
        messages[name] = _event_message(data, name)
        channel = f"event.{data.kind}"
        channels[channel] = _routed_channel(routing.EVENTS_EXCHANGE, data.kind, [name], _folded(data.__doc__))
        binding: dict[str, Any] = {"deliveryMode": 2, "mandatory": False, "bindingVersion": _AMQP}
        if data is HostHeartbeat:
            binding["deliveryMode"] = 1
        operations[f"send.{data.kind}"] = {
            "action": "send",
            "channel": {"$ref": f"#/channels/{channel}"},
            "summary": _folded(data.__doc__),
            "messages": [{"$ref": f"#/channels/{channel}/messages/{name}"}],
            "bindings": {"amqp": binding},
        }


def _add_replies(
    schemas: dict[str, Any], names: dict[type[BaseModel], str], messages: dict[str, Any], channels: dict[str, Any]
) -> None:
    found = [_event_name(kind) for kind in (*_UNSUCCESSFUL, *_ANNOUNCING)]
    for data in COMMANDS:
        name = _success_name(data)
        payload = {
            "allOf": [
                _ref(names[OperationSucceeded]),
                {
                    "type": "object",
                    "properties": {"verb": {"const": data.verb}, "result": _ref(names[RESULTS[data.verb]])},
                },
            ]
        }
        schemas[f"{name}Envelope"] = _envelope(names, OperationSucceeded.kind, payload)
        messages[name] = _event_message(OperationSucceeded, name)
        messages[name]["title"] = f"{data.verb} succeeded"
        messages[name]["summary"] = _folded(RESULTS[data.verb].__doc__)
        found.append(name)
    channels["replies"] = {
        "address": None,
        "title": "Answers",
        "description": f"The controller's own queue, named by `reply_to` and bound to {routing.EVENTS_EXCHANGE} with"
        " its name as the key. What comes here is the same message that goes out under the event's routing key.",
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in found},
    }


def _add_queues(messages: dict[str, Any], channels: dict[str, Any], operations: dict[str, Any]) -> None:
    messages["DeadLetter"] = {
        "name": "dead-letter",
        "title": "A message that is no command",
        "summary": "The bytes as they came, with the reason in the headers.",
        "headers": {
            "type": "object",
            "properties": {
                "compute-host": {"type": "string", "description": "The host whose agent refused it."},
                "compute-code": {"type": "string", "description": "The error code."},
                "compute-reason": {"type": "string", "maxLength": 1000, "description": "The sentence."},
                "compute-exchange": {"type": "string", "description": "The exchange it had come by."},
            },
        },
        "payload": {"description": "Any bytes."},
    }
    channels["host"] = {
        "address": routing.host_queue("{host}"),
        "title": "A host's commands",
        "description": f"Durable quorum queue with a single active consumer, bound to {routing.COMMANDS_EXCHANGE} with"
        f" `*.*.{{host}}` and `*.*.{routing.BROADCAST}`; what is rejected or delivered too often goes to"
        f" {routing.DEAD_EXCHANGE}.",
        "parameters": {"host": {"description": "The host's name."}},
        "messages": {
            name: {"$ref": f"#/components/messages/{name}"} for name in sorted(messages) if name.endswith("Command")
        },
        "bindings": {"amqp": _queue(routing.host_queue("{host}"))},
    }
    channels["dead-letters"] = {
        "address": routing.DEAD_QUEUE,
        "title": "Dead letters",
        "description": f"Bound to {routing.DEAD_EXCHANGE} with `#`.",
        "messages": {"DeadLetter": {"$ref": "#/components/messages/DeadLetter"}},
        "bindings": {"amqp": _queue(routing.DEAD_QUEUE)},
    }
    channels["unroutable"] = {
        "address": routing.UNROUTABLE_QUEUE,
        "title": "Commands for hosts without a queue",
        "description": f"Bound with `#` to {routing.UNROUTABLE_EXCHANGE}, the alternate exchange of"
        f" {routing.COMMANDS_EXCHANGE}. Nobody answers them.",
        "messages": dict(channels["host"]["messages"]),
        "bindings": {"amqp": _queue(routing.UNROUTABLE_QUEUE)},
    }
    operations["send.dead-letter"] = {
        "action": "send",
        "channel": {"$ref": "#/channels/dead-letters"},
        "summary": f"A copy of what cannot be a command goes to {routing.DEAD_EXCHANGE} under its own routing key.",
        "messages": [{"$ref": "#/channels/dead-letters/messages/DeadLetter"}],
    }


def _routed_channel(exchange: str, noun_verb: str, message_names: list[str], description: str) -> dict[str, Any]:
    return {
        "address": f"{noun_verb}.{{host}}",
        "description": description,
        "parameters": {"host": {"description": f"The host's name: {HOST_PATTERN}. It may contain dots."}},
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in message_names},
        "bindings": {
            "amqp": {
                "is": "routingKey",
                "exchange": {"name": exchange, "type": "topic", "durable": True, "autoDelete": False},
                "bindingVersion": _AMQP,
            }
        },
    }


def _queue(name: str) -> dict[str, Any]:
    return {
        "is": "queue",
        "queue": {"name": name, "durable": True, "exclusive": False, "autoDelete": False},
        "bindingVersion": _AMQP,
    }


def _envelope(names: dict[type[BaseModel], str], kind: str, data: dict[str, Any]) -> dict[str, Any]:
    sealed = [] if kind in _UNSEALED else ["epoch", "sequence"]
    return {
        "allOf": [
            _ref(names[Event]),
            {
                "type": "object",
                "properties": {"type": {"const": type_of(kind)}, "data": data},
                "required": sorted(["data", "type", *sealed]),
            },
        ]
    }


def _event_message(data: type[EventData], name: str) -> dict[str, Any]:
    message: dict[str, Any] = {
        "name": type_of(data.kind),
        "title": data.kind,
        "summary": _folded(data.__doc__),
        "contentType": routing.CONTENT_TYPE,
        "payload": _ref(f"{name}Envelope"),
    }
    if issubclass(data, OperationEvent):
        message["correlationId"] = {"location": "$message.header#/correlation_id"}
    return message


def _event_name(kind: str) -> str:
    return _BY_KIND[kind].__name__


def _success_name(data: type[CommandData]) -> str:
    return f"{data.__name__}Succeeded"


_BY_KIND: Final[dict[str, type[EventData]]] = {data.kind: data for data in events.EVENTS}
