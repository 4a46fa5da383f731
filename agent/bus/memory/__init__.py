"""The bus within one process: RabbitMQ's behaviour for tests, demos and simulations, with faults on demand.

`MemoryBroker` is the broker, `MemoryBus` a connection to it. Both belong to one event loop and start no task.
"""

from agent.bus.memory.broker import MemoryBroker
from agent.bus.memory.bus import MemoryBus

__all__ = ["MemoryBroker", "MemoryBus"]
