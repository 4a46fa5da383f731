"""(g) Exports and snapshots: from the command to the published image, against libvirt and qemu-img by hand.

Both sides work in turn on the same guest of the same libvirtd. By hand comes twice: the bare calls, and with what makes
the result of use: its checksum and its being on the disk.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import libvirt

from agent.controller import ComputeClient
from agent.messages.commands import InstanceCreate, InstanceStart, InstanceStop
from agent.messages.spec import ImageSource, RootDisk
from agent.messages.verb import CommandData
from agent.messages.verbs_snapshot import ExportTarget, InstanceExport, SnapshotCreate, SnapshotDelete
from bench import guests, servers
from bench.measure import Report, percentile, ratio_of_medians
from devstack.guest_image import guest_image
from devstack.libvirtd import PrivateLibvirtd
from devstack.rabbitmq import PrivateBroker

GOAL = 1.2
DATA_MIB = 512
DISK_MIB = 1024

Found = dict[str, dict[str, list[float]]]


def measure(directory: Path, rounds: int) -> Report:
    """A disk of 1 GiB with 512 MiB in it, live and cold; a snapshot with the memory of a small guest."""
    report = Report(
        "Exports and snapshots",
        ("what", "side", "p50 ms", "p99 ms", "ratio to by hand", "ratio with checksum and sync"),
    )
    store = directory / "store"
    store.mkdir()
    extra = f'{guests.OVERCOMMIT}\n[exports.stores]\nmain = "{store}"'
    with PrivateBroker(directory / "broker") as broker, PrivateLibvirtd(directory / "host") as host:
        config = servers.agent_config(
            directory / "agent",
            broker.url,
            driver="libvirt",
            settings={"uri": host.uri, "virt_type": "qemu"},
            image_roots=(directory,),
            extra=extra,
        )
        with servers.agent(config, guests.installed(directory)):
            found = guests.run(_run(broker.url, host.uri, directory, rounds))
    for what, sides in found.items():
        for side, seconds in sides.items():
            report.rows.append(
                (
                    what,
                    side,
                    f"{percentile(seconds, 50) * 1000:.0f}",
                    f"{percentile(seconds, 99) * 1000:.0f}",
                    f"{ratio_of_medians(seconds, sides['by hand']):.2f}",
                    f"{ratio_of_medians(seconds, sides['by hand, sha256 and sync']):.2f}" if len(sides) > 2 else "",
                )
            )
    report.remarks.append(
        f"Goal: at most {GOAL} times by hand. {DATA_MIB} MiB of random data in a disk of {DISK_MIB} MiB, {rounds} rounds per"
        " side. The agent's side includes the broker both ways, the journal, the sha256, and the file's being on the disk."
    )
    return report


class _Bench:
    def __init__(self, client: ComputeClient, domain: Any, disk: Path, folder: Path, key: str) -> None:
        self.client = client
        self.domain = domain
        self.disk = disk
        self.folder = folder
        self.key = key
        self.number = 0

    async def do(self, data: CommandData) -> dict[str, Any]:
        done = await self.client.call(data, host=servers.AGENT_HOST, instance_id=self.key, timeout_s=guests.LIMIT_S)
        return dict(done.result)

    def next(self) -> str:
        self.number += 1
        return f"n{self.number}"

    async def export(self) -> float:
        name = self.next()
        begun = time.perf_counter()
        result = await self.do(InstanceExport(target=ExportTarget(store="main", name=name)))
        seconds = time.perf_counter() - begun
        for path in (self.folder / "store").iterdir():
            path.unlink()
        assert result["disks"][0]["size_bytes"] > DATA_MIB << 20
        return seconds

    async def by_hand(self, copy: Callable[[Path], None], *, useful: bool) -> float:
        target = self.folder / "store" / "hand.qcow2"

        def work() -> float:
            begun = time.perf_counter()
            copy(target)
            if useful:
                # Debian's sha256sum does not use the CPU's instructions, which would flatter the agent.
                subprocess.run(["openssl", "dgst", "-sha256", str(target)], check=True, capture_output=True)
                subprocess.run(["sync", str(target)], check=True)
            seconds = time.perf_counter() - begun
            target.unlink()
            return seconds

        return await asyncio.to_thread(work)

    def cold(self, target: Path) -> None:
        subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "qcow2", str(self.disk), str(target)], check=True)

    def live(self, target: Path) -> None:
        document = (
            "<domainbackup mode='push'><disks><disk name='vda' backup='yes' type='file'>"
            f"<target file='{target}'/><driver type='qcow2'/></disk></disks></domainbackup>"
        )
        self.domain.backupBegin(document, None)
        while self.domain.jobStats()["type"] != libvirt.VIR_DOMAIN_JOB_NONE:
            time.sleep(0.01)
        assert self.domain.jobStats(libvirt.VIR_DOMAIN_JOB_STATS_COMPLETED)["success"]

    async def snapshot(self) -> float:
        name = self.next()
        begun = time.perf_counter()
        await self.do(SnapshotCreate(name=name))
        seconds = time.perf_counter() - begun
        await self.do(SnapshotDelete(name=name))
        return seconds

    async def snapshot_by_hand(self) -> float:
        name = self.next()

        def work() -> float:
            begun = time.perf_counter()
            made = self.domain.snapshotCreateXML(f"<domainsnapshot><name>{name}</name></domainsnapshot>")
            seconds = time.perf_counter() - begun
            made.delete()
            return seconds

        return await asyncio.to_thread(work)


async def _run(url: str, uri: str, directory: Path, rounds: int) -> Found:
    found: Found = defaultdict(lambda: defaultdict(list))
    connection = libvirt.open(uri)
    async with guests.controller(url) as client:
        key = guests.new_ids(1)[0]
        disk = directory / "agent" / "state" / "instances" / key / "disk.qcow2"
        spec = guests.small_spec("exported").model_copy(update={"root_disk": RootDisk(size_mib=DISK_MIB)})
        await client.call(
            InstanceCreate(spec=spec, start=False), host=servers.AGENT_HOST, instance_id=key, timeout_s=guests.LIMIT_S
        )
        await asyncio.to_thread(_fill, directory, disk)
        bench = _Bench(client, connection.lookupByUUIDString(key), disk, directory, key)
        await _alternate(found["export of a stopped guest"], rounds, _sides(bench, bench.cold))
        await bench.do(InstanceStart())
        await _alternate(found["export of a running guest"], rounds, _sides(bench, bench.live))
        await bench.do(InstanceStop(force=True))
        await _booted_guest(client, connection, directory, found, rounds)
        await _alternate(
            found["snapshot of a stopped guest"], rounds, {"agent": bench.snapshot, "by hand": bench.snapshot_by_hand}
        )
        await guests.delete_all(client, [key])
    connection.close()
    return found


async def _booted_guest(client: ComputeClient, connection: Any, directory: Path, found: Found, rounds: int) -> None:
    """A Linux guest of 256 MiB, of which its boot has touched a part."""
    built = guest_image(Path.cwd() / ".pytest_cache" / "d" / "guest-image")
    image = directory / "guest.qcow2"
    shutil.copyfile(built.path, image)
    source = ImageSource(url=image.as_uri(), sha256=built.sha256, format="qcow2")
    key = guests.new_ids(1)[0]
    spec = guests.small_spec("booted").model_copy(
        update={"memory_mib": 256, "root_disk": RootDisk(size_mib=256, image=source)}
    )
    await client.call(InstanceCreate(spec=spec), host=servers.AGENT_HOST, instance_id=key, timeout_s=guests.LIMIT_S)
    console = directory / "agent" / "state" / "instances" / key / "console.log"
    async with asyncio.timeout(guests.LIMIT_S):
        while "guest: tick 5" not in console.read_text(errors="replace"):
            await asyncio.sleep(0.2)
    bench = _Bench(client, connection.lookupByUUIDString(key), Path(), directory, key)
    await _alternate(
        found["snapshot with memory"], rounds, {"agent": bench.snapshot, "by hand": bench.snapshot_by_hand}
    )
    await guests.delete_all(client, [key])


def _sides(bench: _Bench, copy: Callable[[Path], None]) -> dict[str, Callable[[], Awaitable[float]]]:
    return {
        "agent": bench.export,
        "by hand": lambda: bench.by_hand(copy, useful=False),
        "by hand, sha256 and sync": lambda: bench.by_hand(copy, useful=True),
    }


async def _alternate(
    into: dict[str, list[float]], rounds: int, sides: dict[str, Callable[[], Awaitable[float]]]
) -> None:
    for side in sides.values():  # one of each that does not count
        await side()
    for _ in range(rounds):
        for name, side in sides.items():
            os.sync()  # what one side left to be written is not the other's affair
            into[name].append(await side())
    assert statistics.median(into["agent"]) > 0


def _fill(directory: Path, disk: Path) -> None:
    raw = directory / "random.raw"
    with raw.open("wb") as file:
        for _ in range(DATA_MIB):
            file.write(os.urandom(1 << 20))
        file.truncate(DISK_MIB << 20)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(disk)], check=True)
    raw.unlink()
