"""Gzip members: what is compressed and inflated on its own, several side by side.

A gzip file may be made of many members, and any gzip reader takes such a file. Ours hold up to `MEMBER_SIZE` bytes each
and state their own compressed length in the header's extra field, so that the next one is found without inflating this
one. What others compressed is inflated as a stream.
"""

from __future__ import annotations

import bz2
import itertools
import lzma
import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol, cast

try:
    from isal import igzip_lib
    from isal import isal_zlib as deflate
except ImportError:  # where isal has no wheel: slower, same format
    deflate = zlib  # type: ignore[misc]
    igzip_lib = None  # type: ignore[assignment]

from flytekit_ckpt.errors import CorruptCheckpointError
from flytekit_ckpt.pipeline import LITTLE, Chunk, ahead, in_order, processors

MEMBER_SIZE = 2 << 20
"""Bytes of what is compressed in one member."""

MEMBER_LIMIT = 16 << 20
"""Bytes of the largest member that is held in memory: one that claims to be larger is none of ours, and a stream."""

COMPRESSION_LEVEL = 1
"""The fastest level that compresses: many times faster than gzip's default of 9 for a few per cent more bytes."""

STORED_ABOVE = 0.9
"""Share of its bytes that a member must compress to; one that does not (the weights of a model) is stored instead."""

GZIP_MAGIC = b"\x1f\x8b"
"""What every gzip file begins with."""

# The stubs of isal call it an instance.
_DeflateError = cast("type[Exception]", deflate.error)

# RFC 1952: magic, deflate, flags = extra field, no time, no hint, unknown system, then the field: its length, our
# two-letter id, the data's length, and the member's whole length in bytes.
_MEMBER_HEADER = struct.Struct("<4sIBBH2sHI")
_MEMBER_MARK = b"FC"
_MEMBER_TRAILER = struct.Struct("<II")
# RFC 1951: the length of a stored block is a 16-bit number.
_STORED_BLOCK = struct.Struct("<BHH")
_STORED_BLOCK_SIZE = 0xFFFF
_SAMPLE_SIZE = 4 << 10


def member(data: memoryview) -> bytes:
    """Make a member of some bytes: compressed, or stored where that is hardly more."""
    body = _shrunk(data) or _stored(data)
    length = _MEMBER_HEADER.size + sum(map(len, body)) + _MEMBER_TRAILER.size
    header = _MEMBER_HEADER.pack(GZIP_MAGIC + b"\x08\x04", 0, 0, 255, 8, _MEMBER_MARK, 4, length)
    return b"".join((header, *body, _MEMBER_TRAILER.pack(deflate.crc32(data), len(data))))


