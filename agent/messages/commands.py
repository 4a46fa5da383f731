"""Every command, its data and its envelope.

A command's wire form is a CloudEvents 1.0 envelope in structured JSON whose `type` is `compute.<noun>.<verb>.v1`.
One discriminated union over `type` parses and validates an envelope with its data in a single pass.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar

from pydantic import (
    AwareDatetime,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import from_json

from agent.errors import InvalidArgument
from agent.messages import (
    verbs_host,
    verbs_image,
    verbs_memory,
    verbs_rebuild,
    verbs_resize,
    verbs_snapshot,
    verbs_stats,
)
from agent.messages.spec import InstanceSpec
from agent.messages.types import CommandId, Generation, HostName, Inbound, InstanceId, TimeoutS
from agent.messages.verb import CommandData

MAX_COMMAND_BYTES = 1024 * 1024
"""A larger body is refused before it is parsed; the largest valid create stays below a quarter of it."""

RestoreS = Annotated[float, Field(gt=0, le=10 * 366 * 86_400, allow_inf_nan=False)]


class InstanceCreate(CommandData):
    """Make an instance from its spec and start it unless `start` is false. `subject` is the new instance's id."""

    verb: ClassVar[str] = "instance.create"
    spec: InstanceSpec
    start: bool = True


class InstanceDelete(CommandData):
    """End an instance and remove everything it owns on this host. Deleting an unknown instance is `not_found`.

    With `restore_within_s` it is only stopped (ended after `timeout_s`), and `instance.restore` brings it back for so
    long; then it is removed. `if_overdue`: remove it only if it is soft-deleted and its time to be restored has passed.
    A shelved instance's exports are removed with it unless `keep_exports`.
    """

    verb: ClassVar[str] = "instance.delete"
    restore_within_s: RestoreS | None = None
    timeout_s: TimeoutS = 60.0
    if_overdue: bool = False
    keep_exports: bool = False

    @model_validator(mode="after")
    def _one_way(self) -> InstanceDelete:
        if self.if_overdue and self.restore_within_s is not None:
            raise ValueError("give restore_within_s or if_overdue, not both")
        return self


class InstanceStart(CommandData):
    """Start a stopped instance, or bring a suspended one back. A running one succeeds with `changed: false`.

    `discard_saved`: boot a suspended instance anew; its saved memory is lost, also where it is damaged.
    """

    verb: ClassVar[str] = "instance.start"
    discard_saved: bool = False


class InstanceStop(CommandData):
    """Ask the guest to shut down, and after `timeout_s` without effect end it; `force` ends it at once.

    A paused or suspended guest is only stopped with `force`; the saved memory of a suspended one is lost then.
    """

    verb: ClassVar[str] = "instance.stop"
    timeout_s: TimeoutS = 60.0
    force: bool = False


class InstanceReboot(CommandData):
    """Restart a running guest: `soft` asks it (hard after `timeout_s`), `hard` ends it and starts it anew.

    `hard` also starts a suspended guest anew; its saved memory is lost.
    """

    verb: ClassVar[str] = "instance.reboot"
    mode: Literal["soft", "hard"] = "soft"
    timeout_s: TimeoutS = 60.0


class InstancePause(CommandData):
    """Stop the guest's vCPUs; its memory stays."""

    verb: ClassVar[str] = "instance.pause"


class InstanceResume(CommandData):
    """Let a paused or suspended guest run on."""

    verb: ClassVar[str] = "instance.resume"


class InstanceShow(CommandData):
    """Read one instance, with its state read back from the hypervisor."""

    verb: ClassVar[str] = "instance.show"


class InstanceList(CommandData):
    """List this host's instances, and on request the foreign domains."""

    verb: ClassVar[str] = "instance.list"
    subject_required: ClassVar[bool] = False
    include_foreign: bool = False
    limit: Annotated[int, Field(ge=1, le=10_000)] = 1000
    after: InstanceId | None = None


class ConsoleLog(CommandData):
    """Read the end of the serial console's log: at most `max_bytes` of it."""

    verb: ClassVar[str] = "console.log"
    max_bytes: Annotated[int, Field(ge=1, le=512 * 1024)] = 64 * 1024


class HostPing(CommandData):
    """Answer through the whole durable path and do nothing else; `echo` comes back."""

    verb: ClassVar[str] = "host.ping"
    subject_required: ClassVar[bool] = False
    echo: Annotated[str, Field(max_length=1024)] | None = None


class HostShow(CommandData):
    """Read the host: what a heartbeat says, at once."""

    verb: ClassVar[str] = "host.show"
    subject_required: ClassVar[bool] = False


class HostSetEnabled(CommandData):
    """Allow or refuse new instances on this host; existing ones are not affected. Survives restarts."""

    verb: ClassVar[str] = "host.set-enabled"
    subject_required: ClassVar[bool] = False
    enabled: bool
    reason: Annotated[str, Field(max_length=256)] | None = None


class OperationShow(CommandData):
    """Read one operation and its steps from the journal."""

    verb: ClassVar[str] = "operation.show"
    subject_required: ClassVar[bool] = False
    operation_id: CommandId


class OperationCancel(CommandData):
    """Cancel an operation: at once while it waits, else at its next safe point, undoing what it did."""

    verb: ClassVar[str] = "operation.cancel"
    subject_required: ClassVar[bool] = False
    operation_id: CommandId


D = TypeVar("D", bound=CommandData)


