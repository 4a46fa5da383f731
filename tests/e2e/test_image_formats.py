"""Guests boot from every format and compression that an image may come in."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import lzma
import subprocess
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from support.fleet import World

from agent.messages.commands import ConsoleLog, InstanceCreate, InstanceDelete
from agent.messages.spec import ImageSource, InstanceSpec, RootDisk
from agent.messages.verbs_image import ImageList, ImagePrefetch, ImageRemove, ImageVerify
from devstack.guest_image import GuestImage
from devstack.libvirtd import PrivateLibvirtd

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(900)]

UP = "compute-agent guest is up"
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
KINDS: dict[str, tuple[str, str, str, Callable[[bytes], bytes]]] = {
    "vmdk-zstd": ("vmdk", "subformat=streamOptimized", "zstd", lambda data: zstandard.ZstdCompressor().compress(data)),
    "vhdx-gzip": ("vhdx", "subformat=dynamic", "gzip", lambda data: gzip.compress(data, 1, mtime=0)),
    "raw-xz": ("raw", "size=0", "xz", lambda data: lzma.compress(data, preset=0)),
}


def make(kind: str, guest: Path, folder: Path) -> ImageSource:
    form, options, compression, pack = KINDS[kind]
    plain = folder / f"{kind}.plain"
    options_given = [] if form == "raw" else ["-o", options]
    subprocess.run(
        ["qemu-img", "convert", "-f", "qcow2", "-O", form, *options_given, guest, plain], check=True, timeout=60
    )
    path = folder / kind
    path.write_bytes(pack(plain.read_bytes()))
    digest = hashlib.sha256(path.read_bytes())
    signature = {"key": "publisher", "ed25519": base64.b64encode(KEY.sign(digest.digest())).decode()}
    return ImageSource.model_validate(
        {
            "url": path.as_uri(),
            "sha256": digest.hexdigest(),
            "format": form,
            "compression": compression,
            "signature": signature,
        }
    )


async def test_guests_boot_from_every_format(
    world: World, libvirtd: PrivateLibvirtd, bootable: GuestImage, tmp_path: Path
) -> None:
    trusted = {"publisher": base64.b64encode(KEY.public_key().public_bytes_raw()).decode()}
    settings: dict[str, Any] = {"images": {"require_signature": True, "trusted_keys": trusted}}
    agent = await world.libvirt_agent(libvirtd, settings=settings)
    await agent.start()
    folder = agent.directory.parent
    sources = {kind: await asyncio.to_thread(make, kind, bootable.path.resolve(), folder) for kind in KINDS}

    async def do(data: Any, instance_id: str | None = None) -> dict[str, Any]:
        return dict((await world.succeed(agent.host, data, instance_id)).data["result"])

    await do(ImagePrefetch(image=sources["vmdk-zstd"]))
    guests = {kind: str(uuid.uuid4()) for kind in KINDS}

    async def boots(kind: str) -> None:
        spec = InstanceSpec(
            name=kind, vcpus=1, memory_mib=128, root_disk=RootDisk(size_mib=256, image=sources[kind])
        )
        await do(InstanceCreate(spec=spec), guests[kind])
        async with asyncio.timeout(240):
            while UP not in (await do(ConsoleLog(max_bytes=256 * 1024), guests[kind]))["text"]:
                await asyncio.sleep(0.25)

    await asyncio.gather(*map(boots, KINDS))
    views = {view["sha256"]: view for view in (await do(ImageList()))["images"]}
    for kind, source in sources.items():
        view = views[source.sha256]
        assert view["in_use_by"] == [guests[kind]]
        assert view["format"] == ("raw" if kind.startswith("raw") else "qcow2")
        assert (await do(ImageVerify(sha256=source.sha256)))["intact"] is True
    refusal = await world.run(agent.host, ImageRemove(sha256=sources["vhdx-gzip"].sha256))
    assert refusal.data["error"]["code"] == "image_in_use"
    unsigned = sources["vhdx-gzip"].model_copy(update={"signature": None})
    refusal = await world.run(agent.host, ImagePrefetch(image=unsigned))
    assert refusal.data["error"]["code"] == "image_unsigned"
    for kind in KINDS:
        await do(InstanceDelete(), guests[kind])
        await do(ImageRemove(sha256=sources[kind].sha256))
    assert list((agent.state_dir / "images").iterdir()) == []
    await world.judge(agent, (), libvirtd)
