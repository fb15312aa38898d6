"""Entries as a gzip-compressed tar: entries in, chunks of bytes out, and back.

Nothing here knows a URI or touches the disk. An archive is produced and consumed as an iterator of chunks, so that
packing and uploading (or downloading and unpacking) overlap and neither an archive nor a large file is ever in memory.

The gzip file is made of many members, each holding up to `MEMBER_SIZE` bytes of the tar stream and stating its own
compressed length in the header's extra field. Any gzip reader takes such a file; a parallel reader can find the members
without inflating them, and the field marks an archive as ours from its first bytes on.
"""

from __future__ import annotations

import bz2
import contextlib
import enum
import functools
import itertools
import lzma
import struct
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, TYPE_CHECKING, Protocol, cast

from flytekit_ckpt.entries import CHUNK_SIZE, Entry, safe_name
from flytekit_ckpt.errors import CheckpointError, CorruptCheckpointError, UnsafeCheckpointError

if TYPE_CHECKING:
    from typing_extensions import Self

MEMBER_SIZE = 4 << 20
"""Bytes of tar stream in one gzip member; at most two of them are in memory."""

COMPRESSION_LEVEL = 1
"""zlib's fastest level: ten times faster than gzip's default of 9 for a few per cent more bytes."""

_GZIP_MAGIC = b"\x1f\x8b"
# RFC 1952: magic, deflate, flags = extra field, no time, no hint, unknown system, then the field: its length, our
# two-letter id, the data's length, and the member's whole length in bytes.
_MEMBER_HEADER = struct.Struct("<4sIBBH2sHI")
_MEMBER_MARK = b"FC"
_MEMBER_TRAILER = struct.Struct("<II")


# ---------------------------------------------------------------------------------------------------------------------
# Packing
# ---------------------------------------------------------------------------------------------------------------------


def pack(entries: Iterable[Entry]) -> Iterator[bytes]:
    """Turn sorted entries into an archive.

    Yields
    ------
    bytes
        One gzip member each: the compressed form of at most `MEMBER_SIZE` bytes of tar stream.
    """
    pending = bytearray()
    for block in itertools.chain.from_iterable(map(_tar_blocks, entries)):
        pending += block
        while len(pending) >= MEMBER_SIZE:
            yield _deflate(pending[:MEMBER_SIZE])
            del pending[:MEMBER_SIZE]
    # tar ends with two zero blocks; every tar program writes a whole record of them.
    yield _deflate(pending + bytes(tarfile.RECORDSIZE))


def _tar_blocks(entry: Entry) -> Iterator[bytes]:
    yield entry.info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
    size = 0
    for chunk in entry.chunks():
        size += len(chunk)
        yield chunk
    if size != entry.info.size:
        message = f"{entry.name} has {size} bytes instead of the {entry.info.size} announced: save again"
        raise CheckpointError(message)
    yield bytes(-size % tarfile.BLOCKSIZE)


