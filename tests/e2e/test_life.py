"""Every verb of an instance's life, on a guest that boots and tells on its console what it sees."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import uuid
from pathlib import Path

import pytest
from support.fleet import World
from support.guests import GUEST_S, UP, Host

from agent.messages.commands import (
    HostSetEnabled,
    HostShow,
    InstanceCreate,
    InstanceDelete,
    InstanceList,
    InstancePause,
    InstanceReboot,
    InstanceResume,
    InstanceShow,
    InstanceStart,
    InstanceStop,
    OperationShow,
)
from agent.messages.spec import BridgeNic, ImageSource, NetworkNic, Seed, UserNic
from agent.messages.verbs_stats import InstanceStats
from devstack.guest_image import GuestImage
from devstack.libvirtd import PrivateLibvirtd

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(900)]

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ1ZgCkP7q9Qz7Zf0a1b2c3d4e5f6g7h8i9j0kLmNoPq someone@example"


@pytest.fixture
async def host(
    world: World, libvirtd: PrivateLibvirtd, source: ImageSource, bootable: GuestImage
) -> Host:
    roots = {"images": {"file_roots": [str(bootable.path.resolve().parent)]}}
    agent = await world.libvirt_agent(libvirtd, settings=roots)
    await agent.start()
    return Host(world, agent, source)


async def test_the_whole_life_of_an_instance(host: Host, libvirtd: PrivateLibvirtd) -> None:
    seed = Seed(hostname="guest-one", user_data="#cloud-config of the test\n", ssh_keys=[KEY], network_config="{}")
    guest = await host.create(host.spec("one", nics=[UserNic(type="user")], seed=seed, vnc=True))

    text = await host.console(guest, "seed: network-config=")
    assert "guest: vcpus=1" in text
    assert "disk_sectors=524288" in text  # 256 MiB: the overlay has the size that was asked for
    assert "seed: label=cidata" in text
    assert f"seed: instance-id={guest}" in text
    assert "seed: user-data-first-line=#cloud-config of the test" in text
    assert "seed: ssh-key=ssh-ed25519" in text
    assert "seed: network-config=present" in text

    shown = await host.do(InstanceShow(), guest)
    assert (shown["desired"], shown["observed"]) == ("running", "running")
    assert shown["vnc_address"].startswith("127.0.0.1:")
    assert "seed" not in shown["spec"]

    assert (await host.do(InstancePause(), guest)) == {
        "instance_id": guest, "observed": "paused", "changed": True, "forced": False,
    }  # fmt: skip
    assert not (await host.do(InstancePause(), guest))["changed"]
    refusal = await host.refused(InstanceStop(), guest)
    assert (refusal.kind, refusal.data["error"]["code"]) == ("operation.rejected", "instance_paused")
    assert (await host.do(InstanceResume(), guest))["observed"] == "running"

    soft = await host.do(InstanceReboot(timeout_s=60), guest)
    assert not soft["forced"]
    await host.console(guest, UP, times=2)
    await host.do(InstanceReboot(mode="hard"), guest)
    await host.console(guest, UP, times=3)

    stopped = await host.do(InstanceStop(timeout_s=60), guest)
    assert (stopped["observed"], stopped["forced"]) == ("stopped", False)
    assert not (await host.do(InstanceStop(), guest))["changed"]
    refusal = await host.refused(InstancePause(), guest)
    assert refusal.data["error"]["code"] == "instance_not_running"
    assert (await host.do(InstanceStart(), guest))["changed"]
    assert not (await host.do(InstanceStart(), guest))["changed"]

    await host.do(InstanceDelete(), guest)
    refusal = await host.refused(InstanceShow(), guest)
    assert refusal.data["error"]["code"] == "unknown_instance"
    await host.world.judge(host.agent, (), libvirtd)


async def test_guests_on_a_network_and_a_bridge(
    world: World, tmp_path_factory: pytest.TempPathFactory, source: ImageSource, bootable: GuestImage
) -> None:
    with PrivateLibvirtd(tmp_path_factory.mktemp("net"), private_network=True) as libvirtd:
        await asyncio.to_thread(_define_network, libvirtd, tmp_path_factory.mktemp("xml"))
        roots = {"images": {"file_roots": [str(bootable.path.resolve().parent)]}}
        agent = await world.libvirt_agent(libvirtd, settings=roots)
        await agent.start()
        host = Host(world, agent, source)
        nics = [NetworkNic(type="network", network="lan", mac="52:54:00:00:00:01"), BridgeNic(type="bridge", bridge="vbr7")]
        drive = Seed(datasource="config-drive", user_data="#second\n")
        guest = await host.create(host.spec("netted", nics=nics, seed=drive))
        text = await host.console(guest, "seed: user-data-first-line=")
        assert "seed: label=config-2" in text
        assert f"seed: instance-id={guest}" in text
        assert text.count("guest: mac=") == 2
        assert "guest: mac=52:54:00:00:00:01" in text
        used = (await host.do(InstanceStats(), guest))["nics"]
        assert [(nic["nic"], nic["device"]) for nic in used] == [(0, "vnet0"), (1, "vnet1")]
        assert used[0]["mac"] == "52:54:00:00:00:01"
        assert all(nic[f"{way}_{what}"] >= 0 for nic in used for way in ("rx", "tx") for what in ("bytes", "packets", "errors"))
        missing = InstanceCreate(spec=host.spec("lost", nics=[NetworkNic(type="network", network="nowhere")]))
        failed = await host.refused(missing, str(uuid.uuid4()))
        assert failed.kind == "operation.failed"
        assert failed.data["undone"]
        await host.do(InstanceDelete(), guest)
        await world.judge(agent, (), libvirtd)


def _define_network(libvirtd: PrivateLibvirtd, folder: Path) -> None:
    xml = folder / "lan.xml"
    xml.write_text("<network><name>lan</name><bridge name='vbr7'/></network>")
    libvirtd.virsh("net-define", str(xml))
    libvirtd.virsh("net-start", "lan")


async def test_a_disabled_or_full_host_refuses(host: Host, libvirtd: PrivateLibvirtd) -> None:
    await host.do(HostSetEnabled(enabled=False, reason="being repaired"))
    spec = host.spec("unwanted")
    refusal = await host.refused(InstanceCreate(spec=spec), str(uuid.uuid4()))
    assert refusal.data["error"]["code"] == "host_disabled"
    assert "being repaired" in refusal.data["error"]["message"]
    await host.agent.stop()
    await host.agent.start()
    beat = (await host.do(HostShow()))["heartbeat"]
    assert beat["enabled"] is False  # it outlives the agent
    await host.do(HostSetEnabled(enabled=True))
    huge = host.spec("huge", memory_mib=16 * 1024 * 1024)
    refusal = await host.refused(InstanceCreate(spec=huge), str(uuid.uuid4()))
    assert refusal.data["error"]["code"] == "does_not_fit"
    assert refusal.data["error"]["details"]["MEMORY_MB"] > 0
    assert refusal.data["error"]["retryable"]
    await host.world.judge(host.agent, (), libvirtd)


async def test_a_guest_that_stops_by_itself_is_seen_at_once(host: Host, libvirtd: PrivateLibvirtd) -> None:
    guest = await host.create(host.spec("leaver"))
    await host.console(guest, "guest: tick")
    await asyncio.to_thread(libvirtd.virsh, "shutdown", "leaver")
    event = await host.world.recorder.wait_for(
        host.agent.host, "instance.state", where=lambda e: e.data["observed"] == "stopped" and e.subject == guest
    )
    assert event.data["reason"] == "shutdown"
    assert event.data["desired"] == "running"  # what to do about it is the controller's choice
    await host.do(InstanceDelete(), guest)


async def test_foreign_domains_are_reported_and_never_touched(
    host: Host, libvirtd: PrivateLibvirtd, tmp_path: Path
) -> None:
    foreign = str(uuid.uuid4())
    xml = tmp_path / "foreign.xml"
    xml.write_text(
        f"<domain type='qemu'><name>foreign</name><uuid>{foreign}</uuid><memory unit='MiB'>32</memory>"
        "<vcpu>1</vcpu><os><type>hvm</type></os></domain>"
    )
    await asyncio.to_thread(libvirtd.virsh, "create", str(xml))
    await host.world.recorder.wait_for(
        host.agent.host, "host.drift", where=lambda e: e.data["difference"] == "foreign-domain" and e.subject == foreign
    )
    for command in (InstanceDelete(), InstanceStop(force=True), InstancePause()):
        refusal = await host.refused(command, foreign)
        assert refusal.kind == "operation.rejected"
    taken = await host.refused(InstanceCreate(spec=host.spec("foreign")), str(uuid.uuid4()))
    assert taken.data["error"]["code"] == "name_taken"
    listed = await host.do(InstanceList(include_foreign=True))
    assert [domain["id"] for domain in listed["foreign"]] == [foreign]
    assert "foreign" in libvirtd.qemu_pids()
    await asyncio.to_thread(libvirtd.virsh, "destroy", "foreign")


async def test_computectl_drives_it_all(host: Host, tmp_path: Path) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text(host.spec("by-hand", nics=[UserNic(type="user")]).model_dump_json(exclude_none=True))
    guest = str(uuid.uuid4())
    made = await _computectl(host, "instance", "create", "-f", str(spec), "--id", guest, "--wait", "--json")
    assert made[0] == 0
    assert json.loads(made[1])["result"]["observed"] == "running"
    status, out, _ = await _computectl(host, "instance", "ls")
    assert status == 0
    assert "by-hand" in out
    status, out, err = await _computectl(host, "instance", "start", str(uuid.uuid4()))
    assert status == 1
    assert "unknown_instance" in err
    assert (await _computectl(host, "instance", "stop", guest, "--force"))[0] == 0
    assert (await _computectl(host, "instance", "rm", guest))[0] == 0
    status, out, _ = await _computectl(host, "host", "show", "--json", host.agent.host)
    assert status == 0
    assert "VCPU" in out


async def _computectl(host: Host, *arguments: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "agent.controller", *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "COMPUTECTL_AMQP": host.world.broker.url, "COMPUTECTL_HOST": host.agent.host},
    )  # fmt: skip
    async with asyncio.timeout(GUEST_S):
        out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


async def test_operations_can_be_looked_up(host: Host) -> None:
    guest = str(uuid.uuid4())
    command_id = await host.world.send(host.agent.host, InstanceCreate(spec=host.spec("known")), guest)
    await host.world.recorder.wait_final(host.agent.host, command_id)
    shown = await host.do(OperationShow(operation_id=command_id))
    assert shown["state"] == "succeeded"
    assert [step["name"] for step in shown["steps"]] == ["claim", "image", "storage", "define", "start"]
    assert {step["state"] for step in shown["steps"]} == {"done"}
    await host.do(InstanceDelete(), guest)
