"""Creates that fail, through a real broker, an agent as a process and real libvirt: whatever goes wrong in whichever
step has a code of its own, leaves nothing behind, and the next create works.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import resource
import shutil
import subprocess
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from support.agent_process import AgentProcess
from support.fleet import World
from support.host import clean_libvirt, libvirt_leftovers
from support.recorder import describe

from agent.messages.commands import (
    HostShow,
    InstanceCreate,
    InstanceDelete,
    InstanceList,
    InstanceShow,
    OperationCancel,
    OperationShow,
)
from agent.messages.events import Event
from agent.messages.spec import BridgeNic, ImageSource, InstanceSpec, NetworkNic, RootDisk, Seed
from agent.messages.verb import CommandData
from devstack.libvirtd import PrivateLibvirtd
from devstack.rabbitmq import PrivateBroker

pytestmark = pytest.mark.qemu

MIB = 1024 * 1024
DATA = b"good" + os.urandom(MIB - 4)
SLOW = b"slow" + os.urandom(2 * MIB - 4)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --- what outlives a test ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateBroker]:
    if shutil.which("rabbitmq-server", path=f"{os.environ['PATH']}:/usr/sbin") is None:
        pytest.skip("rabbitmq-server is not installed")
    with PrivateBroker(tmp_path_factory.mktemp("broker")) as broker:
        yield broker


class Disk:
    """A file system of its own that can be filled up and made read-only. Empty again for every test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filler = folder / "filler"
        # Above 1 GiB, or the host would have no DISK_GB to promise.
        self._mount("-t", "tmpfs", "-o", "size=1100m,mode=0755", "tmpfs")

    def _mount(self, *arguments: str) -> None:
        subprocess.run(["mount", *arguments, str(self.folder)], check=True, timeout=240)

    def fill(self, *, leave: int) -> None:
        """Leave this many bytes free."""
        facts = os.statvfs(self.folder)
        with self._filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, facts.f_bavail * facts.f_frsize - leave)

    def empty(self) -> None:
        self._filler.unlink(missing_ok=True)

    @contextmanager
    def read_only(self) -> Iterator[None]:
        self._mount("-o", "remount,ro")
        try:
            yield
        finally:
            self._mount("-o", "remount,rw")

    def clear(self) -> None:
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def close(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True, timeout=240)


class Hook:
    """libvirt's own hook at the start of a domain: it refuses, or holds the start up until it is let go."""

    SCRIPT = """#!/bin/sh
[ "$2" = prepare ] || exit 0
[ -e {0}/refuse ] && {{ echo "refused by the test" >&2; exit 1; }}
[ -e {0}/hold ] || exit 0
: > {0}/reached
while [ -e {0}/hold ]; do sleep 0.02; done
"""

    def __init__(self, folder: Path, daemon_folder: Path) -> None:
        self._folder = folder
        script = daemon_folder / "etc" / "hooks" / "qemu"
        script.parent.mkdir(parents=True)
        script.write_text(self.SCRIPT.format(folder))
        script.chmod(0o755)

    def refuse(self) -> None:
        (self._folder / "refuse").touch()

    def hold(self) -> None:
        (self._folder / "hold").touch()

    async def reached(self) -> None:
        """Wait until a start is held up. Nothing announces it."""
        async with asyncio.timeout(240):
            while not (self._folder / "reached").exists():
                await asyncio.sleep(0.02)

    def let_go(self) -> None:
        for name in ("refuse", "hold", "reached"):
            (self._folder / name).unlink(missing_ok=True)


@pytest.fixture(scope="module")
def module_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    if os.geteuid() != 0:
        pytest.skip("a file system and a system libvirtd of its own need root")
    disk = Disk(tmp_path_factory.mktemp("disk"))
    try:
        yield disk
    finally:
        disk.close()


@pytest.fixture(scope="module")
def module_daemon(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest, module_disk: Disk
) -> Iterator[tuple[PrivateLibvirtd, Hook]]:
    # After the mount: the daemon's mount namespace would not see a later one.
    path = f"{os.environ['PATH']}:/usr/sbin"
    missing = [name for name in ("libvirtd", "virtlogd", "qemu-system-x86_64", "qemu-img") if not shutil.which(name, path=path)]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    folder = tmp_path_factory.mktemp("lv")
    hook = Hook(tmp_path_factory.mktemp("hook"), folder)
    cache = request.config.cache.mkdir("libvirt-capabilities")
    daemon = PrivateLibvirtd(folder, capabilities_cache=cache)
    try:
        daemon.start()
        yield daemon, hook
    finally:
        daemon.stop()


@pytest.fixture
def disk(module_disk: Disk) -> Iterator[Disk]:
    yield module_disk
    module_disk.clear()


