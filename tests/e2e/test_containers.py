"""Containers through the same driver: a whole life, what is refused by name, events, audit."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.agent_process import AgentProcess
from support.fleet import World

from agent.messages.commands import (
    ConsoleLog,
    HostShow,
    InstanceCreate,
    InstanceDelete,
    InstancePause,
    InstanceReboot,
    InstanceResume,
    InstanceShow,
    InstanceStart,
    InstanceStop,
)
from agent.messages.spec import ImageSource, InstanceSpec, RootDisk, UserNic
from agent.messages.verbs_host import HostAudit, InstanceAdopt
from agent.messages.verbs_stats import InstanceStats
from devstack.libvirtd import PrivateLibvirtd
from devstack.process import all_pids

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not Path("/usr/lib/libvirt/libvirt_lxc").exists(), reason="libvirt-daemon-driver-lxc is not installed"),
]

INIT = """#!/bin/sh
trap 'echo bye >> /story; exit 0' TERM
echo "up $(cat /proc/sys/kernel/hostname) as $$" >> /story
while true; do sleep 0.2; done
"""


@pytest.fixture(scope="module")
def lxc_daemon() -> Iterator[PrivateLibvirtd]:
    folder = Path(tempfile.mkdtemp(prefix="lvc-"))
    daemon = PrivateLibvirtd(folder, containers=True)
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def root_image(tmp_path_factory: pytest.TempPathFactory) -> ImageSource:
    """A file system with busybox and an init that writes what happens to it."""
    folder = tmp_path_factory.mktemp("container")
    tree = folder / "tree"
    for name in ("bin", "sbin", "dev", "proc", "sys", "etc", "tmp", "run"):
        (tree / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", tree / "bin/busybox")
    for name in ("sh", "sleep", "cat", "echo"):
        (tree / "bin" / name).symlink_to("busybox")
    init = tree / "sbin/init"
    init.write_text(INIT)
    init.chmod(0o755)
    image = folder / "root.raw"
    with image.open("xb") as file:
        file.truncate(16 * 1024 * 1024)
    subprocess.run(["/sbin/mkfs.ext4", "-q", "-d", str(tree), str(image)], check=True)
    return ImageSource(url=image.as_uri(), sha256=hashlib.sha256(image.read_bytes()).hexdigest(), format="raw")


@pytest.fixture
def instances() -> Iterator[Path]:
    """libvirt takes only short paths for the roots of containers."""
    folder = Path(tempfile.mkdtemp(prefix="c-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
async def agent(
    world: World, lxc_daemon: PrivateLibvirtd, root_image: ImageSource, instances: Path
) -> AgentProcess:
    driver = {"uri": lxc_daemon.lxc_uri, "reconnect_max_s": 0.5, "instances_dir": str(instances)}
    made = await world.agent(
        driver="libvirt", driver_settings=driver,
        settings={"images": {"file_roots": [str(Path(root_image.url.removeprefix("file://")).parent)]}},
    )  # fmt: skip
    return await made.start()


def spec(image: ImageSource | None, **changes: Any) -> InstanceSpec:
    values: dict[str, Any] = {"name": "c", "vcpus": 1, "memory_mib": 64, "root_disk": RootDisk(size_mib=32, image=image)}
    return InstanceSpec(**(values | changes))


def story(instances: Path, guest: str) -> str:
    """What the container's init wrote, read from its stopped disk."""
    disk = next((instances / guest).glob("*.raw"))
    return subprocess.run(["/sbin/debugfs", "-R", "cat /story", str(disk)], check=True, capture_output=True, text=True).stdout


async def stats(world: World, host: str, guest: str) -> dict[str, Any]:
    return dict((await world.succeed(host, InstanceStats(), guest)).data["result"])


def is_up() -> bool:
    """Whether an init has said that it is up, as the file system that it sees has it."""
    for pid in all_pids():
        with suppress(OSError):
            if "up" in Path(f"/proc/{pid}/root/story").read_text():
                return True
    return False


