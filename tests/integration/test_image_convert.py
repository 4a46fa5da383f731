"""vmdk and vhdx: what qemu-img made of good ones, what it never gets, and how it is kept within limits."""

import asyncio
import hashlib
import json
import os
import random
import shutil
import struct
import subprocess

import pytest
import zstandard

from agent.errors import ComputeError, DeadlineExceeded, ImageRejected
from agent.images import convert
from agent.images.cache import ImageCache
from agent.images.policy import ImagePolicy
from agent.messages.spec import ImageSource

pytestmark = pytest.mark.skipif(not shutil.which("qemu-img"), reason="needs qemu-img")

MIB = 2**20
GOOD = [
    ("vmdk", "subformat=monolithicSparse"),
    ("vmdk", "subformat=streamOptimized"),
    ("vhdx", "subformat=dynamic"),
    ("vhdx", "subformat=fixed"),
]


def ignore(_done, _total):
    pass


def qemu_img(*arguments):
    return subprocess.run(
        ["qemu-img", *map(str, arguments)], check=True, timeout=60, capture_output=True
    ).stdout


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """A disk of 9 MiB with data at both ends."""
    path = tmp_path_factory.mktemp("raw") / "disk.raw"
    path.write_bytes(random.Random(3).randbytes(3 * MIB) + bytes(5 * MIB) + random.Random(4).randbytes(MIB))
    return path


@pytest.fixture(scope="module")
def made(raw):
    """Return the bytes of a good image of a format."""
    known = {}

    def make(form, options):
        if (form, options) not in known:
            path = raw.parent / f"made.{form}"
            qemu_img("convert", "-f", "raw", "-O", form, "-o", options, raw, path)
            known[form, options] = path.read_bytes()
        return known[form, options]

    return make


@pytest.fixture
def vmdk(made):
    return bytearray(made(*GOOD[0]))


@pytest.fixture
def cached(tmp_path):
    """Return a function that prepares bytes as an image."""
    (tmp_path / "sources").mkdir()

    async def prepare(data, form, progress=ignore, policy=None, **more):
        path = tmp_path / "sources" / "image"
        path.write_bytes(data)
        sha = hashlib.sha256(data).hexdigest()
        rules = ImagePolicy(file_roots=[path.parent], **(policy or {}))
        source = ImageSource(url=f"file://{path}", sha256=sha, format=form, **more)
        return await ImageCache(tmp_path / "cache", rules).prepare(source, progress)

    return prepare


async def refused(cached, tmp_path, data, form, error=ImageRejected, **more):
    with pytest.raises(error) as caught:
        await cached(bytes(data), form, **more)
    assert list((tmp_path / "cache").iterdir()) == []
    assert str(tmp_path) not in caught.value.message
    return caught.value.code


