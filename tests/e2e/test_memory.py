"""Suspend to disk, NMI, memory dump, and what happens by itself, on guests that boot and tell what they live through."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import sqlite3
import struct
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from support import guests
from support.fleet import World
from support.guests import GUEST_S, UP

from agent.messages.commands import (
    InstanceDelete,
    InstancePause,
    InstanceReboot,
    InstanceResume,
    InstanceStart,
    InstanceStop,
    OperationCancel,
)
from agent.messages.events import Event
from agent.messages.spec import ImageSource, RootDisk, Seed
from agent.messages.spec_policy import Policy
from agent.messages.verb import CommandData
from agent.messages.verbs_memory import (
    InstanceMemoryDump,
    InstanceReset,
    InstanceSetPolicy,
    InstanceSuspend,
    InstanceTriggerCrashDump,
)
from devstack.guest_image import GuestImage
from devstack.libvirtd import PrivateLibvirtd

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(900)]

MEMORY_MIB = 112


class Host(guests.Host):
    """A host whose guests talk, are saved and dumped."""

    async def code(self, data: CommandData, instance_id: str) -> str:
        """The code that a command is refused with."""
        return str((await self.refused(data, instance_id)).data["error"]["code"])

    async def guest(self, name: str, acts: str = "", **changes: Any) -> str:
        """Make a guest that does something by itself."""
        seed = {"seed": Seed(user_data=f"#cloud-config\n{acts}\n"), "memory_mib": MEMORY_MIB}
        return await self.create(self.spec(name, **(seed | changes)))

    async def state(self, instance_id: str, observed: str, since: int) -> Event:
        return await self.world.recorder.wait_for(
            self.agent.host, "instance.state", timeout_s=GUEST_S, since=since,
            where=lambda event: event.subject == instance_id and event.data["observed"] == observed,
        )  # fmt: skip

    async def went_on(self, instance_id: str, word: int) -> None:
        """Wait for the guest to come to a word; it never began anew, and left out none."""
        text = await self.console(instance_id, f"guest: word {word}")
        assert text.count(UP) == 1
        words = [int(found) for found in re.findall(r"guest: word (\d+)", text)]
        assert words == list(range(1, len(words) + 1))

    def saved_images(self, libvirtd: PrivateLibvirtd) -> list[Path]:
        return list((libvirtd.directory / "lib" / "qemu" / "save").glob("*"))

    async def policy(self, instance_id: str, since: int = 0) -> dict[str, Any]:
        event = await self.world.recorder.wait_for(
            self.agent.host, "instance.policy", timeout_s=GUEST_S, since=since, where=lambda e: e.subject == instance_id
        )
        await self.world.recorder.wait_final(self.agent.host, event.data["operation_id"], timeout_s=GUEST_S)
        return event.data


@pytest.fixture
async def host(world: World, libvirtd: PrivateLibvirtd, source: ImageSource, bootable: GuestImage) -> Host:
    agent = await world.libvirt_agent(libvirtd, settings={"images": {"file_roots": [str(bootable.path.resolve().parent)]}})
    await agent.start()
    return Host(world, agent, source)


def last_word(text: str) -> int:
    return max((int(word) for word in re.findall(r"guest: word (\d+)", text)), default=0)


async def test_a_suspended_guest_goes_on_where_it_was(host: Host, libvirtd: PrivateLibvirtd) -> None:
    """Agent and libvirtd are both restarted in between; the guest notices nothing."""
    guest = await host.guest("saved", "guest-act: 1 talk")
    await host.console(guest, "guest: word 2")
    result = await host.do(InstanceSuspend(), guest)
    assert (result["observed"], result["changed"]) == ("suspended", True)
    assert "saved" not in await asyncio.to_thread(libvirtd.qemu_pids)
    assert not (await host.do(InstanceSuspend(), guest))["changed"]
    assert await host.code(InstanceStop(), guest) == "instance_suspended"
    assert await host.code(InstanceReboot(), guest) == "instance_suspended"
    assert await host.code(InstanceReset(), guest) == "instance_not_running"
    before = last_word(await host.console(guest, "word"))
    await host.agent.stop()
    await asyncio.to_thread(libvirtd.kill_daemon)
    await asyncio.to_thread(libvirtd.start_daemon)
    await host.agent.start()
    shown = await host.do(InstanceResume(), guest)
    assert (shown["observed"], shown["changed"]) == ("running", True)
    await host.went_on(guest, before + 2)

    # A cancel leaves it as it was, also where it comes when all is saved already.
    mark = host.world.recorder.mark
    command_id = await host.world.send(host.agent.host, InstanceSuspend(), guest)
    await host.state(guest, "paused", mark)
    cancel = await host.world.run(host.agent.host, OperationCancel(operation_id=command_id))
    final = await host.world.recorder.wait_final(host.agent.host, command_id, timeout_s=GUEST_S)
    if cancel.kind == "operation.succeeded":  # on a very slow host it comes after the end
        assert final.kind == "operation.cancelled"
    else:
        await host.do(InstanceResume(), guest)
    assert not list(host.saved_images(libvirtd))
    await host.went_on(guest, last_word(await host.console(guest, "word")) + 2)

    # Saved while it was paused, it runs when it is asked to; force, hard and delete give the saved memory up.
    await host.do(InstancePause(), guest)
    await host.do(InstanceSuspend(), guest)
    assert (await host.do(InstanceStart(), guest))["observed"] == "running"
    await host.do(InstanceSuspend(), guest)
    assert (await host.do(InstanceReboot(mode="hard"), guest))["observed"] == "running"
    await host.do(InstanceSuspend(), guest)
    assert (await host.do(InstanceStop(force=True), guest))["observed"] == "stopped"
    assert not list(host.saved_images(libvirtd))
    assert (await host.do(InstanceStart(), guest))["observed"] == "running"
    await host.do(InstanceSuspend(), guest)
    await host.do(InstanceDelete(), guest)
    assert not list(host.saved_images(libvirtd))
    await host.world.judge(host.agent, (), libvirtd)


async def test_death_in_the_middle_of_a_suspend(host: Host, libvirtd: PrivateLibvirtd) -> None:
    """The agent's, before and after the saving, and libvirtd's while it saves: the guest loses nothing."""
    guest = await host.guest("cut-off", "guest-act: 1 talk")
    await host.console(guest, "guest: word 1")
    for where in ("before", "after"):
        await host.agent.stop()
        await host.agent.start(failpoint=f"instance.suspend:suspend:{where}")
        command_id = await host.world.send(host.agent.host, InstanceSuspend(), guest)
        await host.agent.wait_ended()
        await host.agent.start()
        final = await host.world.recorder.wait_final(host.agent.host, command_id, timeout_s=GUEST_S)
        assert (final.kind, final.data["result"]["observed"]) == ("operation.succeeded", "suspended")
        await host.do(InstanceResume(), guest)
    mark = host.world.recorder.mark
    command_id = await host.world.send(host.agent.host, InstanceSuspend(), guest)
    await host.state(guest, "paused", mark)
    await asyncio.to_thread(libvirtd.kill_daemon)
    # What it left half written is no saved memory; the guest lives on, and is saved by the next try.
    await asyncio.to_thread(libvirtd.start_daemon)
    final = await host.world.recorder.wait_final(host.agent.host, command_id, timeout_s=GUEST_S)
    assert (final.kind, final.data["result"]["observed"]) == ("operation.succeeded", "suspended")
    await host.do(InstanceResume(), guest)
    await host.went_on(guest, last_word(await host.console(guest, "word")) + 2)

    # Damaged memory is only given up by name: libvirt itself would throw an incomplete image away without a word.
    await host.do(InstanceSuspend(), guest)
    (image,) = host.saved_images(libvirtd)
    whole = image.read_bytes()
    for damaged in (b"LibvirtQemudPart" + whole[16:], b"no libvirt image" + whole[16:], whole[: len(whole) // 2]):
        image.write_bytes(damaged)
        for command in (InstanceResume(), InstanceStart()):
            assert await host.code(command, guest) == "saved_state_damaged"
            assert image.read_bytes() == damaged
    assert (await host.do(InstanceStart(discard_saved=True), guest))["observed"] == "running"
    await host.console(guest, UP, times=2)
    await host.do(InstanceDelete(), guest)
    await host.world.judge(host.agent, (), libvirtd)


async def test_buttons_and_dumps(host: Host, libvirtd: PrivateLibvirtd) -> None:
    guest = await host.guest("buttons")
    await host.console(guest, "guest: tick 1")
    await host.do(InstanceTriggerCrashDump(), guest)
    await host.console(guest, "NMI received for unknown reason")

    for form, magic in (("elf", b"\x7fELF"), ("kdump-zlib", b"makedumpfile"), ("raw", b"QEVM")):
        made = await host.do(InstanceMemoryDump.model_validate({"format": form, "live": form == "raw"}), guest)
        path = Path(made["path"])
        data = path.read_bytes()
        assert path.parent == host.agent.state_dir / "dumps"
        assert data.startswith(magic)
        assert (made["size_bytes"], made["sha256"], made["format"]) == (len(data), hashlib.sha256(data).hexdigest(), form)
        if form == "elf":
            assert struct.unpack_from("<H", data, 16)[0] == 4  # ET_CORE
            assert MEMORY_MIB < len(data) / 1024 / 1024 < MEMORY_MIB + 32
            assert b"guest: tick 1" in data  # what the guest had in its memory
        path.unlink()
    assert list((host.agent.state_dir / "dumps").iterdir()) == []

    for where in ("before", "after"):
        await host.agent.stop()
        await host.agent.start(failpoint=f"instance.memory-dump:dump:{where}")
        command_id = await host.world.send(host.agent.host, InstanceMemoryDump(), guest)
        await host.agent.wait_ended()
        await host.agent.start()
        final = await host.world.recorder.wait_final(host.agent.host, command_id, timeout_s=GUEST_S)
        path = Path(final.data["result"]["path"])
        assert list(path.parent.iterdir()) == [path]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == final.data["result"]["sha256"]
        path.unlink()

    mark = host.world.recorder.mark
    pid = (await asyncio.to_thread(libvirtd.qemu_pids))["buttons"]
    assert (await host.do(InstanceReset(), guest))["observed"] == "running"
    await host.world.recorder.wait_for(host.agent.host, "instance.rebooted", since=mark, where=lambda e: e.subject == guest)
    await host.console(guest, "guest: boots=2")
    assert (await asyncio.to_thread(libvirtd.qemu_pids))["buttons"] == pid
    await host.do(InstanceStop(force=True), guest)
    for command in (InstanceReset(), InstanceTriggerCrashDump(), InstanceMemoryDump(), InstanceSuspend()):
        assert await host.code(command, guest) == "instance_not_running"
    await host.do(InstanceDelete(), guest)
    await host.world.judge(host.agent, (), libvirtd)


async def test_guests_that_end_by_themselves_come_back(host: Host, libvirtd: PrivateLibvirtd) -> None:
    """One powers itself off, one panics: each is told for what it was, and boots again."""
    restart = Policy(on_stop="restart", on_crash="restart")
    leaver = await host.guest("leaver", "guest-act: 1 poweroff", policy=restart)
    said = await host.policy(leaver)
    assert (said["cause"], said["attempt"]) == ("on-stop", 1)
    stopped = [
        event.data for event in host.world.recorder.events(host.agent.host, "instance.state") if event.subject == leaver
    ]
    assert [(e["observed"], e["reason"]) for e in stopped if e["observed"] == "stopped"] == [("stopped", "shutdown")]

    panicker = await host.guest("panicker", "guest-act: 1 panic", policy=restart)
    crashed = await host.state(panicker, "crashed", 0)
    assert crashed.data["reason"] in ("panicked", "crashed")
    said = await host.policy(panicker)
    assert (said["cause"], said["action"]) == ("on-crash", "start")
    text = await host.console(panicker, "guest: boots=2")
    assert "Kernel panic" in text

    # What it is told to keep it keeps.
    keep = await host.do(InstanceSetPolicy(on_crash="keep", on_stop="keep"), panicker)
    assert keep["spec"]["policy"]["on_crash"] == "keep"
    xml = await asyncio.to_thread(libvirtd.virsh, "dumpxml", "--inactive", "panicker")
    assert '"on_crash":"keep"' in xml.replace("&quot;", '"')
    mark = host.world.recorder.mark
    os.kill((await asyncio.to_thread(libvirtd.qemu_pids))["panicker"], 9)
    await host.state(panicker, "crashed", mark)
    await host.world.settle(host.agent.host)
    events = host.world.recorder.events(host.agent.host, "instance.policy", since=mark)
    assert events == []
    for guest in (leaver, panicker):
        await host.do(InstanceDelete(), guest)
    await host.world.judge(host.agent, (), libvirtd)


async def test_guests_come_back_after_a_host_boot(host: Host, libvirtd: PrivateLibvirtd) -> None:
    """The boot is told by the kernel's boot id, which the journal keeps; a restart of the agent starts nothing."""
    # Nothing boots from an empty disk; that their QEMUs run is what counts here.
    empty: dict[str, Any] = {"root_disk": RootDisk(size_mib=1), "memory_mib": 32, "seed": None}
    ran = await host.guest("ran", **empty)
    stays = await host.guest("stays", policy=Policy(on_host_boot="stay-stopped"), **empty)
    for boot in (False, True):
        await host.agent.stop()
        for name in ("ran", "stays"):
            if "running" in await asyncio.to_thread(libvirtd.virsh, "domstate", name):
                await asyncio.to_thread(libvirtd.virsh, "destroy", name)
        if boot:
            with closing(sqlite3.connect(host.agent.state_dir / "journal.sqlite")) as journal, journal:
                journal.execute("UPDATE settings SET value = 'another' WHERE key = 'host.boot_id'")
        mark = host.world.recorder.mark
        await host.agent.start()
        if boot:
            assert (await host.policy(ran, mark))["cause"] == "on-host-boot"
        await host.world.settle(host.agent.host)
        assert set(await asyncio.to_thread(libvirtd.qemu_pids)) == ({"ran"} if boot else set())
    for guest in (ran, stays):
        await host.do(InstanceDelete(), guest)
    await host.world.judge(host.agent, (), libvirtd)
