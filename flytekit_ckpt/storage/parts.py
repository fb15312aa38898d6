"""Divides an object into parts for a multipart upload."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator

from flytekit_ckpt.pipeline import Chunk, Range
from flytekit_ckpt.storage.objects import PART_SIZE

MIN_PART_SIZE = 5 << 20
"""Bytes that S3 wants in every part but the last."""

MAX_PART_SIZE = 5 << 30
"""Bytes that S3 takes in one part."""

COPY_SIZE = 256 << 20
"""Bytes that S3 is asked to copy in one request, unless the parts would run out."""

MAX_PARTS = 10_000
"""Parts that S3 takes for one object."""


def divide(
    chunks: Iterator[Chunk | Range],
    size: Callable[[], int] | None,
    fetched: Callable[[Range], Iterator[Chunk]],
) -> Iterator[bytes | Range]:
    """Divide an object into parts for a multipart upload: bytes to send, and ranges for the server to copy.

    S3 takes `MAX_PARTS` parts of at least `MIN_PART_SIZE`, the last excepted, and objects up to 5 TiB. Where `size`
    tells how large the object will be, the parts to send are equal; where it does not, they double every thousand.

    Parameters
    ----------
    chunks : iterator of bytes or Range
        The object.
    size : callable, optional
        Returns about how many bytes there will be; called once one part is full.
    fetched : callable
        Reads a range that is too small for a part of its own.
    """
    buffer = _Buffer()
    equal = None
    number = copies = 0
    for chunk in _joined(chunks):
        if not isinstance(chunk, Range):
            pieces, copied = iter((chunk,)), None
        # Each range takes a part of its own, and ends another one: there may not be too many.
        elif chunk.length < 2 * PART_SIZE << copies // (MAX_PARTS // 40):
            pieces, copied = fetched(chunk), None
        else:
            missing = max(0, MIN_PART_SIZE - buffer.size) if buffer.size else 0
            pieces = fetched(Range(chunk.start, missing))
            copied = Range(chunk.start + missing, chunk.length - missing)
        for piece in pieces:
            buffer.add(piece)
            # More than a part, so that the last one is never empty.
            while buffer.size > (part_size := _part_size(number, equal)):
                if size is not None and equal is None:
                    # With some room for a folder that grows while it is being saved.
                    equal = max(PART_SIZE, size() * 21 // 20 // MAX_PARTS)
                    continue
                yield buffer.take(part_size)
                number += 1
        if copied is not None:
            if buffer.size:
                yield buffer.take(buffer.size)
            ranges = copied_ranges(copied, number)
            yield from ranges
            number += 1 + len(ranges)
            copies += 1
    if buffer.size or not number:
        yield buffer.take(buffer.size)


def equal_parts(chunks: Iterator[Chunk], size: int) -> Iterator[bytes]:
    """Divide an object into parts of one size, the last excepted; an object of no bytes is one part."""
    buffer = _Buffer()
    is_first = True
    for chunk in chunks:
        buffer.add(chunk)
        # More than a part, so that the last one is never empty.
        while buffer.size > size:
            yield buffer.take(size)
            is_first = False
    if buffer.size or is_first:
        yield buffer.take(buffer.size)


def copied_ranges(whole: Range, number: int = 0) -> list[Range]:
    """Divide a range into equal parts that the server copies in one request each; `number` parts come before."""
    size = max(COPY_SIZE << number // (MAX_PARTS // 10), whole.length // (MAX_PARTS // 20))
    count = -(-whole.length // min(size, MAX_PART_SIZE))
    edges = [whole.start + whole.length * edge // count for edge in range(count + 1)]
    return [Range(start, end - start) for start, end in itertools.pairwise(edges)]


def _part_size(number: int, equal: int | None) -> int:
    if equal is None:
        return PART_SIZE << number // 1000
    # Equal, unless there is so much more than was told that the parts would run out.
    return min(equal << max(0, number - MAX_PARTS * 96 // 100) // (MAX_PARTS // 250), MAX_PART_SIZE)


def _joined(chunks: Iterator[Chunk | Range]) -> Iterator[Chunk | Range]:
    """Make one range of those that follow each other."""
    last: Range | None = None
    for chunk in chunks:
        if last is not None and isinstance(chunk, Range) and chunk.start == last.start + last.length:
            last = Range(last.start, last.length + chunk.length)
            continue
        if last is not None:
            yield last
        last = chunk if isinstance(chunk, Range) else None
        if not isinstance(chunk, Range):
            yield chunk
    if last is not None:
        yield last


class _Buffer:
    """Chunks that wait to become a part; each byte is copied once."""

    def __init__(self) -> None:
        self._chunks: deque[memoryview] = deque()
        self.size = 0

    def add(self, chunk: Chunk) -> None:
        self._chunks.append(memoryview(chunk))
        self.size += len(chunk)

    def take(self, size: int) -> bytes:
        taken: list[memoryview] = []
        left = size
        while left:
            chunk = self._chunks.popleft()
            if len(chunk) > left:
                self._chunks.appendleft(chunk[left:])
                chunk = chunk[:left]
            taken.append(chunk)
            left -= len(chunk)
        self.size -= size
        return b"".join(taken)