@pytest.mark.parametrize(("form", "options"), GOOD, ids=str)
@pytest.mark.parametrize("packed", [False, True])
async def test_good_ones_become_qcow2(cached, made, raw, tmp_path, form, options, packed):
    data, more = made(form, options), {}
    if packed:
        data, more = zstandard.ZstdCompressor().compress(data), {"compression": "zstd"}
    progress = []
    image = await cached(data, form, lambda *figures: progress.append(figures), **more)
    assert (image.format, image.virtual_size_bytes) == ("qcow2", 9 * MIB)
    assert image.sha256 == hashlib.sha256(data).hexdigest()
    assert image.path.name == f"{image.sha256}.qcow2"
    info = json.loads(qemu_img("info", "--output=json", "-f", "qcow2", image.path))
    assert (info["virtual-size"], "backing-filename" in info) == (9 * MIB, False)
    qemu_img("convert", "-f", "qcow2", "-O", "raw", image.path, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == raw.read_bytes()
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [image.path.name, f"{image.path.name}.json"]
    assert progress[-1][0] == progress[-1][1]
    assert await cached(data, form, **more) == image
    with pytest.raises(ImageRejected) as caught:
        await cached(data, "qcow2", **more)
    assert caught.value.code == "image_format_mismatch"


async def test_one_conversion_for_many(cached, made, monkeypatch):
    runs, real = [], convert.Conversion.run

    def counted(self, *arguments):
        runs.append(arguments)
        real(self, *arguments)

    monkeypatch.setattr(convert.Conversion, "run", counted)
    first = await cached(made(*GOOD[0]), "vmdk")
    path = first.path
    for file in path.parent.iterdir():
        file.unlink()
    runs.clear()
    cache = ImageCache(path.parent, ImagePolicy(file_roots=[path.parent.parent / "sources"]))
    source = ImageSource(
        url=f"file://{path.parent.parent / 'sources' / 'image'}", sha256=first.sha256, format="vmdk"
    )
    assert len(set(await asyncio.gather(*(cache.prepare(source, ignore) for _ in range(10))))) == 1
    assert len(runs) == 1


@pytest.mark.parametrize("subformat", ["monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"])
async def test_vmdks_of_several_files(cached, raw, tmp_path, subformat):
    qemu_img("convert", "-f", "raw", "-O", "vmdk", "-o", f"subformat={subformat}", raw, tmp_path / "many.vmdk")
    assert await refused(cached, tmp_path, (tmp_path / "many.vmdk").read_bytes(), "vmdk") == "image_unsafe"


def with_descriptor(vmdk, change):
    """The vmdk with its descriptor's text changed."""
    text = change(bytes(vmdk[512 : 21 * 512]).rstrip(b"\0"))
    assert len(text) <= 20 * 512
    return vmdk[:512] + text.ljust(20 * 512, b"\0") + vmdk[21 * 512 :]


def replaced(old, new):
    def change(text):
        assert old in text
        return text.replace(old, new)

    return change


def added(line):
    return lambda text: text + line + b"\n"


DESCRIPTORS = {
    "flat": replaced(b"monolithicSparse", b"monolithicFlat"),
    "custom": replaced(b"monolithicSparse", b"custom"),
    "raw device": replaced(b"monolithicSparse", b"fullDevice"),
    "second type": added(b'createType="monolithicFlat"'),
    "hidden type": lambda text: b'#createTypeXXmonolithicFlat"\n' + text,
    "type in other case": added(b'CREATETYPE="monolithicFlat"'),
    "no type": replaced(b"createType", b"ddb.createT"),
    "second extent": added(b'RW 10 SPARSE "other.vmdk"'),
    "flat extent": replaced(b"SPARSE", b"FLAT"),
    "extent elsewhere": lambda text: text.replace(b'SPARSE "', b'SPARSE "/etc/'),
    "extent above": lambda text: text.replace(b'SPARSE "', b'SPARSE "../'),
    "extent of another size": replaced(b"RW 18432", b"RW 18431"),
    "no extent": replaced(b"RW 18432", b"# 18432"),
    "parent": added(b'parentFileNameHint="/etc/passwd"'),
    "parent in other case": added(b'PARENTFILENAMEHINT="/etc/passwd"'),
    "parent in a comment": added(b'#parentFileNameHint="/etc/passwd"'),
    "parent behind the end": lambda text: text + b"\0" * 3 + b'parentFileNameHint="/etc/passwd"',
    "parent by id": replaced(b"parentCID=ffffffff", b"parentCID=12345678"),
    "unknown line": added(b"something else"),
    "no ascii": added(b"# \xc3\xa4"),
    "control characters": added(b"#\x01"),
}


@pytest.mark.parametrize("name", DESCRIPTORS)
async def test_descriptors_that_qemu_never_gets(cached, tmp_path, vmdk, name, monkeypatch):
    monkeypatch.setattr(convert.subprocess, "Popen", None)
    data = with_descriptor(vmdk, DESCRIPTORS[name])
    assert await refused(cached, tmp_path, data, "vmdk") == "image_unsafe"


def test_what_the_descriptors_test_begins_with_is_a_good_one(vmdk):
    assert with_descriptor(vmdk, lambda text: text) == vmdk


@pytest.mark.parametrize(
    ("place", "form", "value", "code"),
    [
        (12, "<Q", 0, "image_unsafe"),  # QEMU then opens what the descriptor names
        (12, "<Q", 2**63, "image_unsafe"),
        (12, "<Q", 2**20, "image_unsafe"),
        (20, "<Q", 0, "image_corrupt"),
        (28, "<Q", 3, "image_unsafe"),
        (36, "<Q", 0, "image_unsafe"),
        (36, "<Q", 2**40, "image_unsafe"),
        (44, "<I", 0, "image_corrupt"),
        (44, "<I", 2**31, "image_corrupt"),
        (4, "<I", 4, "image_corrupt"),
        (56, "<Q", 0, "image_corrupt"),
        (56, "<Q", 2**60, "image_corrupt"),
        (56, "<Q", 2**30, "image_corrupt"),
    ],
)
async def test_vmdk_headers(cached, tmp_path, vmdk, place, form, value, code, monkeypatch):
    monkeypatch.setattr(convert.subprocess, "Popen", None)
    struct.pack_into(form, vmdk, place, value)
    assert await refused(cached, tmp_path, vmdk, "vmdk") == code


async def test_vmdk_footer_that_contradicts(cached, tmp_path, made, monkeypatch):
    monkeypatch.setattr(convert.subprocess, "Popen", None)
    data = bytearray(made(*GOOD[1]))
    struct.pack_into("<Q", data, 56, 2**64 - 1)
    # A footer's marker, the header again, and the end-of-stream marker.
    footer = data[:512]
    struct.pack_into("<Q", footer, 12, 5)
    assert await refused(cached, tmp_path, data + bytes(512), "vmdk") == "image_corrupt"
    data += struct.pack("<QII", 1, 0, 3).ljust(512, b"\0") + footer + bytes(512)
    assert await refused(cached, tmp_path, data, "vmdk") == "image_unsafe"


@pytest.mark.parametrize(("form", "options"), GOOD, ids=str)
@pytest.mark.parametrize("share", [0.00001, 0.01, 0.5])
async def test_truncated(cached, tmp_path, made, form, options, share):
    data = made(form, options)
    code = await refused(cached, tmp_path, data[: int(len(data) * share)], form)
    assert code in {"image_corrupt", "image_format_mismatch", "image_unsafe"}


def vhdx_metadata(data):
    """Return where the metadata region is."""
    for start in range(192 * 1024 + 16, 192 * 1024 + 1000, 32):
        if data[start : start + 4] == bytes.fromhex("06a27c8b"):
            return struct.unpack_from("<Q", data, start + 16)[0]
    raise AssertionError("no metadata region")


@pytest.mark.parametrize("what", ["has parent", "parent locator", "log", "size", "twice", "no regions", "region away"])
async def test_vhdx_that_qemu_never_gets(cached, tmp_path, made, what, monkeypatch):
    monkeypatch.setattr(convert.subprocess, "Popen", None)
    data = bytearray(made(*GOOD[2]))
    place = vhdx_metadata(data)
    count = struct.unpack_from("<H", data, place + 10)[0]
    items = {bytes(data[p : p + 4]): p for p in range(place + 32, place + 32 + 32 * count, 32)}
    parameters, size = items[bytes.fromhex("3767a1ca")], items[bytes.fromhex("2442a52f")]
    code = "image_corrupt"
    if what == "has parent":
        at = place + struct.unpack_from("<I", data, parameters + 16)[0]
        data[at + 4] |= 2
        code = "image_unsafe"
    elif what == "parent locator":
        data[size : size + 16] = bytes.fromhex("2d5fd3a80bb34d45abf7d3d84834ab0c")
        code = "image_unsafe"
    elif what == "log":
        for header in (64 * 1024, 128 * 1024):
            data[header + 48] = 1
    elif what == "size":
        struct.pack_into("<Q", data, place + struct.unpack_from("<I", data, size + 16)[0], 2**62)
    elif what == "twice":
        data[size : size + 16] = data[parameters : parameters + 16]
    elif what == "no regions":
        data[192 * 1024] = 0
    else:
        data = data[: place + 100]
    assert await refused(cached, tmp_path, data, "vhdx") == code


@pytest.mark.parametrize(("form", "options"), GOOD, ids=str)
async def test_the_virtual_size_has_a_limit(cached, tmp_path, made, form, options):
    policy = {"max_virtual_size_mib": 8}
    assert await refused(cached, tmp_path, made(form, options), form, policy=policy) == "image_too_large"


@pytest.mark.parametrize("seed", range(8))
async def test_damaged_anywhere(cached, tmp_path, made, seed):
    """It ends in a refusal or an image: never in a hang, a foreign error or a file left behind."""
    dice = random.Random(seed)
    form, options = GOOD[seed % 4]
    data = bytearray(made(form, options))
    for _ in range(200):
        data[dice.randrange(min(len(data), 4 * MIB))] = dice.randrange(256)
    try:
        image = await cached(bytes(data), form)
        assert image.format == "qcow2"
    except ImageRejected:
        assert list((tmp_path / "cache").iterdir()) == []


FAKE = """#!/bin/sh
echo "$@" > {log}
ulimit -a >> {log}
echo "    (12.50/100%)"
echo $$ > {pid}
exec sleep {sleep}
"""


@pytest.fixture
def slow_qemu_img(tmp_path, monkeypatch):
    """In place of qemu-img, a program that notes how it was started and then sleeps."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "qemu-img"
    script.write_text(FAKE.format(log=folder / "log", pid=folder / "pid", sleep=600))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def is_gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


async def test_timeout(cached, tmp_path, vmdk, slow_qemu_img):
    policy = {"convert_timeout_s": 4}
    assert await refused(cached, tmp_path, vmdk, "vmdk", DeadlineExceeded, policy=policy) == "image_timeout"
    assert is_gone(int((slow_qemu_img / "pid").read_text()))


async def test_limits_and_cancel(cached, tmp_path, vmdk, slow_qemu_img):
    task = asyncio.create_task(cached(bytes(vmdk), "vmdk", policy={"convert_memory_mib": 500}))
    pid = slow_qemu_img / "pid"
    async with asyncio.timeout(240):
        while not (pid.exists() and pid.read_text().strip()):
            await asyncio.sleep(0.01)
    log = (slow_qemu_img / "log").read_text()
    assert log.startswith("convert -p -f vmdk -O qcow2 ")
    limits = {line.split("(")[0].strip(): line.split()[-1] for line in log.splitlines()[1:]}
    assert {limits[name] for name in limits if name.startswith(("vmemory", "virtual memory"))} == {"512000"}
    assert {limits[name] for name in limits if name.startswith(("time", "cpu time"))} == {"60"}
    assert {limits[name] for name in limits if name.startswith(("file", "file size"))} == {str((9 + 1 + 64) * 2048)}
    child = int(pid.read_text())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert is_gone(child)
    assert list((tmp_path / "cache").iterdir()) == []


async def test_output_cannot_outgrow_what_the_header_says(cached, tmp_path, vmdk, monkeypatch):
    """Were the header lying in a way that nobody thought of: the file size is limited all the same."""
    monkeypatch.setattr(convert, "_ROUND_MIB", -8)
    assert await refused(cached, tmp_path, vmdk, "vmdk") == "image_corrupt"


@pytest.mark.parametrize("said", ["qemu_thread_create: Resource temporarily unavailable", "Cannot allocate memory", ""])
def test_short_memory_is_not_the_images_fault(said):
    """Seen on a busy disk: as qemu-img's threads used up its address space, a good image was called corrupt."""
    assert convert._translate(-6, said).code == "qemu_img_failed"


async def test_threads_share_one_arena(cached, vmdk, slow_qemu_img):
    script = slow_qemu_img / "qemu-img"
    script.write_text(f"#!/bin/sh\necho $MALLOC_ARENA_MAX > {slow_qemu_img}/arena\nexit 1\n")
    with pytest.raises(ComputeError):
        await cached(bytes(vmdk), "vmdk")
    assert (slow_qemu_img / "arena").read_text().strip() == "1"
