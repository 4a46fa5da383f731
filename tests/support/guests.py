"""Guests that boot, on one agent: commands about them, and what they say on their consoles."""

from __future__ import annotations

import asyncio
import re
import subprocess
import uuid
from pathlib import Path
from typing import Any

from agent.messages.commands import ConsoleLog, InstanceCreate
from agent.messages.events import Event
from agent.messages.spec import ImageSource, InstanceSpec, RootDisk
from agent.messages.verb import CommandData
from support.agent_process import AgentProcess
from support.fleet import World

UP = "compute-agent guest is up"
"""What a guest says first, once in each boot; it hears its power button by then."""
COUNT_AT = 1024 * 512
"""Where it counts its boots on its first disk: a sector in front of the first partition."""
GUEST_S = 240.0
"""How long a guest, or a command about it, may take: twenty times what it takes, since this only ends what hangs."""


class Host:
    """One agent, and guests from one image."""

    def __init__(self, world: World, agent: AgentProcess, source: ImageSource) -> None:
        self.world = world
        self.agent = agent
        self.source = source

    def spec(self, name: str, **changes: Any) -> InstanceSpec:
        """A small guest from the image; `changes` are fields of the spec."""
        values: dict[str, Any] = {
            "name": name, "vcpus": 1, "memory_mib": 128, "root_disk": RootDisk(size_mib=256, image=self.source),
        }  # fmt: skip
        return InstanceSpec(**(values | changes))

    async def do(self, data: CommandData, instance_id: str | None = None) -> dict[str, Any]:
        """Run a command that must succeed; its result."""
        event = await self.world.succeed(self.agent.host, data, instance_id, timeout_s=GUEST_S)
        result: dict[str, Any] = event.data["result"]
        return result

    async def refused(self, data: CommandData, instance_id: str | None = None) -> Event:
        """Run a command that must not succeed; its final event."""
        event = await self.world.run(self.agent.host, data, instance_id, timeout_s=GUEST_S)
        assert event.kind != "operation.succeeded", event.data
        return event

    async def create(self, spec: InstanceSpec, **options: Any) -> str:
        """Make an instance; its id."""
        instance_id = str(uuid.uuid4())
        made = await self.do(InstanceCreate(spec=spec, **options), instance_id)
        assert made["observed"] == ("running" if options.get("start", True) else "stopped")
        return instance_id

    async def said(self, instance_id: str) -> str:
        """All that the guest has said on its console, in all its boots."""
        return str((await self.do(ConsoleLog(max_bytes=512 * 1024), instance_id))["text"])

    async def console(self, instance_id: str, wanted: str, *, times: int = 1, after: int = 0) -> str:
        """Wait until a pattern has come up so often behind a position; all that was said. The console has no events."""
        text = ""
        try:
            async with asyncio.timeout(GUEST_S):
                while True:
                    text = await self.said(instance_id)
                    if len(re.findall(wanted, text[after:])) >= times:
                        return text
                    await asyncio.sleep(0.25)
        except TimeoutError:
            raise AssertionError(f"the guest did not say {wanted!r} {times} times, but:\n{text[after:][-3000:]}") from None

    async def position(self, instance_id: str, wanted: str, *, after: int = 0) -> int:
        """Wait until a pattern comes up behind a position; the position behind it."""
        text = await self.console(instance_id, wanted, after=after)
        found = re.search(wanted, text[after:])
        assert found is not None
        return after + found.end()


def boots_on_disk(disk: Path) -> int:
    """How often the guest of a qcow2 disk that nobody has open has booted, as it counts there itself; 0: never."""
    command = ["qemu-io", "-r", "-f", "qcow2", "-c", f"read -v {COUNT_AT} 16", str(disk)]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    dump = re.match(r"[0-9a-f]+:((?: +[0-9a-f]{2}){16})", shown)
    assert dump is not None, shown
    return int(bytes.fromhex(dump[1].replace(" ", "")).strip(b" \0\n") or b"0")
