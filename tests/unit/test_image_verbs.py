"""The image verbs on a whole agent: what is in use stays, what goes was unused, and a crash loses nothing."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import random
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from support.world import ROUNDS, World, new_id, spec, until

from agent.drivers.fake.settings import Fault
from agent.messages.commands import InstanceCreate, InstanceDelete, OperationCancel
from agent.messages.life import Life, Rescue, Shelf, ShelvedDisk
from agent.messages.spec import ImageSource, RootDisk
from agent.messages.spec_disks import Boot, BootFile, CdromDisk, DataDisk, KernelBoot
from agent.messages.verbs_image import ImageList, ImagePrefetch, ImageRemove, ImageVerify

MIB = 2**20


@pytest.fixture
async def world(tmp_path: Path, no_blocking: object, unannounced: None) -> AsyncIterator[World]:
    made = await World(tmp_path).open()
    yield made
    await made.stop()
    await made.close()


def image(world: World, number: int = 0, **more: Any) -> ImageSource:
    """A raw image of 1 MiB of its own."""
    path = world.folder / f"image-{number}"
    data = random.Random(number).randbytes(MIB)
    path.write_bytes(data)
    return ImageSource(url=f"file://{path}", sha256=hashlib.sha256(data).hexdigest(), **{"format": "raw"} | more)


def folder(world: World) -> Path:
    return world.folder / "state" / "images"


def names(world: World) -> list[str]:
    return sorted(path.name for path in folder(world).iterdir())


async def succeed(world: World, data: Any, **options: Any) -> dict[str, Any]:
    done = await world.do(data, **options)
    assert done.kind == "operation.succeeded", done.data
    return dict(done.data["result"])


async def refused(world: World, data: Any, **options: Any) -> str:
    done = await world.do(data, **options)
    assert done.kind in {"operation.failed", "operation.rejected"}, done.data
    return str(done.data["error"]["code"])


async def test_prefetch_list_use_and_remove(world: World) -> None:
    await world.start()
    one = image(world)
    first = await succeed(world, ImagePrefetch(image=one))
    assert first == {"sha256": one.sha256, "format": "raw", "virtual_size_bytes": MIB, "changed": True}
    assert (await succeed(world, ImagePrefetch(image=one)))["changed"] is False
    (view,) = (await succeed(world, ImageList()))["images"]
    assert view["state"] == "ready"
    assert (view["size_bytes"], view["virtual_size_bytes"], view["in_use_by"]) == (MIB, MIB, [])
    assert abs(datetime.fromisoformat(view["last_used"]) - datetime.now(UTC)).total_seconds() < 60

    instance_id = await world.create(root_disk=RootDisk(size_mib=8, image=one))
    (view,) = (await succeed(world, ImageList()))["images"]
    assert view["in_use_by"] == [instance_id]
    assert await refused(world, ImageRemove(sha256=one.sha256)) == "image_in_use"
    await succeed(world, InstanceDelete(), instance_id=instance_id)
    assert (await succeed(world, ImageRemove(sha256=one.sha256)))["freed_bytes"] >= MIB
    assert names(world) == []
    assert await refused(world, ImageRemove(sha256=one.sha256)) == "unknown_image"
    assert await refused(world, ImageVerify(sha256=one.sha256)) == "unknown_image"


async def test_everything_that_mentions_an_image_uses_it(world: World) -> None:
    await world.start()
    sources = [image(world, n) for n in range(8)]
    root, data, disc, kernel, initrd, rescue, exported, unused = sources
    for source in (root, data, disc, rescue, exported, unused):
        await succeed(world, ImagePrefetch(image=source))
    for source in (kernel, initrd):
        await succeed(world, ImagePrefetch(image=source, boot_file=True))
    instance_id = await world.create(
        root_disk=RootDisk(size_mib=8, image=root),
        disks=[
            DataDisk(kind="data", name="data", size_mib=8, image=data),
            CdromDisk(kind="cdrom", name="disc", image=disc),
        ],
        boot=Boot(
            kernel=KernelBoot(
                kernel=BootFile(url=kernel.url, sha256=kernel.sha256),
                initrd=BootFile(url=initrd.url, sha256=initrd.sha256),
            )
        ),
    )
    at = datetime.now(UTC)
    life = Life(
        rescue=Rescue(image=rescue, since=at, was_running=True),
        shelf=Shelf(
            disks=[ShelvedDisk(name="root", url="x", sha256=exported.sha256, size_bytes=1)], since=at, was_running=True
        ),
    )
    world.agent.ctx.instances.update(instance_id, life=life)
    views = (await succeed(world, ImageList()))["images"]
    used = {view["sha256"] for view in views if view["in_use_by"] == [instance_id]}
    assert used == {source.sha256 for source in sources if source is not unused}
    assert [view["format"] for view in views if view["sha256"] == kernel.sha256] == ["file"]
    for source in sources[:-1]:
        assert await refused(world, ImageRemove(sha256=source.sha256)) == "image_in_use"
    await succeed(world, ImageRemove(sha256=unused.sha256))


async def test_a_boot_file_may_hold_anything_and_is_no_disk(world: World) -> None:
    await world.start()
    path = world.folder / "initrd"
    path.write_bytes(b"\x1f\x8b\x08 compressed")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    source = ImageSource(url=f"file://{path}", sha256=digest, format="raw")
    assert await refused(world, ImagePrefetch(image=source)) == "image_format_mismatch"
    await succeed(world, ImagePrefetch(image=source, boot_file=True))
    assert await refused(world, ImagePrefetch(image=source)) == "image_format_mismatch"


async def test_signed_boot_files_where_signatures_are_required(tmp_path: Path, no_blocking: object) -> None:
    signer = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    trusted = {"publisher": base64.b64encode(signer.public_key().public_bytes_raw()).decode()}
    images = {"file_roots": [str(tmp_path)], "require_signature": True, "trusted_keys": trusted}
    world = await World(tmp_path, images=images).open()
    await world.start()

    def boot_file(number: int, *, signed: int | None) -> dict[str, Any]:
        source = image(world, number)
        found: dict[str, Any] = {"url": source.url, "sha256": source.sha256}
        if signed is not None:
            digest = bytes.fromhex(image(world, signed).sha256)
            found["signature"] = {"key": "publisher", "ed25519": base64.b64encode(signer.sign(digest)).decode()}
        return found

    def create(**files: dict[str, Any]) -> InstanceCreate:
        return InstanceCreate(spec=spec(boot=Boot.model_validate({"kernel": files})))

    good = create(kernel=boot_file(0, signed=0), initrd=boot_file(1, signed=1))
    await succeed(world, good, instance_id=new_id())
    for wrong, code in (
        (create(kernel=boot_file(0, signed=None)), "image_unsigned"),
        (create(kernel=boot_file(0, signed=0), initrd=boot_file(1, signed=None)), "image_unsigned"),
        (create(kernel=boot_file(0, signed=1)), "image_signature_invalid"),
    ):
        instance_id = new_id()
        assert await refused(world, wrong, instance_id=instance_id) == code
        assert world.agent.ctx.instances.find(instance_id) is None
    await world.stop()
    await world.close()


async def test_an_operation_under_way_uses_its_image(world: World) -> None:
    """Between the image and the disk: also where the agent is killed there, and cannot ask the hypervisor yet."""
    await world.start()
    one, instance_id = image(world), new_id()
    world.driver.inject(Fault(call="create_storage", hang_s=30, times=1))
    create = world.send(
        InstanceCreate(spec=spec(root_disk=RootDisk(size_mib=8, image=one))), instance_id=instance_id
    )
    plan = world.driver._plan
    await until(lambda: all(armed.left == 0 for armed in plan._armed))
    (view,) = (await succeed(world, ImageList()))["images"]
    assert view["wanted_by"] == [create]
    assert await refused(world, ImageRemove(sha256=one.sha256)) == "image_in_use"
    await world.crash()
    await world.start()
    assert (await world.final(create)).kind == "operation.succeeded"
    assert await refused(world, ImageRemove(sha256=one.sha256)) == "image_in_use"


async def test_nothing_goes_while_the_instances_are_not_known(world: World) -> None:
    await world.start()
    one = image(world)
    await succeed(world, ImagePrefetch(image=one))
    world.agent.ctx.state.surveyed = False
    os.utime(folder(world) / f"{one.sha256}.raw.json", (0, 0))
    await world.agent.ctx.images.tidy()
    assert await refused(world, ImageRemove(sha256=one.sha256)) == "instances_unknown"
    assert f"{one.sha256}.raw" in names(world)


async def test_old_unused_images_go(tmp_path: Path, no_blocking: object) -> None:
    world = await World(
        tmp_path, images={"file_roots": [str(tmp_path)], "keep_unused_s": 100}, periodic={"images_s": 0.05}
    ).open()
    await world.start()
    used, old, young = (image(world, n) for n in range(3))
    for source in (used, old, young):
        await succeed(world, ImagePrefetch(image=source))
    await world.create(root_disk=RootDisk(size_mib=8, image=used))
    for source in (used, old):
        os.utime(folder(world) / f"{source.sha256}.raw.json", (time.time() - 101,) * 2)
    await until(lambda: f"{old.sha256}.raw" not in names(world))
    await until(lambda: not world.agent._images._removals)
    assert {name for name in names(world) if name.endswith(".raw")} == {f"{s.sha256}.raw" for s in (used, young)}
    # What was in use until now was used just now.
    assert (folder(world) / f"{used.sha256}.raw.json").stat().st_mtime > time.time() - 60
    await world.stop()
    await world.close()


async def test_quota(tmp_path: Path, no_blocking: object) -> None:
    world = await World(tmp_path, images={"file_roots": [str(tmp_path)], "max_cache_mib": 3}).open()
    await world.start()
    sources = [image(world, n) for n in range(5)]
    for number, source in enumerate(sources[:3]):
        await succeed(world, ImagePrefetch(image=source))
        os.utime(folder(world) / f"{source.sha256}.raw.json", (1000 + number,) * 2)
    await succeed(world, ImagePrefetch(image=sources[0]))  # it is used now: the second is the oldest
    await succeed(world, ImagePrefetch(image=sources[3]))
    listed = await succeed(world, ImageList())
    assert {view["sha256"] for view in listed["images"]} == {sources[n].sha256 for n in (0, 2, 3)}
    assert listed["limit_bytes"] == 3 * MIB
    for number in (0, 2, 3):
        await world.create(root_disk=RootDisk(size_mib=8, image=sources[number]))
    done = await world.do(ImagePrefetch(image=sources[4]))
    assert done.data["error"]["code"] == "image_cache_full"
    assert done.data["error"]["details"] == {"needed_bytes": MIB, "short_bytes": MIB, "limit_bytes": 3 * MIB}
    assert not [name for name in names(world) if name.startswith(".partial")]
    await world.stop()
    await world.close()


async def test_damage_is_noticed(world: World) -> None:
    await world.start()
    sizes, bits = image(world, 0), image(world, 1)
    for source in (sizes, bits):
        await succeed(world, ImagePrefetch(image=source))
        assert (await succeed(world, ImageVerify(sha256=source.sha256)))["intact"] is True
    instance_id = await world.create(root_disk=RootDisk(size_mib=8, image=sizes))
    for source, length in ((sizes, MIB - 1), (bits, MIB)):
        path = folder(world) / f"{source.sha256}.raw"
        path.chmod(0o644)
        path.write_bytes(bytes(length))
    assert (await succeed(world, ImageVerify(sha256=bits.sha256)))["intact"] is False
    views = (await succeed(world, ImageList()))["images"]
    assert [view["state"] for view in views] == ["damaged", "damaged"]
    assert await world.agent.ctx.images.tidy() == [sizes.sha256]
    views = (await succeed(world, ImageList()))["images"]
    assert [(view["sha256"], view["in_use_by"]) for view in views] == [(sizes.sha256, [instance_id])]
    assert (await succeed(world, ImagePrefetch(image=sizes)))["changed"] is True
    assert (await succeed(world, ImageVerify(sha256=sizes.sha256)))["intact"] is True


async def test_list_in_pages(world: World) -> None:
    await world.start()
    sources = sorted((image(world, n) for n in range(5)), key=lambda source: source.sha256)
    for source in sources:
        await succeed(world, ImagePrefetch(image=source))
    seen, after = [], None
    while True:
        page = await succeed(world, ImageList(limit=2, after=after))
        seen += [view["sha256"] for view in page["images"]]
        after = page.get("next_after")
        if after is None:
            break
    assert seen == [source.sha256 for source in sources]


async def test_a_cancelled_prefetch_leaves_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.start()
    begun, release = asyncio.Event(), asyncio.Event()

    async def slow(_self: object, _needed: int) -> None:
        begun.set()
        await release.wait()

    monkeypatch.setattr("agent.images.download.Download._need", slow)
    prefetch = world.send(ImagePrefetch(image=image(world)))
    await begun.wait()
    await succeed(world, OperationCancel(operation_id=prefetch))
    assert (await world.final(prefetch)).kind == "operation.cancelled"
    assert names(world) == []


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("verb", ["prefetch", "remove"])
async def test_dies_at_every_commit(world: World, verb: str, applied: bool) -> None:
    await world.start()
    one = image(world)
    data = ImagePrefetch(image=one) if verb == "prefetch" else ImageRemove(sha256=one.sha256)
    entry = [f"{one.sha256}.raw", f"{one.sha256}.raw.json"]
    for commits in range(ROUNDS):
        if verb == "remove":
            await succeed(world, ImagePrefetch(image=one))
        await world.quiet()
        world.cut.after(commits, applied=applied)
        operation_id = world.send(data)
        died = await world.cut_or_final(operation_id)
        await world.crash()
        await world.start()
        final = await world.final(operation_id)
        assert final.kind == "operation.succeeded", final.data
        assert len(world.finals(operation_id)) == 1
        assert names(world) == (entry if verb == "prefetch" else [])
        assert await world.cut.operations(unfinished=True) == []
        world.check_sequence()
        if verb == "prefetch":
            await succeed(world, ImageRemove(sha256=one.sha256))
        if not died:
            return
    raise AssertionError("there were more commits than this test has rounds")


async def test_a_removal_and_a_use_at_once(world: World) -> None:
    """Whichever comes first: never an instance without its image."""
    await world.start()
    one = image(world)
    for _ in range(15):
        await succeed(world, ImagePrefetch(image=one))
        remove = world.send(ImageRemove(sha256=one.sha256))
        instance_id = new_id()
        create = world.send(
            InstanceCreate(spec=spec(root_disk=RootDisk(size_mib=8, image=one))), instance_id=instance_id
        )
        assert (await world.final(create)).kind == "operation.succeeded"
        final = await world.final(remove)
        assert final.kind == "operation.succeeded" or final.data["error"]["code"] == "image_in_use", final.data
        assert f"{one.sha256}.raw" in names(world)
        await succeed(world, InstanceDelete(), instance_id=instance_id)
