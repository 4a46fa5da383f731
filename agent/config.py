"""The agent's configuration: a TOML file, over it environment variables, over both files of a secrets directory.

`COMPUTE_AGENT_<SECTION>__<KEY>` sets a key from the environment, a file named `<section>__<key>` from the secrets
directory (`COMPUTE_AGENT_SECRETS_DIR`, or systemd's `CREDENTIALS_DIRECTORY`). A wrong key is named with the file
and line where it stands.
"""

from __future__ import annotations

import os
import re
import socket
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings.sources import EnvSettingsSource, NestedSecretsSettingsSource

from agent.bus.amqp import AmqpSettings
from agent.core.capacity import Reservations
from agent.core.context import Deadlines
from agent.errors import InvalidArgument
from agent.exports.policy import ExportPolicy
from agent.images.policy import ImagePolicy
from agent.messages.types import HostName

Seconds = Annotated[float, Field(gt=0, le=86_400 * 365)]
Limit = Annotated[float, Field(ge=0, le=86_400 * 365)]
Count = Annotated[int, Field(ge=1, le=4096)]


class Section(BaseModel):
    """Base of the sections: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class AgentSection(Section):
    """Who this agent is and where it keeps its state."""

    host: HostName = Field(
        default_factory=socket.gethostname, description="Name of this host on the bus; `all` is reserved."
    )
    state_dir: Path = Field(
        default=Path("/var/lib/compute-agent"), description="Journal, compute_id, images, instances."
    )
    drain_timeout_s: Seconds = Field(default=60.0, description="On SIGTERM: how long running work may take to end.")


class DriverSection(Section):
    """Which hypervisor, and the driver's own settings (each driver documents its own)."""

    name: str = Field(default="libvirt", description="A driver: libvirt, fake, or one from an installed package.")
    settings: dict[str, Any] = Field(default_factory=dict, description="The driver's own settings.")


class LanesSection(Section):
    """How many commands of each class run at once."""

    query: Count = Field(default=16, description="Reads.")
    power: Count = Field(default=16, description="Start, stop, reboot, pause, resume, delete.")
    build: Count = Field(default=16, description="Create.")


class ThreadsSection(Section):
    """Driver threads: one hypervisor connection each."""

    query: Count = Field(default=4, description="Threads for reads.")
    mutate: Count = Field(default=16, description="Threads for changes.")
    long: Count = Field(default=4, description="Threads for long work: disks, full re-reads.")
    max_stuck: Count = Field(
        default=16, description="Stuck threads per pool that are replaced before calls are refused."
    )


class DeadlinesSection(Section):
    """Limits of one driver call."""

    query_s: Seconds = Field(default=15.0, description="One read.")
    mutate_s: Seconds = Field(default=120.0, description="One change.")
    long_s: Seconds = Field(default=3600.0, description="One piece of long work.")
    settle_s: Seconds = Field(default=30.0, description="Wait for a late call before undoing is put off.")
    reconnect_s: Seconds = Field(default=30.0, description="Wait for a lost hypervisor before a call is tried again.")
    operation_query_s: Limit = Field(default=3600.0, description="A whole read; 0: no limit. Longer ones are ended.")
    operation_power_s: Limit = Field(
        default=172_800.0, description="A whole start, stop, delete … with its waiting for the guest; 0: no limit."
    )
    operation_build_s: Limit = Field(
        default=172_800.0, description="A whole create, export … with its downloads; 0: no limit."
    )

    def build(self) -> Deadlines:
        """As the core takes them."""
        return Deadlines(
            query_s=self.query_s,
            mutate_s=self.mutate_s,
            long_s=self.long_s,
            settle_s=self.settle_s,
            reconnect_s=self.reconnect_s,
        )

    @property
    def operations_s(self) -> dict[str, float]:
        """Class of work → limit of a whole operation; 0: none."""
        return {"query": self.operation_query_s, "power": self.operation_power_s, "build": self.operation_build_s}


