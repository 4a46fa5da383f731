"""A tiny scripted agent on the in-process broker, for the controller's tests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from click.testing import CliRunner, Result

from agent.bus.base import Delivery, Outgoing
from agent.bus.memory import MemoryBroker, MemoryBus
from agent.bus.topology import host_topology, shared_topology
from agent.controller.cli import cli
from agent.controller.session import Session
from agent.messages import routing
from agent.messages.commands import Command, parse_command
from agent.messages.events import (
    EventData,
    HostHeartbeat,
    Inventory,
    OperationAccepted,
    OperationFailed,
    OperationProgress,
    OperationRejected,
    OperationStarted,
    OperationSucceeded,
    Problem,
    render_event,
    seal,
)

HOST = "node1.example"
SPEC = "name: a\nvcpus: 1\nmemory_mib: 64\nroot_disk: {size_mib: 1}\n"
INSTANCE = "11111111-2222-3333-4444-555555555555"
Script = Callable[[Command[Any]], list[EventData]]


def succeed(result: dict[str, Any] | None = None) -> Script:
    return lambda c: [
        OperationSucceeded(operation_id=c.id, verb=c.verb, instance_id=c.subject, result=result or {}, duration_ms=12.5)
    ]


def reject(code: str, message: str, /, *, retryable: bool = False, **details: Any) -> Script:
    problem = Problem(code=code, message=message, retryable=retryable, details=details)
    return lambda c: [OperationRejected(operation_id=c.id, verb=c.verb, instance_id=c.subject, error=problem)]


def fail(code: str, message: str, *, undone: bool = True) -> Script:
    problem = Problem(code=code, message=message, retryable=False)
    return lambda c: [
        OperationFailed(operation_id=c.id, verb=c.verb, instance_id=c.subject, error=problem, undone=undone)
    ]


def with_progress(last: Script) -> Script:
    def events(c: Command[Any]) -> list[EventData]:
        common: dict[str, Any] = {"operation_id": c.id, "verb": c.verb, "instance_id": c.subject}
        return [
            OperationAccepted(**common),
            OperationStarted(**common),
            OperationProgress(**common, phase="image", done_bytes=1048576, total_bytes=4194304),
            *last(c),
        ]

    return events


class FakeAgent:
    """Answers by script: `answers[verb]`, or silence. `commands` has what came, repeats included."""

    def __init__(self, broker: MemoryBroker, host: str = "node1.example") -> None:
        self.bus = MemoryBus(broker, name=f"agent@{host}")
        self.host = host
        self.epoch = "e1"
        self.sequence = 0
        self.answers: dict[str, Script] = {}
        self.commands: list[Command[Any]] = []
        self.bodies: list[bytes] = []
        self.correlate = True
        self.repeat = 1

    async def start(self) -> FakeAgent:
        await self.bus.connect(timeout_s=1)
        await self.bus.declare(shared_topology())
        await self.bus.declare(host_topology(self.host))
        await self.bus.consume(routing.host_queue(self.host), self._on_delivery, prefetch=10)
        return self

    def _on_delivery(self, delivery: Delivery) -> None:
        delivery.ack()
        self.bodies.append(delivery.body)
        command = parse_command(delivery.body)
        self.commands.append(command)
        script = self.answers.get(command.verb)
        for data in script(command) if script else []:
            self.publish(
                data,
                subject=command.subject,
                cc=(delivery.reply_to or "",),
                correlation_id=delivery.correlation_id if self.correlate else None,
                repeat=self.repeat,
            )

    def publish(
        self,
        data: EventData,
        *,
        subject: str | None = None,
        cc: tuple[str, ...] = (),
        correlation_id: str | None = None,
        sequenced: bool = True,
        repeat: int = 1,
    ) -> None:
        body, event_id = render_event(data, host=self.host, subject=subject)
        if sequenced:
            self.sequence += 1
            body = seal(body, self.sequence, self.epoch)
        message = Outgoing(
            exchange=routing.EVENTS_EXCHANGE,
            routing_key=routing.event_key(data.kind, self.host),
            body=body,
            message_id=event_id,
            correlation_id=correlation_id,
            cc=cc,
        )
        for _ in range(repeat):
            self.bus.publish_soon(message).add_done_callback(lambda f: f.exception())


class StartingBus(MemoryBus):
    """A bus whose connect brings up a broker's worth of agents on the loop that computectl made."""

    def __init__(self, broker: MemoryBroker, prepare: Callable[[MemoryBroker], Any]) -> None:
        super().__init__(broker, name="computectl")
        self._prepare = prepare
        self._broker_of_test = broker

    async def connect(self, *, timeout_s: float) -> None:
        await self._prepare(self._broker_of_test)
        await super().connect(timeout_s=timeout_s)


def heartbeat(**changes: Any) -> HostHeartbeat:
    base: dict[str, Any] = {
        "agent_version": "0.1.0", "compute_id": "c", "started_at": "2026-01-01T00:00:00Z", "uptime_s": 5.0,
        "enabled": True, "hypervisor_connected": True, "hypervisor_type": "QEMU", "hypervisor_version": "9.1.0",
        "driver": "fake", "capabilities": [], "healthy": True, "instances": {"running": 2, "stopped": 1},
        "foreign_domains": 0, "operations_in_flight": 0, "outbox_waiting": 0, "stuck_threads": 0, "last_sequence": 7,
        "interval_s": 10.0, "traits": [], "numa_cells": [], "cpu_model": "x", "architecture": "x86_64",
        "inventory": {
            "VCPU": Inventory(total=8, reserved=1, max_unit=8, allocation_ratio=4.0, used=3),
            "MEMORY_MB": Inventory(total=16384, reserved=512, max_unit=16384, allocation_ratio=1.0, used=2048),
        },
    }  # fmt: skip
    return HostHeartbeat.model_validate(base | changes)


def lines_of_json(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines() if line]


class Ctl:
    """Runs computectl against agents that are brought up on its loop."""

    def __init__(self) -> None:
        self.answers: dict[str, Script] = {}
        self.then: Callable[[FakeAgent], None] | None = None
        self.down = False
        self.agents: list[FakeAgent] = []

    async def _prepare(self, broker: MemoryBroker) -> None:
        agent = await FakeAgent(broker, HOST).start()
        agent.answers = self.answers
        self.agents.append(agent)
        if self.then is not None:
            asyncio.get_running_loop().call_later(0.01, self.then, agent)
        if self.down:
            broker.refuse(True)

    def __call__(self, *args: str, input: str | None = None, env: dict[str, str] | None = None) -> Result:
        session = Session(make_bus=lambda _address: StartingBus(MemoryBroker(), self._prepare))
        return CliRunner().invoke(cli, args, obj=session, input=input, env={"COMPUTECTL_HOST": HOST} | (env or {}))

    @property
    def commands(self) -> list[Command[Any]]:
        return [command for agent in self.agents for command in agent.commands]
