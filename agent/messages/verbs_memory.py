"""The power and memory family of verbs: suspend to disk, reset, crash dump, memory dump, policy."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from agent.messages.spec_policy import Policy
from agent.messages.types import Outbound
from agent.messages.verb import CommandData

DumpFormat = Literal["elf", "kdump-zlib", "raw"]
"""`elf` and `kdump-zlib` hold the guest's memory and registers; `raw` is the hypervisor's own, with all devices."""


class InstanceSuspend(CommandData):
    """Save the guest's memory to the host's disk and end it. `instance.resume` or `instance.start` brings it back."""

    verb: ClassVar[str] = "instance.suspend"


class InstanceReset(CommandData):
    """Reset the guest at once, as its reset button does: memory is lost, the domain and its QEMU stay."""

    verb: ClassVar[str] = "instance.reset"


class InstanceTriggerCrashDump(CommandData):
    """Send the guest a non-maskable interrupt; what it does with it (a crash dump, a panic) is its own affair."""

    verb: ClassVar[str] = "instance.trigger-crash-dump"


class InstanceMemoryDump(CommandData):
    """Write the guest's memory into a file in the host's dumps folder. `live` false: its vCPUs stand meanwhile."""

    verb: ClassVar[str] = "instance.memory-dump"
    format: DumpFormat = "elf"
    live: bool = True


class InstanceSetPolicy(CommandData):
    """Change what happens by itself (`spec.policy`). Fields that are left out stay as they are."""

    verb: ClassVar[str] = "instance.set-policy"
    on_host_boot: Literal["stay-stopped", "last-state", "start"] | None = None
    on_stop: Literal["keep", "restart"] | None = None
    on_crash: Literal["keep", "restart"] | None = None
    on_io_error: Literal["keep", "pause-and-retry"] | None = None

    @model_validator(mode="after")
    def _something(self) -> InstanceSetPolicy:
        if not self.model_dump(exclude_none=True):
            raise ValueError("name at least one policy to change")
        return self

    def applied_to(self, policy: Policy) -> Policy:
        """The policy with this change."""
        return policy.model_copy(update=self.model_dump(exclude_none=True))


class MemoryDumpResult(Outbound):
    """A memory dump on the host: readable by the agent's user and root only, kept until a person removes it."""

    instance_id: str
    path: str
    format: DumpFormat
    size_bytes: Annotated[int, Field(ge=0)]
    sha256: str


COMMANDS: tuple[type[CommandData], ...] = (
    InstanceSuspend,
    InstanceReset,
    InstanceTriggerCrashDump,
    InstanceMemoryDump,
    InstanceSetPolicy,
)
RESULTS: dict[str, type[Outbound]] = {"instance.memory-dump": MemoryDumpResult}
"""Verb → result, for the results that this module defines; those that return a shared one are in `results`."""