@pytest.fixture
def libvirtd(module_daemon: tuple[PrivateLibvirtd, Hook]) -> Iterator[PrivateLibvirtd]:
    daemon, hook = module_daemon
    daemon.start()
    yield daemon
    hook.let_go()
    daemon.start()
    clean_libvirt(daemon)


@pytest.fixture
def hook(module_daemon: tuple[PrivateLibvirtd, Hook]) -> Hook:
    return module_daemon[1]


# --- one test's world -------------------------------------------------------------------------------------------------


class Server:
    """An HTTP server for images that misbehaves as its path says."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.gate = asyncio.Event()
        self.location = ""
        self.gone = asyncio.Event()

    async def start(self) -> None:
        app = web.Application()
        app.router.add_get("/{name}", self._handle)
        self._runner = web.AppRunner(app, handler_cancellation=True)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        self.gate.set()
        await self._runner.cleanup()

    def url(self, name: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}/{name}"

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request.path)
        match request.match_info["name"]:
            case "good":
                return web.Response(body=DATA)
            case "truncated":
                response = await self._begin(request, {"Content-Length": str(len(DATA))})
                await response.write(DATA[: MIB // 2])
                request.transport.close()
                return response
            case "chunked":
                response = await self._begin(request, {})
                for _ in range(16):
                    await response.write(DATA)
                return response
            case "slow":
                response = await self._begin(request, {"Content-Length": str(len(SLOW))})
                await self._trickle(response)
                return response
            case "redirect":
                return web.Response(status=302, headers={"Location": self.location})
            case _:
                return web.Response(status=404)

    async def _begin(self, request: web.Request, headers: dict[str, str]) -> web.StreamResponse:
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        return response

    async def _trickle(self, response: web.StreamResponse) -> None:
        """A few bytes now and then until the gate is opened, then all the rest."""
        sent = 0
        try:
            while not self.gate.is_set():
                await response.write(SLOW[sent : sent + 100])
                sent += 100
                await asyncio.sleep(0.05)
            await response.write(SLOW[sent:])
        except (asyncio.CancelledError, ConnectionError):
            self.gone.set()
            raise


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
async def world(broker: PrivateBroker, tmp_path: Path) -> AsyncIterator[World]:
    made = World(broker, tmp_path)
    try:
        await made.open()
        yield made
    finally:
        await made.close()


class Bench:
    """One agent on real libvirt, and what is expected of it before, while and after a create fails."""

    def __init__(self, world: World, libvirtd: PrivateLibvirtd, server: Server, folder: Path) -> None:
        self.world = world
        self.libvirtd = libvirtd
        self.server = server
        self.folder = folder
        self.images = folder / "images"
        self.images.mkdir()
        self.file("good.raw", DATA)
        self.instances_dir: Path | None = None
        self.agent: AgentProcess
        self._before: dict[str, int] = {}
        self._last: tuple[str, str] | None = None

    async def start(self, *, driver: dict[str, Any] | None = None, state_dir: Path | None = None, **settings: Any) -> None:
        own = {"uri": self.libvirtd.uri, "virt_type": "qemu", "reconnect_max_s": 0.3, "connect_timeout_s": 3.0}
        if driver and "instances_dir" in driver:
            self.instances_dir = Path(driver["instances_dir"])
        sections = {
            "periodic": {"reconcile_s": 1.0},
            "images": {"file_roots": [str(self.images)], "allowed_hosts": ["127.0.0.1"]},
            "capacity": {"reserved_disk_gib": 0},
            **settings,
        }
        self.agent = await self.world.agent(
            driver="libvirt", driver_settings=own | (driver or {}), settings=sections, state_dir=state_dir
        )
        await self.agent.start()
        self._before = await self.used()

    # --- what a create is made of ---------------------------------------------------------------------------------

    def file(self, name: str, data: bytes) -> Path:
        path = self.images / name
        path.write_bytes(data)
        return path

    def good(self) -> ImageSource:
        return self.source(self.images / "good.raw")

    def source(self, at: Path | str, **changes: Any) -> ImageSource:
        url = at.as_uri() if isinstance(at, Path) else at
        values = {"url": url, "sha256": sha256(at.read_bytes() if isinstance(at, Path) else DATA), "format": "raw"}
        return ImageSource(**(values | changes))

    def slow(self) -> ImageSource:
        return ImageSource(url=self.server.url("slow"), sha256=sha256(SLOW), format="raw")

    def spec(self, name: str = "one", image: ImageSource | None = None, **changes: Any) -> InstanceSpec:
        """The smallest guest that QEMU runs: its BIOS finds nothing to boot and idles."""
        values: dict[str, Any] = {
            "name": name, "vcpus": 1, "memory_mib": 32, "root_disk": RootDisk(size_mib=2, image=image or self.good()),
            "rng": False, "balloon": False, "guest_agent": False,
        }  # fmt: skip
        return InstanceSpec(**(values | changes))

    # --- commands -------------------------------------------------------------------------------------------------

    async def do(self, data: CommandData, instance_id: str | None = None) -> dict[str, Any]:
        return (await self.world.succeed(self.agent.host, data, instance_id)).data["result"]

    async def send(self, data: CommandData, instance_id: str | None = None, **options: Any) -> str:
        return await self.world.send(self.agent.host, data, instance_id, **options)

    async def final(self, operation_id: str) -> Event:
        return await self.world.recorder.wait_final(self.agent.host, operation_id)

    async def reached(self, operation_id: str, step: str) -> None:
        """Wait until a create that was sent with `progress` is in this step."""
        await self.world.recorder.wait_for(
            self.agent.host, "operation.progress",
            where=lambda event: event.data["operation_id"] == operation_id and event.data["phase"] == step,
        )  # fmt: skip

    async def used(self) -> dict[str, int]:
        inventory = (await self.do(HostShow()))["heartbeat"]["inventory"]
        return {resource: item["used"] for resource, item in inventory.items()}

    # --- expectations ---------------------------------------------------------------------------------------------

    async def fails(
        self, spec: InstanceSpec, code: str, *, retryable: bool, kind: str = "operation.failed", foreign: Collection[str] = ()
    ) -> Event:
        """Expect a create to end so, and to leave nothing."""
        instance_id = str(uuid.uuid4())
        final = await self.final(await self.send(InstanceCreate(spec=spec), instance_id))
        self.judge(final, code, retryable=retryable, kind=kind)
        await self.nothing_left(foreign)
        self._last = (instance_id, spec.name)
        return final

    def judge(self, final: Event, code: str, *, retryable: bool, kind: str = "operation.failed") -> None:
        assert (final.kind, final.data["error"]["code"]) == (kind, code), describe(final)
        assert final.data["error"]["retryable"] is retryable, describe(final)
        assert len(final.data["error"]["message"]) > 15, describe(final)
        if kind == "operation.failed":
            assert final.data["undone"] is True, describe(final)

    async def nothing_left(self, foreign: Collection[str] = (), instances: Collection[str] = ()) -> None:
        """Expect a host without a trace but for `foreign` domains and good `instances`."""
        await self.world.settle(self.agent.host)
        self.world.recorder.check(self.agent.host, self.world.sent[self.agent.host])
        still_open = self.agent.open_operations()
        assert not still_open, [(op.verb, op.state, op.undo_pending) for op in still_open]
        listed = await self.do(InstanceList())
        assert {one["id"] for one in listed["instances"]} == set(instances)
        if not instances and not foreign:
            assert await self.used() == self._before
        known = {*foreign, *instances}
        found = await asyncio.to_thread(libvirt_leftovers, self.libvirtd, self.agent.state_dir, known)
        if self.instances_dir is not None and self.instances_dir.is_dir():
            found += [str(path) for path in self.instances_dir.iterdir() if path.name not in known]
        assert not found, "\n".join(found)

    async def works(self, image: ImageSource | None = None) -> None:
        """Expect a good create under the id and the name of the failed one, and take it away again."""
        instance_id, name = self._last or (str(uuid.uuid4()), "one")
        made = await self.do(InstanceCreate(spec=self.spec(name, image)), instance_id)
        assert made["observed"] == "running"
        assert name in await asyncio.to_thread(self.libvirtd.qemu_pids)
        await self.nothing_left(instances=[instance_id])
        await self.do(InstanceDelete(), instance_id)
        await self.nothing_left()
        assert self.agent.alive

    # --- foreign domains ------------------------------------------------------------------------------------------

    async def foreign(self, name: str, domain_id: str | None = None) -> str:
        domain_id = domain_id or str(uuid.uuid4())
        file = self.folder / "foreign.xml"
        file.write_text(
            f"<domain type='qemu'><name>{name}</name><uuid>{domain_id}</uuid><memory unit='MiB'>32</memory>"
            "<vcpu>1</vcpu><os><type>hvm</type></os></domain>"
        )
        await asyncio.to_thread(self.libvirtd.virsh, "define", str(file))
        return domain_id

    async def drift(self, difference: str, domain_id: str) -> None:
        await self.world.recorder.wait_for(
            self.agent.host, "host.drift",
            where=lambda event: event.data["difference"] == difference and event.subject == domain_id,
        )  # fmt: skip

    async def remove_foreign(self, domain_id: str) -> None:
        await asyncio.to_thread(self.libvirtd.virsh, "undefine", domain_id)
        await self.drift("foreign-domain-gone", domain_id)


@pytest.fixture
def bench(world: World, libvirtd: PrivateLibvirtd, server: Server, tmp_path: Path) -> Bench:
    return Bench(world, libvirtd, server, tmp_path)


# --- step image: what the command says about it is wrong --------------------------------------------------------------


def qemu_img(*arguments: str | Path) -> None:
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, timeout=30, stdout=subprocess.DEVNULL)


def qcow2(bench: Bench, name: str, *options: str | Path, size: str = "2M") -> Path:
    path = bench.images / name
    qemu_img("create", "-q", "-f", "qcow2", *options, path, *([size] if size else []))
    return path


def missing_file(bench: Bench) -> ImageSource:
    return bench.source((bench.images / "nowhere.raw").as_uri())


def missing_http(bench: Bench) -> ImageSource:
    return bench.source(bench.server.url("nowhere"))


def checksum_file(bench: Bench) -> ImageSource:
    return bench.source(bench.images / "good.raw", sha256="0" * 64)


def checksum_http(bench: Bench) -> ImageSource:
    return bench.source(bench.server.url("good"), sha256="0" * 64)


def truncated_http(bench: Bench) -> ImageSource:
    return bench.source(bench.server.url("truncated"))


def large_file(bench: Bench) -> ImageSource:
    return bench.source(bench.file("large.raw", DATA + b"more"), max_size_mib=1)


def large_http(bench: Bench) -> ImageSource:
    return bench.source(bench.server.url("slow"), max_size_mib=1)


def large_chunked(bench: Bench) -> ImageSource:
    return bench.source(bench.server.url("chunked"), max_size_mib=2)


def backing_file(bench: Bench) -> ImageSource:
    path = qcow2(bench, "overlay.qcow2", "-F", "raw", "-b", bench.images / "good.raw", size="")
    return bench.source(path, format="qcow2")


def data_file(bench: Bench) -> ImageSource:
    path = qcow2(bench, "split.qcow2", "-o", f"data_file={bench.images / 'split.raw'},data_file_raw=on")
    return bench.source(path, format="qcow2")


def qcow2_as_raw(bench: Bench) -> ImageSource:
    return bench.source(qcow2(bench, "plain.qcow2"))


def raw_as_qcow2(bench: Bench) -> ImageSource:
    return bench.source(bench.images / "good.raw", format="qcow2")


def corrupt_header(bench: Bench) -> ImageSource:
    path = qcow2(bench, "damaged.qcow2")
    data = bytearray(path.read_bytes())
    data[20:24] = (63).to_bytes(4, "big")  # cluster_bits
    return bench.source(bench.file("damaged.qcow2", bytes(data)), format="qcow2")


def corrupt_tables(bench: Bench) -> ImageSource:
    path = qcow2(bench, "cut.qcow2", size="64M")
    qemu_img("convert", "-f", "raw", "-O", "qcow2", bench.images / "good.raw", path)
    os.truncate(path, 200_000)
    return bench.source(path, format="qcow2")


def outside(bench: Bench) -> ImageSource:
    path = bench.folder / "outside.raw"
    path.write_bytes(DATA)
    return bench.source(path)


def dotted_outside(bench: Bench) -> ImageSource:
    outside(bench)
    return bench.source(f"file://{bench.images}/../outside.raw")


def symlink_outside(bench: Bench) -> ImageSource:
    link = bench.images / "link.raw"
    link.symlink_to(bench.folder / "outside.raw")
    outside(bench)
    return bench.source(link)


def folder_as_file(bench: Bench) -> ImageSource:
    (bench.images / "folder").mkdir()
    return bench.source((bench.images / "folder").as_uri())


def fifo(bench: Bench) -> ImageSource:
    os.mkfifo(bench.images / "fifo")
    return bench.source((bench.images / "fifo").as_uri())


def redirect_to_file(bench: Bench) -> ImageSource:
    bench.server.location = (bench.images / "good.raw").as_uri()
    return bench.source(bench.server.url("redirect"))


def redirect_to_host(bench: Bench) -> ImageSource:
    bench.server.location = bench.server.url("good", "localhost")
    return bench.source(bench.server.url("redirect"))


def redirect_for_ever(bench: Bench) -> ImageSource:
    bench.server.location = "/redirect"
    return bench.source(bench.server.url("redirect"))


def forbidden_host(bench: Bench) -> ImageSource:
    return bench.source(bench.server.url("good", "localhost"))


BAD_IMAGES: tuple[tuple[Callable[[Bench], ImageSource], str, bool], ...] = (
    (missing_file, "image_missing", False),
    (missing_http, "image_missing", False),
    (checksum_file, "image_checksum_mismatch", False),
    (checksum_http, "image_checksum_mismatch", False),
    (truncated_http, "image_truncated", True),
    (large_file, "image_too_large", False),
    (large_http, "image_too_large", False),
    (large_chunked, "image_too_large", False),
    (backing_file, "image_unsafe", False),
    (data_file, "image_unsafe", False),
    (qcow2_as_raw, "image_format_mismatch", False),
    (raw_as_qcow2, "image_format_mismatch", False),
    (corrupt_header, "image_corrupt", False),
    (corrupt_tables, "image_corrupt", False),
    (outside, "image_source_forbidden", False),
    (dotted_outside, "image_source_forbidden", False),
    (symlink_outside, "image_source_forbidden", False),
    (folder_as_file, "image_source_forbidden", False),
    (fifo, "image_source_forbidden", False),
    (redirect_to_file, "image_source_forbidden", False),
    (redirect_to_host, "image_source_forbidden", False),
    (redirect_for_ever, "image_source_forbidden", False),
    (forbidden_host, "image_source_forbidden", False),
)


@pytest.mark.parametrize(("make", "code", "retryable"), BAD_IMAGES, ids=[case[0].__name__ for case in BAD_IMAGES])
async def test_bad_image(bench: Bench, make: Callable[[Bench], ImageSource], code: str, retryable: bool) -> None:
    await bench.start()
    await bench.fails(bench.spec(image=make(bench)), code, retryable=retryable)
    assert not list((bench.agent.state_dir / "images").iterdir())
    if make in (redirect_to_file, redirect_to_host):
        assert bench.server.requests == ["/redirect"]
    await bench.works(bench.source(bench.server.url("good")))


async def test_disk_smaller_than_the_image(bench: Bench) -> None:
    await bench.start()
    image = bench.source(qcow2(bench, "eight.qcow2", size="8M"), format="qcow2")
    final = await bench.fails(bench.spec(root_disk=RootDisk(size_mib=7, image=image)), "disk_too_small", retryable=False)
    assert final.data["error"]["details"] == {"disk": "root", "size_mib": 7, "image_mib": 8}
    await bench.works()


async def test_one_create_fails_and_the_other_with_the_same_download_does_not(bench: Bench) -> None:
    """Two wait for one download, and only one of them has a disk that is large enough."""
    await bench.start()
    bad, good = str(uuid.uuid4()), str(uuid.uuid4())
    small = bench.spec("bad", root_disk=RootDisk(size_mib=1, image=bench.slow()))
    first = await bench.send(InstanceCreate(spec=small), bad, progress=True)
    second = await bench.send(InstanceCreate(spec=bench.spec("good", bench.slow())), good, progress=True)
    await bench.reached(first, "image")
    await bench.reached(second, "image")
    bench.server.gate.set()
    bench.judge(await bench.final(first), "disk_too_small", retryable=False)
    assert (await bench.final(second)).kind == "operation.succeeded"
    assert bench.server.requests == ["/slow"]
    await bench.nothing_left(instances=[good])


# --- no space ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("announced", [True, False], ids=["announced", "chunked"])
async def test_no_space_in_the_image_cache(bench: Bench, disk: Disk, announced: bool) -> None:
    """Cache and journal share the full file system: the end of the create is told all the same."""
    instances = bench.folder / "instances"
    await bench.start(state_dir=disk.folder / "state", driver={"instances_dir": str(instances)})
    if announced:
        image = bench.source(bench.file("large.raw", DATA * 16))
    else:
        image = bench.source(bench.server.url("chunked"), sha256=sha256(DATA * 16))
    disk.fill(leave=6 * MIB)
    await bench.fails(bench.spec(root_disk=RootDisk(size_mib=16, image=image)), "no_space", retryable=True)
    assert not list((disk.folder / "state" / "images").iterdir())
    disk.empty()
    await bench.works()


@pytest.mark.parametrize(("leave", "kept_free"), [(32 * MIB, 64), (0, 0), (300_000, 0)], ids=["kept", "disk", "seed"])
async def test_no_space_for_the_disk(bench: Bench, disk: Disk, leave: int, kept_free: int) -> None:
    """Refused below what must stay free; without such a limit the disk, or the seed after it, finds no space."""
    instances = disk.folder / "instances"
    await bench.start(driver={"instances_dir": str(instances), "min_free_mib": kept_free})
    disk.fill(leave=leave)
    seed = Seed(user_data="x" * 64_000, meta_data={f"k{n}": "y" * 64_000 for n in range(8)})
    await bench.fails(bench.spec(seed=seed), "no_space", retryable=True)
    disk.empty()
    await bench.works()


# --- step storage -----------------------------------------------------------------------------------------------------


async def test_storage_is_read_only(bench: Bench, disk: Disk) -> None:
    await bench.start(driver={"instances_dir": str(disk.folder / "instances")})
    with disk.read_only():
        await bench.fails(bench.spec(), "storage_unavailable", retryable=True)
    await bench.works()


async def test_a_file_where_the_instances_folder_should_be(bench: Bench) -> None:
    blocker = bench.folder / "data"
    await bench.start(driver={"instances_dir": str(blocker / "instances")})
    blocker.write_text("in the way")
    await bench.fails(bench.spec(), "storage_failed", retryable=False)
    assert blocker.read_text() == "in the way"
    blocker.unlink()
    await bench.works()


@pytest.mark.parametrize("kind", ["file", "symlink"])
async def test_something_else_where_the_instance_s_folder_should_be(bench: Bench, kind: str) -> None:
    """It has the instance's name in the agent's own folder, so it goes; what a link points to stays."""
    instances, elsewhere = bench.folder / "instances", bench.folder / "elsewhere"
    await bench.start(driver={"instances_dir": str(instances)})
    instances.mkdir()
    elsewhere.mkdir()
    (elsewhere / "precious").touch()
    instance_id = str(uuid.uuid4())
    place = instances / instance_id
    place.write_text("in the way") if kind == "file" else place.symlink_to(elsewhere)
    final = await bench.final(await bench.send(InstanceCreate(spec=bench.spec()), instance_id))
    bench.judge(final, "storage_failed", retryable=False)
    await bench.nothing_left()
    assert [path.name for path in elsewhere.iterdir()] == ["precious"]
    await bench.works()


TOOL = """#!/bin/sh
{0}
exec {1} "$@"
"""


def wrapper(path: Path, program: str, fault: str) -> Path:
    """A stand-in for a program of the host, with a fault as long as the file `<path>.fault` is there."""
    real = shutil.which(program)
    assert real is not None
    path.write_text(TOOL.format(f"if [ -e {path}.fault ]; then {fault}; fi", real))
    path.chmod(0o755)
    return path


def fault_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.fault")


@pytest.mark.parametrize(
    ("fault", "code", "retryable"),
    [("exec sleep 60", "qemu_img_timeout", True), ("echo broken >&2; exit 1", "qemu_img_failed", False)],
    ids=["hangs", "fails"],
)
async def test_qemu_img_does_not_do_its_work(bench: Bench, fault: str, code: str, retryable: bool) -> None:
    tool = wrapper(bench.folder / "qemu-img", "qemu-img", fault)
    await bench.start(driver={"qemu_img": str(tool), "qemu_img_timeout_s": 2.0})
    fault_of(tool).touch()
    await bench.fails(bench.spec(), code, retryable=retryable)
    fault_of(tool).unlink()
    await bench.works()


# --- step define ------------------------------------------------------------------------------------------------------


async def test_name_of_a_foreign_domain(bench: Bench) -> None:
    await bench.start()
    foreign = await bench.foreign("taken")
    await bench.drift("foreign-domain", foreign)
    refusal = await bench.fails(
        bench.spec("taken"), "name_taken", retryable=False, kind="operation.rejected", foreign=[foreign]
    )
    assert foreign in refusal.data["error"]["message"]
    await bench.remove_foreign(foreign)
    await bench.works()


async def test_id_of_a_foreign_domain(bench: Bench) -> None:
    await bench.start()
    foreign = await bench.foreign("somebody-s")
    await bench.drift("foreign-domain", foreign)
    final = await bench.final(await bench.send(InstanceCreate(spec=bench.spec()), foreign))
    bench.judge(final, "instance_exists", retryable=False, kind="operation.rejected")
    await bench.nothing_left(foreign=[foreign])
    await bench.remove_foreign(foreign)
    await bench.works()


@pytest.mark.parametrize("same", ["name", "id"])
async def test_a_foreign_domain_comes_in_between(bench: Bench, same: str) -> None:
    """It is defined while the image is fetched: the create gives way, and the foreign domain is not touched."""
    await bench.start()
    instance_id = str(uuid.uuid4())
    command = await bench.send(InstanceCreate(spec=bench.spec("wanted", bench.slow())), instance_id, progress=True)
    await bench.reached(command, "image")
    foreign = await (bench.foreign("wanted") if same == "name" else bench.foreign("other", instance_id))
    before = await asyncio.to_thread(bench.libvirtd.virsh, "dumpxml", foreign)
    bench.server.gate.set()
    bench.judge(await bench.final(command), "already_exists", retryable=False)
    await bench.nothing_left(foreign=[foreign])
    assert await asyncio.to_thread(bench.libvirtd.virsh, "dumpxml", foreign) == before
    await asyncio.to_thread(bench.libvirtd.virsh, "undefine", foreign)
    # The operation's own instance is not reported as foreign while it runs, so only the same name is known to be gone.
    if same == "name":
        await bench.drift("foreign-domain-gone", foreign)
    await bench.works()


async def test_the_emulator_is_missing(bench: Bench) -> None:
    emulator = wrapper(bench.folder / "qemu", "qemu-system-x86_64", "exit 1")
    await bench.start(driver={"emulator": str(emulator)})
    hidden = emulator.rename(bench.folder / "hidden")
    await bench.fails(bench.spec(), "file_missing", retryable=False, kind="operation.rejected")
    hidden.rename(emulator)
    await bench.works()


# --- step start -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nic", "code"),
    [
        (NetworkNic(type="network", network="nowhere"), "network_missing"),
        (BridgeNic(type="bridge", bridge="br-nowhere"), "bridge_missing"),
    ],
    ids=["network", "bridge"],
)
async def test_a_network_that_is_not_there(bench: Bench, nic: NetworkNic | BridgeNic, code: str) -> None:
    await bench.start()
    await bench.fails(bench.spec(nics=[nic]), code, retryable=False)
    await bench.works()


async def test_the_emulator_ends_at_once(bench: Bench) -> None:
    emulator = wrapper(
        bench.folder / "qemu", "qemu-system-x86_64",
        # libvirt's own questions about it, with a machine of type none, are answered.
        'case "$*" in *"-machine none"*) ;; *) echo "not today" >&2; exit 1;; esac',
    )  # fmt: skip
    fault_of(emulator).touch()
    await bench.start(driver={"emulator": str(emulator)})
    final = await bench.fails(bench.spec(), "hypervisor_error", retryable=False)
    assert "not today" in final.data["error"]["message"]
    fault_of(emulator).unlink()
    await bench.works()


async def test_not_enough_memory_for_the_guest(bench: Bench) -> None:
    """The host promised it, and QEMU does not get it."""
    await bench.start()
    daemon = bench.libvirtd.pid
    assert daemon is not None
    before = resource.prlimit(daemon, resource.RLIMIT_AS)
    resource.prlimit(daemon, resource.RLIMIT_AS, (3 * 1024 * MIB, before[1]))
    try:
        await bench.fails(bench.spec(memory_mib=4096), "host_memory", retryable=True)
    finally:
        resource.prlimit(daemon, resource.RLIMIT_AS, before)
    await bench.works()


async def test_a_hook_of_the_host_refuses(bench: Bench, hook: Hook) -> None:
    await bench.start()
    hook.refuse()
    await bench.fails(bench.spec(), "hypervisor_error", retryable=False)
    hook.let_go()
    await bench.works()


async def test_libvirtd_dies_while_the_domain_is_started(bench: Bench, hook: Hook) -> None:
    """It comes back in time: the create goes on and there is one domain."""
    await bench.start()
    instance_id = str(uuid.uuid4())
    hook.hold()
    command = await bench.send(InstanceCreate(spec=bench.spec()), instance_id, progress=True)
    await bench.reached(command, "start")
    await hook.reached()
    await asyncio.to_thread(bench.libvirtd.kill_daemon)
    hook.let_go()
    await asyncio.to_thread(bench.libvirtd.start_daemon)
    final = await bench.final(command)
    assert final.kind == "operation.succeeded", describe(final)
    assert final.data["result"]["observed"] == "running"
    await bench.nothing_left(instances=[instance_id])
    await bench.do(InstanceDelete(), instance_id)
    await bench.nothing_left()


async def test_libvirtd_dies_and_stays_away(bench: Bench, hook: Hook) -> None:
    """The create fails and says that something is left; that goes when libvirtd is back, without a command."""
    await bench.start(deadlines={"reconnect_s": 0.5})
    instance_id = str(uuid.uuid4())
    hook.hold()
    command = await bench.send(InstanceCreate(spec=bench.spec()), instance_id, progress=True)
    await bench.reached(command, "start")
    await hook.reached()
    await asyncio.to_thread(bench.libvirtd.kill_daemon)
    hook.let_go()
    final = await bench.final(command)
    assert (final.kind, final.data["error"]["code"]) == ("operation.failed", "hypervisor_unreachable"), describe(final)
    assert final.data["error"]["retryable"]
    assert final.data["undone"] is False
    await asyncio.to_thread(bench.libvirtd.start_daemon)
    await bench.world.recorder.wait_for(bench.agent.host, "instance.removed", where=lambda event: event.subject == instance_id)
    await bench.nothing_left()
    await bench.works()


# --- cancel, expiry, order, duplicates --------------------------------------------------------------------------------


async def test_cancel_during_a_slow_download(bench: Bench) -> None:
    await bench.start()
    command = await bench.send(InstanceCreate(spec=bench.spec(image=bench.slow())), str(uuid.uuid4()), progress=True)
    await bench.reached(command, "image")
    await bench.do(OperationCancel(operation_id=command))
    bench.judge(await bench.final(command), "cancelled", retryable=False, kind="operation.cancelled")
    async with asyncio.timeout(240):
        await bench.server.gone.wait()
    assert not list((bench.agent.state_dir / "images").iterdir())
    await bench.nothing_left()
    late = await bench.world.run(bench.agent.host, OperationCancel(operation_id=command))
    assert (late.kind, late.data["error"]["code"]) == ("operation.rejected", "unknown_operation")
    await bench.works()


async def test_cancel_while_the_domain_is_started(bench: Bench, hook: Hook) -> None:
    """What was promised to be cancelled ends as cancelled, though the last step could not be stopped."""
    await bench.start()
    hook.hold()
    command = await bench.send(InstanceCreate(spec=bench.spec()), str(uuid.uuid4()), progress=True)
    await hook.reached()
    await bench.do(OperationCancel(operation_id=command))
    hook.let_go()
    bench.judge(await bench.final(command), "cancelled", retryable=False, kind="operation.cancelled")
    await bench.nothing_left()
    await bench.works()


@pytest.mark.parametrize("same_lane", [True, False], ids=["lane", "slot"])
async def test_expiry_while_it_waits(bench: Bench, same_lane: bool) -> None:
    """For its turn in the lane of the instance, or for a turn among the creates of the host."""
    await bench.start(lanes={"build": 1})
    first, other = str(uuid.uuid4()), str(uuid.uuid4())
    running = await bench.send(InstanceCreate(spec=bench.spec("first", bench.slow())), first, progress=True)
    await bench.reached(running, "image")
    waiting = await bench.send(
        InstanceCreate(spec=bench.spec("second")), first if same_lane else other, expires_in_s=0.4
    )
    await asyncio.sleep(0.6)
    bench.server.gate.set()
    assert (await bench.final(running)).kind == "operation.succeeded"
    bench.judge(await bench.final(waiting), "expired", retryable=False, kind="operation.expired")
    await bench.nothing_left(instances=[first])
    await bench.do(InstanceDelete(), first)
    await bench.nothing_left()
    await bench.works()


async def occupied(bench: Bench) -> Callable[[], Awaitable[str]]:
    """Let a slow create take the only turn; the result ends it and gives the instance's id."""
    await bench.start(lanes={"build": 1})
    instance_id = str(uuid.uuid4())
    running = await bench.send(InstanceCreate(spec=bench.spec("first", bench.slow())), instance_id, progress=True)
    await bench.reached(running, "image")

    async def end() -> str:
        bench.server.gate.set()
        assert (await bench.final(running)).kind == "operation.succeeded"
        return instance_id

    return end


