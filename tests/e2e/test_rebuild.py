"""Rebuild, rescue and soft delete on guests that boot. Which image booted is told by the count of boots on its disk."""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
from datetime import datetime
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from support.fleet import World
from support.guests import COUNT_AT, GUEST_S, UP, Host, boots_on_disk

from agent.drivers.libvirt.seed import _iso
from agent.messages.commands import HostShow, InstanceDelete, InstanceShow, InstanceStart, InstanceStop
from agent.messages.spec import ImageSource, Seed, UserNic
from agent.messages.spec_disks import CdromDisk, DataDisk, EphemeralDisk
from agent.messages.spec_machine import Firmware, Machine
from agent.messages.verbs_host import HostAudit
from agent.messages.verbs_rebuild import (
    InstanceRebuild,
    InstanceRescue,
    InstanceRestore,
    InstanceShelve,
    InstanceUnrescue,
    InstanceUnshelve,
)
from agent.messages.verbs_snapshot import ExportTarget
from devstack.firmware import firmware
from devstack.guest_image import GuestImage
from devstack.libvirtd import PrivateLibvirtd

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(900)]

SEEDED = "seed: network-config="
OTHER = 7000
"""The count of boots that the other image begins with."""


@pytest.fixture(scope="session")
def other(bootable: GuestImage, tmp_path_factory: pytest.TempPathFactory) -> ImageSource:
    """The same system in another image: it says so by the number of its boots."""
    folder = tmp_path_factory.mktemp("other")
    raw, image = folder / "other.raw", folder / "other.qcow2"
    subprocess.run(["qemu-img", "convert", "-O", "raw", bootable.path, raw], check=True)
    with raw.open("r+b") as disk:
        disk.seek(COUNT_AT)
        disk.write(f"{OTHER:<511}\n".encode())
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image], check=True)
    raw.unlink()
    return ImageSource(url=image.as_uri(), sha256=hashlib.sha256(image.read_bytes()).hexdigest(), format="qcow2")


@pytest.fixture
async def host(
    world: World,
    libvirtd: PrivateLibvirtd,
    source: ImageSource,
    bootable: GuestImage,
    other: ImageSource,
    tmp_path: Path,
) -> Host:
    folders = [str(bootable.path.resolve().parent), str(Path(other.url.removeprefix("file://")).parent)]
    (tmp_path / "shelf").mkdir()
    settings = {
        "images": {"file_roots": folders},
        "periodic": {"due_s": 0.2},
        "exports": {"stores": {"shelf": str(tmp_path / "shelf")}},
    }
    agent = await world.libvirt_agent(libvirtd, settings=settings)
    await agent.start()
    return Host(world, agent, source)


def boots(text: str) -> list[int]:
    return [int(line.split("=")[1]) for line in text.splitlines() if line.startswith("guest: boots=")]


async def booted(host: Host, guest: str, number: int, wanted: str = "guest: mac=") -> str:
    """Wait for the guest's next boot, which is its `number`th; the console of that boot alone."""
    text = await host.console(guest, wanted, times=number)
    return text.split(UP)[number]


async def mac_addresses(host: Host, guest: str) -> list[str]:
    return (await host.do(InstanceShow(), guest))["mac_addresses"]


def folder(host: Host, guest: str) -> list[str]:
    return sorted(path.name for path in (host.agent.state_dir / "instances" / guest).iterdir())