def _deflate(data: bytes | bytearray) -> bytes:
    engine = zlib.compressobj(COMPRESSION_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
    body = engine.compress(data) + engine.flush()
    length = _MEMBER_HEADER.size + len(body) + _MEMBER_TRAILER.size
    header = _MEMBER_HEADER.pack(_GZIP_MAGIC + b"\x08\x04", 0, 0, 255, 8, _MEMBER_MARK, 4, length)
    return header + body + _MEMBER_TRAILER.pack(zlib.crc32(data), len(data))


# ---------------------------------------------------------------------------------------------------------------------
# Recognising
# ---------------------------------------------------------------------------------------------------------------------


class Kind(enum.Enum):
    """What a reader takes some bytes for, judged by their beginning as `tarfile.open` does."""

    EMPTY = "no bytes at all"
    ARCHIVE = "a tar, compressed or not"
    ZEROS = "512 zero bytes: an empty tar to tarfile"
    COMPRESSED_ZEROS = "512 zero bytes once decompressed: an empty compressed tar to tarfile"
    BROKEN_GZIP = "a gzip file that ends before the first tar header could: Flyte 2 fails on it"
    OTHER = "anything else"


def recognise(chunks: Iterable[bytes]) -> tuple[Kind, Iterator[bytes]]:
    """Tell what a stream of bytes looks like; returns the kind and the whole stream again."""
    source = iter(chunks)
    taken: list[bytes] = []
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

    def feed(self, chunk: bytes) -> bool:
        """Take more bytes; returns whether the kind is now certain."""
        if not chunk:
            return False
        self._seen += chunk
        self.kind = Kind.OTHER
        if self._is_ours():
            self.kind = Kind.ARCHIVE
        else:
            for start, zeros in ((self._seen, Kind.ZEROS), (self._decompressed(), Kind.COMPRESSED_ZEROS)):
                block = bytes(start[: tarfile.BLOCKSIZE])
                if block == bytes(tarfile.BLOCKSIZE):
                    self.kind = zeros
                elif _is_tar_header(block):
                    self.kind = Kind.ARCHIVE
        return self.kind is not Kind.OTHER or (
            len(self._seen) >= tarfile.BLOCKSIZE
            and (_decompressor(self._seen) is None or len(self._seen) >= self.LIMIT)
        )

    def end(self) -> None:
        """Take it that there are no more bytes."""
        if self.kind is Kind.OTHER and self._seen.startswith(_GZIP_MAGIC):
            engine = _GzipDecompressor()
            with contextlib.suppress(zlib.error):
                engine.decompress(bytes(self._seen), tarfile.BLOCKSIZE)
                if not engine.eof and engine.needs_input:
                    self.kind = Kind.BROKEN_GZIP

    def _is_ours(self) -> bool:
        return (
            len(self._seen) >= _MEMBER_HEADER.size
            and self._seen.startswith(_GZIP_MAGIC)
            and _MEMBER_HEADER.unpack_from(self._seen)[5] == _MEMBER_MARK
        )

    def _decompressed(self) -> bytes:
        engine = _decompressor(self._seen)
        try:
            return engine.decompress(bytes(self._seen), tarfile.BLOCKSIZE) if engine else b""
        except _DECOMPRESSION_ERRORS:
            return b""


def _is_tar_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _GzipDecompressor:
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


_DECOMPRESSION_ERRORS = (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError)


def _decompressor(start: bytes | bytearray) -> _Decompressor | None:
    """A fresh decompressor for what `start` begins with, `None` for plain bytes."""
    if start.startswith(_GZIP_MAGIC):
        return _GzipDecompressor()
    if start.startswith(b"BZh"):
        return bz2.BZ2Decompressor()
    if start.startswith((b"\xfd7zXZ\x00", b"\x5d\x00\x00")):
        return lzma.LZMADecompressor()
    return None


def _inflate(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Decompress a stream of one or many members, none of which may be cut short."""
    start = b""
    for chunk in chunks:
        start += chunk
        if len(start) >= 6:
            break
    engine = _decompressor(start)
    source = itertools.chain((start,), chunks)
    if engine is None:
        yield from source
        return
    for chunk in source:
        data = bytes(chunk)
        while data or not (engine.eof or engine.needs_input):
            if engine.eof:
                # Zeros between and after members are padding.
                data = data.lstrip(b"\0")
                if not data:
                    break
                engine = _decompressor(start)
                assert engine is not None
            try:
                out = engine.decompress(data, CHUNK_SIZE)
            except _DECOMPRESSION_ERRORS as error:
                message = f"its compressed data is damaged ({error})"
                raise CorruptCheckpointError(message) from error
            data = engine.unused_data if engine.eof else b""
            if out:
                yield out
    if not engine.eof:
        message = "it is truncated: its compressed data ends in the middle"
        raise CorruptCheckpointError(message)


class _ChunkReader:
    """The `read` of a file, over an iterator of chunks."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._left = b""

    def read(self, size: int, /) -> bytes:
        """Return at least one byte and at most `size`, fewer than asked for at a chunk's end; b"" at the end."""
        if not self._left:
            self._left = next(self._chunks, b"")
        out, self._left = self._left[:size], self._left[size:]
        return out


_END_OF_ARCHIVE: type[tarfile.HeaderError] = tarfile.EOFHeaderError  # type: ignore[attr-defined]


class _StrictTarInfo(tarfile.TarInfo):
    """Takes nothing but the end marker for the end; tarfile takes any damaged header for it."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as error:
            if isinstance(error, _END_OF_ARCHIVE):
                raise
            message = f"an entry's header is damaged or missing ({error})"
            raise CorruptCheckpointError(message) from error


def read(chunks: Iterable[bytes]) -> Iterator[Entry]:
    """Read an archive made by anyone, in any compression that tarfile opens.

    Everything that carries a checksum is verified, up to the archive's very end, before the iterator is exhausted.

    Yields
    ------
    Entry
        With a name that is relative and free of `.` and `..`; a file, folder, link or hard link.

    Raises
    ------
    CorruptCheckpointError
        If the archive is damaged or truncated.
    UnsafeCheckpointError
        If an entry lies outside the archive's folder, or is a device or a fifo.
    """
    inflated = _inflate(iter(chunks))
    with _damage_reported():
        tar = tarfile.open(  # noqa: SIM115 - closing it would only write an end marker
            fileobj=cast("IO[bytes]", _ChunkReader(inflated)),
            mode="r|",
            bufsize=CHUNK_SIZE,
            tarinfo=_StrictTarInfo,
            errorlevel=2,
        )
    members = iter(tar)
    while True:
        with _damage_reported():
            info = next(members, None)
        if info is None:
            break
        # tarfile would remember every entry of the archive.
        tar.members.clear()  # type: ignore[attr-defined]
        info.name = safe_name(info.name)
        if not (info.isreg() or info.isdir() or info.issym() or info.islnk()):
            message = f"its entry {info.name!r} is a device or a fifo"
            raise UnsafeCheckpointError(message)
        if info.islnk():
            info.linkname = safe_name(info.linkname)
        if info.name:
            yield Entry(info, functools.partial(_content, tar, info))
    for _ in inflated:
        # What follows the end marker is only verified.
        pass


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo) -> Iterator[bytes]:
    if not info.isreg():
        return
    with _damage_reported():
        file = tar.extractfile(info)
    assert file is not None
    while True:
        with _damage_reported():
            chunk = file.read(CHUNK_SIZE)
        if not chunk:
            break
        yield chunk


@contextlib.contextmanager
def _damage_reported() -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except (tarfile.TarError, ValueError, ArithmeticError, EOFError, LookupError) as error:
        message = f"it is damaged or truncated ({error})"
        raise CorruptCheckpointError(message) from error
