"""Sends `instance.create` through the broker and follows it: the operation's events, the guest's console, the
instance's state, the host's heartbeat.

The last part of `make up`. Unlike the rest of this package it runs in `.venv`, because it is a controller.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import uuid
from pathlib import Path

import structlog
from pydantic import SecretStr
from rich.console import Console
from rich.live import Live
from rich.table import Table

from agent.bus.amqp import AmqpBus, AmqpSettings
from agent.controller import ComputeClient
from agent.controller.failures import CommandRefused
from agent.errors import ComputeError, Unroutable
from agent.messages.commands import ConsoleLog, HostShow, InstanceCreate, InstanceResume, InstanceShow, InstanceStart
from agent.messages.events import Event
from agent.messages.spec import ImageSource, InstanceSpec, RootDisk, Seed, UserNic
from devstack.guest_image import guest_image

NAME = "first-guest"
UP_LINE = "compute-agent guest is up"
BOOT_LIMIT_S = 120.0
# What the guest says of itself, without what only tests look for (a line with all its CPU's flags among it).
_TOLD = ("compute", "seed", "guest: vcpus", "guest: boots", "guest: mac", "guest: firmware", "guest: tick")


class Story:
    """One run, told on the terminal."""

    def __init__(self, client: ComputeClient, host: str, image_cache: Path) -> None:
        self._client = client
        self._host = host
        self._image_cache = image_cache
        self._console = Console(highlight=False)
        self._instance_id = str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{NAME}.{host}"))

    async def run(self) -> None:
        """Create the guest, or take the one of a former run, and show that it lives."""
        created = await self._create()
        await self._await_console(fresh=created)
        await self._show_instance()
        await self._show_host()

    async def _create(self) -> bool:
        image = guest_image(self._image_cache)
        spec = InstanceSpec(
            name=NAME,
            vcpus=1,
            memory_mib=128,
            root_disk=RootDisk(
                size_mib=256,
                image=ImageSource(url=f"file://{image.path.resolve()}", sha256=image.sha256, format="qcow2"),
            ),
            nics=[UserNic(type="user")],
            seed=Seed(hostname=NAME, user_data="#cloud-config\n"),
        )
        with Live(self._line("sent", ""), console=self._console, refresh_per_second=8, transient=True) as live:
            try:
                done = await self._client.call(
                    InstanceCreate(spec=spec),
                    host=self._host,
                    instance_id=self._instance_id,
                    timeout_s=BOOT_LIMIT_S,
                    on_event=lambda event: self._progress(live, event),
                )
            except CommandRefused as exc:
                if exc.code != "instance_exists":
                    raise
                # A guest that somebody paused is resumed; one that runs stays as it is.
                known = await self._client.call(InstanceShow(), host=self._host, instance_id=self._instance_id)
                again = InstanceResume() if known.result["observed"] == "paused" else InstanceStart()
                await self._client.call(
                    again, host=self._host, instance_id=self._instance_id, timeout_s=BOOT_LIMIT_S
                )
                self._console.print(f"{NAME} is there from a former run")
                return False
        self._console.print(f"{NAME} was created in {done.duration_ms:.0f} ms")
        return True

    def _progress(self, live: Live, event: Event) -> None:
        data = event.data
        percent = f" {data['percent']:.0f} %" if data.get("percent") is not None else ""
        text = f"{data.get('phase', '')}{percent}"
        live.update(self._line(event.kind, text))
        live.console.print(f"  {event.time:%H:%M:%S.%f}  {event.kind:<22} {text}", highlight=False)

    def _line(self, kind: str, text: str) -> str:
        return f"instance.create {NAME}: {kind.removeprefix('operation.')} {text}"

    async def _await_console(self, *, fresh: bool) -> None:
        """Read the console's log until the guest says that it is up. There is no event for a line of text."""
        shown = 0
        async with asyncio.timeout(BOOT_LIMIT_S):
            while True:
                text = await self._read_console()
                lines = [line.rstrip() for line in text.splitlines() if line.startswith(_TOLD)]
                if fresh:
                    for line in lines[shown:]:
                        self._console.print(f"  console: {line}", markup=False)
                    shown = len(lines)
                if UP_LINE in text and (not fresh or any(line.startswith("seed") for line in lines)):
                    return
                await asyncio.sleep(0.5)

    async def _read_console(self) -> str:
        answer = await self._client.call(ConsoleLog(), host=self._host, instance_id=self._instance_id, timeout_s=30)
        return str(answer.result["text"])

    async def _show_instance(self) -> None:
        shown = (await self._client.call(InstanceShow(), host=self._host, instance_id=self._instance_id)).result
        spec = shown["spec"]
        self._console.print(
            f"the guest is up: {shown['name']} {shown['id']}, desired {shown['desired']}, observed {shown['observed']},"
            f" {spec['vcpus']} vCPU, {spec['memory_mib']} MiB",
            soft_wrap=True,
        )

    async def _show_host(self) -> None:
        beat = (await self._client.call(HostShow(), host=self._host)).result["heartbeat"]
        table = Table("resource", "total", "reserved", "ratio", "used", title=f"Heartbeat of {self._host}")
        for name, item in beat["inventory"].items():
            table.add_row(name, *(str(item[key]) for key in ("total", "reserved", "allocation_ratio", "used")))
        self._console.print(table)
        healthy = "healthy" if beat["healthy"] else f"not healthy: {beat['conditions']}"
        self._console.print(
            f"{beat['hypervisor_type']} {beat['hypervisor_version']}, {beat['architecture']}, {healthy};"
            f" instances {beat['instances']}"
        )


async def tell(options: argparse.Namespace) -> int:
    """Connect, tell the story, and say how to go on. Returns the exit status."""
    settings = AmqpSettings(url=SecretStr(options.amqp))
    try:
        async with ComputeClient(AmqpBus(settings, name="first-boot"), source="/devstack") as client:
            await _host_answers(client, options.host)
            await Story(client, options.host, options.images).run()
    except TimeoutError:
        print("first boot: the guest did not say in time that it is up; see its console", file=sys.stderr)
        return 1
    except ComputeError as exc:
        print(f"first boot: {exc.code}: {exc.message}", file=sys.stderr)
        return 1
    print(f"\nThe stack stays up. Try:\n  export COMPUTECTL_AMQP={options.amqp} COMPUTECTL_HOST={options.host}")
    print("  .venv/bin/computectl instance ls\n  .venv/bin/computectl events --follow\n  make down")
    return 0


async def _host_answers(client: ComputeClient, host: str) -> None:
    """Wait until the agent serves its host; on the very first start its queue is not there yet."""
    async with asyncio.timeout(60):
        while True:
            try:
                answer = await client.call(HostShow(), host=host, timeout_s=60)
            except Unroutable:
                await asyncio.sleep(0.2)
                continue
            if answer.result["heartbeat"]["hypervisor_connected"]:
                return
            await asyncio.sleep(0.2)


def main() -> int:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(prog="python3 -m devstack.first_boot", description=__doc__.split("\n")[0])
    parser.add_argument("--amqp", required=True, help="the broker's URL")
    parser.add_argument("--host", required=True, help="the agent's host name on the bus")
    parser.add_argument("--images", type=Path, required=True, help="where the guest image is cached")
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    return asyncio.run(tell(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