class Command(Inbound, Generic[D]):
    """The envelope of a command. `id` is its idempotency key, `subject` the instance it is about.

    `expirytime`: refused as expired if work has not begun by then. `generation`: refused as stale if lower than
    the instance's. `host`: refused if it is not this host. `reportprogress`: send accepted, started and progress
    events at once and not only when the work outlasts 200 ms.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    specversion: Literal["1.0"]
    id: CommandId
    source: Annotated[str, Field(min_length=1, max_length=256)]
    type: str
    subject: InstanceId | None = None
    time: AwareDatetime | None = None
    datacontenttype: Literal["application/json"] = "application/json"
    dataschema: Annotated[str, Field(max_length=512)] | None = None
    traceparent: (
        Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$")] | None
    ) = None
    expirytime: AwareDatetime | None = None
    generation: Generation | None = None
    host: HostName | None = None
    reportprogress: bool = False
    data: D

    @property
    def verb(self) -> str:
        """`<noun>.<verb>` of this command."""
        return self.data.verb

    def is_expired(self, now: datetime) -> bool:
        """Tell whether `expirytime` has passed."""
        return self.expirytime is not None and now >= self.expirytime


COMMANDS: tuple[type[CommandData], ...] = (
    InstanceCreate,
    InstanceDelete,
    InstanceStart,
    InstanceStop,
    InstanceReboot,
    InstancePause,
    InstanceResume,
    InstanceShow,
    InstanceList,
    ConsoleLog,
    HostPing,
    HostShow,
    HostSetEnabled,
    OperationShow,
    OperationCancel,
    *verbs_memory.COMMANDS,
    *verbs_resize.COMMANDS,
    *verbs_image.COMMANDS,
    *verbs_snapshot.COMMANDS,
    *verbs_rebuild.COMMANDS,
    *verbs_host.COMMANDS,
    *verbs_stats.COMMANDS,
)


def type_of(verb: str) -> str:
    """Return the CloudEvents type of a verb: `compute.<noun>.<verb>.v1`."""
    return f"compute.{verb}.v1"


def _envelope(data: type[CommandData]) -> Any:
    literal = Literal[type_of(data.verb)]  # type: ignore[valid-type]
    fields: dict[str, Any] = {"type": literal, "data": data}
    if data.subject_required:
        fields["subject"] = InstanceId
    name = f"{data.__name__}Command"
    namespace: dict[str, Any] = {"__annotations__": fields, "__module__": __name__, "__doc__": data.__doc__}
    # Not of `Command[data]`: pydantic would build, and keep, a second model for each command.
    return type(name, (Command,), namespace)


ENVELOPES: dict[str, Any] = {type_of(data.verb): _envelope(data) for data in COMMANDS}
"""CloudEvents type → envelope model."""

_ADAPTERS: dict[str, TypeAdapter[Command[CommandData]]] = {t: TypeAdapter(m) for t, m in ENVELOPES.items()}


class Refused(InvalidArgument):
    """A body that is no valid command. Carries what of the envelope could be read, so that it can be answered."""

    def __init__(self, message: str, *, code: str, id: str | None = None, subject: str | None = None) -> None:
        super().__init__(message, code=code)
        self.command_id = id
        self.subject = subject


def parse_command(body: bytes) -> Command[CommandData]:
    """Parse and validate a command.

    Raises `Refused` with a code: `too_large`, `bad_json`, `bad_envelope`, `unknown_type`, `unknown_field`,
    `invalid_argument`. Bounded in time and memory by `MAX_COMMAND_BYTES` and the parser's nesting limit.
    """
    if len(body) > MAX_COMMAND_BYTES:
        raise Refused(f"the body has {len(body)} bytes; a command has at most {MAX_COMMAND_BYTES}", code="too_large")
    try:
        raw = from_json(body, cache_strings="keys", allow_inf_nan=False)
    except ValueError as exc:
        raise Refused(f"the body is not JSON: {exc}", code="bad_json") from exc
    if not isinstance(raw, dict):
        raise Refused("the body is no CloudEvents object", code="bad_envelope")
    known = _readable(raw)
    if raw.get("specversion") != "1.0" or "id" not in raw or "type" not in raw:
        raise Refused(
            "the body is no CloudEvents 1.0 object: it needs specversion, id and type", code="bad_envelope", **known
        )
    adapter = _ADAPTERS.get(raw["type"]) if isinstance(raw["type"], str) else None
    if adapter is None:
        raise Refused(f"no command has the type {str(raw['type'])[:120]!r}", code="unknown_type", **known)
    try:
        return adapter.validate_json(body)
    except ValidationError as exc:
        code, sentence = _explain(exc)
        raise Refused(sentence, code=code, **known) from None


def _readable(raw: dict[str, Any]) -> dict[str, str | None]:
    """Pick the id and subject out of an envelope that may be wrong in any way."""
    found: dict[str, str | None] = {}
    for key, adapter in (("id", _ID), ("subject", _SUBJECT)):
        try:
            found[key] = adapter.validate_python(raw.get(key))
        except ValidationError:
            found[key] = None
    return found


_ID: TypeAdapter[str] = TypeAdapter(CommandId)
_SUBJECT: TypeAdapter[str] = TypeAdapter(InstanceId)


def _explain(exc: ValidationError) -> tuple[str, str]:
    """Turn pydantic's findings into a code and one sentence that names at most three fields."""
    errors = exc.errors(include_url=False, include_context=False, include_input=False)
    code = "unknown_field" if any(e["type"] == "extra_forbidden" for e in errors) else "invalid_argument"
    parts = [f"{'.'.join(str(p) for p in e['loc']) or 'envelope'}: {e['msg'][:160]}" for e in errors[:3]]
    more = f" (and {len(errors) - 3} more)" if len(errors) > 3 else ""
    return code, "; ".join(parts) + more