async def test_delete_while_its_create_is_queued(bench: Bench) -> None:
    end = await occupied(bench)
    instance_id = str(uuid.uuid4())
    create = await bench.send(InstanceCreate(spec=bench.spec("second")), instance_id)
    delete = await bench.send(InstanceDelete(), instance_id)
    first = await end()
    made, gone = await bench.final(create), await bench.final(delete)
    assert (made.kind, gone.kind) == ("operation.succeeded", "operation.succeeded"), describe(gone)
    assert made.sequence < gone.sequence
    await bench.nothing_left(instances=[first])
    await bench.do(InstanceDelete(), first)
    await bench.nothing_left()


async def test_cancel_and_delete_while_its_create_is_queued(bench: Bench) -> None:
    end = await occupied(bench)
    instance_id = str(uuid.uuid4())
    create = await bench.send(InstanceCreate(spec=bench.spec("second")), instance_id)
    delete = await bench.send(InstanceDelete(), instance_id)
    await bench.do(OperationCancel(operation_id=create))
    bench.judge(await bench.final(create), "cancelled", retryable=False, kind="operation.cancelled")
    first = await end()
    bench.judge(await bench.final(delete), "unknown_instance", retryable=False, kind="operation.rejected")
    await bench.nothing_left(instances=[first])


