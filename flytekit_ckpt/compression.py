"""Deflate, CRC-32 and what else compresses, by the fastest library that is there."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable
from typing import Protocol, cast

try:
    from isal import igzip_lib
    from isal import isal_zlib as deflate
except ImportError:  # where isal has no wheel: slower, same format
    deflate = zlib  # type: ignore[misc]
    igzip_lib = None  # type: ignore[assignment]

COMPRESSION_LEVEL = 1
"""The fastest level that compresses: many times faster than gzip's default of 9 for a few per cent more bytes."""

GZIP_MAGIC = b"\x1f\x8b"
"""What every gzip file begins with."""

# The stubs of isal call it an instance.
_DeflateError = cast("type[Exception]", deflate.error)


def deflated(data: bytes | memoryview) -> bytes:
    """Compress bytes at once, without a header."""
    if igzip_lib is not None:
        compressed: bytes = deflate.compress(data, COMPRESSION_LEVEL, -zlib.MAX_WBITS)
        return compressed
    engine = zlib.compressobj(COMPRESSION_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
    return engine.compress(data) + engine.flush()


def inflated_exactly(data: bytes | memoryview, size: int) -> bytes:
    """Inflate bytes without a header to so many; anything else is a `ValueError`."""
    engine = deflate.decompressobj(-zlib.MAX_WBITS)
    try:
        content: bytes = engine.decompress(data, size + 1)
    except _DeflateError as error:
        message = f"its compressed data is damaged ({error})"
        raise ValueError(message) from error
    if not engine.eof or engine.unused_data or len(content) != size:
        message = "its compressed data is damaged or truncated (checksum or length differ)"
        raise ValueError(message)
    return content


def crc32(data: bytes | memoryview, crc: int = 0) -> int:
    """Continue the CRC-32 of a stream of bytes."""
    return int(deflate.crc32(data, crc))


def byte_sum(block: bytes) -> int:
    """Sum up the bytes of a block of at most 512."""
    # Half of an Adler-32 is one more than the sum of the bytes, modulo 65521, which that many of ASCII do not reach.
    return (zlib.adler32(block) & 0xFFFF) - 1 if block.isascii() else sum(block)


class Decompressor(Protocol):
    """What inflates a stream step by step, like `bz2.BZ2Decompressor`."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class ZlibDecompressor:
    """One gzip member, with the interface of `bz2.BZ2Decompressor`; zlib verifies its CRC and length."""

    def __init__(self) -> None:
        self._engine = zlib.decompressobj(zlib.MAX_WBITS | 16)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._engine.eof

    @property
    def unused_data(self) -> bytes:
        return self._engine.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        out = self._engine.decompress(self._engine.unconsumed_tail + data, max_length)
        self.needs_input = not self._engine.unconsumed_tail and len(out) < max_length
        return out


def gzip_decompressor() -> Decompressor:
    """Make what inflates one gzip member; it verifies its CRC and length."""
    if igzip_lib is None:
        return ZlibDecompressor()
    return igzip_lib.IgzipDecompressor(igzip_lib.DECOMP_GZIP)


DECOMPRESSION_ERRORS = (_DeflateError, zlib.error, lzma.LZMAError, OSError, EOFError, ValueError)


def compression_of(start: bytes | bytearray) -> Callable[[], Decompressor] | None:
    """What makes a decompressor for what begins with `start`, `None` for plain bytes."""
    if start.startswith(GZIP_MAGIC):
        return gzip_decompressor
    if start.startswith(b"BZh"):
        return bz2.BZ2Decompressor
    if start.startswith((b"\xfd7zXZ\x00", b"\x5d\x00\x00")):
        return lzma.LZMADecompressor
    return None