async def test_life_of_a_container(
    world: World, agent: AgentProcess, lxc_daemon: PrivateLibvirtd, root_image: ImageSource, instances: Path
) -> None:
    host, guest = agent.host, str(uuid.uuid4())
    beat = (await world.succeed(host, HostShow())).data["result"]["heartbeat"]
    assert beat["hypervisor_type"] == "LXC"
    assert beat["capabilities"] == ["host.audit", "instance.pause", "instance.resume", "instance.stats"]
    assert beat["inventory"]["VCPU"]["total"] >= 1

    made = (await world.succeed(host, InstanceCreate(spec=spec(root_image)), guest)).data["result"]
    assert made["observed"] == "running"
    assert (await world.succeed(host, InstancePause(), guest)).data["result"]["observed"] == "paused"
    assert (await world.succeed(host, InstanceResume(), guest)).data["result"]["observed"] == "running"
    used = await stats(world, host, guest)
    assert (used["power"], used["complete"]) == ("running", True)
    assert used["memory"]["rss_kib"] > 0
    assert used["memory"]["current_kib"] == used["memory"]["maximum_kib"] == 64 * 1024
    assert (used["disks"][0]["name"], used["disks"][0]["capacity_bytes"]) == ("root", 32 * 1024 * 1024)
    assert "write_bytes" not in used["disks"][0], "what is not known is not 0"
    await agent.restart()
    async with asyncio.timeout(240):
        while (await stats(world, host, guest))["cpu"]["cpu_time_ns"] <= used["cpu"]["cpu_time_ns"]:
            await asyncio.sleep(0.2)  # nothing tells of it but another look
    assert (await world.succeed(host, InstanceShow(), guest)).data["result"]["observed"] == "running"
    # Its init must have come as far as its trap before it is asked.
    async with asyncio.timeout(240):
        while not await asyncio.to_thread(is_up):
            await asyncio.sleep(0.05)
    stopped = (await world.succeed(host, InstanceStop(timeout_s=30), guest)).data["result"]
    assert (stopped["observed"], stopped["forced"]) == ("stopped", False)
    idle = await stats(world, host, guest)
    assert (idle["power"], idle["cpu"]) == ("stopped", {"vcpus": 1, "max_vcpus": 1})
    assert idle["disks"][0]["capacity_bytes"] == 32 * 1024 * 1024
    told = await asyncio.to_thread(story, instances, guest)
    assert told == "up c as 1\nbye\n", "it has a host name and processes of its own"

    await world.succeed(host, InstanceStart(), guest)
    mark = world.recorder.mark
    await asyncio.to_thread(lxc_daemon.virsh, "-c", lxc_daemon.lxc_uri, "destroy", guest)
    state = await world.recorder.wait_for(host, "instance.state", since=mark)
    assert (state.data["observed"], state.data["reason"]) == ("stopped", "destroyed")
    assert (await world.succeed(host, HostAudit())).data["result"]["items"] == []
    await world.succeed(host, InstanceStart(), guest)
    await world.succeed(host, InstanceDelete(), guest)
    assert (await world.succeed(host, HostAudit())).data["result"]["items"] == []
    assert list(instances.iterdir()) == []
    assert guest not in await asyncio.to_thread(lxc_daemon.virsh, "-c", lxc_daemon.lxc_uri, "list", "--all", "--uuid")
    world.recorder.check(host, world.sent[host])


async def test_what_a_container_is_not(
    world: World, agent: AgentProcess, root_image: ImageSource, instances: Path
) -> None:
    host, guest = agent.host, str(uuid.uuid4())
    for wrong, words in (
        (spec(None), "a root_disk without image"),
        (spec(root_image, vnc=True), "vnc"),
        (spec(root_image, nics=[UserNic(type="user")]), "a NIC of type user"),
    ):
        refused = await world.run(host, InstanceCreate(spec=wrong), guest)
        assert (refused.kind, refused.data["error"]["code"]) == ("operation.rejected", "config_unsupported")
        assert words in refused.data["error"]["message"]
    await world.succeed(host, InstanceCreate(spec=spec(root_image)), guest)
    for command in (InstanceReboot(), ConsoleLog()):
        refused = await world.run(host, command, guest)
        assert (refused.kind, refused.data["error"]["code"]) == ("operation.rejected", "verb_unsupported")
    refused = await world.run(host, InstanceAdopt(), str(uuid.uuid4()))
    assert refused.data["error"]["code"] == "verb_unsupported"
    await world.succeed(host, InstanceDelete(), guest)
    assert list(instances.iterdir()) == []