async def test_duplicates_of_a_create(bench: Bench) -> None:
    """While it runs, after it, and after its instance was deleted: one domain, one final event, one answer."""
    await bench.start()
    instance_id, command_id = str(uuid.uuid4()), str(uuid.uuid4())
    command = InstanceCreate(spec=bench.spec(image=bench.slow()))
    await bench.send(command, instance_id, id=command_id, progress=True)
    await bench.reached(command_id, "image")
    for _ in range(3):
        await bench.send(command, instance_id, id=command_id, progress=True)
    bench.server.gate.set()
    final = await bench.final(command_id)
    assert final.kind == "operation.succeeded", describe(final)
    qemu = await asyncio.to_thread(bench.libvirtd.qemu_pids)
    for _ in range(3):
        await bench.send(command, instance_id, id=command_id, progress=True)
    await bench.nothing_left(instances=[instance_id])
    assert await asyncio.to_thread(bench.libvirtd.qemu_pids) == qemu
    assert list(qemu) == ["one"]
    shown = await bench.do(OperationShow(operation_id=command_id))
    assert (shown["state"], shown["attempt"]) == ("succeeded", 1)
    assert bench.server.requests == ["/slow"]

    # Another command for the same id is a create of its own, and is refused.
    again = await bench.world.run(bench.agent.host, command, instance_id)
    bench.judge(again, "instance_exists", retryable=False, kind="operation.rejected")
    assert (await bench.do(InstanceShow(), instance_id))["observed"] == "running"

    await bench.do(InstanceDelete(), instance_id)
    await bench.send(command, instance_id, id=command_id, progress=True)
    await bench.nothing_left()
    assert len(bench.world.recorder.finals(bench.agent.host)[command_id]) == 1
