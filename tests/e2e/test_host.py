"""The host's own verbs with real guests: audit after a life and with planted leftovers, adoption, drain under load."""

from __future__ import annotations

import asyncio
import json
import subprocess
import uuid
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from support.fleet import World, spec

from agent.drivers.libvirt.metadata import build
from agent.drivers.libvirt.settings import BUILT_IN
from agent.messages.commands import (
    HostSetEnabled,
    HostShow,
    InstanceCreate,
    InstanceDelete,
    InstanceList,
    InstanceShow,
    InstanceStop,
)
from agent.messages.verbs_host import HostAudit, HostDrain, InstanceAdopt
from agent.messages.verbs_memory import InstanceSetPolicy
from devstack.guest_image import GuestImage
from devstack.libvirtd import PrivateLibvirtd

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(900)]

UP = "compute-agent guest is up"


async def audit(world: World, host: str, *, repair: bool = False) -> dict[str, Any]:
    return dict((await world.succeed(host, HostAudit(repair=repair))).data["result"])


def define(libvirtd: PrivateLibvirtd, folder: Path, document: str) -> None:
    path = folder / f"{uuid.uuid4()}.xml"
    path.write_text(document)
    libvirtd.virsh("define", str(path))


def secret(libvirtd: PrivateLibvirtd, folder: Path, usage: str) -> str:
    made, path = str(uuid.uuid4()), folder / f"{uuid.uuid4()}.xml"
    path.write_text(
        f"<secret ephemeral='no' private='yes'><uuid>{made}</uuid>"
        f"<usage type='volume'><volume>{usage}</volume></usage></secret>"
    )
    libvirtd.virsh("secret-define", str(path))
    return made


async def test_audit_of_lives_and_of_planted_leftovers(world: World, libvirtd: PrivateLibvirtd, tmp_path: Path) -> None:
    agent = await (await world.libvirt_agent(libvirtd)).start()
    host = agent.host
    guest = await world.create(host)
    assert (await audit(world, host))["items"] == []

    folders = agent.state_dir / "instances"
    leftover, copied, bare = (folders / str(uuid.uuid4()) for _ in range(3))
    for folder in (leftover, copied, bare, folders / "somebody"):
        folder.mkdir()
        (folder / "disk.qcow2").write_bytes(b"x" * 4096)
    entry = {"name": "root", "backend": BUILT_IN, "kind": "file", "path": str(leftover / "disk.qcow2"), "format": "qcow2"}
    for folder in (leftover, copied):  # the second lists what is another's
        (folder / "volumes.json").write_text(json.dumps({"version": 1, "volumes": [entry]}))
    stray = secret(libvirtd, tmp_path, f"compute-agent/{uuid.uuid4()}/root")
    used = secret(libvirtd, tmp_path, f"compute-agent/{guest}/root")
    others = secret(libvirtd, tmp_path, "not-ours")
    # Ours by its metadata, and unknown to the journal, as after the journal was restored from an older copy.
    marked = str(uuid.uuid4())
    element = ET.tostring(build(spec(marked), generation=3, host=host), encoding="unicode")
    define(
        libvirtd, tmp_path,
        f"<domain type='qemu'><name>i-{marked[:8]}</name><uuid>{marked}</uuid><metadata>{element}</metadata>"
        "<memory unit='MiB'>32</memory><vcpu>1</vcpu><os><type arch='x86_64'>hvm</type></os></domain>",
    )  # fmt: skip

    result = await audit(world, host, repair=True)
    actions = {(item["finding"], item["kind"], item["name"]): item.get("action") for item in result["items"]}
    taken = actions.pop(("unowned", "domain", marked), "taken in by its event already")
    assert taken in ("taken-in", "taken in by its event already")
    # The domain may have been taken in before the audit looked: then its disk is what is missing.
    actions = {key: action for key, action in actions.items() if key[0] != "missing"}
    assert actions == {
        ("unowned", "folder", str(leftover)): "removed",
        ("unproven", "folder", str(copied)): None,
        ("unproven", "folder", str(bare)): None,
        ("unproven", "folder", str(folders / "somebody")): None,
        ("unowned", "secret", stray): "removed",
    }
    assert [folder.exists() for folder in (leftover, copied, bare)] == [False, True, True]
    secrets = libvirtd.virsh("secret-list")
    assert [one in secrets for one in (stray, used, others)] == [False, True, True]
    listed = (await world.succeed(host, InstanceList())).data["result"]["instances"]
    assert {one["id"] for one in listed} == {guest, marked}

    again = await audit(world, host, repair=True)
    assert {item["finding"] for item in again["items"]} == {"unproven", "missing"}
    assert [item["instance_id"] for item in again["items"] if item["finding"] == "missing"] == [marked]
    for one in (guest, marked):
        await world.succeed(host, InstanceDelete(), one)
    assert {item["name"] for item in (await audit(world, host))["items"] if item["finding"] == "unowned"} == {used}
    assert (await audit(world, host, repair=True))["removed"] == 1
    libvirtd.virsh("secret-undefine", others)
    assert not agent.open_operations()


