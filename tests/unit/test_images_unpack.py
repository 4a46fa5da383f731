"""Decompressors: whatever the chunks and whatever the bytes, the content comes out, or a typed refusal."""

import gzip
import itertools
import lzma
import os
import random
import tracemalloc

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.errors import ImageRejected
from agent.images.unpack import PIECE, unpacker

PACK = {
    "gzip": lambda data: gzip.compress(data, 1, mtime=0),
    "xz": lambda data: lzma.compress(data, preset=0),
    "zstd": lambda data: zstandard.ZstdCompressor(level=1, write_checksum=True).compress(data),
}
KINDS = sorted(PACK)
DATA = random.Random(1).randbytes(70_000) + bytes(300_000) + random.Random(2).randbytes(3)


def unpack(kind, packed, cuts=(), limit=None):
    out = bytearray()

    def sink(piece):
        assert 0 < len(piece) <= PIECE
        out.extend(piece)
        if limit is not None and len(out) > limit:
            raise ImageRejected("too much", code="image_too_large")

    one = unpacker(kind, sink)
    edges = [0, *sorted(cuts), len(packed)]
    for start, end in itertools.pairwise(edges):
        one.feed(packed[start:end])
    one.finish()
    return bytes(out)


def code(kind, packed, **more):
    with pytest.raises(ImageRejected) as caught:
        unpack(kind, packed, **more)
    return caught.value.code


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [1, 7, 4096, 65_536, 10**9])
def test_whatever_the_chunks(kind, step):
    data = DATA[:3000] if step < 100 else DATA
    packed = PACK[kind](data)
    assert unpack(kind, packed, range(step, len(packed), step)) == data


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(parts=st.lists(st.binary(max_size=2000), min_size=1, max_size=4), seed=st.integers(0, 2**32))
def test_several_members(kind, parts, seed):
    packed = b"".join(PACK[kind](part) for part in parts)
    cuts = [random.Random(seed + n).randrange(len(packed)) for n in range(5)]
    assert unpack(kind, packed, cuts) == b"".join(parts)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_truncation_is_noticed(kind, data):
    packed = PACK[kind](DATA[:5000])
    cut = data.draw(st.integers(0, len(packed) - 1))
    with pytest.raises(ImageRejected) as caught:
        unpack(kind, packed[:cut])
    assert caught.value.code in {"image_corrupt", "image_format_mismatch"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_that_is_cut_off_is_noticed(kind):
    packed = PACK[kind](DATA[:5000])
    for cut in range(1, 20):
        assert code(kind, packed[:cut]) in {"image_corrupt", "image_format_mismatch"}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_gives_a_refusal_or_the_content(kind, data):
    packed = bytearray(PACK[kind](DATA[:5000]))
    packed[data.draw(st.integers(0, len(packed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        found = unpack(kind, bytes(packed))
    except ImageRejected as exc:
        found = exc.code
    # The content, where it was a bit of a time or a name in a header.
    assert found in {DATA[:5000], "image_corrupt", "image_format_mismatch", "image_unsafe"}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(rubbish=st.binary(max_size=300))
def test_rubbish_is_refused(kind, rubbish):
    assert code(kind, rubbish) in {"image_corrupt", "image_format_mismatch"}
    head = PACK[kind](b"")[:8]
    with pytest.raises(ImageRejected):
        unpack(kind, head + b"\xff" + rubbish)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("behind", [b"x", b"garbage behind the end", b"\x1f\x8b", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd"])
def test_garbage_behind_the_end(kind, behind):
    assert code(kind, PACK[kind](DATA) + behind) == "image_corrupt"


@pytest.mark.parametrize("kind", ["gzip", "xz"])
def test_zeros_behind_the_end_are_padding(kind):
    assert unpack(kind, PACK[kind](DATA) + bytes(512)) == DATA


def test_padding_before_the_first_member_is_not():
    assert code("gzip", bytes(8) + PACK["gzip"](DATA)) == "image_format_mismatch"


def test_skippable_zstd_frames():
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    packed = PACK["zstd"](DATA)
    assert unpack("zstd", skippable + packed + skippable) == DATA


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", KINDS)
def test_declared_otherwise(kind, other):
    if kind != other:
        assert code(kind, PACK[other](DATA)) == "image_format_mismatch"
    assert code(kind, b"") == "image_format_mismatch"


@pytest.mark.parametrize("kind", KINDS)
def test_a_bomb_ends_early_and_takes_no_memory(kind):
    if kind == "zstd":
        bomb = zstandard.ZstdCompressor().compress(bytes(256 * PIECE)) * 8
    else:
        bomb = PACK[kind](bytes(64 * PIECE)) * 32
    tracemalloc.start()
    try:
        assert code(kind, bomb, limit=20 * PIECE) == "image_too_large"
        assert tracemalloc.get_traced_memory()[1] < 40 * PIECE
    finally:
        tracemalloc.stop()


def test_windows_that_are_too_large():
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=30, enable_ldm=True)
    one = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    assert code("zstd", one.compress(os.urandom(10)) + one.flush()) == "image_unsafe"
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 2**28}]
    assert code("xz", lzma.compress(DATA, filters=filters)) == "image_unsafe"


def test_the_largest_windows_of_the_usual_tools():
    assert unpack("xz", lzma.compress(DATA, preset=9)) == DATA
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=27, enable_ldm=True)
    one = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    assert unpack("zstd", one.compress(DATA) + one.flush()) == DATA
