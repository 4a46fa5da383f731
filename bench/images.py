"""(g) Images: from the URL to the image in the cache, against curl, sha256sum and the tools by hand.

A local HTTP server in a process of its own serves the same file to both sides in turn. By hand: `curl | tee file |
sha256sum`, then `qemu-img convert` (vmdk), `gzip -dc` (raw), or nothing more (qcow2).
"""

from __future__ import annotations

import hashlib
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import psutil
import uvloop

from agent.images.cache import ImageCache
from agent.images.policy import ImagePolicy
from agent.messages.spec import ImageSource
from bench import servers
from bench.measure import Report, ratio_of_medians

GOAL = 1.3
SIZE_MIB = 512
MIB = 2**20
SERVER = """
import asyncio, sys
from aiohttp import web
async def main():
    app = web.Application()
    app.router.add_static("/", sys.argv[1])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print("ready", runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""

Files = dict[str, tuple[Path, ImageSource]]


def measure(directory: Path, rounds: int) -> Report:
    """Each kind of image, both sides in turn."""
    report = Report("Images", ("image", "side", "median s", "MiB/s of virtual size", "CPU s", "ratio to by hand"))
    web = directory / "web"
    web.mkdir()
    log = directory / "server.log"
    with servers.process([sys.executable, "-c", SERVER, str(web)], "ready", log=log):
        port = int(log.read_text().split()[1])
        files = _files(directory, web, f"http://127.0.0.1:{port}")
        for name, (_path, source) in files.items():
            found: dict[str, list[float]] = defaultdict(list)
            cpu: dict[str, list[float]] = defaultdict(list)
            for number in range(rounds + 1):
                for side, call in (("agent", _by_agent), ("by hand", _by_hand)):
                    seconds, used = _timed(call, directory / "work", source)
                    if number:  # the first round warms up
                        found[side].append(seconds)
                        cpu[side].append(used)
            for side, times in found.items():
                middle = statistics.median(times)
                ratio = ratio_of_medians(times, found["by hand"])
                used = statistics.median(cpu[side])
                report.rows.append(
                    (name, side, f"{middle:.2f}", f"{SIZE_MIB / middle:.0f}", f"{used:.2f}", f"{ratio:.2f}")
                )
    report.remarks.append(
        f"Goal: at most {GOAL} times by hand. A disk of {SIZE_MIB} MiB, three quarters of it data. The agent also"
        " inspects the format, syncs the image and its folder to the disk, and notes a checksum of what it stored; by"
        " hand nothing is synced or checked but the one checksum."
    )
    return report


def _files(directory: Path, web: Path, url: str) -> Files:
    raw = directory / "disk.raw"
    dice = random.Random(1)
    # Compressible to about a half, as programs and libraries are, with holes between.
    block = b"".join(dice.randbytes(2) if n % 2 else bytes([dice.randrange(256)]) * 2 for n in range(MIB // 2))
    with raw.open("wb") as file:
        for number in range(SIZE_MIB):
            turn = dice.randrange(MIB)
            file.write(block[turn:] + block[:turn] if number % 4 else bytes(MIB))
    made: Files = {}

    def add(name: str, path: Path, form: str, compression: str | None = None) -> None:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        fields = {"url": f"{url}/{path.name}", "sha256": digest, "format": form, "compression": compression}
        made[name] = (path, ImageSource.model_validate(fields))

    for name, form, options in (
        ("vmdk (monolithicSparse)", "vmdk", "subformat=monolithicSparse"),
        ("vmdk (streamOptimized)", "vmdk", "subformat=streamOptimized"),
        ("qcow2", "qcow2", "compat=1.1"),
    ):
        path = web / f"{len(made)}.{form}"
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", form, "-o", options, raw, path], check=True)
        add(name, path, form)
    with raw.open("rb") as plain, (web / "disk.raw.gz").open("wb") as packed:
        subprocess.run(["gzip", "-1"], stdin=plain, stdout=packed, check=True)
    add("raw in gzip", web / "disk.raw.gz", "raw", "gzip")
    raw.unlink()
    return made


def _timed(call: Callable[[Path, ImageSource], None], work: Path, source: ImageSource) -> tuple[float, float]:
    """Seconds, and seconds of CPU of this process and its children. What was left to be written is, before."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    subprocess.run(["sync"], check=True)
    before, begun = _cpu_s(), time.perf_counter()
    call(work, source)
    seconds = time.perf_counter() - begun
    return seconds, _cpu_s() - before


def _cpu_s() -> float:
    times = psutil.Process().cpu_times()
    return float(times.user + times.system + times.children_user + times.children_system)


def _by_agent(work: Path, source: ImageSource) -> None:
    async def prepare() -> None:
        cache = ImageCache(work, ImagePolicy())
        image = await cache.prepare(source, lambda _done, _total: None)
        assert image.virtual_size_bytes == SIZE_MIB * MIB

    uvloop.run(prepare())


def _by_hand(work: Path, source: ImageSource) -> None:
    file = work / "downloaded"
    script = f"curl --silent --fail '{source.url}' | tee '{file}' | sha256sum"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", script], check=True, stdout=subprocess.PIPE)
    assert done.stdout.split()[0].decode() == source.sha256
    if source.format != "qcow2" and source.compression is None:
        subprocess.run(
            ["qemu-img", "convert", "-f", source.format, "-O", "qcow2", file, work / "converted"], check=True
        )
    if source.compression == "gzip":
        with (work / "unpacked").open("wb") as out:
            subprocess.run(["gzip", "-dc", file], stdout=out, check=True)
