"""Bad input through the whole agent: each kind is a typed refusal, after which nothing is left and all goes on."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from support.images import MIB, qcow2
from support.world import HOST, World, command, new_id, spec, until

from agent.drivers.fake.settings import Fault
from agent.images import download
from agent.messages import routing
from agent.messages.commands import (
    ConsoleLog,
    HostPing,
    HostSetEnabled,
    InstanceCreate,
    InstanceDelete,
    InstancePause,
    InstanceReboot,
    InstanceResume,
    InstanceShow,
    InstanceStart,
    InstanceStop,
    OperationCancel,
    OperationShow,
)
from agent.messages.events import Event
from agent.messages.spec import ImageSource, RootDisk

RAW = bytes(range(256)) * 1024


@pytest.fixture(params=["memory", "sqlite"])
async def world(request: pytest.FixtureRequest, tmp_path: Path, no_blocking: object) -> AsyncIterator[World]:
    made = await World(tmp_path, store=request.param, driver={"cpus": 8, "memory_mib": 8192, "disk_mib": 64 * 1024}).open()
    await made.start()
    yield made
    # After whatever the test did: the agent is alive, the next command works, and then nothing is left.
    assert (await made.do(HostPing(echo="alive"))).data["result"]["echo"] == "alive"
    instance_id = await made.create()
    assert (await made.do(InstanceDelete(), instance_id=instance_id)).kind == "operation.succeeded"
    await nothing_left(made)
    assert made.agent.not_ready() == {}
    await made.stop()
    await made.close()


async def nothing_left(world: World) -> None:
    """No domain, no file, no record, no unfinished work; a whole sequence with one final event per operation."""
    await world.quiet()
    assert world.owned_files() == []
    assert world.agent.ctx.instances.all() == []
    assert await world.cut.instances() == []
    assert await world.cut.operations(unfinished=True) == []
    assert [path.name for path in (world.folder / "state" / "images").glob(".partial*")] == []
    world.check_sequence()
    finals = [event.data["operation_id"] for event in world.events if event.sequence and "operation." in event.kind]
    for operation_id in set(finals) - {""}:  # what had no id that could be read has none in its answer
        assert len(world.finals(operation_id)) <= 1


def refused(final: Event, code: str, kind: str = "operation.rejected", *, retryable: bool = False) -> dict[str, Any]:
    error: dict[str, Any] = final.data["error"]
    assert (final.kind, error["code"]) == (kind, code), final.data
    assert error["retryable"] is retryable
    assert len(error["message"]) > 10
    return error


# --- what is no command -------------------------------------------------------------------------------------------

DEEP = b"[" * 100_000


@pytest.mark.parametrize(
    ("body", "code"),
    [
        pytest.param(b"not json", "bad_json", id="not json"),
        pytest.param(b"\xff\xfe\x00", "bad_json", id="no text"),
        pytest.param(DEEP, "bad_json", id="nesting"),
        pytest.param(b"[1,2]", "bad_envelope", id="no object"),
        pytest.param(b'{"hello":"world"}', "bad_envelope", id="no cloudevent"),
        pytest.param(b'{"a":"' + b"x" * (10 * 1024 * 1024) + b'"}', "too_large", id="10 MiB"),
        pytest.param(command("instance.explode", id="bad"), "unknown_type", id="unknown type"),
        pytest.param(command("host.ping", {"surprise": 1}, id="bad"), "unknown_field", id="unknown field"),
        pytest.param(command("host.ping", id="bad", colour="red"), "unknown_field", id="unknown envelope field"),
        pytest.param(command("host.ping", {"echo": 5}, id="bad"), "invalid_argument", id="wrong type"),
        pytest.param(command("host.ping", id="bad", data=DEEP.decode()), "invalid_argument", id="data is text"),
        pytest.param(command("instance.start", id="bad"), "invalid_argument", id="no instance"),
    ],
)
async def test_what_is_no_command(world: World, body: bytes, code: str) -> None:
    heard = await world.listen("compute.reply.test")
    world.put(body, reply_to="compute.reply.test", correlation_id="c", message_id="m", key=routing.command_key("host.ping", HOST))
    await until(lambda: heard and world.dead)
    refused(heard[0], code)
    assert heard[0].data["operation_id"] in ("bad", "m")
    assert world.dead[0].body == body
    assert world.dead[0].headers["compute-code"] == code
    assert world.dead[0].headers["compute-reason"] == heard[0].data["error"]["message"][:1000]


@pytest.mark.parametrize(
    "changes",
    [
        {"vcpus": 0}, {"vcpus": -3}, {"vcpus": "two"}, {"memory_mib": 2**30}, {"memory_mib": 10**40},
        {"root_disk": {"size_mib": -1}}, {"name": "a;reboot"}, {"name": "../../etc"}, {"name": "<domain/>"},
        {"name": "$(id)"}, {"nics": [{"type": "bridge", "bridge": "br0; ip link"}]},
        {"nics": [{"type": "network", "network": "<evil/>"}]}, {"labels": {"../x": "y"}},
    ],
)  # fmt: skip
async def test_a_create_with_nonsense_in_it(world: World, changes: dict[str, Any]) -> None:
    fields: dict[str, Any] = {"name": "vm", "vcpus": 1, "memory_mib": 64, "root_disk": {"size_mib": 10}} | changes
    instance_id = new_id()
    world.put(command("instance.create", {"spec": fields}, subject=instance_id, id="bad"))
    error = refused(await world.final("bad"), "invalid_argument")
    assert next(iter(changes)) in error["message"]
    assert world.finals("bad")[0].subject == instance_id


# --- fences -------------------------------------------------------------------------------------------------------


async def test_the_wrong_host(world: World) -> None:
    world.put(command("host.ping", id="bad", host="other.example"))
    assert "other.example" in refused(await world.final("bad"), "wrong_host")["message"]


async def test_expired(world: World) -> None:
    past = (datetime.now(UTC) - timedelta(days=1)).isoformat()
    body = command("instance.create", {"spec": spec().model_dump(mode="json")}, subject=new_id(), id="bad", expirytime=past)
    world.put(body)
    refused(await world.final("bad"), "expired", "operation.expired")


async def test_a_stale_generation(world: World) -> None:
    instance_id = await world.create()
    await world.do(InstancePause(), instance_id=instance_id, generation=4)
    error = refused(await world.do(InstanceDelete(), instance_id=instance_id, generation=3), "stale_generation")
    assert error["details"] == {"generation": 4}
    assert await world.power(instance_id) == "paused"
    await world.do(InstanceDelete(), instance_id=instance_id, generation=4)


async def test_a_known_id_with_another_body(world: World) -> None:
    heard = await world.listen("compute.reply.test")
    instance_id = await world.create()
    operation_id = world.agent.ctx.instances.get(instance_id).created_by
    world.put(command("instance.delete", subject=instance_id, id=operation_id), reply_to="compute.reply.test")
    await until(lambda: heard)
    refused(heard[0], "conflict")
    assert await world.power(instance_id) == "running"
    await world.do(InstanceDelete(), instance_id=instance_id)


# --- state --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        InstanceDelete(), InstanceStart(), InstanceStop(), InstanceStop(force=True), InstanceReboot(), InstancePause(),
        InstanceResume(), InstanceShow(), ConsoleLog(),
    ],
    ids=lambda data: data.verb,
)  # fmt: skip
async def test_an_unknown_instance(world: World, data: Any) -> None:
    refused(await world.do(data, instance_id=new_id()), "unknown_instance")


@pytest.mark.parametrize("data", [OperationShow(operation_id="nobody"), OperationCancel(operation_id="nobody")])
async def test_an_unknown_operation(world: World, data: Any) -> None:
    refused(await world.do(data), "unknown_operation")


@pytest.mark.parametrize(
    ("before", "data", "code"),
    [
        (None, InstancePause(), "instance_not_running"),
        (None, InstanceResume(), "instance_not_paused"),
        (None, InstanceReboot(), "instance_not_running"),
        (InstancePause(), InstanceStart(), "instance_paused"),
        (InstancePause(), InstanceStop(), "instance_paused"),
        (InstancePause(), InstanceReboot(), "instance_paused"),
    ],
)
async def test_a_verb_that_is_impossible_in_this_state(world: World, before: Any, data: Any, code: str) -> None:
    instance_id = await world.create(start=before is not None)
    if before is not None:
        await world.do(before, instance_id=instance_id)
    power = await world.power(instance_id)
    refused(await world.do(data, instance_id=instance_id), code)
    assert await world.power(instance_id) == power
    await world.do(InstanceDelete(), instance_id=instance_id)


async def test_taken_names_and_ids(world: World) -> None:
    instance_id = await world.create("taken")
    refused(await world.do(InstanceCreate(spec=spec("taken")), instance_id=new_id()), "name_taken")
    refused(await world.do(InstanceCreate(spec=spec("free")), instance_id=instance_id), "instance_exists")
    assert await world.power(instance_id) == "running"
    await world.do(InstanceDelete(), instance_id=instance_id)


async def test_two_creates_of_one_name_at_once(world: World) -> None:
    ids = [world.send(InstanceCreate(spec=spec("taken")), instance_id=new_id()) for _ in range(5)]
    finals = [await world.final(one) for one in ids]
    assert sorted(event.kind for event in finals) == ["operation.rejected"] * 4 + ["operation.succeeded"]
    (record,) = world.agent.ctx.instances.all()
    await world.do(InstanceDelete(), instance_id=record.id)


async def test_what_does_not_fit(world: World) -> None:
    error = refused(
        await world.do(InstanceCreate(spec=spec(vcpus=100, memory_mib=100_000)), instance_id=new_id()),
        "does_not_fit",
        retryable=True,
    )
    assert set(error["details"]) == {"VCPU", "MEMORY_MB"}
    full = await world.create(memory_mib=7600)
    error = refused(
        await world.do(InstanceCreate(spec=spec(memory_mib=256)), instance_id=new_id()), "does_not_fit", retryable=True
    )
    assert error["details"] == {"MEMORY_MB": 256 - (8192 - 512 - 7600)}
    await world.do(InstanceDelete(), instance_id=full)


async def test_a_disabled_host(world: World) -> None:
    await world.do(HostSetEnabled(enabled=False, reason="new disks"))
    error = refused(await world.do(InstanceCreate(spec=spec()), instance_id=new_id()), "host_disabled")
    assert "new disks" in error["message"]
    await world.do(HostSetEnabled(enabled=True))


# --- images -------------------------------------------------------------------------------------------------------


class Shelf:
    """Images as files and over HTTP."""

    def __init__(self, world: World, port: int) -> None:
        self.world, self.port = world, port

    def source(self, data: bytes, *, url: str = "", **changes: Any) -> ImageSource:
        path = self.world.folder / "image"
        path.write_bytes(data)
        fields: dict[str, Any] = {
            "url": url or path.as_uri(), "sha256": hashlib.sha256(data).hexdigest(), "format": "raw",
        }  # fmt: skip
        return ImageSource(**(fields | changes))

    def http(self, name: str) -> str:
        return f"http://127.0.0.1:{self.port}/{name}"

    async def create(self, source: ImageSource, *, size_mib: int = 20) -> Event:
        made = spec(root_disk=RootDisk(size_mib=size_mib, image=source))
        return await self.world.do(InstanceCreate(spec=made), instance_id=new_id())


@pytest.fixture
async def shelf(world: World, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Shelf]:
    monkeypatch.setattr(download, "ATTEMPTS", 1)

    async def answer(request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        if name == "missing":
            raise web.HTTPNotFound
        if name == "broken":
            raise web.HTTPInternalServerError
        response = web.StreamResponse(headers={"Content-Length": str(len(RAW) * 2 if name == "truncated" else len(RAW))})
        await response.prepare(request)
        await response.write(RAW)
        if name == "truncated":
            assert request.transport is not None
            request.transport.close()
        return response

    app = web.Application()
    app.router.add_get("/{name}", answer)
    server = web.AppRunner(app)
    await server.setup()
    site = web.TCPSite(server, "127.0.0.1", 0)
    await site.start()
    yield Shelf(world, server.addresses[0][1])
    await server.cleanup()


@pytest.mark.parametrize("how", ["file", "http"])
async def test_a_good_image_for_comparison(world: World, shelf: Shelf, how: str) -> None:
    source = shelf.source(RAW, **({"url": shelf.http("good")} if how == "http" else {}))
    done = await shelf.create(source)
    assert done.kind == "operation.succeeded", done.data
    await world.do(InstanceDelete(), instance_id=done.subject)


ImageCase = Callable[[Shelf], ImageSource]
IMAGES: dict[str, tuple[ImageCase, str, bool]] = {
    "missing file": (lambda s: s.source(RAW, url=(s.world.folder / "nothing").as_uri()), "image_missing", False),
    "missing url": (lambda s: s.source(RAW, url=s.http("missing")), "image_missing", False),
    "server error": (lambda s: s.source(RAW, url=s.http("broken")), "image_unavailable", True),
    "nobody listens": (lambda s: s.source(RAW, url="http://127.0.0.1:1/x"), "image_unavailable", True),
    "wrong checksum": (lambda s: s.source(RAW, sha256="0" * 64), "image_checksum_mismatch", False),
    "truncated": (lambda s: s.source(RAW, url=s.http("truncated")), "image_truncated", True),
    "too big": (lambda s: s.source(b"x" * (2 * MIB), max_size_mib=1), "image_too_large", False),
    "backing file": (lambda s: s.source(qcow2(name=b"/etc/passwd"), format="qcow2"), "image_unsafe", False),
    "external data file": (lambda s: s.source(qcow2(incompatible=4), format="qcow2"), "image_unsafe", False),
    "qcow2 declared raw": (lambda s: s.source(qcow2(), format="raw"), "image_format_mismatch", False),
    "raw declared qcow2": (lambda s: s.source(RAW, format="qcow2"), "image_format_mismatch", False),
    "outside the roots": (lambda s: s.source(RAW, url="file:///etc/passwd"), "image_source_forbidden", False),
    "by way of dots": (lambda s: s.source(RAW, url=s.world.folder.as_uri() + "/../../etc/passwd"), "image_source_forbidden", False),
    "with a password": (lambda s: s.source(RAW, url="http://me:pw@127.0.0.1/x"), "image_source_forbidden", False),
}


@pytest.mark.parametrize("case", IMAGES)
async def test_an_image_that_is_refused(world: World, shelf: Shelf, case: str) -> None:
    make, code, retryable = IMAGES[case]
    final = await shelf.create(make(shelf))
    error = refused(final, code, "operation.failed", retryable=retryable)
    assert "pw" not in error["message"]
    assert final.data["undone"] is True
    await nothing_left(world)


async def test_a_disk_smaller_than_its_image(world: World, shelf: Shelf) -> None:
    final = await shelf.create(shelf.source(qcow2(), format="qcow2"), size_mib=9)
    refused(final, "disk_too_small", "operation.failed")
    assert final.data["undone"] is True
    await nothing_left(world)


async def test_no_space_for_the_disk(world: World) -> None:
    world.driver.inject(Fault(call="create_storage", error="resource_exhausted", times=1))
    final = await world.do(InstanceCreate(spec=spec()), instance_id=new_id())
    refused(final, "resource_exhausted", "operation.failed", retryable=True)
    assert final.data["undone"] is True
    await nothing_left(world)


async def test_no_space_for_the_image(world: World, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    from agent.errors import ResourceExhausted  # noqa: PLC0415
    from agent.images import entry  # noqa: PLC0415

    def full(*_args: Any) -> None:
        raise ResourceExhausted("the image cache is full", code="no_space")

    with monkeypatch.context() as patch:
        patch.setattr(entry, "check_space", full)
        final = await shelf.create(shelf.source(RAW))
    refused(final, "no_space", "operation.failed", retryable=True)
    await nothing_left(world)


# --- the driver fails ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [False, True], ids=["before its effect", "after its effect"])
@pytest.mark.parametrize("error", ["internal", "failed_precondition", "bug", "already_exists", "unsupported"])
@pytest.mark.parametrize("call", ["create_storage", "define", "start", "get"])
async def test_a_driver_fault_in_each_call_of_create(world: World, call: str, error: str, after: bool) -> None:
    """All is undone and one failed event says so. A fault of `get` strikes the reading back at the end only."""
    instance_id = new_id()
    if call == "get":
        world.driver.inject(Fault(call="start", hang_s=0, error=None, times=1))
    world.driver.inject(Fault(call=call, error=error, crash_after=after, times=1 if call != "get" else None))
    operation_id = world.send(InstanceCreate(spec=spec()), instance_id=instance_id, progress=True)
    if call == "get":
        # Undoing asks as well; the fault ends once the failure is journaled.
        await until(lambda: (item := world.agent._runner.find(operation_id)) and item.record.state == "undoing")
        world.driver.clear_faults()
    final = await world.final(operation_id)
    refused(final, "internal" if error == "bug" else error, "operation.failed")
    assert final.data["undone"] is True
    await nothing_left(world)
    assert [event.kind for event in world.of(operation_id)].count("operation.failed") == 1
    assert world.of(operation_id)[-1].kind == "operation.failed", "nothing of an operation follows its final event"


@pytest.mark.parametrize("undo", ["destroy", "undefine", "delete_storage", "get"])
async def test_a_fault_in_each_call_of_the_undoing(world: World, undo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once is overcome at once; what lasts is told, kept in the journal, and taken back when it can be."""
    from agent.core import operation  # noqa: PLC0415

    monkeypatch.setattr(operation, "UNDO_PAUSE_S", 0.0)
    for times in (1, None):
        instance_id = new_id()
        world.driver.inject(Fault(call="start", error="internal", crash_after=True, times=1))
        world.driver.inject(Fault(call=undo, error="internal", times=times))
        final = await world.do(InstanceCreate(spec=spec()), instance_id=instance_id)
        assert (final.kind, final.data["undone"]) == ("operation.failed", times == 1)
        await until(lambda: not world.agent._lanes.busy)
        if times is None:
            assert world.agent.ctx.instances.find(instance_id) is not None
            shown = await world.do(OperationShow(operation_id=final.data["operation_id"]))
            assert shown.data["result"]["undo_pending"] is True
        world.driver.clear_faults()
        if times is None:
            await world.agent._retry_undo()
            await until(lambda: not world.agent._lanes.busy)
        await nothing_left(world)
        assert len(world.finals(final.data["operation_id"])) == 1


