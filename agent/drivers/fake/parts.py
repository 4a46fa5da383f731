"""What every family of the fake driver works with."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterator

from agent.drivers.base import CallContext, Driver, DriverContext
from agent.drivers.fake.domains import Domain
from agent.drivers.fake.faults import FaultPlan
from agent.drivers.fake.hypervisor import Hypervisor
from agent.drivers.fake.settings import FakeSettings
from agent.messages.spec import InstanceSpec


class Parts(Driver):
    """The collaborators, set by the driver's constructor."""

    _settings: FakeSettings
    _context: DriverContext
    _plan: FaultPlan
    _hypervisor: Hypervisor

    @abstractmethod
    def _active(self, instance_id: str, participle: str) -> Domain:
        """The domain, which must be ours and active. Raises `NotFound`, `FailedPrecondition`."""

    @abstractmethod
    @contextlib.contextmanager
    def _call(
        self,
        call: str,
        instance_id: str | None = None,
        *,
        verb: str | None = None,
        spec: InstanceSpec | None = None,
        context: CallContext | None = None,
        connecting: bool = False,
    ) -> Iterator[None]:
        """Surround one call of the contract: whether it can be asked, how long it takes, which fault strikes it."""
        yield
