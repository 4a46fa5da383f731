"""The floor: aio-pika and uvloop, acknowledge each message, send a confirmed reply. No journal, no validation."""

from __future__ import annotations

import asyncio
import sys

import aio_pika
import uvloop

REPLY = b'{"specversion":"1.0","id":"' + b"x" * 36 + b'","data":{"result":{"echo":"' + b"y" * 300 + b'"}}}'


async def serve(url: str, name: str) -> None:
    """Serve until ended."""
    consuming = await aio_pika.connect_robust(url)
    publishing = await aio_pika.connect_robust(url)
    channel, replies = await consuming.channel(), await publishing.channel()
    await channel.set_qos(prefetch_count=500)
    queue = await channel.declare_queue(name, durable=True, arguments={"x-queue-type": "quorum"})

    async def on_message(message: aio_pika.abc.AbstractIncomingMessage) -> None:
        await message.ack()
        reply = aio_pika.Message(
            REPLY,
            correlation_id=message.correlation_id,
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            content_type="application/cloudevents+json",
        )
        await replies.default_exchange.publish(reply, routing_key=message.reply_to or "")

    await queue.consume(on_message)
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1], sys.argv[2]))
