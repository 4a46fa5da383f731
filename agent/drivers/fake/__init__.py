"""A simulated hypervisor: the driver `fake`, for demos, load tests and the tests of controllers.

It behaves as a hypervisor does, also in failing: `settings` says how large it is and what goes wrong, `faults`
holds what is scripted, `hypervisor` simulates domains, guests and disks, `driver` puts the contract on top.
"""

from agent.drivers.fake.driver import FakeDriver
from agent.drivers.fake.settings import Fault

__all__ = ["FakeDriver", "Fault"]
