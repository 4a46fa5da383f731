"""Decompression while the bytes stream: gzip, xz and zstd, with bounded memory whatever the input is.

An unpacker hands pieces of at most `PIECE` bytes to its sink, which may raise to stop it: that is how a
decompression bomb ends. Runs in the download's worker thread.
"""

from __future__ import annotations

import lzma
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from agent.errors import ImageRejected

if TYPE_CHECKING:
    import zstandard

Compression = Literal["gzip", "xz", "zstd"]
Sink = Callable[[bytes], None]

PIECE = 1024 * 1024
MEMORY_BYTES = 128 * 1024 * 1024
"""The largest window or dictionary that is accepted: what `xz -9` and `zstd --long` need."""
_SLICE = 64 * 1024
"""Input that a decoder gets at once; what it has not used is copied each time it has filled a piece."""
_MAGIC: dict[Compression, tuple[bytes, ...]] = {
    "gzip": (b"\x1f\x8b",),
    "xz": (b"\xfd7zXZ\x00",),
    "zstd": (b"\x28\xb5\x2f\xfd", *(bytes([0x50 + n, 0x2A, 0x4D, 0x18]) for n in range(16))),
}
_LONGEST_MAGIC = 6


def unpacker(compression: Compression, sink: Sink) -> Unpacker:
    """Make the unpacker for one image. Loads its library: call it in a thread."""
    if compression == "gzip":
        return _Gzip(compression, sink)
    return _Xz(compression, sink) if compression == "xz" else _Zstd(compression, sink)


def damaged(compression: str, reason: str) -> ImageRejected:
    """Make the refusal of a compressed stream that is damaged: code `image_corrupt`; a retry cannot help."""
    return ImageRejected(f"the image cannot be decompressed as {compression}: {reason}", code="image_corrupt")


class Unpacker(ABC):
    """Unpacks one stream: `feed` every chunk in order, then `finish` once. Not for several threads.

    Raises what the sink raises, and `ImageRejected`, which a retry cannot help: `image_format_mismatch` (other
    bytes than declared), `image_corrupt` (damaged, cut off, or with something behind its end), `image_unsafe`
    (needs more than `MEMORY_BYTES` to be unpacked).
    """

    def __init__(self, compression: Compression, sink: Sink) -> None:
        self._compression = compression
        self._sink = sink
        self._head: bytes | None = b""

    def feed(self, chunk: bytes | bytearray) -> None:
        """Unpack the next bytes."""
        if self._head is not None:
            chunk = self._head + chunk
            self._head = bytes(chunk)
            if len(chunk) < _LONGEST_MAGIC:
                return
            self._check_magic(self._head)
        view = memoryview(chunk)
        for start in range(0, len(view), _SLICE):
            self._decode(bytes(view[start : start + _SLICE]))

    def finish(self) -> None:
        """Check that the stream ended where it had to."""
        if self._head is not None:
            self._check_magic(self._head)
            raise damaged(self._compression, "it ends within its header")
        self._end()

    def _check_magic(self, head: bytes) -> None:
        self._head = None
        if not head.startswith(_MAGIC[self._compression]):
            raise ImageRejected(
                f"the image is declared as compressed with {self._compression}, but it is not",
                code="image_format_mismatch",
                declared=self._compression,
            )

    @abstractmethod
    def _decode(self, data: bytes) -> None:
        """Unpack a slice."""

    @abstractmethod
    def _end(self) -> None:
        """Raise unless the stream is complete."""


class _Members(Unpacker):
    """gzip and xz: complete streams one behind the other; zero bytes may follow each as padding."""

    _decoder: Any = None

    def _decode(self, data: bytes) -> None:
        while data:
            if self._decoder is None:
                data = data.lstrip(b"\0")
                if not data:
                    return
                self._decoder = self._new()
            try:
                data = self._some(data)
            except (zlib.error, lzma.LZMAError) as exc:
                raise self._translated(exc) from exc

    def _end(self) -> None:
        if self._decoder is not None:
            raise damaged(self._compression, "it ends early, or something follows its end")

    def _translated(self, exc: Exception) -> ImageRejected:
        if "emory usage limit" in str(exc):
            return _too_much_memory(self._compression)
        return damaged(self._compression, str(exc))

    @abstractmethod
    def _new(self) -> Any:
        """Make a decoder of one stream."""

    @abstractmethod
    def _some(self, data: bytes) -> bytes:
        """Unpack until the data or the stream ends; return what is behind the stream's end."""


class _Gzip(_Members):
    def _new(self) -> Any:
        return zlib.decompressobj(wbits=31)

    def _some(self, data: bytes) -> bytes:
        decoder = self._decoder
        while True:
            piece = decoder.decompress(data, PIECE)
            if piece:
                self._sink(piece)
            if decoder.eof:
                self._decoder = None
                return bytes(decoder.unused_data)
            data = decoder.unconsumed_tail
            if not data and len(piece) < PIECE:
                return b""


class _Xz(_Members):
    def _new(self) -> Any:
        return lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=MEMORY_BYTES)

    def _some(self, data: bytes) -> bytes:
        decoder = self._decoder
        while True:
            piece = decoder.decompress(data, PIECE)
            data = b""
            if piece:
                self._sink(piece)
            if decoder.eof:
                self._decoder = None
                return bytes(decoder.unused_data)
            if decoder.needs_input:
                return b""


_ZSTD_HEADER_BYTES = 18
"""The longest header of a frame."""


class _Zstd(Unpacker):
    """The library writes pieces to us as it makes them; it does not say where a frame ends (see `_end`)."""

    def __init__(self, compression: Compression, sink: Sink) -> None:
        import zstandard  # noqa: PLC0415 - loaded when the first image needs it

        super().__init__(compression, sink)
        self._error = zstandard.ZstdError
        self._begin = b""
        decompressor = zstandard.ZstdDecompressor(max_window_size=MEMORY_BYTES)
        self._writer: zstandard.ZstdDecompressionWriter = decompressor.stream_writer(self, write_size=PIECE)  # type: ignore[arg-type]

    def write(self, piece: bytes) -> int:
        """Take a piece from the library."""
        self._sink(bytes(piece))
        return len(piece)

    def _decode(self, data: bytes) -> None:
        if len(self._begin) < _ZSTD_HEADER_BYTES:
            self._begin += data[: _ZSTD_HEADER_BYTES - len(self._begin)]
        try:
            self._writer.write(data)
        except self._error as exc:
            if "too much memory" in str(exc):
                raise _too_much_memory(self._compression) from exc
            raise damaged(self._compression, str(exc).rpartition(": ")[2]) from exc

    def _end(self) -> None:
        """A frame of our own behind the last one comes out as it is only where that one was complete."""
        import zstandard  # noqa: PLC0415

        try:
            # The library forgets a header that was cut off, and would take the proof for the first frame.
            zstandard.get_frame_parameters(self._begin)
        except self._error as exc:
            raise damaged(self._compression, "it ends early") from exc
        proof, seen = os.urandom(16), bytearray()
        self._sink = seen.extend
        self._decode(zstandard.ZstdCompressor().compress(proof))
        if seen != proof:
            raise damaged(self._compression, "it ends early")


def _too_much_memory(compression: str) -> ImageRejected:
    return ImageRejected(
        f"the image needs more than {MEMORY_BYTES // 1024**2} MiB of memory to be decompressed as {compression};"
        " publish it with a smaller window",
        code="image_unsafe",
    )
