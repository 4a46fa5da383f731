"""The broker topology of the wire contract, as pure data."""

from __future__ import annotations

from agent.bus.base import Binding, Exchange, Queue, Topology
from agent.messages import routing

DELIVERY_LIMIT = 20
"""RabbitMQ 4's default, set for 3.10 too: a command that kills the agent this often is dead-lettered."""


def shared_topology() -> Topology:
    """What all hosts share: the exchanges, and a queue each for dead and for unroutable messages."""
    return Topology(
        exchanges=(
            Exchange(routing.UNROUTABLE_EXCHANGE),
            Exchange(routing.DEAD_EXCHANGE),
            Exchange(routing.COMMANDS_EXCHANGE, alternate=routing.UNROUTABLE_EXCHANGE),
            Exchange(routing.EVENTS_EXCHANGE),
        ),
        queues=(Queue(routing.DEAD_QUEUE), Queue(routing.UNROUTABLE_QUEUE)),
        bindings=(
            Binding(routing.DEAD_EXCHANGE, "#", routing.DEAD_QUEUE),
            Binding(routing.UNROUTABLE_EXCHANGE, "#", routing.UNROUTABLE_QUEUE),
        ),
    )


def host_topology(host: str) -> Topology:
    """One host's command queue: single active consumer, so that a second agent of the same host stands by."""
    queue = routing.host_queue(host)
    return Topology(
        queues=(
            Queue(
                queue,
                single_active=True,
                dead_letter_exchange=routing.DEAD_EXCHANGE,
                delivery_limit=DELIVERY_LIMIT,
            ),
        ),
        bindings=(
            Binding(routing.COMMANDS_EXCHANGE, f"*.*.{host}", queue),
            Binding(routing.COMMANDS_EXCHANGE, f"*.*.{routing.BROADCAST}", queue),
        ),
    )
