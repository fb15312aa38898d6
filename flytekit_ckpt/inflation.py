"""A compressed file as a stream of bytes: our members side by side, what others compressed step by step."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator

from flytekit_ckpt.compression import DECOMPRESSION_ERRORS, Decompressor, compression_of, gzip_decompressor
from flytekit_ckpt.errors import CorruptCheckpointError
from flytekit_ckpt.members import (
    HEADER_SIZE,
    MEMBER_SIZE,
    inflated_member,
    note_length,
    noted,
    stated_length,
)
from flytekit_ckpt.pipeline import LITTLE, Chunk, ahead, in_order, processors


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
    yield from in_order(_inflated, _members(source), threads=threads, memory=memory)
    start = source.peek(6)
    compression = gzip_decompressor if source.position else compression_of(start)
    if compression is None:
        yield from source.rest()
    elif start:
        stream = _inflate_stream(source.rest(), compression)
        yield from ahead(stream, count=max(1, min(4, memory // (2 * _INFLATED_SIZE))))


def _members(source: ByteStream) -> Iterator[tuple[int, list[memoryview]]]:
    """Take the members that state their own length, up to something else or the end."""
    while True:
        header = source.peek(HEADER_SIZE)
        length = stated_length(header)
        if not length:
            length = note_length(header)
            if not length or noted(source.peek(length)) is None:
                return
            for _ in source.pieces(length):
                pass
            continue
        pieces = list(source.pieces(length))
        if sum(map(len, pieces)) < length:
            raise CorruptCheckpointError(_TRUNCATED)
        # What it inflates to stands at its end; only of a little one is it worth looking.
        size = int.from_bytes(b"".join(pieces)[-4:], "little") if length <= LITTLE else MEMBER_SIZE
        yield length + min(size, MEMBER_SIZE), pieces


def _inflated(pieces: list[memoryview]) -> bytes:
    return inflated_member(b"".join(pieces) if len(pieces) > 1 else pieces[0])


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
    engine = gzip_decompressor()
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
