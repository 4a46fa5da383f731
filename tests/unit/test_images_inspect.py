"""Formats: what is accepted, and each thing that is not. The qcow2 images are made here, field by field."""

import shutil
import struct
import subprocess
import sys

import pytest

from agent.errors import ImageRejected
from agent.images.inspect import Inspector
from agent.images.policy import ImagePolicy

CLUSTER = 65_536
MIB = 2**20


def qcow2_image(**changes):
    """A small valid qcow2 (header, refcount table and block, L1, one L2) with the given header fields changed."""
    fields = {
        "magic": b"QFI\xfb", "version": 3, "backing_offset": 0, "backing_size": 0, "cluster_bits": 16, "size": 10 * MIB,
        "crypt": 0, "l1_size": 1, "l1_offset": 3 * CLUSTER, "reftable_offset": CLUSTER, "reftable_clusters": 1,
        "snapshots": 0, "snapshots_offset": 0, "incompatible": 0, "compatible": 0, "autoclear": 0, "refcount_order": 4,
        "header_length": 104,
    }  # fmt: skip
    l2_offset = changes.pop("l2_offset", 4 * CLUSTER)
    clusters = changes.pop("clusters", 5)
    assert not set(changes) - set(fields)
    fields |= changes
    image = bytearray(clusters * CLUSTER)
    struct.pack_into(">4sIQIIQIIQQIIQQQQII", image, 0, *fields.values())
    struct.pack_into(">Q", image, CLUSTER, 2 * CLUSTER)  # refcount block
    for cluster in range(5):
        struct.pack_into(">H", image, 2 * CLUSTER + 2 * cluster, 1)
    struct.pack_into(">Q", image, 3 * CLUSTER, l2_offset | 1 << 63)
    return bytes(image)


def inspect(data, declared, tmp_path, policy=None, chunk=100_000):
    path = tmp_path / "image"
    path.write_bytes(data)
    inspector = Inspector(declared, policy or ImagePolicy())
    for start in range(0, len(data), chunk):
        inspector.feed(data[start : start + chunk])
    with path.open("rb") as file:
        return inspector.finish(file.fileno(), len(data))


def refusal(data, declared, tmp_path, policy=None):
    with pytest.raises(ImageRejected) as caught:
        inspect(data, declared, tmp_path, policy)
    return caught.value.code


def at(offset, data, length=MIB):
    image = bytearray(length)
    image[offset : offset + len(data)] = data
    return bytes(image)


@pytest.mark.parametrize("chunk", [37, 512, 65_536, 10 * MIB])
def test_good_qcow2_gives_its_virtual_size(tmp_path, chunk):
    assert inspect(qcow2_image(), "qcow2", tmp_path, chunk=chunk) == 10 * MIB


def test_version_2_is_accepted(tmp_path):
    assert inspect(qcow2_image(version=2, refcount_order=0, header_length=0), "qcow2", tmp_path) == 10 * MIB


@pytest.mark.skipif(not shutil.which("qemu-img"), reason="needs qemu-img")
def test_the_image_made_here_is_one_for_qemu(tmp_path):
    """Otherwise every refusal below could be right for a wrong reason."""
    (tmp_path / "image").write_bytes(qcow2_image())
    subprocess.run(
        ["qemu-img", "check", "-f", "qcow2", tmp_path / "image"], check=True, timeout=30, stdout=subprocess.PIPE
    )


@pytest.mark.skipif(not shutil.which("qemu-img"), reason="needs qemu-img")
@pytest.mark.parametrize(
    "options", ["compat=0.10", "compat=1.1", "cluster_size=2M", "compression_type=zstd", "refcount_bits=1"]
)
def test_what_qemu_makes_is_accepted(tmp_path, options):
    path = tmp_path / "made"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, "3G"], check=True, timeout=30)
    assert inspect(path.read_bytes(), "qcow2", tmp_path) == 3 * 2**30


@pytest.mark.parametrize(
    "changes",
    [
        {"backing_offset": 512, "backing_size": 10},
        {"backing_offset": 512, "backing_size": 0},
        {"incompatible": 4},
        {"incompatible": 1 << 5},
        {"incompatible": 1 << 63},
        {"version": 1},
        {"version": 4},
        {"crypt": 1},
        {"crypt": 2},
    ],
    ids=str,
)
def test_unsafe_qcow2(tmp_path, changes):
    assert refusal(qcow2_image(**changes), "qcow2", tmp_path) == "image_unsafe"


@pytest.mark.parametrize(
    "changes",
    [
        {"incompatible": 1},
        {"incompatible": 2},
        {"cluster_bits": 8},
        {"cluster_bits": 22},
        {"size": 0},
        {"size": 2**63},
        {"size": 2 * 2**30},
        {"l1_size": 0},
        {"l1_size": 2**31},
        {"l1_offset": 3 * CLUSTER + 8},
        {"l1_offset": 50 * CLUSTER},
        {"l1_offset": 2**63},
        {"reftable_offset": 50 * CLUSTER},
        {"reftable_clusters": 2**31},
        {"snapshots": 1, "snapshots_offset": 50 * CLUSTER},
        {"snapshots": 2**31},
        {"l2_offset": 50 * CLUSTER},
        {"clusters": 4},
    ],
    ids=str,
)
def test_damaged_qcow2(tmp_path, changes):
    assert refusal(qcow2_image(**changes), "qcow2", tmp_path) == "image_corrupt"