def _shrunk(data: memoryview) -> list[bytes] | None:
    """Compress, if samples of the data and the whole of it become smaller."""
    if len(data) > 8 * _SAMPLE_SIZE:
        starts = range(0, len(data), len(data) // 4)
        sample = b"".join(data[start : start + _SAMPLE_SIZE] for start in starts)
        if sum(map(len, _deflate(sample))) > STORED_ABOVE * len(sample):
            return None
    body = _deflate(data)
    return body if sum(map(len, body)) <= STORED_ABOVE * len(data) else None


def _deflate(data: bytes | memoryview) -> list[bytes]:
    if igzip_lib is not None:
        return [deflate.compress(data, COMPRESSION_LEVEL, -zlib.MAX_WBITS)]
    engine = zlib.compressobj(COMPRESSION_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
    return [engine.compress(data), engine.flush()]


def _stored(data: memoryview) -> list[bytes | memoryview]:
    pieces: list[bytes | memoryview] = []
    for start in range(0, len(data), _STORED_BLOCK_SIZE):
        block = data[start : start + _STORED_BLOCK_SIZE]
        is_last = start + len(block) == len(data)
        pieces += (_STORED_BLOCK.pack(is_last, len(block), len(block) ^ 0xFFFF), block)
    return pieces


# ---------------------------------------------------------------------------------------------------------------------

# RFC 1952: as above, but the field has an id of its own, and any length.
_NOTE_HEADER = struct.Struct("<4sIBBH2sH")
_NOTE_MARK = b"FI"
# Of no content: deflate's empty block, its CRC-32 and its length.
_NOTE_BODY = b"\x03\x00" + bytes(8)

NOTE_SIZE = 0xFFFF - 4
"""Bytes that a member's extra field takes, beside its own header."""


def note(content: bytes) -> bytes:
    """Make a member that holds nothing but, where other readers do not look, up to `NOTE_SIZE` bytes."""
    header = _NOTE_HEADER.pack(GZIP_MAGIC + b"\x08\x04", 0, 0, 255, 4 + len(content), _NOTE_MARK, len(content))
    return header + content + _NOTE_BODY


def note_size(length: int) -> int:
    """Give the bytes of a member that is a note of a length."""
    return _NOTE_HEADER.size + length + len(_NOTE_BODY)


def noted(start: bytes) -> bytes | None:
    """Give what a member that `start` begins with was made to hold; `None` if it is no note."""
    if len(start) < _NOTE_HEADER.size:
        return None
    *_, length = _NOTE_HEADER.unpack_from(start)
    content = start[_NOTE_HEADER.size : _NOTE_HEADER.size + length]
    return content if length <= NOTE_SIZE and start.startswith(note(content)) else None


def deflated(data: bytes) -> bytes:
    """Compress bytes at once, without a header."""
    return b"".join(_deflate(data))


def inflated_exactly(data: bytes, size: int) -> bytes:
    """Inflate what `deflated` made of so many bytes; anything else is a `ValueError`."""
    engine = deflate.decompressobj(-zlib.MAX_WBITS)
    try:
        content: bytes = engine.decompress(data, size + 1)
    except _DeflateError as error:
        raise ValueError(error) from error
    if not engine.eof or engine.unused_data or len(content) != size:
        message = "its compressed data is damaged or truncated (checksum or length differ)"
        raise ValueError(message)
    return content


def crc32(data: Chunk, crc: int = 0) -> int:
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


def _gzip() -> Decompressor:
    if igzip_lib is None:
        return ZlibDecompressor()
    return igzip_lib.IgzipDecompressor(igzip_lib.DECOMP_GZIP)


DECOMPRESSION_ERRORS = (_DeflateError, zlib.error, lzma.LZMAError, OSError, EOFError, ValueError)


def compression_of(start: bytes | bytearray) -> Callable[[], Decompressor] | None:
    """What makes a decompressor for what begins with `start`, `None` for plain bytes."""
    if start.startswith(GZIP_MAGIC):
        return _gzip
    if start.startswith(b"BZh"):
        return bz2.BZ2Decompressor
    if start.startswith((b"\xfd7zXZ\x00", b"\x5d\x00\x00")):
        return lzma.LZMADecompressor
    return None


class ByteStream:
    """Bytes of a stream of chunks, taken in any number and copied only where a chunk ends in the middle."""

    def __init__(self, chunks: Iterator[Chunk]) -> None:
        self._chunks = chunks
        self._left: deque[memoryview] = deque()
        self.position = 0

    def pieces(self, size: int) -> Iterator[memoryview]:
        """Yield the next `size` bytes, fewer at the end of the stream."""
        while size > 0:
            if not self._left:
                chunk = next(self._chunks, None)
                if chunk is None:
                    return
                self._left.append(memoryview(chunk))
            piece = self._left.popleft()
            if len(piece) > size:
                self._left.appendleft(piece[size:])
                piece = piece[:size]
            size -= len(piece)
            self.position += len(piece)
            yield piece

    def peek(self, size: int) -> bytes:
        """Return the next `size` bytes, fewer at the end of the stream, without taking them."""
        taken = b"".join(self.pieces(size))
        self.position -= len(taken)
        self._left.appendleft(memoryview(taken))
        return taken

    def at_hand(self) -> memoryview:
        """Return what is left of the chunk under way, perhaps nothing, without taking it."""
        return self._left[0] if self._left else memoryview(b"")

    def take(self, size: int) -> memoryview:
        """Take so many of the bytes at hand, of which there are as many."""
        piece = self._left.popleft()
        if size < len(piece):
            self._left.appendleft(piece[size:])
            piece = piece[:size]
        self.position += size
        return piece

    def rest(self) -> Iterator[Chunk]:
        """Yield what has not been taken."""
        while self._left:
            yield self._left.popleft()
        yield from self._chunks


def inflated(chunks: Iterator[Chunk], memory: int) -> Iterator[Chunk]:
    """Decompress: our own members side by side, anything else as a stream, one step ahead of the reader."""
    source = ByteStream(chunks)
    threads = min(processors(), max(1, memory // (4 * MEMBER_SIZE)))
    yield from in_order(_inflate_member, _members(source), threads=threads, memory=memory)
    start = source.peek(6)
    compression = _gzip if source.position else compression_of(start)
    if compression is None:
        yield from source.rest()
    elif start:
        stream = _inflate_stream(source.rest(), compression)
        yield from ahead(stream, count=max(1, min(4, memory // (2 * _INFLATED_SIZE))))


def _members(source: ByteStream) -> Iterator[tuple[int, list[memoryview]]]:
    """Take the members that state their own length, up to something else or the end."""
    while True:
        header = source.peek(_MEMBER_HEADER.size)
        length = stated_length(header)
        if length > MEMBER_LIMIT or length < _MEMBER_HEADER.size + _MEMBER_TRAILER.size:
            found = noted(source.peek(note_size(NOTE_SIZE))) if header[12:14] == _NOTE_MARK else None
            if found is None:
                return
            for _ in source.pieces(note_size(len(found))):
                pass
            continue
        pieces = list(source.pieces(length))
        if sum(map(len, pieces)) < length:
            raise CorruptCheckpointError(_TRUNCATED)
        # What it inflates to stands at its end; only of a little one is it worth looking.
        size = int.from_bytes(b"".join(pieces)[-4:], "little") if length <= LITTLE else MEMBER_SIZE
        yield length + min(size, MEMBER_SIZE), pieces


def stated_length(header: bytes | bytearray) -> int:
    """The length that one of our members states, 0 for anything else."""
    if len(header) < _MEMBER_HEADER.size or not header.startswith(GZIP_MAGIC):
        return 0
    _, _, _, _, _, mark, _, length = _MEMBER_HEADER.unpack_from(header)
    return int(length) if mark == _MEMBER_MARK else 0


def stated_crc32(member: bytes) -> int:
    """The CRC-32 that one of our members states of what it inflates to."""
    return int(_MEMBER_TRAILER.unpack(member[-_MEMBER_TRAILER.size :])[0])


def _inflate_member(pieces: list[memoryview]) -> bytes:
    member = memoryview(b"".join(pieces)) if len(pieces) > 1 else pieces[0]
    crc, size = _MEMBER_TRAILER.unpack(member[-_MEMBER_TRAILER.size :])
    if size > MEMBER_LIMIT:
        message = "its compressed data is damaged (a member of an impossible size)"
        raise CorruptCheckpointError(message)
    engine = deflate.decompressobj(-zlib.MAX_WBITS)
    try:
        data = engine.decompress(member[_MEMBER_HEADER.size : -_MEMBER_TRAILER.size], size + 1)
    except _DeflateError as error:
        raise _damaged(error) from error
    if not engine.eof or engine.unused_data or len(data) != size or deflate.crc32(data) != crc:
        message = "its compressed data is damaged or truncated (checksum or length differ)"
        raise CorruptCheckpointError(message)
    return data


def _inflate_stream(chunks: Iterator[Chunk], compression: Callable[[], Decompressor]) -> Iterator[bytes]:
    """Decompress a stream of one or many members, none of which may be cut short."""
    engine: Decompressor | None = None
    for piece in itertools.chain.from_iterable(map(_small, chunks)):
        data = piece
        while data or not (engine is None or engine.eof or engine.needs_input):
            if engine is None or engine.eof:
                # Zeros between and after members are padding.
                data = data.lstrip(b"\0")
                if not data:
                    break
                engine = compression()
            try:
                out = engine.decompress(data, _INFLATED_SIZE)
            except DECOMPRESSION_ERRORS as error:
                raise _damaged(error) from error
            data = engine.unused_data if engine.eof else b""
            if out:
                yield out
    if engine is not None and not engine.eof:
        raise CorruptCheckpointError(_TRUNCATED)


def intact(chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """Pass a gzip file on as it is, and verify its first member meanwhile; what follows may be anything."""
    engine = _gzip()
    for chunk in chunks:
        for piece in _small(chunk):
            data = piece
            while data or not (engine.eof or engine.needs_input):
                if engine.eof:
                    break
                try:
                    engine.decompress(data, _INFLATED_SIZE)
                except DECOMPRESSION_ERRORS as error:
                    raise _damaged(error) from error
                data = b""
        yield chunk
    if not engine.eof:
        raise CorruptCheckpointError(_TRUNCATED)


def _damaged(error: Exception) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"its compressed data is damaged ({error})")


_TRUNCATED = "it is truncated: its compressed data ends in the middle"

# What a decompressor of a stream takes and gives at a time. zlib copies what it has not used yet at every step.
_DEFLATED_SIZE = 1 << 20
_INFLATED_SIZE = 2 << 20


def _small(chunk: Chunk) -> Iterator[bytes]:
    for start in range(0, len(chunk), _DEFLATED_SIZE):
        yield bytes(chunk[start : start + _DEFLATED_SIZE])
