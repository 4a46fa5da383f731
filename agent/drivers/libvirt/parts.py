"""What every family of the libvirt driver works with."""

from __future__ import annotations

from abc import abstractmethod

from agent.drivers.base import Driver
from agent.drivers.libvirt.connection import Link
from agent.drivers.libvirt.host import Hypervisor
from agent.drivers.libvirt.settings import LibvirtSettings
from agent.drivers.libvirt.storage import Storage


class Parts(Driver):
    """The collaborators, set by the driver's constructor."""

    _settings: LibvirtSettings
    _host: str
    _storage: Storage
    _link: Link
    _hypervisor: Hypervisor

    @abstractmethod
    def _remove_storage(self, instance_id: str, *, keep_variables: bool) -> None:
        """Remove all that an instance has on the host's disks, or all but its UEFI variables."""