@pytest.mark.parametrize("length", [4, 60, 200, 511])
def test_qcow2_shorter_than_its_header(tmp_path, length):
    for declared in ("qcow2", "raw"):
        assert refusal(qcow2_image()[:length], declared, tmp_path) == "image_corrupt"


def test_internal_snapshots_are_accepted(tmp_path):
    assert inspect(qcow2_image(snapshots=1, snapshots_offset=4 * CLUSTER), "qcow2", tmp_path) == 10 * MIB


@pytest.mark.parametrize(
    "data",
    [
        at(510, b"\x55\xaa"),
        at(32_769, b"CD001"),
        b"plain text, no disk at all\n" * 1000,
        b"x",
        at(0, b"", 3 * MIB + 5),
    ],
    ids=["mbr", "iso", "text", "one byte", "zeros"],
)
def test_raw_content(tmp_path, data):
    assert inspect(data, "raw", tmp_path) == len(data)


def gpt():
    mbr = bytearray(MIB)
    struct.pack_into("<B3BB3BII", mbr, 446, 0, 0, 2, 0, 0xEE, 0xFF, 0xFF, 0xFF, 1, 2047)
    mbr[510:520] = b"\x55\xaaEFI PART"
    return bytes(mbr)


def test_gpt_counts_as_raw(tmp_path):
    assert inspect(gpt(), "raw", tmp_path) == MIB


@pytest.mark.parametrize(
    "data",
    [
        qcow2_image(),
        at(0, b"QED\x00"),
        at(0, b"conectix"),
        at(0, b"vhdxfile"),
        at(0x40, struct.pack("<I", 0xBEDA107F)),
        at(0, b"KDMV" + struct.pack("<IIQQQQIQQ", 1, 3, 100, 128, 1, 20, 512, 21, 26)),
        at(0, b"# Disk DescriptorFile\nversion=1\n", 1000),
        b'# Disk DescriptorFile\nversion=1\nRW 1 FLAT "/etc/shadow" 0\n',
        b'# Disk DescriptorFile\nversion=1\nRW 1 FLAT "/etc/shadow" 0\n' + b"#" * 1000,
        at(0, b"# any comment\n \r\nversion=2\r\n"),
        at(0, b"LUKS\xba\xbe\x00\x01"),
        at(0, b"WithouFreSpacExt"),
        at(0, b"\x1f\x8b\x08"),
        at(0, b"\xfd7zXZ\x00"),
        at(0, b"\x28\xb5\x2f\xfd"),
    ],
    ids=[
        "qcow2",
        "qed",
        "vhd",
        "vhdx",
        "vdi",
        "vmdk",
        "text, NULs",
        "text, short",
        "text, long",
        "text, comment",
        "luks",
        "parallels",
        "gzip",
        "xz",
        "zstd",
    ],
)
def test_container_declared_as_raw(tmp_path, data):
    assert refusal(data, "raw", tmp_path) == "image_format_mismatch"


@pytest.mark.parametrize("data", [gpt(), b"<html>404</html>", at(0, b"vhdxfile")], ids=["gpt", "text", "vhdx"])
def test_something_else_declared_as_qcow2(tmp_path, data):
    assert refusal(data, "qcow2", tmp_path) == "image_format_mismatch"


@pytest.mark.parametrize(("offset", "mark"), [(32_769, b"CD001"), (510, b"\x55\xaa")], ids=["iso", "mbr"])
def test_two_formats_at_once(tmp_path, offset, mark):
    image = bytearray(qcow2_image())
    image[offset : offset + len(mark)] = mark
    assert refusal(bytes(image), "qcow2", tmp_path) == "image_unsafe"
    assert refusal(bytes(image), "raw", tmp_path) == "image_format_mismatch"


def test_empty(tmp_path):
    assert refusal(b"", "raw", tmp_path) == "image_corrupt"
    assert refusal(b"", "qcow2", tmp_path) == "image_format_mismatch"


def test_virtual_size_limit(tmp_path):
    policy = ImagePolicy(max_virtual_size_mib=9)
    assert refusal(qcow2_image(), "qcow2", tmp_path, policy) == "image_too_large"
    assert refusal(bytes(9 * MIB + 1), "raw", tmp_path, policy) == "image_too_large"
    assert inspect(bytes(9 * MIB), "raw", tmp_path, policy) == 9 * MIB


def test_wrong_format_is_refused_before_the_end():
    inspector = Inspector("qcow2", ImagePolicy())
    with pytest.raises(ImageRejected):
        inspector.feed(bytes(MIB))


def test_idle_agent_does_not_load_what_only_downloads_need():
    code = "import sys, agent.images.cache; sys.exit(any(n in sys.modules for n in ('aiohttp', 'oslo_utils')))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
