"""Sizes and limits, on a guest that boots and says on its console how many CPUs, how much memory and disk it sees."""

from __future__ import annotations

import asyncio
import re
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from support import guests
from support.agent_process import AgentProcess
from support.fleet import World
from support.guests import GUEST_S

from agent.messages.commands import (
    InstanceCreate,
    InstanceDelete,
    InstanceShow,
    InstanceStop,
    OperationCancel,
)
from agent.messages.spec import ImageSource, InstanceSpec, NetworkNic, RootDisk, UserNic
from agent.messages.spec_limits import CpuLimits, DiskLimits, NicLimits
from agent.messages.verb import CommandData
from agent.messages.verbs_resize import (
    InstanceConfirmResize,
    InstanceResize,
    InstanceRevertResize,
    InstanceSetLimits,
    InstanceSetMemoryTarget,
    NicLimitsChange,
)
from devstack.guest_image import GuestImage
from devstack.libvirtd import PrivateLibvirtd
from devstack.process import DevstackError

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(900)]

MIB_SECTORS = 2048


class Host(guests.Host):
    """A host and its libvirtd, whose guests say what they see."""

    def __init__(self, world: World, libvirtd: PrivateLibvirtd, agent: AgentProcess, source: ImageSource) -> None:
        super().__init__(world, agent, source)
        self.libvirtd = libvirtd

    def spec(self, name: str, **changes: Any) -> InstanceSpec:
        return super().spec(name, **({"root_disk": RootDisk(size_mib=128, image=self.source)} | changes))

    async def sees(
        self, instance_id: str, *, vcpus: int | None = None, memory: tuple[int, int] | None = None,
        disk_mib: int | None = None, after: int = 0,
    ) -> int:  # fmt: skip
        """Wait until the guest says that it has this; `memory` in MiB, since the kernel keeps some for itself."""
        position = after
        async with asyncio.timeout(GUEST_S):
            while True:
                position = await self.position(instance_id, r"guest: vcpus=\d+ memory_kib=\d+ disk_sectors=\d+", after=position)
                text = await self.said(instance_id)
                said = [int(number) for number in re.findall(r"=(\d+)", text[:position].splitlines()[-1])]
                if (
                    vcpus in (None, said[0])
                    and (memory is None or memory[0] <= said[1] // 1024 <= memory[1])
                    and disk_mib in (None, said[2] // MIB_SECTORS)
                ):
                    return position

    async def xml(self, instance_id: str, *, inactive: bool = False) -> ET.Element:
        options = ["--inactive"] if inactive else []
        return ET.fromstring(await asyncio.to_thread(self.libvirtd.virsh, "dumpxml", instance_id, *options))

    async def kill_at(self, failpoint: str, data: CommandData, instance_id: str) -> dict[str, Any]:
        """Let the agent kill itself at a place of a command, start it again, and return the command's result."""
        await self.agent.stop()
        await self.agent.start(failpoint=failpoint)
        command = await self.world.send(self.agent.host, data, instance_id)
        assert await self.agent.wait_ended(GUEST_S) == -9, "the failpoint was never reached"
        await self.agent.start()
        done = await self.world.recorder.wait_final(self.agent.host, command, timeout_s=GUEST_S)
        assert done.kind == "operation.succeeded", done.data
        return done.data["result"]


@pytest.fixture
async def host(world: World, libvirtd: PrivateLibvirtd, source: ImageSource, bootable: GuestImage) -> Host:
    settings = {"images": {"file_roots": [str(bootable.path.resolve().parent)]}, "periodic": {"due_s": 0.5}}
    settings["deadlines"] = {"settle_s": 3.0}  # how long an undo waits for a guest that may still shut down
    agent = await world.libvirt_agent(libvirtd, settings=settings)
    await agent.start()
    return Host(world, libvirtd, agent, source)


async def test_cold(host: Host) -> None:
    guest = await host.create(host.spec("cold"))
    at = await host.sees(guest, vcpus=1, memory=(32, 110), disk_mib=128)
    await host.console(guest, "guest: boots=1", after=at)

    done = await host.do(InstanceResize(vcpus=2, memory_mib=192, disks_mib={"root": 160}), guest)
    assert (done["observed"], done["pending"], done["forced"]) == ("running", True, False)
    at = await host.sees(guest, vcpus=2, memory=(90, 180), disk_mib=160, after=at)
    await host.console(guest, "guest: boots=2", after=at)

    done = await host.do(InstanceRevertResize(), guest)
    assert (done["vcpus"], done["memory_mib"], done["disks_mib"], done["forced"]) == (1, 128, {"root": 160}, False)
    # Disks keep what they have grown to: data is never thrown away.
    at = await host.sees(guest, vcpus=1, memory=(32, 110), disk_mib=160, after=at)
    # The guest's own count of boots is kept on the disk: it is still the same one.
    await host.console(guest, "guest: boots=3", after=at)

    await host.do(InstanceStop(force=True), guest)
    await host.do(InstanceResize(vcpus=2, confirm_within_s=0.5), guest)
    event = await host.world.recorder.wait_for(
        host.agent.host, "operation.succeeded",
        where=lambda e: e.data["verb"] == "instance.confirm-resize" and e.data["instance_id"] == guest,
    )  # fmt: skip
    assert event.data["operation_id"].startswith("due/")
    shown = await host.do(InstanceShow(), guest)
    assert "life" not in shown
    assert shown["spec"]["vcpus"] == 2
    assert shown["observed"] == "stopped"
    refusal = await host.refused(InstanceConfirmResize(), guest)
    assert refusal.data["error"]["code"] == "no_resize_pending"
    await host.do(InstanceDelete(), guest)


@pytest.mark.parametrize("step", ["grow-root:after", "define:after"])
async def test_killed_in_a_cold_resize(host: Host, step: str) -> None:
    guest = await host.create(host.spec("killed", root_disk=RootDisk(size_mib=16)))
    data = InstanceResize(vcpus=2, memory_mib=96, disks_mib={"root": 24}, timeout_s=0)
    done = await host.kill_at(f"instance.resize:{step}", data, guest)
    assert (done["vcpus"], done["memory_mib"], done["disks_mib"], done["pending"]) == (2, 96, {"root": 24}, True)
    for inactive in (False, True):
        assert (await host.xml(guest, inactive=inactive)).findtext("vcpu") == "2"
    assert f"Capacity:       {24 << 20}" in await asyncio.to_thread(host.libvirtd.virsh, "domblkinfo", guest, "vda")
    await host.world.judge(host.agent, (guest,), host.libvirtd)


async def test_cancelled_while_the_guest_does_not_shut_down(host: Host) -> None:
    """Nothing boots from its disk, so it never will; it runs on, with what it had, but for the disk."""
    guest = await host.create(host.spec("deaf", root_disk=RootDisk(size_mib=16), memory_mib=64))
    data = InstanceResize(vcpus=2, disks_mib={"root": 24}, timeout_s=600)
    command = await host.world.send(host.agent.host, data, guest)
    await host.world.recorder.wait_for(
        host.agent.host, "operation.started", where=lambda e: e.data["operation_id"] == command
    )
    await host.world.succeed(host.agent.host, OperationCancel(operation_id=command))
    done = await host.world.recorder.wait_final(host.agent.host, command, timeout_s=GUEST_S)
    assert done.kind == "operation.cancelled", done.data
    for inactive in (False, True):
        assert (await host.xml(guest, inactive=inactive)).findtext("vcpu") == "1"
    shown = await host.do(InstanceShow(), guest)
    assert (shown["observed"], shown["desired"], shown["spec"]["vcpus"]) == ("running", "running", 1)
    assert "life" not in shown
    await host.world.judge(host.agent, (guest,), host.libvirtd)


async def test_live(host: Host) -> None:
    guest = await host.create(host.spec("live", max_vcpus=2, max_memory_mib=512))
    at = await host.sees(guest, vcpus=1, memory=(20, 110), disk_mib=128)
    await host.console(guest, "guest: tick 1", after=at)

    grow = InstanceResize(mode="live", vcpus=2, memory_mib=384, disks_mib={"root": 160})
    done = await host.do(grow, guest)
    assert (done["vcpus"], done["memory_mib"], done["disks_mib"], done["pending"]) == (2, 384, {"root": 160}, False)
    at = await host.sees(guest, vcpus=2, memory=(256, 384), disk_mib=160, after=at)
    await _agrees(host, guest, vcpus=2, memory_mib=384)

    # Killed between the guest and the definition: both are the same afterwards.
    shrink = InstanceResize(mode="live", memory_mib=256)
    await host.kill_at("instance.resize:memory:after", shrink, guest)
    at = await host.sees(guest, memory=(128, 256), after=at)
    await _agrees(host, guest, vcpus=2, memory_mib=256)

    refused = await host.refused(InstanceResize(mode="live", vcpus=1, timeout_s=1), guest)
    assert refused.data["error"]["code"] == "vcpu_unplug_unsafe"
    refused = await host.refused(InstanceResize(mode="live", memory_mib=64), guest)
    assert refused.data["error"]["code"] == "below_boot_memory"
    await _agrees(host, guest, vcpus=2, memory_mib=256)

    done = await host.do(InstanceSetMemoryTarget(memory_mib=224), guest)
    assert done["actual_mib"] == 224
    stats = await asyncio.to_thread(host.libvirtd.virsh, "dommemstat", guest)
    assert f"actual {(224 - 128) * 1024}" in stats  # libvirt tells it without the plugged memory
    await host.sees(guest, memory=(96, 224), after=at)
    refused = await host.refused(InstanceSetMemoryTarget(memory_mib=100), guest)
    assert refused.data["error"]["code"] == "failed_precondition"

    await host.do(InstanceDelete(), guest)
    await host.world.judge(host.agent, (), host.libvirtd)


async def _agrees(host: Host, guest: str, *, vcpus: int, memory_mib: int) -> None:
    """The running guest, the definition and the spec have the same sizes."""
    live, kept = await host.xml(guest), await host.xml(guest, inactive=True)
    assert {element.find("vcpu").get("current") for element in (live, kept)} in ({str(vcpus)}, {None})
    assert live.findtext("currentMemory") == str(memory_mib * 1024)
    assert kept.findtext("currentMemory") == str(memory_mib * 1024)
    assert live.findtext("memory") == kept.findtext("memory")
    shown = await host.do(InstanceShow(), guest)
    assert (shown["spec"]["vcpus"], shown["spec"]["memory_mib"]) == (vcpus, memory_mib)


async def test_a_guest_without_the_driver_takes_no_memory(host: Host) -> None:
    """Nothing boots from an empty disk, so nobody takes what is plugged in: read back, and taken back."""
    guest = await host.create(host.spec("deaf", root_disk=RootDisk(size_mib=16), max_memory_mib=256))
    refused = await host.refused(InstanceResize(mode="live", memory_mib=256, timeout_s=1), guest)
    assert refused.data["error"]["code"] == "guest_refused"
    assert refused.data["error"]["details"] == {"resource": "memory_mib", "asked": 256, "read_back": 128}
    assert refused.data["undone"]
    live = await host.xml(guest)
    assert live.findtext("devices/memory/target/requested") == "0"
    shown = await host.do(InstanceShow(), guest)
    assert shown["spec"]["memory_mib"] == 128


async def test_limits(
    world: World, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, source: ImageSource
) -> None:
    with PrivateLibvirtd(tmp_path_factory.mktemp("net"), private_network=True) as libvirtd:
        network = tmp_path / "lan.xml"
        network.write_text("<network><name>lan</name><bridge name='vbr8'/></network>")
        await asyncio.to_thread(libvirtd.virsh, "net-define", str(network))
        await asyncio.to_thread(libvirtd.virsh, "net-start", "lan")
        agent = await world.libvirt_agent(libvirtd)
        await agent.start()
        host = Host(world, libvirtd, agent, source)
        nics = [NetworkNic(type="network", network="lan"), UserNic(type="user")]
        disk = RootDisk(size_mib=16, limits=DiskLimits(total_iops=500))
        guest = await host.create(host.spec("limited", root_disk=disk, nics=nics))
        for root in (await host.xml(guest), await host.xml(guest, inactive=True)):
            assert root.findtext("devices/disk/iotune/total_iops_sec") == "500"

        change = InstanceSetLimits(disks={"root": DiskLimits(read_bytes_s=2**20, write_iops=50)})
        await host.kill_at("instance.set-limits:live:after", change, guest)
        for root in (await host.xml(guest), await host.xml(guest, inactive=True)):
            tune = root.find("devices/disk/iotune")
            assert {item.tag: item.text for item in tune} == {"read_bytes_sec": str(2**20), "write_iops_sec": "50"}
        shown = await host.do(InstanceShow(), guest)
        assert shown["spec"]["root_disk"]["limits"] == {"read_bytes_s": 2**20, "write_iops": 50}
        await host.do(InstanceSetLimits(disks={"root": None}), guest)
        for root in (await host.xml(guest), await host.xml(guest, inactive=True)):
            assert root.find("devices/disk/iotune") is None

        slow = NicLimits(inbound_kib_s=1000)
        shape = InstanceSetLimits(nics=[NicLimitsChange(nic=0, limits=slow)])
        if await asyncio.to_thread(_kernel_shapes, libvirtd):
            await host.do(shape, guest)
            for root in (await host.xml(guest), await host.xml(guest, inactive=True)):
                assert root.find("devices/interface/bandwidth/inbound").get("average") == "1000"
            await host.do(InstanceSetLimits(nics=[NicLimitsChange(nic=0)]), guest)
        else:
            refused = await host.refused(shape, guest)
            assert (refused.data["error"]["code"], refused.data["undone"]) == ("nic_limits_failed", True)
        for root in (await host.xml(guest), await host.xml(guest, inactive=True)):
            assert root.find("devices/interface/bandwidth/inbound") is None

        # The private daemon has no control groups: refused by name, and nothing is left of it.
        refused = await host.refused(InstanceSetLimits(cpu=CpuLimits(shares=512)), guest)
        assert refused.data["error"]["code"] == "cpu_limits_unavailable"
        assert (await host.xml(guest, inactive=True)).find("cputune") is None
        refused = await host.refused(InstanceSetLimits(nics=[NicLimitsChange(nic=1, limits=slow)]), guest)
        assert refused.data["error"]["code"] == "nic_limits_unsupported"
        bad = host.spec("bad", root_disk=RootDisk(size_mib=16), nics=[UserNic(type="user", limits=slow)])
        other = await host.refused(InstanceCreate(spec=bad), str(uuid.uuid4()))
        assert other.data["error"]["message"] == refused.data["error"]["message"]

        # What does not run takes all of it into its definition.
        await host.do(InstanceStop(force=True), guest)
        await host.do(InstanceSetLimits(cpu=CpuLimits(shares=512, quota_percent=50), nics=shape.nics), guest)
        kept = await host.xml(guest, inactive=True)
        assert {item.tag: item.text for item in kept.find("cputune")} == {"shares": "512", "period": "100000", "quota": "50000"}
        assert kept.find("devices/interface/bandwidth/inbound").get("average") == "1000"
        await host.do(InstanceDelete(), guest)
        await world.judge(agent, (), libvirtd)


def _kernel_shapes(libvirtd: PrivateLibvirtd) -> bool:
    """Whether this kernel has what libvirt shapes traffic with."""
    with suppress(DevstackError):
        libvirtd._run_inside(["tc", "qdisc", "add", "dev", "lo", "root", "handle", "1:", "htb"])
        libvirtd._run_inside(["tc", "class", "add", "dev", "lo", "parent", "1:", "classid", "1:1", "htb", "rate", "1mbit"])
        libvirtd._run_inside(["tc", "qdisc", "add", "dev", "lo", "parent", "1:1", "handle", "2:", "sfq"])
        return True
    return False
