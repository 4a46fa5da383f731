"""kill -9 of the agent while an image is on its way: nothing half-made stays, and the command ends once."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from aiohttp import web
from support.fleet import World
from support.recorder import describe

from agent.messages.spec import ImageSource
from agent.messages.verbs_image import ImageList, ImagePrefetch, ImageRemove

DATA = random.Random(5).randbytes(6_000_000)
SHA = hashlib.sha256(DATA).hexdigest()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def judge(world: World, host: str, command: str, folder: Path, name: str) -> None:
    final = await world.recorder.wait_final(host, command)
    assert final.kind == "operation.succeeded", describe(final)
    assert sorted(path.name for path in folder.iterdir()) == [name, f"{name}.json"]
    listed = await world.succeed(host, ImageList())
    assert [view["state"] for view in listed.data["result"]["images"]] == ["ready"]
    await world.succeed(host, ImageRemove(sha256=name.partition(".")[0]))
    assert list(folder.iterdir()) == []


async def test_killed_in_the_middle_of_a_download(world: World) -> None:
    gate, half = asyncio.Event(), asyncio.Event()

    async def serve(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(len(DATA)), "ETag": '"one"'})
        await response.prepare(request)
        await response.write(DATA[:4_000_000])
        half.set()
        await gate.wait()
        await response.write(DATA[4_000_000:])
        return response

    app = web.Application()
    app.router.add_get("/image", serve)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/image"
        agent = await world.fake_agent()
        await agent.start()
        command = await world.send(agent.host, ImagePrefetch(image=ImageSource(url=url, sha256=SHA, format="raw")))
        folder = agent.state_dir / "images"
        await until(lambda: half.is_set() and any(path.stat().st_size > 10**6 for path in folder.glob(".partial-*")))
        await agent.kill()
        assert list(folder.glob(".partial-*"))
        gate.set()
        await agent.start()
        await judge(world, agent.host, command, folder, f"{SHA}.raw")
        await world.judge(agent)
    finally:
        gate.set()
        await runner.cleanup()


@pytest.mark.skipif(not shutil.which("qemu-img"), reason="needs qemu-img")
async def test_killed_in_the_middle_of_a_conversion(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """qemu-img ends with the agent: nobody writes into the cache any more when the next agent cleans it."""
    vmdk = tmp_path / "disk.vmdk"
    subprocess.run(["qemu-img", "create", "-q", "-f", "vmdk", vmdk, "8M"], check=True, timeout=60)
    sha = hashlib.sha256(vmdk.read_bytes()).hexdigest()
    path, pid = os.environ["PATH"], tmp_path / "bin" / "pid"
    pid.parent.mkdir()
    script = pid.with_name("qemu-img")
    script.write_text(f"#!/bin/sh\necho $$ > {pid}\nexec sleep 600\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{pid.parent}:{path}")
    agent = await world.fake_agent()
    await agent.start()
    source = ImageSource(url=vmdk.as_uri(), sha256=sha, format="vmdk")
    command = await world.send(agent.host, ImagePrefetch(image=source))
    await until(lambda: pid.exists() and pid.read_text().strip())
    await agent.kill()
    process = Path("/proc") / pid.read_text().strip() / "stat"
    await until(lambda: not process.exists() or process.read_text().rpartition(")")[2].split()[0] == "Z")
    monkeypatch.setenv("PATH", path)
    await agent.start()
    await judge(world, agent.host, command, agent.state_dir / "images", f"{sha}.qcow2")
    await world.judge(agent)


POINTS = [
    *(f"{verb}:{step}:{side}" for verb, step in (("image.prefetch", "image"), ("image.remove", "remove")) for side in ("before", "after")),
    *(f"{verb}:{point}" for verb in ("image.prefetch", "image.remove") for point in ("accept:after", "result:before", "result:after")),
]


@pytest.mark.parametrize("point", POINTS)
async def test_killed_at_every_boundary(world: World, image: ImageSource, point: str) -> None:
    agent = await world.fake_agent()
    await agent.start(failpoint=point)
    folder = agent.state_dir / "images"
    command = await world.send(agent.host, ImagePrefetch(image=image))
    if point.startswith("image.remove"):
        await world.recorder.wait_final(agent.host, command)
        command = await world.send(agent.host, ImageRemove(sha256=image.sha256))
    assert await agent.wait_ended() == -9, "the failpoint was never reached"
    await agent.start()
    final = await world.recorder.wait_final(agent.host, command)
    assert final.kind == "operation.succeeded", describe(final)
    wanted = [] if point.startswith("image.remove") else [f"{image.sha256}.raw", f"{image.sha256}.raw.json"]
    assert sorted(path.name for path in folder.iterdir()) == wanted
    await world.judge(agent)