class CapacitySection(Section):
    """What is kept for the host, and how far each resource may be over-committed."""

    cpu_allocation_ratio: Annotated[float, Field(gt=0, le=100)] = Field(default=4.0, description="vCPUs per CPU.")
    ram_allocation_ratio: Annotated[float, Field(gt=0, le=100)] = Field(
        default=1.0, description="Memory promised per memory."
    )
    disk_allocation_ratio: Annotated[float, Field(gt=0, le=100)] = Field(
        default=1.0, description="Disk promised per disk."
    )
    reserved_vcpus: Annotated[int, Field(ge=0)] = Field(default=0, description="CPUs kept for the host.")
    reserved_memory_mib: Annotated[int, Field(ge=0)] = Field(
        default=512, description="MiB of memory kept for the host."
    )
    reserved_disk_gib: Annotated[int, Field(ge=0)] = Field(default=1, description="GiB of disk kept for the host.")
    reserved_pcpus: Annotated[int, Field(ge=0)] = Field(
        default=0, description="CPUs of the dedicated set that no guest gets."
    )
    reserved_pages: dict[Annotated[int, Field(ge=4)], Annotated[int, Field(ge=0)]] = Field(
        default_factory=dict, description="Huge pages that no guest gets: page size in KiB = number of pages."
    )

    def build(self) -> Reservations:
        """As the core takes them."""
        return Reservations(**self.model_dump())


class PeriodicSection(Section):
    """What happens by the clock."""

    heartbeat_s: Seconds = Field(default=10.0, description="Between heartbeats; changes are told at once.")
    reconcile_s: Seconds = Field(default=60.0, description="Between comparisons of journal and hypervisor.")
    due_s: Seconds = Field(default=5.0, description="Between looks for instances whose deadlines have passed.")
    audit_s: Seconds = Field(default=3600.0, description="Between audits of what is on the host; see `[audit]`.")
    prune_s: Seconds = Field(default=3600.0, description="Between prunings of the journal.")
    images_s: Seconds = Field(default=600.0, description="Between looks for cached images that may go.")
    requests_s: Seconds = Field(default=5.0, description="Between looks for requests of the journal tool.")
    keep_operations_s: Seconds = Field(default=7 * 86_400.0, description="How long ended operations answer duplicates.")


class SnapshotsSection(Section):
    """Snapshots of instances."""

    max_per_instance: Annotated[int, Field(ge=0, le=256)] = Field(
        default=16, description="Snapshots that one instance may have; they grow its disk files."
    )


class AuditSection(Section):
    """What the periodic audit does about what it finds."""

    repair: bool = Field(
        default=False, description="Remove what is provably the agent's and of no instance; false: only report it."
    )
    leftover_age_s: Seconds = Field(
        default=86_400.0, description="Unfinished downloads and exports older than this are leftovers."
    )
    memory_dump_age_s: Seconds | None = Field(
        default=None, description="Memory dumps older than this are leftovers; not set: they are kept for ever."
    )


class HealthSection(Section):
    """The HTTP endpoint for /livez, /readyz and /metrics."""

    listen: str = Field(default="127.0.0.1:9177", description="`address:port`; empty: no endpoint.")


class LogSection(Section):
    """Logs on stdout, one JSON object per line."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least level that is logged."
    )


class Settings(BaseSettings):
    """The whole configuration."""

    model_config = SettingsConfigDict(
        env_prefix="COMPUTE_AGENT_",
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        nested_model_default_partial_update=True,
    )

    agent: AgentSection = Field(default_factory=AgentSection)
    bus: AmqpSettings
    driver: DriverSection = Field(default_factory=DriverSection)
    images: ImagePolicy = Field(default_factory=ImagePolicy)
    exports: ExportPolicy = Field(default_factory=ExportPolicy)
    snapshots: SnapshotsSection = Field(default_factory=SnapshotsSection)
    lanes: LanesSection = Field(default_factory=LanesSection)
    threads: ThreadsSection = Field(default_factory=ThreadsSection)
    deadlines: DeadlinesSection = Field(default_factory=DeadlinesSection)
    capacity: CapacitySection = Field(default_factory=CapacitySection)
    periodic: PeriodicSection = Field(default_factory=PeriodicSection)
    audit: AuditSection = Field(default_factory=AuditSection)
    health: HealthSection = Field(default_factory=HealthSection)
    log: LogSection = Field(default_factory=LogSection)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Secrets over environment over file; no dotenv."""
        del settings_cls, dotenv_settings
        secrets = os.environ.get("COMPUTE_AGENT_SECRETS_DIR") or os.environ.get("CREDENTIALS_DIRECTORY")
        assert isinstance(env_settings, EnvSettingsSource)  # noqa: S101 - pydantic-settings gives just this
        assert isinstance(init_settings, InitSettingsSource)  # noqa: S101
        if secrets is None:
            return (env_settings, init_settings)
        nested = NestedSecretsSettingsSource(
            file_secret_settings,
            secrets_dir=secrets,
            secrets_prefix="",
            secrets_nested_delimiter="__",
            secrets_dir_missing="error",
        )
        return (nested, env_settings, init_settings)


