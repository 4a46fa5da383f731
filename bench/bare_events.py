"""The floor of (c): libvirt-python's event callback publishes by aio-pika. No journal, no look at the state."""

from __future__ import annotations

import asyncio
import json
import sys
import threading

import aio_pika
import libvirt
import uvloop

from agent.messages import routing
from bench.servers import AGENT_HOST


async def serve(url: str, uri: str) -> None:
    """Publish until ended."""
    loop = asyncio.get_running_loop()
    connection = await aio_pika.connect_robust(url)
    channel = await connection.channel()
    exchange = await channel.declare_exchange(routing.EVENTS_EXCHANGE, aio_pika.ExchangeType.TOPIC, durable=True)
    published: set[asyncio.Task[None]] = set()

    async def publish(body: bytes) -> None:
        message = aio_pika.Message(body, delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
        await exchange.publish(message, routing_key=routing.event_key("instance.state", AGENT_HOST))

    def hand_over(body: bytes) -> None:
        task = loop.create_task(publish(body))
        published.add(task)
        task.add_done_callback(published.discard)

    def on_event(_connection: object, domain: libvirt.virDomain, event: int, detail: int, _opaque: object) -> None:
        body = json.dumps({"instance_id": domain.UUIDString(), "event": event, "detail": detail}).encode()
        loop.call_soon_threadsafe(hand_over, body)

    libvirt.virEventRegisterDefaultImpl()
    threading.Thread(target=_run_events, daemon=True).start()
    hypervisor = libvirt.open(uri)
    hypervisor.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, on_event, None)
    print("ready", flush=True)
    await asyncio.Event().wait()


def _run_events() -> None:
    while True:
        libvirt.virEventRunDefaultImpl()


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1], sys.argv[2]))
