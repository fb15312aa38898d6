"""What a reader takes some bytes for, judged by their beginning."""

from __future__ import annotations

import enum
import itertools
import tarfile
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from flytekit_ckpt.compression import (
    DECOMPRESSION_ERRORS,
    GZIP_MAGIC,
    Decompressor,
    ZlibDecompressor,
    compression_of,
)
from flytekit_ckpt.members import stated_length
from flytekit_ckpt.pipeline import Chunk


class Kind(enum.Enum):
    """What a reader takes some bytes for."""

    EMPTY = "no bytes at all"
    ARCHIVE = "a tar, compressed or not"
    ZEROS = "512 zero bytes: an empty tar to tarfile"
    COMPRESSED_ZEROS = "512 zero bytes once decompressed: an empty compressed tar to tarfile"
    DAMAGED = "a gzip file that ends or breaks before the first tar header could, or would be one but for a single bit"
    GZIP = "a gzip file of something else"
    OTHER = "anything else"


def recognise(chunks: Iterable[Chunk]) -> tuple[Kind, Iterator[Chunk]]:
    """Tell what a stream of bytes looks like; returns the kind and the whole stream again."""
    source = iter(chunks)
    taken: list[Chunk] = []
    probe = _Probe()
    for chunk in source:
        taken.append(chunk)
        if probe.feed(chunk):
            break
    else:
        probe.end()
    return probe.kind, itertools.chain(taken, source)


class _Probe:
    """Decides from as few leading bytes as possible."""

    # The first block of a bz2 file can take 900 kB before any byte comes out of it.
    LIMIT = 4 << 20

    def __init__(self) -> None:
        self.kind = Kind.EMPTY
        self._seen = bytearray()
        self._is_certain = False

    def feed(self, chunk: Chunk) -> bool:
        """Take more bytes; returns whether the kind is now certain."""
        if not chunk:
            return False
        self._seen += chunk
        self._is_certain = len(self._seen) >= tarfile.BLOCKSIZE
        self.kind = self._judged()
        return self._is_certain or self.kind not in (Kind.OTHER, Kind.GZIP) or len(self._seen) >= self.LIMIT

    def end(self) -> None:
        """Take it that there are no more bytes."""
        if self.kind is Kind.GZIP and not _beginning(self._seen, ZlibDecompressor).is_certain:
            self.kind = Kind.DAMAGED

    def _judged(self) -> Kind:
        if stated_length(self._seen):
            return Kind.ARCHIVE
        kind = _meaning(bytes(self._seen[: tarfile.BLOCKSIZE]), Kind.ZEROS)
        compression = compression_of(self._seen)
        if kind is not None or compression is None:
            return kind or self._judged_by_a_bit()
        is_gzip = self._seen.startswith(GZIP_MAGIC)
        # isal finds damage further on than tarfile would look.
        start = _beginning(self._seen, ZlibDecompressor if is_gzip else compression)
        self._is_certain = self._is_certain and start.is_certain
        kind = _meaning(start.block, Kind.COMPRESSED_ZEROS)
        if kind is not None or not is_gzip:
            return kind or Kind.OTHER
        return Kind.DAMAGED if start.is_broken else Kind.GZIP

    def _judged_by_a_bit(self) -> Kind:
        """Look whether it would be a compressed archive if one bit of its first three bytes were another."""
        differing = int.from_bytes(self._seen[:3], "big") ^ int.from_bytes(_GZIP_START, "big")
        if len(self._seen) < 3 or differing.bit_count() != 1:
            return Kind.OTHER
        start = _beginning(_GZIP_START + self._seen[3:], ZlibDecompressor)
        self._is_certain = self._is_certain and start.is_certain
        return Kind.OTHER if _meaning(start.block, Kind.COMPRESSED_ZEROS) is None else Kind.DAMAGED


# With the one method of compression that there is.
_GZIP_START = GZIP_MAGIC + b"\x08"


class _Beginning(NamedTuple):
    """What the first bytes of a compressed stream decompress to, a tar's block at most."""

    block: bytes
    is_broken: bool
    is_certain: bool


def _beginning(seen: bytes | bytearray, compression: Callable[[], Decompressor]) -> _Beginning:
    engine = compression()
    try:
        block = engine.decompress(bytes(seen), tarfile.BLOCKSIZE)
    except DECOMPRESSION_ERRORS:
        return _Beginning(b"", is_broken=True, is_certain=True)
    return _Beginning(block, is_broken=False, is_certain=engine.eof or len(block) == tarfile.BLOCKSIZE)


def _meaning(block: bytes, zeros: Kind) -> Kind | None:
    if block == bytes(tarfile.BLOCKSIZE):
        return zeros
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None
    return Kind.ARCHIVE