async def test_rebuild_boots_the_new_image_with_the_same_id_and_mac(
    host: Host, libvirtd: PrivateLibvirtd, other: ImageSource
) -> None:
    seed = Seed(hostname="one", user_data="#first\n")
    guest = await host.create(host.spec("phoenix", nics=[UserNic(type="user")], seed=seed))
    first = await booted(host, guest, 1, SEEDED)
    mac = next(line for line in first.splitlines() if line.startswith("guest: mac="))
    shown = await host.do(InstanceShow(), guest)

    again = Seed(hostname="two", user_data="#second\n")
    rebuilt = await host.do(InstanceRebuild(image=other, seed=again), guest)
    assert (rebuilt["id"], rebuilt["name"], rebuilt["observed"]) == (guest, "phoenix", "running")
    assert rebuilt["spec"]["root_disk"]["image"]["sha256"] == other.sha256
    second = await booted(host, guest, 2, SEEDED)
    assert boots(first + second) == [1, OTHER + 1]
    assert mac in second
    assert "seed: user-data-first-line=#second" in second
    assert f"seed: instance-id={guest}" in second
    now = await host.do(InstanceShow(), guest)
    assert now["mac_addresses"] == shown["mac_addresses"]
    assert now["disk_paths"] == shown["disk_paths"]
    assert "seed-new.iso" not in folder(host, guest)

    # A stopped one stays stopped, and what the metadata says is true: it comes back after the loss of the journal.
    await host.do(InstanceStop(force=True), guest)
    disk = Path(now["disk_paths"][0])
    assert await asyncio.to_thread(boots_on_disk, disk) == OTHER + 1
    await host.do(InstanceRebuild(image=host.source), guest)
    assert (await host.do(InstanceShow(), guest))["observed"] == "stopped"
    assert await asyncio.to_thread(boots_on_disk, disk) == 0
    assert (await host.do(InstanceStart(), guest))["observed"] == "running"
    await host.do(InstanceDelete(), guest)
    await host.world.judge(host.agent, (), libvirtd)


def fill(host: Host, guest: str, disk: str) -> None:
    """Write nines where a guest reads its count of boots, as a guest that used the disk would have."""
    path = host.agent.state_dir / "instances" / guest / f"disk-{disk}.qcow2"
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", f"write -P 0x39 {COUNT_AT} 512", path], check=True)


async def test_rebuild_keeps_data_disks_and_makes_scratch_disks_anew(
    host: Host, libvirtd: PrivateLibvirtd, other: ImageSource
) -> None:
    disks = [
        DataDisk(kind="data", name="data", size_mib=16),
        EphemeralDisk(kind="ephemeral", name="scratch", size_mib=16, filesystem="none"),
    ]
    guest = await host.create(host.spec("keeper", disks=disks), start=False)
    fill(host, guest, "data")
    fill(host, guest, "scratch")
    await host.do(InstanceRebuild(image=other), guest)
    await host.do(InstanceStart(), guest)
    text = await host.console(guest, "guest: tick 1")
    assert boots(text) == [OTHER + 1]
    assert "guest: other=vdb sectors=32768 boots=999" in text
    assert "guest: other=vdc sectors=32768 boots=0" in text
    await host.do(InstanceRescue(image=other, force=True), guest)
    second = await booted(host, guest, 2, "guest: tick 1")
    assert f"guest: other=vdb sectors=524288 boots={OTHER + 1}" in second
    assert "guest: other=vdc sectors=32768 boots=999" in second
    assert not [name for name in folder(host, guest) if "_new" in name]
    await host.do(InstanceDelete(), guest)
    await host.world.judge(host.agent, (), libvirtd)


async def test_shelve_and_unshelve_keep_what_was_written(
    host: Host, libvirtd: PrivateLibvirtd, tmp_path: Path
) -> None:
    shelf = tmp_path / "shelf"
    disks = [DataDisk(kind="data", name="data", size_mib=16)]
    guest = await host.create(host.spec("hermit", disks=disks, nics=[UserNic(type="user")]), start=False)
    fill(host, guest, "data")
    await host.do(InstanceStart(), guest)
    await booted(host, guest, 1)
    macs = await mac_addresses(host, guest)
    shelved = await host.do(InstanceShelve(target=ExportTarget(store="shelf", name="hermit")), guest)
    assert (shelved["observed"], shelved["desired"]) == ("stopped", "stopped")
    for disk in shelved["life"]["shelf"]["disks"]:
        content = Path(disk["url"].removeprefix("file://")).read_bytes()
        assert hashlib.sha256(content).hexdigest() == disk["sha256"]
    assert not (host.agent.state_dir / "instances" / guest).exists()
    used = (await host.do(HostShow()))["heartbeat"]["inventory"]
    assert [used[name]["used"] for name in ("VCPU", "MEMORY_MB", "DISK_GB")] == [0, 0, 0]
    refusal = await host.refused(InstanceStart(), guest)
    assert refusal.data["error"]["code"] == "instance_shelved"
    assert "hermit" in libvirtd.virsh("list", "--all", "--name")  # its definition, with what it needs to return

    await host.agent.kill()
    await host.agent.start()
    back = await host.do(InstanceUnshelve(), guest)
    assert (back["observed"], "life" in back) == ("running", False)
    text = await booted(host, guest, 1)
    assert boots(text) == [2]
    assert "guest: other=vdb sectors=32768 boots=999" in text
    assert await mac_addresses(host, guest) == macs
    assert list(shelf.iterdir()) == []
    for name in ("disk.qcow2", "disk-data.qcow2"):  # whole: the exports they were made of are gone
        path = host.agent.state_dir / "instances" / guest / name
        shown = subprocess.run(["qemu-img", "info", "-U", path], check=True, capture_output=True, text=True).stdout
        assert "backing file" not in shown
    await host.do(InstanceDelete(), guest)
    await host.world.judge(host.agent, (), libvirtd)