async def test_a_running_guest_is_adopted_undisturbed(
    world: World, libvirtd: PrivateLibvirtd, bootable: GuestImage, tmp_path: Path
) -> None:
    disk, console, legacy = tmp_path / "legacy.qcow2", tmp_path / "console.log", str(uuid.uuid4())
    backing = ["-F", "qcow2", "-b", str(bootable.path.resolve())]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *backing, str(disk)], check=True)
    define(
        libvirtd, tmp_path,
        f"<domain type='qemu'><name>legacy</name><uuid>{legacy}</uuid><title>Old &amp; dear</title>"
        "<memory unit='MiB'>128</memory><vcpu>1</vcpu><os><type arch='x86_64' machine='pc'>hvm</type></os>"
        "<features><acpi/></features><devices>"
        f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{disk}'/>"
        "<target dev='vda' bus='virtio'/></disk>"
        f"<serial type='file'><source path='{console}'/><target port='0'/></serial>"
        "<interface type='user'><mac address='52:54:00:12:34:56'/><model type='virtio'/></interface>"
        "<sound model='ich6'/></devices></domain>",
    )  # fmt: skip
    libvirtd.virsh("start", legacy)
    async with asyncio.timeout(240):
        while UP not in (console.read_text(errors="replace") if console.exists() else ""):
            await asyncio.sleep(0.25)
    before = libvirtd.virsh("dumpxml", legacy, "--inactive")
    live = libvirtd.virsh("dumpxml", legacy)
    process = libvirtd.qemu_pids()["legacy"]

    agent = await (await world.libvirt_agent(libvirtd)).start()
    host = agent.host
    mark = world.recorder.mark
    adopted = (await world.succeed(host, InstanceAdopt(), legacy)).data["result"]
    assert (adopted["observed"], adopted["name"]) == ("running", "legacy")
    assert adopted["spec"]["root_disk"]["size_mib"] == bootable_mib(bootable)
    assert adopted["spec"]["nics"][0]["mac"] == "52:54:00:12:34:56"
    assert adopted["life"]["adopted"]["disks"] == [str(disk)]
    assert "device sound" in adopted["life"]["adopted"]["kept"]
    # Nothing but our element differs, the process is the same, and nobody heard of a change of power.
    assert without_metadata(libvirtd.virsh("dumpxml", legacy, "--inactive")) == without_metadata(before)
    assert libvirtd.virsh("dumpxml", legacy) == live
    assert libvirtd.qemu_pids()["legacy"] == process
    assert not [e for e in world.recorder.events(host, "instance.state", since=mark) if e.data["observed"] != "running"]
    assert (await audit(world, host))["items"] == []

    # A policy is no part of the definition, which stays as it was; the agent follows it when the guest ends by itself.
    mark = world.recorder.mark
    followed = (await world.succeed(host, InstanceSetPolicy(on_stop="restart"), legacy)).data["result"]
    assert followed["spec"]["policy"]["on_stop"] == "restart"
    assert without_metadata(libvirtd.virsh("dumpxml", legacy, "--inactive")) == without_metadata(before)
    assert libvirtd.qemu_pids()["legacy"] == process
    libvirtd.virsh("shutdown", legacy)
    said = await world.recorder.wait_for(host, "instance.policy", timeout_s=90, since=mark)
    assert (said.subject, said.data["cause"], said.data["action"]) == (legacy, "on-stop", "start")
    await world.recorder.wait_final(host, said.data["operation_id"])
    assert libvirtd.qemu_pids()["legacy"] != process
    async with asyncio.timeout(90):
        while UP not in console.read_text(errors="replace"):  # QEMU began the file anew
            await asyncio.sleep(0.25)

    await agent.restart()
    shown = (await world.succeed(host, InstanceShow(), legacy)).data["result"]
    assert shown["life"]["adopted"]["own_disks"] is False
    assert shown["spec"]["policy"]["on_stop"] == "restart"
    stopped = (await world.succeed(host, InstanceStop(timeout_s=60), legacy)).data["result"]
    assert not stopped["forced"], "the guest runs and obeys"
    assert console.read_text(errors="replace").count(UP) == 1
    await world.succeed(host, InstanceDelete(), legacy)
    assert disk.exists(), "its disk was not given to the agent"
    assert legacy not in libvirtd.virsh("list", "--all", "--uuid")
    assert (await audit(world, host))["items"] == []


