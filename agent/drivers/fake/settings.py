"""What can be set on the fake: its size, its slowness, its faults, and the labels by which a spec steers it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from agent import errors
from agent.drivers.base import Driver
from agent.errors import ComputeError, InvalidArgument

CALLS: Final[frozenset[str]] = frozenset(
    name for name in dir(Driver) if not name.startswith("_") and inspect.isfunction(getattr(Driver, name))
) - {"close", "is_connected"}
"""The driver's methods that can be made slow or made to fail."""


def _known_call(name: str) -> str:
    if name not in CALLS:
        raise ValueError(f"the driver contract has no method {name!r}")
    return name


CallName = Annotated[str, AfterValidator(_known_call)]

BUG: Final = "bug"
"""A fault's `error` for an exception that breaks the contract, as a defective driver raises it."""

_ERRORS: Final[dict[str, type[ComputeError]]] = {
    cls.default_code: cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, ComputeError)
}

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Fault(BaseModel):
    """One scripted fault. Of several that match a call the first takes effect.

    `call`: a method's name, or `*` for all but `connect`. `instance`: a shell pattern on the instance's name or
    id; None matches every call. `times`: how often it strikes; None is every time. `hang_s`: the call first hangs
    that long (until `clear_faults` at the most). `error`: the code or class name of an `agent.errors` class, or
    `bug`; without it, and without `kill`, the call then succeeds. `kill` ends this process with SIGKILL. With
    `crash_after` the error or the kill comes after the effect took place, else before it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    call: Literal["*"] | CallName
    instance: str | None = None
    times: Annotated[int, Field(ge=1)] | None = None
    error: str | None = None
    message: str | None = None
    hang_s: Seconds | None = None
    crash_after: bool = False
    kill: bool = False

    @field_validator("error")
    @classmethod
    def _known_error(cls, value: str | None) -> str | None:
        if value is None:
            return None
        code = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", value).lower()
        if code != BUG and code not in _ERRORS:
            raise ValueError(f"there is no error {value!r}; known are: {', '.join(sorted([*_ERRORS, BUG]))}")
        return code

    def exception(self, call: str) -> Exception | None:
        """Build what the call raises, or None."""
        if self.error is None:
            return None
        message = self.message or f"scripted fault of the fake driver in {call}"
        return RuntimeError(message) if self.error == BUG else _ERRORS[self.error](message)


class FakeSettings(BaseModel):
    """Settings of the driver `fake`. Times are in seconds, sizes in MiB.

    `latency_s` makes calls slow: per method, with `default` for those not named. `guest_shutdown_s` is what the
    guest takes to react to a shutdown or reboot; None: it ignores them. `boot_s`: until then the guest has written
    no console log and reacts to nothing. `persist`: domains and disks are kept as files below the state directory
    and outlive the agent, as real guests do. `lacks`: optional verbs that this hypervisor does not have. `backends`
    and `keys`: names of storage back ends and of encryption keys that a spec can ask for.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    cpus: Annotated[int, Field(ge=1, le=4096)] = 64
    memory_mib: Annotated[int, Field(ge=64)] = 262_144
    disk_mib: Annotated[int, Field(ge=1)] = 4 * 1024 * 1024
    latency_s: dict[Literal["default"] | CallName, Seconds] = Field(default_factory=dict)
    guest_shutdown_s: Seconds | None = 0.0
    boot_s: Seconds = 0.0
    faults: list[Fault] = Field(default_factory=list)
    persist: bool = False
    lacks: list[Literal["instance.pause", "instance.resume", "instance.reboot", "console.log"]] = Field(
        default_factory=list
    )

    backends: list[str] = Field(default_factory=list)
    keys: list[str] = Field(default_factory=list)

    def latency_of(self, call: str) -> float:
        """How long a call takes, in seconds."""
        if not self.latency_s:
            return 0.0
        return dict[str, float](self.latency_s.items()).get(call, self.latency_s.get("default", 0.0))


def parse_settings(settings: Mapping[str, Any]) -> FakeSettings:
    """Validate settings. Raises `InvalidArgument` that names the key."""
    try:
        return FakeSettings.model_validate(dict(settings))
    except ValidationError as exc:
        raise InvalidArgument(f"driver fake: {_first(exc)}", code="bad_driver_settings") from exc


@dataclass(frozen=True, slots=True)
class Steering:
    """What a spec's labels ask of the fake. `ignores_acpi`: `fake.guest-shutdown-s` is `never`."""

    faults: tuple[Fault, ...] = ()
    crash_after_s: float | None = None
    stop_after_s: float | None = None
    io_error_after_s: float | None = None
    guest_shutdown_s: float | None = None
    ignores_acpi: bool = False
    boot_s: float | None = None


UNSTEERED: Final = Steering()
PREFIX: Final = "fake."
_AFTER: Final = {
    "crash-after-s": "crash_after_s",
    "stop-after-s": "stop_after_s",
    "io-error-after-s": "io_error_after_s",
    "boot-s": "boot_s",
}


def parse_labels(labels: Mapping[str, str]) -> Steering:
    """Read the labels that begin with `fake.`.

    `fake.<call>-error=<code>`, `fake.<call>-error-times=<n>`, `fake.<call>-hang-s=<s>` (`fake.hang-s` is that of
    start), and about the guest, counted from its start: `fake.crash-after-s`, `fake.stop-after-s`,
    `fake.io-error-after-s`, `fake.boot-s`, `fake.guest-shutdown-s` (or `never`). Raises `InvalidArgument` with
    code `unknown_fake_label` or `bad_fake_label`, since a misspelt label would make a test pass for no reason.
    """
    mine = {key.removeprefix(PREFIX): value for key, value in labels.items() if key.startswith(PREFIX)}
    if not mine:
        return UNSTEERED
    found: dict[str, Any] = {}
    faults: dict[str, dict[str, Any]] = {}
    for key, value in mine.items():
        if key in _AFTER:
            found[_AFTER[key]] = _number(key, value)
        elif key == "guest-shutdown-s":
            found["ignores_acpi"] = value == "never"
            found["guest_shutdown_s"] = None if value == "never" else _number(key, value)
        else:
            call, field = _fault_label(key)
            faults.setdefault(call, {"call": call})[field] = value
    try:
        # Labels are text, so the model converts them: this is no wire type.
        found["faults"] = tuple(Fault.model_validate(fault) for fault in faults.values())
    except ValidationError as exc:
        raise InvalidArgument(f"a label of driver fake is wrong: {_first(exc)}", code="bad_fake_label") from exc
    return Steering(**found)


def _fault_label(key: str) -> tuple[str, str]:
    if key == "hang-s":
        return "start", "hang_s"
    for suffix, field in (("-error-times", "times"), ("-error", "error"), ("-hang-s", "hang_s")):
        call = key.removesuffix(suffix).replace("-", "_")
        if key.endswith(suffix) and call in CALLS:
            return call, field
    raise InvalidArgument(f"driver fake knows no label {PREFIX + key!r}", code="unknown_fake_label")


def _number(key: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise InvalidArgument(f"label {PREFIX + key!r} is no number of seconds: {value!r}", code="bad_fake_label")
    return number


def _first(exc: ValidationError) -> str:
    error = exc.errors(include_url=False, include_context=False, include_input=False)[0]
    return f"{'.'.join(str(part) for part in error['loc']) or 'settings'}: {error['msg']}"