async def test_uefi_variables_and_cds_come_back_from_the_shelf(
    world: World, libvirtd: PrivateLibvirtd, source: ImageSource, bootable: GuestImage, tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    iso = tmp_path / "tools.iso"
    iso.write_bytes(_iso("TOOLS", {"readme": b"hello"}))
    tools = ImageSource(url=iso.as_uri(), sha256=hashlib.sha256(iso.read_bytes()).hexdigest(), format="raw")
    builds = firmware(Path(request.config.cache.mkdir("firmware")))
    agent = await world.agent(
        driver="libvirt",
        driver_settings={"uri": libvirtd.uri, "virt_type": "qemu", "firmware_dirs": [str(builds)]},
        settings={
            "images": {"file_roots": [str(bootable.path.resolve().parent), str(tmp_path)]},
            "exports": {"stores": {"shelf": str(shelf)}},
        },
    )
    await agent.start()
    host = Host(world, agent, source)
    machine = Machine(firmware=Firmware(type="uefi"))
    disks = [CdromDisk(kind="cdrom", name="tools", image=tools)]
    guest = await host.create(host.spec("settled", memory_mib=256, machine=machine, disks=disks))
    first = await host.console(guest, "guest: tick 1")
    assert "guest: firmware=efi" in first
    assert "type=iso9660 label=TOOLS" in first
    await host.do(InstanceStop(force=True), guest)
    variables = agent.state_dir / "instances" / guest / "nvram.fd"
    written = variables.read_bytes()
    assert "Boot0001".encode("utf-16-le") in written, "the firmware notes what it can boot"

    shelved = await host.do(InstanceShelve(target=ExportTarget(store="shelf", name="settled")), guest)
    assert [disk["name"] for disk in shelved["life"]["shelf"]["disks"]] == ["root"]
    assert folder(host, guest) == ["nvram.fd", "volumes.json"]
    assert (await host.do(HostAudit()))["items"] == []
    await agent.kill()
    for cached in (agent.state_dir / "images").glob(f"{tools.sha256}*"):
        cached.unlink()
    await agent.start()
    export = Path(shelved["life"]["shelf"]["disks"][0]["url"].removeprefix("file://"))
    export.rename(tmp_path / "away")
    gone = await host.refused(InstanceUnshelve(), guest)
    assert gone.data["error"]["code"] == "image_missing"
    assert variables.read_bytes() == written, "also after an unshelve that failed"
    (tmp_path / "away").rename(export)

    await host.do(InstanceUnshelve(), guest)
    assert variables.read_bytes() == written
    assert [path.name for path in (agent.state_dir / "images").glob(f"{tools.sha256}*")], "fetched again"
    await host.do(InstanceStart(), guest)
    second = await host.console(guest, "guest: tick 1")
    assert "guest: firmware=efi" in second
    assert "type=iso9660 label=TOOLS" in second
    assert second.count(UP) == 1, "the console's log began anew"
    await host.do(InstanceDelete(), guest)
    await world.judge(agent, (), libvirtd)


async def test_a_rebuild_that_fails_brings_the_old_guest_back(
    host: Host, libvirtd: PrivateLibvirtd, other: ImageSource
) -> None:
    guest = await host.create(host.spec("tenacious", nics=[UserNic(type="user")]))
    await asyncio.to_thread(libvirtd.kill_daemon)
    command = await host.world.send(host.agent.host, InstanceRebuild(image=other, force=True), guest)
    await asyncio.to_thread(libvirtd.start_daemon)
    done = await host.world.recorder.wait_final(host.agent.host, command, timeout_s=GUEST_S)
    assert done.kind == "operation.succeeded", done.data  # the hypervisor came back in time
    small = ImageSource(url=other.url, sha256="0" * 64, format="qcow2")
    failed = await host.refused(InstanceRebuild(image=small), guest)
    assert failed.data["error"]["code"] == "image_checksum_mismatch"
    assert (await host.do(InstanceShow(), guest))["observed"] == "running"
    await host.do(InstanceDelete(), guest)
    await host.world.judge(host.agent, (), libvirtd)


async def test_rescue_boots_its_image_before_the_guests_own_disk(
    host: Host, libvirtd: PrivateLibvirtd, other: ImageSource
) -> None:
    guest = await host.create(host.spec("patient", nics=[UserNic(type="user")]))
    await booted(host, guest, 1)
    macs = await mac_addresses(host, guest)
    rescued = await host.do(InstanceRescue(image=other), guest)
    assert rescued["observed"] == "running"
    assert rescued["life"]["rescue"]["was_running"]
    assert await mac_addresses(host, guest) == macs
    definition = ET.fromstring(libvirtd.virsh("dumpxml", guest))
    disks = [disk for disk in definition.findall("devices/disk") if disk.get("device") == "disk"]
    assert [disk.find("target").get("dev") for disk in disks] == ["vda", "vdb"]
    assert [disk.find("boot").get("order") for disk in disks] == ["1", "2"]

    for command in (InstanceRebuild(image=other), InstanceRescue(image=other)):
        refusal = await host.refused(command, guest)
        assert (refusal.kind, refusal.data["error"]["code"]) == ("operation.rejected", "instance_rescued")
    # It outlives the agent and libvirtd, and the power verbs work.
    await host.agent.kill()
    await asyncio.to_thread(libvirtd.restart_daemon)
    await host.agent.start()
    assert (await host.do(InstanceShow(), guest))["life"]["rescue"]["image"]["sha256"] == other.sha256
    await host.do(InstanceStop(force=True), guest)
    before = len(await host.said(guest))
    await host.do(InstanceStart(), guest)
    rescue = (await host.console(guest, "guest: mac=", after=before))[before:]
    # The first boot of the rescue image was ended before it counted, or after that.
    assert boots(rescue) in ([OTHER + 1], [OTHER + 2])
    assert "guest: other=vdb sectors=524288 boots=1" in rescue  # its own disk, behind the rescue disk, untouched

    before = len(await host.said(guest))
    back = await host.do(InstanceUnrescue(force=True), guest)
    assert back["observed"] == "running"
    assert "life" not in back
    own = (await host.console(guest, "guest: mac=", after=before))[before:]
    assert boots(own.rpartition(UP)[2]) == [2]  # its own data
    assert "guest: other=" not in own.rpartition(UP)[2]
    assert not [name for name in folder(host, guest) if "rescue" in name]
    await host.do(InstanceRescue(image=other, force=True), guest)
    await host.do(InstanceDelete(), guest)
    await host.world.judge(host.agent, (), libvirtd)


async def test_soft_delete_restore_and_its_end(host: Host, libvirtd: PrivateLibvirtd) -> None:
    guest = await host.create(host.spec("lazarus", nics=[UserNic(type="user")]))
    await booted(host, guest, 1)
    deleted = await host.do(InstanceDelete(restore_within_s=3600), guest)
    assert datetime.fromisoformat(deleted["restore_until"]) > datetime.now().astimezone()
    shown = await host.do(InstanceShow(), guest)
    assert (shown["desired"], shown["observed"]) == ("deleted", "stopped")
    refusal = await host.refused(InstanceStart(), guest)
    assert refusal.data["error"]["code"] == "instance_soft_deleted"
    await host.agent.kill()
    await host.agent.start()
    restored = await host.do(InstanceRestore(), guest)
    assert (restored["desired"], restored["observed"]) == ("running", "running")
    assert boots(await booted(host, guest, 2)) == [2]

    await host.do(InstanceDelete(restore_within_s=0.5), guest)
    await host.world.recorder.wait_for(
        host.agent.host, "instance.removed", where=lambda e: e.subject == guest, timeout_s=GUEST_S
    )
    refusal = await host.refused(InstanceRestore(), guest)
    assert refusal.data["error"]["code"] == "unknown_instance"
    await host.world.settle(host.agent.host)
    assert libvirtd.virsh("list", "--all", "--name").split() == []
    assert folder_names(host) == []


def folder_names(host: Host) -> list[str]:
    return sorted(path.name for path in (host.agent.state_dir / "instances").iterdir())


