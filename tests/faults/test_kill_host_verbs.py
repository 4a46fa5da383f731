"""kill -9 of the agent in the middle of an adoption and of an audit's repair, on real QEMU.

Every commit of both is met in `tests/unit/test_host_family.py`; here are the boundaries that touch the hypervisor.
"""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from pathlib import Path

import pytest
from support.agent_process import AgentProcess
from support.fleet import World
from support.recorder import describe

from agent.messages.commands import InstanceDelete, InstanceList
from agent.messages.verbs_host import HostAudit, InstanceAdopt
from devstack.libvirtd import PrivateLibvirtd

pytestmark = pytest.mark.qemu


async def dies(agent: AgentProcess) -> None:
    assert await agent.wait_ended() == -9, "the failpoint was never reached"


async def foreign(libvirtd: PrivateLibvirtd, folder: Path) -> tuple[str, Path]:
    """A running domain of somebody else, with a disk."""
    made, disk = str(uuid.uuid4()), folder / "foreign.raw"
    disk.write_bytes(b"\0" * 1024 * 1024)
    document = folder / "foreign.xml"
    document.write_text(
        f"<domain type='qemu'><name>f-{made[:8]}</name><uuid>{made}</uuid><memory unit='MiB'>32</memory><vcpu>1</vcpu>"
        "<os><type arch='x86_64'>hvm</type></os><devices><disk type='file' device='disk'>"
        f"<driver name='qemu' type='raw'/><source file='{disk}'/><target dev='vda' bus='virtio'/></disk></devices></domain>"
    )
    await asyncio.to_thread(libvirtd.virsh, "define", str(document))
    await asyncio.to_thread(libvirtd.virsh, "start", made)
    return made, disk


@pytest.mark.parametrize("point", ["claim:after", "mark:before", "mark:after", "result:before"])
async def test_adoption(world: World, libvirtd: PrivateLibvirtd, tmp_path: Path, point: str) -> None:
    domain, disk = await foreign(libvirtd, tmp_path)
    process = await asyncio.to_thread(lambda: libvirtd.qemu_pids()[f"f-{domain[:8]}"])
    agent = await world.libvirt_agent(libvirtd)
    await agent.start(failpoint=f"instance.adopt:{point}")
    command = await world.send(agent.host, InstanceAdopt(own_disks=True), domain)
    await dies(agent)

    await agent.start()
    final = await world.recorder.wait_final(agent.host, command)
    assert final.kind == "operation.succeeded", describe(final)
    assert final.data["result"]["observed"] == "running"
    assert libvirtd.qemu_pids()[f"f-{domain[:8]}"] == process, "the guest was not disturbed"
    listed = (await world.succeed(agent.host, InstanceList(include_foreign=True))).data["result"]
    assert ([one["id"] for one in listed["instances"]], listed["foreign"]) == ([domain], [])
    assert (await world.succeed(agent.host, HostAudit())).data["result"]["items"] == []
    await world.succeed(agent.host, InstanceDelete(), domain)
    assert not disk.exists()
    assert (await world.succeed(agent.host, HostAudit())).data["result"]["items"] == []
    assert not agent.open_operations()
    world.recorder.check(agent.host, world.sent[agent.host])


@pytest.mark.parametrize("point", ["look:after", "repair-0:before", "repair-0:after", "result:before"])
async def test_repair(world: World, libvirtd: PrivateLibvirtd, point: str) -> None:
    agent = await world.libvirt_agent(libvirtd)
    await agent.start(failpoint=f"host.audit:{point}")
    kept = await world.create(agent.host)
    leftovers = [agent.state_dir / "instances" / str(uuid.uuid4()) for _ in range(2)]
    for folder in leftovers:
        folder.mkdir()
        (folder / "disk.qcow2").write_bytes(os.urandom(64))
        (folder / "volumes.json").write_text(json.dumps({"version": 1, "volumes": []}))
    command = await world.send(agent.host, HostAudit(repair=True))
    await dies(agent)

    await agent.start()
    final = await world.recorder.wait_final(agent.host, command)
    assert final.kind == "operation.succeeded", describe(final)
    assert final.data["result"]["removed"] == 2
    assert not any(folder.exists() for folder in leftovers)
    await world.judge(agent, [kept], libvirtd)
    await world.succeed(agent.host, InstanceDelete(), kept)
    await world.judge(agent, (), libvirtd)
