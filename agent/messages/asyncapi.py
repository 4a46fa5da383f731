"""The wire contract as one AsyncAPI 3 document, generated from the models of this package.

The models are the source; this module only arranges them. Everything is seen from the agent: it receives commands
and sends events. Knows nothing of a broker: exchanges and queues are named here as a reader needs them, and a test
compares them with what the agent declares. Pure, no I/O.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Final, cast

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, JsonSchemaValue, models_json_schema
from pydantic_core import core_schema

from agent import errors
from agent.errors import ComputeError
from agent.messages import events, routing
from agent.messages.commands import COMMANDS, ENVELOPES, MAX_COMMAND_BYTES, CommandData, type_of
from agent.messages.events import EVENTS, Event, EventData, HostHeartbeat, OperationEvent, OperationSucceeded
from agent.messages.results import RESULTS
from agent.messages.types import HOST_PATTERN

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


@dataclass(frozen=True, slots=True)
class ErrorCode:
    """One code of the contract: the class that decides whether a retry can help, and what it means."""

    code: str
    error: type[ComputeError]
    meaning: str

    @property
    def retryable(self) -> bool:
        """Whether the same request, sent again later, can succeed."""
        return self.error.retryable


ERROR_CODES: Final[tuple[ErrorCode, ...]] = (
    # What is wrong with the command itself.
    ErrorCode("too_large", errors.InvalidArgument, f"The body is larger than {MAX_COMMAND_BYTES} bytes."),
    ErrorCode("bad_json", errors.InvalidArgument, "The body is not JSON, or is nested too deeply."),
    ErrorCode("bad_envelope", errors.InvalidArgument, "The body is JSON but no CloudEvents 1.0 object."),
    ErrorCode("unknown_type", errors.InvalidArgument, "No command has this `type`."),
    ErrorCode("unknown_field", errors.InvalidArgument, "The command has a field that the contract does not know."),
    ErrorCode("invalid_argument", errors.InvalidArgument, "A field has the wrong type or a value out of its range."),
    ErrorCode("wrong_host", errors.InvalidArgument, "`host` names another host than the one that got the command."),
    ErrorCode("spec_too_large", errors.InvalidArgument, "The spec is too large for the domain's metadata."),
    ErrorCode("definition_refused", errors.InvalidArgument, "The hypervisor refuses the domain's definition."),
    ErrorCode("definition_too_large", errors.InvalidArgument, "The domain's definition is too large to be sent."),
    ErrorCode("network_config_not_json", errors.InvalidArgument, "A config-drive needs its network_config as JSON."),
    ErrorCode("invalid_instance_id", errors.InvalidArgument, "The driver was given an id that is no lower-case UUID."),
    ErrorCode("unknown_fake_label", errors.InvalidArgument, "Driver fake: there is no label of this name."),
    ErrorCode("bad_fake_label", errors.InvalidArgument, "Driver fake: the label's value cannot be used."),
    # What stands against it.
    ErrorCode("conflict", errors.Conflict, "Another command was accepted under this id before."),
    ErrorCode("stale_generation", errors.StaleGeneration, "`generation` is lower than the instance's; details has it."),
    ErrorCode("expired", errors.Expired, "`expirytime` passed before work began."),
    ErrorCode("cancelled", errors.Cancelled, "A command cancelled the operation; what it had done was undone."),
    ErrorCode("unknown_instance", errors.NotFound, "No instance with this id is on this host."),
    ErrorCode("unknown_operation", errors.NotFound, "No operation with this id is in the journal, or to be cancelled."),
    ErrorCode("not_found", errors.NotFound, "The hypervisor has no such domain."),
    ErrorCode("instance_exists", errors.AlreadyExists, "An instance with this id is on this host already."),
    ErrorCode("name_taken", errors.AlreadyExists, "Another instance or a foreign domain has this name."),
    ErrorCode("already_exists", errors.AlreadyExists, "The hypervisor has a domain with this name or id."),
    ErrorCode("instance_running", errors.FailedPrecondition, "The instance runs and must be stopped first."),
    ErrorCode("instance_not_running", errors.FailedPrecondition, "The instance does not run; start it first."),
    ErrorCode("instance_paused", errors.FailedPrecondition, "The instance is paused; resume it first."),
    ErrorCode("instance_not_paused", errors.FailedPrecondition, "The instance neither runs nor is paused; start it."),
    ErrorCode("host_disabled", errors.FailedPrecondition, "The host takes no new instances; see `host.set-enabled`."),
    ErrorCode("too_late_to_cancel", errors.FailedPrecondition, "The operation is past its point of no return."),
    ErrorCode("foreign_domain", errors.FailedPrecondition, "The domain was not made by this agent and is left alone."),
    ErrorCode("disk_missing", errors.FailedPrecondition, "The instance's root disk is not there."),
    ErrorCode("disk_in_use", errors.FailedPrecondition, "Another process holds the lock of the disk."),
    ErrorCode("network_missing", errors.FailedPrecondition, "The libvirt network of a NIC does not exist."),
    ErrorCode("bridge_missing", errors.FailedPrecondition, "The bridge of a NIC does not exist on the host."),
    ErrorCode("file_missing", errors.FailedPrecondition, "A file that the hypervisor needs does not exist."),
    ErrorCode("file_access_denied", errors.FailedPrecondition, "The hypervisor may not open a file that it needs."),
    ErrorCode("resource_busy", errors.FailedPrecondition, "The hypervisor says that something the work needs is busy."),
    ErrorCode("operation_aborted", errors.FailedPrecondition, "The hypervisor's work was aborted from outside."),
    ErrorCode("hypervisor_access_denied", errors.FailedPrecondition, "The agent lacks rights at the hypervisor."),
    ErrorCode("hypervisor_login_failed", errors.Unavailable, "The hypervisor did not take the agent's login."),
    ErrorCode("failed_precondition", errors.FailedPrecondition, "The verb is impossible in the present state."),
    ErrorCode("kvm_missing", errors.FailedPrecondition, "The driver is set to KVM, which does not work on this host."),
    ErrorCode("unsupported", errors.Unsupported, "The driver or hypervisor cannot do it."),
    ErrorCode("verb_unsupported", errors.Unsupported, "The driver lacks this verb; heartbeats list what it has."),
    ErrorCode("config_unsupported", errors.Unsupported, "The hypervisor cannot run a domain with this definition."),
    ErrorCode("qemu_img_missing", errors.Unsupported, "qemu-img is not installed on the host."),
    # Images.
    ErrorCode("image_rejected", errors.ImageRejected, "The image is not what the command said, or is not safe."),
    ErrorCode("image_missing", errors.ImageRejected, "There is no image at this URL."),
    ErrorCode("image_source_forbidden", errors.ImageRejected, "The host's policy does not allow this source."),
    ErrorCode("image_source_denied", errors.ImageRejected, "The source refuses to give the image to the agent."),
    ErrorCode("image_checksum_mismatch", errors.ImageRejected, "The bytes do not have the sha256 of the command."),
    ErrorCode("image_format_mismatch", errors.ImageRejected, "The bytes do not have the format of the command."),
    ErrorCode("image_too_large", errors.ImageRejected, "The image is larger than the host or the command allows."),
    ErrorCode("image_corrupt", errors.ImageRejected, "The image's structure is damaged."),
    ErrorCode("image_unsafe", errors.ImageRejected, "The image refers to other files, or is otherwise unsafe."),
    ErrorCode("disk_too_small", errors.InvalidArgument, "The root disk is smaller than the image."),
    ErrorCode("image_truncated", errors.Unavailable, "The source ended the image early."),
    ErrorCode("image_stalled", errors.Unavailable, "The source sent nothing for too long."),
    ErrorCode("image_unavailable", errors.Unavailable, "The source cannot be reached or answers with an error."),
    ErrorCode("image_timeout", errors.DeadlineExceeded, "The download took longer than the host allows."),
    ErrorCode("image_cache_unavailable", errors.Unavailable, "The host's image cache cannot be read or written."),
    # What is short, away or slow.
    ErrorCode("does_not_fit", errors.ResourceExhausted, "The instance does not fit; details says what is short."),
    ErrorCode("capacity_unknown", errors.Unavailable, "The host's capacity has not been read yet."),
    ErrorCode("no_space", errors.ResourceExhausted, "No disk space is left on the host."),
    ErrorCode("host_memory", errors.ResourceExhausted, "The host could not give the guest its memory."),
    ErrorCode("resource_exhausted", errors.ResourceExhausted, "Something is short on the host."),
    ErrorCode("hypervisor_unreachable", errors.Unavailable, "The hypervisor cannot be asked now."),
    ErrorCode("hypervisor_timeout", errors.DeadlineExceeded, "The hypervisor gave up waiting for itself or the guest."),
    ErrorCode("guest_agent_unresponsive", errors.Unavailable, "The guest agent does not answer."),
    ErrorCode("qemu_does_not_end", errors.Unavailable, "The guest's QEMU process could not be ended yet."),
    ErrorCode("qemu_img_timeout", errors.DeadlineExceeded, "qemu-img did not end in time."),
    ErrorCode("storage_unavailable", errors.Unavailable, "The file system of the instances failed."),
    ErrorCode("driver_threads_stuck", errors.Unavailable, "Too many hypervisor calls hang; no more are begun."),
    ErrorCode("journal_error", errors.Unavailable, "The journal could not be read."),
    ErrorCode("shutting_down", errors.Unavailable, "The agent is stopping."),
    ErrorCode("unavailable", errors.Unavailable, "A service that the work needs cannot be reached now."),
    ErrorCode("deadline_exceeded", errors.DeadlineExceeded, "A call did not end in time; read the state first."),
    # Defects and endings that need a person.
    ErrorCode("interrupted", errors.Internal, "The operation failed and its undoing outlived a restart of the agent."),
    ErrorCode("too_many_attempts", errors.Internal, "The agent died in this operation again and again; it was undone."),
    ErrorCode("hypervisor_error", errors.Internal, "The hypervisor answered with an error the agent does not know."),
    ErrorCode("hypervisor_operation_failed", errors.Internal, "The hypervisor tried and failed."),
    ErrorCode("qemu_img_failed", errors.Internal, "qemu-img failed."),
    ErrorCode("storage_failed", errors.Internal, "An unexpected error of the file system."),
    ErrorCode("journal_rejected", errors.Internal, "The journal can never take this change: a defect of the agent."),
    ErrorCode("internal", errors.Internal, "A defect of the agent; its log says more."),
)
"""Every code that the `error` of a final event can have. Codes are never renamed; new ones may come."""


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
