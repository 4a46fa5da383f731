"""Exchange, queue and routing-key names. The host is last in a key, so that host names may contain dots."""

from __future__ import annotations

COMMANDS_EXCHANGE = "compute.commands"
UNROUTABLE_EXCHANGE = "compute.unroutable"
EVENTS_EXCHANGE = "compute.events"
DEAD_EXCHANGE = "compute.dead"
DEAD_QUEUE = "compute.dead-letters"
UNROUTABLE_QUEUE = "compute.unroutable-commands"
REPLY_PREFIX = "compute.reply."
"""A reply queue's name begins so, and it is bound to the events exchange by its own name."""
BROADCAST = "all"

CONTENT_TYPE = "application/cloudevents+json"


def host_queue(host: str) -> str:
    """Name the one durable queue of a host."""
    return f"compute.agent.{host}"


def command_key(verb: str, host: str) -> str:
    """Routing key of a command: `<noun>.<verb>.<host>`."""
    return f"{verb}.{host}"


def event_key(kind: str, host: str) -> str:
    """Routing key of an event: `<noun>.<event>.<host>`."""
    return f"{kind}.{host}"