@pytest.mark.parametrize("call", ["destroy", "undefine", "delete_storage"])
async def test_a_delete_that_fails_goes_on_with_the_next_one(world: World, call: str) -> None:
    instance_id = await world.create()
    world.driver.inject(Fault(call=call, error="internal", times=1))
    final = await world.do(InstanceDelete(), instance_id=instance_id)
    refused(final, "internal", "operation.failed")
    assert final.data["undone"] is False
    assert (await world.do(InstanceDelete(), instance_id=instance_id)).kind == "operation.succeeded"
    await nothing_left(world)


@pytest.mark.parametrize("call", ["create_storage", "define", "start"])
async def test_a_driver_call_that_hangs_past_its_deadline(
    tmp_path: Path, no_blocking: object, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The waiter is released, the lane stays blocked, others go on; when the thread returns all is taken back."""
    world = await World(tmp_path).open()
    await world.start()
    try:
        instance_id = new_id()
        deadlines = world.agent.ctx.deadlines
        world.driver.inject(Fault(call=call, instance="hangs", hang_s=30, times=1))
        # The deadline is short for the call that hangs, once it hangs, and for no other.
        executor = world.agent.ctx.executor
        inner = executor.call

        async def short(pool: Any, run: Any, *args: Any, deadline_s: float, **options: Any) -> Any:
            hangs = run.__name__ == call and any(armed.left for armed in world.driver._plan._armed)
            return await inner(pool, run, *args, deadline_s=1.0 if hangs else deadline_s, **options)

        monkeypatch.setattr(executor, "call", short)
        world.agent.ctx.deadlines = replace(deadlines, settle_s=0.05)
        final = await world.do(InstanceCreate(spec=spec("hangs")), instance_id=instance_id)
        world.agent.ctx.deadlines = deadlines
        refused(final, "deadline_exceeded", "operation.failed", retryable=True)
        assert final.data["undone"] is False
        behind = world.send(InstanceDelete(), instance_id=instance_id)
        other = await world.create()
        assert world.agent.ctx.executor.stuck == 1
        assert world.finals(behind) == []
        world.driver.clear_faults()
        assert (await world.final(behind)).data["error"]["code"] == "unknown_instance", "it was all taken back before"
        assert (await world.do(InstanceDelete(), instance_id=other)).kind == "operation.succeeded"
        await nothing_left(world)
        assert world.agent.ctx.executor.stuck == 0
    finally:
        await world.stop()
        await world.close()


async def test_a_flood_of_everything_at_once(world: World) -> None:
    """Good and bad in one stream: each gets its answer, in order per instance."""
    good: list[str] = []
    bad = 0
    for number in range(60):
        match number % 6:
            case 0:
                good.append(world.send(InstanceCreate(spec=spec(memory_mib=16)), instance_id=new_id()))
            case 1:
                good.append(world.send(HostPing()))
            case 2:
                world.put(b"{" * 1000)
                bad += 1
            case 3:
                world.put(command("host.ping", {"x": 1}))
                bad += 1
            case 4:
                good.append(world.send(InstanceStart(), instance_id=new_id()))
            case _:
                world.put(b"x" * (1024 * 1024 + 1))
                bad += 1
    for one in good:
        await world.final(one)
    await until(lambda: len(world.dead) == bad)
    for record in world.agent.ctx.instances.all():
        await world.do(InstanceDelete(), instance_id=record.id)
    await asyncio.sleep(0)
