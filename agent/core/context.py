"""What every handler and task of the agent works with: the collaborators, given once by the composition root."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol

from agent.core.waiting import happens
from agent.drivers.base import Capabilities, DomainInfo, Driver, PreparedImage
from agent.exports.service import Exports
from agent.messages.spec import ImageSource

if TYPE_CHECKING:
    from agent.core.capacity import Capacity
    from agent.core.instances import Instances
    from agent.core.journal import Journal
    from agent.drivers.executor import DriverExecutor
    from agent.images.cache import CachedImage


def now() -> datetime:
    """The time, in UTC."""
    return datetime.now(UTC)


class Images(Protocol):
    """Where verified images come from."""

    @property
    def limit_bytes(self) -> int | None:
        """The quota of the cache."""

    async def prepare(
        self,
        source: ImageSource,
        progress: Callable[[int, int | None], None],
        *,
        boot_file: bool = False,
        ours: bool = False,
    ) -> PreparedImage:
        """Return the image, fetched and verified if it is not in the cache yet.

        `boot_file`: a kernel or ramdisk. `ours`: its sha256 comes from this agent, so it needs no signature.
        """

    async def images(self) -> list[CachedImage]:
        """List the cache."""

    async def find(self, sha256: str) -> list[CachedImage]:
        """Return what the cache has of these bytes. Raises `NotFound`."""

    def check_unused(self, sha256: str) -> None:
        """Refuse if an instance or an operation uses the image."""

    async def remove(self, sha256: str) -> int:
        """Remove an unused image; return the bytes that are free again."""

    async def verify(self, sha256: str, progress: Callable[[int, int | None], None]) -> bool:
        """Tell whether the image's bytes are those that were published."""

    async def tidy(self) -> list[str]:
        """Let go what may go; return the sha256 of each image that is damaged and in use."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Limits of one driver call, in seconds, per thread pool."""

    query_s: float = 15.0
    mutate_s: float = 120.0
    long_s: float = 3600.0
    settle_s: float = 30.0
    reconnect_s: float = 30.0


@dataclass(slots=True)
class HostState:
    """What the agent knows about its host as a whole."""

    enabled: bool = True
    disabled_reason: str | None = None
    connected: asyncio.Event = field(default_factory=asyncio.Event)
    ready: bool = False
    surveyed: bool = False
    """Every domain was read once since the start: there is no instance that is not known."""
    capabilities: Capabilities = field(
        default_factory=lambda: Capabilities(hypervisor_type="unknown", hypervisor_version="", verbs=frozenset())
    )
    foreign: dict[str, DomainInfo] = field(default_factory=dict)
    reconciling: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while everything is re-read: of two re-readings at once the older could overwrite the newer."""
    conditions: dict[str, str] = field(default_factory=dict)
    """Name of what is wrong → sentence. Empty: all is well."""

    async def wait_connected(self, timeout_s: float) -> bool:
        """Wait until the hypervisor can be asked. False after `timeout_s`."""
        return await happens(self.connected, timeout_s)


@dataclass(slots=True)
class Context:
    """The collaborators. No logic lives here."""

    host: str
    compute_id: str
    version: str
    driver: Driver
    executor: DriverExecutor
    journal: Journal
    instances: Instances
    capacity: Capacity
    images: Images
    deadlines: Deadlines
    state: HostState
    exports: Exports = field(default_factory=Exports)
    max_snapshots: int = 16
    """How many snapshots an instance may have."""
    heartbeat_now: Callable[[], None] = lambda: None
    """Asks for a heartbeat soon; many askings become one."""