def bootable_mib(image: GuestImage) -> int:
    shown = subprocess.run(
        ["qemu-img", "info", "--output=json", "-f", "qcow2", str(image.path)], check=True, capture_output=True
    ).stdout
    return -(-int(json.loads(shown)["virtual-size"]) // (1024 * 1024))


def without_metadata(document: str) -> str:
    root = ET.fromstring(document)
    for metadata in root.findall("metadata"):
        root.remove(metadata)
    return ET.canonicalize(ET.tostring(root, encoding="unicode"), strip_text=True)


async def test_disks_are_removed_where_they_were_given(
    world: World, libvirtd: PrivateLibvirtd, tmp_path: Path
) -> None:
    agent = await (await world.libvirt_agent(libvirtd)).start()
    host, given = agent.host, str(uuid.uuid4())
    disk = tmp_path / "given.raw"
    disk.write_bytes(b"\0" * 1024 * 1024)

    def document(source: str) -> str:
        return (
            f"<domain type='qemu'><name>given</name><uuid>{given}</uuid><memory unit='MiB'>32</memory><vcpu>1</vcpu>"
            "<os><type arch='x86_64'>hvm</type></os><devices><disk type='file' device='disk'>"
            f"<driver name='qemu' type='raw'/><source file='{source}'/><target dev='vda' bus='virtio'/></disk>"
            "</devices></domain>"
        )

    define(libvirtd, tmp_path, document(str(tmp_path / "gone.raw")))
    refused = await world.run(host, InstanceAdopt(own_disks=True), given)
    assert (refused.kind, refused.data["error"]["code"]) == ("operation.rejected", "not_adoptable")
    assert "gone.raw does not exist" in refused.data["error"]["message"]
    define(libvirtd, tmp_path, document(str(disk)))
    await world.succeed(host, InstanceAdopt(own_disks=True), given)
    await world.succeed(host, InstanceDelete(), given)
    assert not disk.exists()


async def test_drain_under_load(world: World, libvirtd: PrivateLibvirtd) -> None:
    agent = await (await world.libvirt_agent(libvirtd)).start()
    host = agent.host
    ids = [str(uuid.uuid4()) for _ in range(4)]
    running = await world.create(host)
    creates = [await world.send(host, InstanceCreate(spec=spec(one)), one) for one in ids]
    drain = await world.send(host, HostDrain(stop_instances=True, stop_timeout_s=1, at_once=2))
    done = await world.recorder.wait_final(host, drain)
    assert done.kind == "operation.succeeded", done.data
    # All had ended before the drain did; one whose claim came after it was refused.
    ends = [await world.recorder.wait_final(host, create, timeout_s=1) for create in creates]
    codes = {end.data["error"]["code"] for end in ends if end.kind != "operation.succeeded"}
    assert codes <= {"host_disabled"}
    ids = [one for one, end in zip(ids, ends, strict=True) if end.kind == "operation.succeeded"]
    beat = (await world.succeed(host, HostShow())).data["result"]["heartbeat"]
    assert (beat["enabled"], beat["disabled_reason"]) == (False, "drained: drained for maintenance")
    assert beat["operations_in_flight"] <= 1  # this question
    assert set(done.data["result"]["stopped"]) == {running, *ids}
    assert done.data["result"]["running"] == []
    late = str(uuid.uuid4())
    refused = await world.run(host, InstanceCreate(spec=spec(late)), late)
    assert refused.data["error"]["code"] == "host_disabled"
    await world.succeed(host, HostSetEnabled(enabled=True))
    made = {one["id"] for one in (await world.succeed(host, InstanceList())).data["result"]["instances"]}
    assert made == {running, *ids}
    for one in made:
        await world.succeed(host, InstanceDelete(), one)
    assert (await audit(world, host))["items"] == []
