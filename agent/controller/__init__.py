"""The other side of the bus: an async client library and the `computectl` commands.

Knows the wire contract (`agent.messages`) and the bus interface (`agent.bus.base`), and nothing of how the
agent carries a command out. Everything runs on one event loop's thread.
"""

from agent.controller.client import ComputeClient
from agent.controller.failures import CommandError, CommandFailed, CommandRefused
from agent.controller.stream import EventStream, Gap

__all__ = ["CommandError", "CommandFailed", "CommandRefused", "ComputeClient", "EventStream", "Gap"]
