"""The bus on RabbitMQ.

aiormq does the protocol's control side: login, heartbeats, channels, declarations. What happens per message
(publish, confirm, deliver, settle) is encoded and decoded here, at the transport (`transport`, `wire`), because
a library object and a task per message cost more than all the rest. Reconnecting is ours as well (`link`).
Only this package imports aiormq.
"""

from agent.bus.amqp.bus import AmqpBus
from agent.bus.amqp.settings import AmqpSettings

__all__ = ["AmqpBus", "AmqpSettings"]