def load(path: Path) -> Settings:
    """Read and validate the configuration.

    Raises `InvalidArgument` (code `bad_config`) whose sentence names file, line and key.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise InvalidArgument(f"cannot read the configuration {path}: {reason}", code="bad_config") from exc
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise InvalidArgument(f"{path}: {exc}", code="bad_config") from exc
    return validate(raw, path, text)


def validate(raw: dict[str, Any], path: Path, text: str) -> Settings:
    """Validate what the file said together with environment and secrets. Raises as `load`."""
    try:
        settings = Settings(**raw)
    except ValidationError as exc:
        lines = [
            f"{_where(path, text, error['loc'])}: {'.'.join(str(part) for part in error['loc'])}: {_sentence(error)}"
            for error in exc.errors(include_url=False, include_input=False)
        ]
        raise InvalidArgument("\n".join(lines), code="bad_config") from None
    except ValueError as exc:
        raise InvalidArgument(f"{path}: {exc}", code="bad_config") from exc
    if settings.agent.host == "all":
        raise InvalidArgument(f"{path}: agent.host: the name `all` is reserved for broadcasts", code="bad_config")
    return settings


def _sentence(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return "no such key"
    if error["type"] == "missing":
        return "this key is needed and not set"
    return str(error["msg"])


def _where(path: Path, text: str, loc: tuple[int | str, ...]) -> str:
    """File and line of a key; only the file where it was not set in the file."""
    section: list[str] = []
    wanted = [str(part) for part in loc]
    best = None
    for number, line in enumerate(text.splitlines(), start=1):
        header = re.match(r"\s*\[\[?\s*([^\]]+?)\s*\]\]?", line)
        key = re.match(r"\s*([A-Za-z0-9_.\"'-]+)\s*=", line)
        if header:
            section = [part.strip(" \"'") for part in header.group(1).split(".")]
            here = section
        elif key:
            here = section + [part.strip(" \"'") for part in key.group(1).split(".")]
        else:
            continue
        if here == wanted[: len(here)] and (best is None or len(here) >= best[0]):
            best = (len(here), number)
    return f"{path}:{best[1]}" if best else str(path)


def document() -> str:
    """The reference of all keys, as a commented TOML file with every default."""
    lines: list[str] = []
    for name, field in Settings.model_fields.items():
        section = field.annotation
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            continue
        lines.append(f"# {(section.__doc__ or '').strip().splitlines()[0]}")
        lines.append(f"[{name}]")
        for key, item in section.model_fields.items():
            if item.description:
                lines.append(f"# {item.description}")
            lines.append(_documented(key, item))
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"


def _documented(key: str, item: Any) -> str:
    if item.is_required():
        return f'{key} = ""  # needed'
    if key == "host":
        return "# host = ...  # default: this machine's host name"
    default = item.get_default(call_default_factory=True)
    return f"# {key} = ...  # not set" if default is None else f"# {key} = {_toml(default)}"


def _toml(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return str(value)
        case frozenset() | list() | tuple():
            return "[" + ", ".join(_toml(item) for item in sorted(value)) + "]"
        case dict():
            return "{}"
        case _:
            return f'"{value}"'
