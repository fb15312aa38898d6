"""Entries as a gzip-compressed tar: entries in, chunks of bytes out, and back.

Nothing here knows a URI. An archive is produced and consumed as an iterator of chunks, so that packing and uploading
(or downloading and unpacking) overlap and neither an archive nor a large file is ever in memory.

The gzip file is made of many members, each holding up to `MEMBER_SIZE` bytes of the tar stream and stating its own
compressed length in the header's extra field. Any gzip reader takes such a file; ours finds the members without
inflating them, and works on several at the same time. Members belong to units: a large entry is a unit of its own,
small ones share one. A unit's members can be carried from one archive into the next as they are.
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
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import IO, TYPE_CHECKING, Protocol, cast

try:
    from isal import igzip_lib
    from isal import isal_zlib as deflate
except ImportError:  # where isal has no wheel: slower, same format
    deflate = zlib  # type: ignore[misc]
    igzip_lib = None  # type: ignore[assignment]

from flytekit_ckpt.entries import Entry, OpenFile, safe_name
from flytekit_ckpt.errors import CheckpointError, CorruptCheckpointError, UnsafeCheckpointError
from flytekit_ckpt.pipeline import CHUNK_SIZE, LITTLE, MEMORY_BUDGET, Chunk, Range, ahead, in_order, processors

if TYPE_CHECKING:
    from pathlib import Path

    from typing_extensions import Self

MEMBER_SIZE = 2 << 20
"""Bytes of tar stream in one gzip member."""

LARGE_ENTRY = MEMBER_SIZE // 4
"""Bytes of content from which on an entry has members of its own."""

COMPRESSION_LEVEL = 1
"""The fastest level that compresses: many times faster than gzip's default of 9 for a few per cent more bytes."""

STORED_ABOVE = 0.9
"""Share of its bytes that a member must compress to; one that does not (the weights of a model) is stored instead."""

# The stubs of isal call it an instance.
_DeflateError = cast("type[Exception]", deflate.error)

_GZIP_MAGIC = b"\x1f\x8b"
# RFC 1952: magic, deflate, flags = extra field, no time, no hint, unknown system, then the field: its length, our
# two-letter id, the data's length, and the member's whole length in bytes.
_MEMBER_HEADER = struct.Struct("<4sIBBH2sHI")
_MEMBER_MARK = b"FC"
_MEMBER_TRAILER = struct.Struct("<II")
# Members that claim to be larger than any of ours are read as a stream, in bounded memory.
_MEMBER_LIMIT = 16 << 20
# RFC 1951: the length of a stored block is a 16-bit number.
_STORED_BLOCK = struct.Struct("<BHH")
_STORED_BLOCK_SIZE = 0xFFFF
_SAMPLE_SIZE = 4 << 10


@dataclass(frozen=True)
class Unit:
    """Consecutive members that hold whole entries, and nothing but them.

    Attributes
    ----------
    first, last : list of str
        Sort keys of the first and the last entry.
    parts : frozenset of int
        Numbers of the parts that the entries came from.
    start, length : int
        Where the members lie in the archive, in bytes.
    """

    first: list[str]
    last: list[str]
    parts: frozenset[int]
    start: int
    length: int


# ---------------------------------------------------------------------------------------------------------------------
# Packing
# ---------------------------------------------------------------------------------------------------------------------


def pack(
    items: Iterable[Entry | Unit],
    *,
    memory: int = MEMORY_BUDGET,
    record: Callable[[Unit], object] = lambda _: None,
    progress: Callable[[int], object] = lambda _: None,
) -> Iterator[bytes | Range]:
    """Turn sorted entries, and units of an earlier archive, into an archive.

    Parameters
    ----------
    items : iterable of Entry or Unit
        What the archive will hold.
    memory : int
        Bytes that the members under way may take.
    record : callable, optional
        Takes each unit of the new archive, in order.
    progress : callable, optional
        Takes the bytes of file content in each member that is done.

    Yields
    ------
    bytes or Range
        One gzip member each, the compressed form of about `MEMBER_SIZE` bytes of tar stream; or, for a unit that is
        carried over, where its members lie in the earlier archive.
    """
    plans = ((_cost(plan), plan) for plan in _Planner().plans(items))
    threads = min(processors(), max(1, memory // (4 * MEMBER_SIZE)))
    position = 0
    unit: Unit | None = None
    for plan, data in in_order(_Packer(), plans, threads=threads, memory=memory):
        if isinstance(plan, Unit) or not plan.continues:
            if unit is not None:
                record(unit)
            unit = None
        if isinstance(plan, Unit):
            record(replace(plan, start=position))
            position += plan.length
            yield Range(plan.start, plan.length)
            continue
        progress(plan.content)
        length = len(data)
        if unit is None:
            unit = Unit(plan.first, plan.last, frozenset(plan.parts), position, length)
        else:
            unit = replace(unit, length=unit.length + length)
        position += length
        yield data
    if unit is not None:
        record(unit)
    yield end_of_archive()


def end_of_archive() -> bytes:
    """Make the member that ends an archive: two zero blocks, of which every tar program writes a whole record."""
    return _member(memoryview(bytes(tarfile.RECORDSIZE)))


@dataclass
class _Slice:
    """Bytes of a file that are read when they are packed."""

    file: Path | OpenFile
    offset: int
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, part: slice) -> _Slice:
        start, stop, _ = part.indices(self.length)
        return _Slice(self.file, self.offset + start, stop - start)


@dataclass
class _Plan:
    """A member to be: pieces of the tar stream, some of them still on the disk."""

    continues: bool = False
    pieces: list[bytes | memoryview | _Slice] = field(default_factory=list)
    size: int = 0
    content: int = 0
    first: list[str] = field(default_factory=list)
    last: list[str] = field(default_factory=list)
    parts: set[int] = field(default_factory=set)

    def begin(self, entry: Entry) -> None:
        self.last = entry.sort_key
        self.first = self.first or self.last
        self.parts.add(entry.part)

    def add(self, piece: bytes | memoryview | _Slice) -> None:
        self.pieces.append(piece)
        self.size += len(piece)


def _cost(plan: _Plan | Unit) -> int:
    return 0 if isinstance(plan, Unit) else 2 * plan.size


class _Planner:
    """Divides the tar stream into members."""

    def __init__(self) -> None:
        self._plan = _Plan()

    def plans(self, items: Iterable[Entry | Unit]) -> Iterator[_Plan | Unit]:
        for item in items:
            if isinstance(item, Unit):
                yield from self._finish()
                yield item
            else:
                yield from self._add(item)
        yield from self._finish()

    def _add(self, entry: Entry) -> Iterator[_Plan]:
        header = _tar_header(entry.info)
        is_large = entry.info.size >= LARGE_ENTRY
        if is_large or self._plan.size + len(header) + entry.info.size > MEMBER_SIZE:
            yield from self._finish()
        self._plan.begin(entry)
        self._plan.add(header)
        size = 0
        for content in _content_to_pack(entry, is_large=is_large):
            size += len(content)
            piece = content
            while len(piece):
                room = MEMBER_SIZE - self._plan.size
                if not room:
                    yield from self._finish(continued=True)
                    continue
                taken = piece[:room]
                self._plan.add(taken)
                self._plan.content += len(taken)
                piece = piece[room:]
        if size != entry.info.size:
            message = f"{entry.name} has {size} bytes instead of the {entry.info.size} announced: save again"
            raise CheckpointError(message)
        self._plan.add(bytes(-size % tarfile.BLOCKSIZE))
        if is_large:
            yield from self._finish()

    def _finish(self, *, continued: bool = False) -> Iterator[_Plan]:
        if self._plan.size:
            yield self._plan
            self._plan = _Plan(continued)


# Name, mode, owner, group, size, time, checksum, type, link target, magic and version, names of owner and group,
# device, prefix of the name, padding.
_TAR_HEADER = struct.Struct("100s8s8s8s12s12s8s1s100s8s32s32s8s8s155s12s")


def _tar_header(info: tarfile.TarInfo) -> bytes:
    """Encode an entry's header, PAX records first: what tarfile does, ten times as fast for what is common."""
    name = info.name + "/" if info.isdir() and not info.name.endswith("/") else info.name
    if not (
        name.isascii()
        and len(name) <= 100
        and (info.isreg() or info.isdir())
        and info.size < 1 << 33
        and 0 <= info.mtime < 1 << 33
        and not (info.uid or info.gid or info.uname or info.gname)
    ):
        return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
    header = _tar_block(name, info.mode & 0o7777, info.size, int(info.mtime), info.type)
    records = b"".join(_pax_record(key, value) for key, value in info.pax_headers.items())
    if not records:
        return header
    padding = bytes(-len(records) % tarfile.BLOCKSIZE)
    return _tar_block("././@PaxHeader", 0, len(records), 0, tarfile.XHDTYPE) + records + padding + header


def _tar_block(name: str, mode: int, size: int, mtime: int, kind: bytes) -> bytes:
    fields = [name.encode(), b"%07o" % mode, b"0000000", b"0000000", b"%011o" % size, b"%011o" % mtime, b" " * 8, kind]
    block = _TAR_HEADER.pack(*fields, b"", b"ustar\x0000", b"", b"", b"", b"", b"", b"")
    return b"%s%06o\0%s" % (block[:148], sum(block), block[155:])


def _pax_record(key: str, value: str) -> bytes:
    """Encode a record, which begins with its own length in decimal."""
    record = f" {key}={value}\n".encode("utf-8", "surrogateescape")
    length = len(record) + len(str(len(record)))
    return str(len(record) + len(str(length))).encode() + record


def _content_to_pack(entry: Entry, *, is_large: bool) -> Iterator[memoryview | _Slice]:
    if entry.path is None:
        yield from (memoryview(chunk) for chunk in entry.chunks())
    elif entry.info.size:
        # A small file is opened when it is packed: a member may hold a thousand of them.
        yield _Slice(OpenFile(entry.path) if is_large else entry.path, 0, entry.info.size)


class _Packer:
    """Makes members of plans, in any number of threads; a new buffer for each member would cost more than its CRC."""

    def __init__(self) -> None:
        self._spare: list[bytearray] = []

    def __call__(self, plan: _Plan | Unit) -> tuple[_Plan | Unit, bytes]:
        if isinstance(plan, Unit):
            return plan, b""
        try:
            buffer = self._spare.pop()
        except IndexError:
            buffer = bytearray(plan.size)
        if len(buffer) < plan.size:
            buffer = bytearray(plan.size)
        view = memoryview(buffer)[: plan.size]
        position = 0
        for piece in plan.pieces:
            place = view[position : position + len(piece)]
            if isinstance(piece, _Slice):
                file = piece.file if isinstance(piece.file, OpenFile) else OpenFile(piece.file)
                file.read_into(place, piece.offset)
            else:
                place[:] = piece
            position += len(piece)
        plan.pieces.clear()
        data = _member(view)
        self._spare.append(buffer)
        return plan, data


def _member(data: memoryview) -> bytes:
    body = _shrunk(data) or _stored(data)
    length = _MEMBER_HEADER.size + sum(map(len, body)) + _MEMBER_TRAILER.size
    header = _MEMBER_HEADER.pack(_GZIP_MAGIC + b"\x08\x04", 0, 0, 255, 8, _MEMBER_MARK, 4, length)
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

    def feed(self, chunk: Chunk) -> bool:
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
            len(self._seen) >= tarfile.BLOCKSIZE and (_compression(self._seen) is None or len(self._seen) >= self.LIMIT)
        )

    def end(self) -> None:
        """Take it that there are no more bytes."""
        if self.kind is Kind.OTHER and self._seen.startswith(_GZIP_MAGIC):
            engine = _ZlibDecompressor()
            with contextlib.suppress(zlib.error):
                engine.decompress(bytes(self._seen), tarfile.BLOCKSIZE)
                if not engine.eof and engine.needs_input:
                    self.kind = Kind.BROKEN_GZIP

    def _is_ours(self) -> bool:
        return bool(_stated_length(self._seen))

    def _decompressed(self) -> bytes:
        compression = _compression(self._seen)
        if compression is _gzip:
            # isal finds damage further on than tarfile would look.
            compression = _ZlibDecompressor
        try:
            return compression().decompress(bytes(self._seen), tarfile.BLOCKSIZE) if compression else b""
        except _DECOMPRESSION_ERRORS:
            return b""


def _is_tar_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Inflating
# ---------------------------------------------------------------------------------------------------------------------


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _ZlibDecompressor:
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


def _gzip() -> _Decompressor:
    if igzip_lib is None:
        return _ZlibDecompressor()
    return igzip_lib.IgzipDecompressor(igzip_lib.DECOMP_GZIP)


_DECOMPRESSION_ERRORS = (_DeflateError, zlib.error, lzma.LZMAError, OSError, EOFError, ValueError)


def _compression(start: bytes | bytearray) -> Callable[[], _Decompressor] | None:
    """What makes a decompressor for what begins with `start`, `None` for plain bytes."""
    if start.startswith(_GZIP_MAGIC):
        return _gzip
    if start.startswith(b"BZh"):
        return bz2.BZ2Decompressor
    if start.startswith((b"\xfd7zXZ\x00", b"\x5d\x00\x00")):
        return lzma.LZMADecompressor
    return None


class _Bytes:
    """Bytes of a stream of chunks, taken in any number and copied only where a chunk ends in the middle."""

    def __init__(self, chunks: Iterator[Chunk]) -> None:
        self._chunks = chunks
        self._left: deque[memoryview] = deque()
        self.position = 0

    def pieces(self, size: int) -> Iterator[memoryview]:
        """Yield the next `size` bytes, fewer at the end of the stream."""
        while size:
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

    def rest(self) -> Iterator[Chunk]:
        """Yield what has not been taken."""
        while self._left:
            yield self._left.popleft()
        yield from self._chunks

    # What tarfile asks of a file.

    def read(self, size: int, /) -> bytes:
        return b"".join(self.pieces(size))

    def tell(self) -> int:
        return self.position


def _inflate(chunks: Iterator[Chunk], memory: int) -> Iterator[Chunk]:
    """Decompress: our own members side by side, anything else as a stream, one step ahead of the reader."""
    source = _Bytes(chunks)
    threads = min(processors(), max(1, memory // (4 * MEMBER_SIZE)))
    yield from in_order(_inflate_member, _members(source), threads=threads, memory=memory)
    start = source.peek(6)
    compression = _gzip if source.position else _compression(start)
    if compression is None:
        yield from source.rest()
    elif start:
        stream = _inflate_stream(source.rest(), compression)
        yield from ahead(stream, count=max(1, min(4, memory // (2 * _INFLATED_SIZE))))


def _members(source: _Bytes) -> Iterator[tuple[int, list[memoryview]]]:
    """Take the members that state their own length, up to something else or the end."""
    while True:
        header = source.peek(_MEMBER_HEADER.size)
        length = _stated_length(header)
        if length > _MEMBER_LIMIT or length < _MEMBER_HEADER.size + _MEMBER_TRAILER.size:
            return
        pieces = list(source.pieces(length))
        if sum(map(len, pieces)) < length:
            message = "it is truncated: its compressed data ends in the middle"
            raise CorruptCheckpointError(message)
        # What it inflates to stands at its end; only of a little one is it worth looking.
        size = int.from_bytes(b"".join(pieces)[-4:], "little") if length <= LITTLE else MEMBER_SIZE
        yield length + min(size, MEMBER_SIZE), pieces


def _stated_length(header: bytes | bytearray) -> int:
    """The length that one of our members states, 0 for anything else."""
    if len(header) < _MEMBER_HEADER.size or not header.startswith(_GZIP_MAGIC):
        return 0
    _, _, _, _, _, mark, _, length = _MEMBER_HEADER.unpack_from(header)
    return int(length) if mark == _MEMBER_MARK else 0


def _inflate_member(pieces: list[memoryview]) -> bytes:
    member = memoryview(b"".join(pieces)) if len(pieces) > 1 else pieces[0]
    crc, size = _MEMBER_TRAILER.unpack(member[-_MEMBER_TRAILER.size :])
    if size > _MEMBER_LIMIT:
        message = "its compressed data is damaged (a member of an impossible size)"
        raise CorruptCheckpointError(message)
    engine = deflate.decompressobj(-zlib.MAX_WBITS)
    try:
        data = engine.decompress(member[_MEMBER_HEADER.size : -_MEMBER_TRAILER.size], size + 1)
    except _DeflateError as error:
        message = f"its compressed data is damaged ({error})"
        raise CorruptCheckpointError(message) from error
    if not engine.eof or engine.unused_data or len(data) != size or deflate.crc32(data) != crc:
        message = "its compressed data is damaged or truncated (checksum or length differ)"
        raise CorruptCheckpointError(message)
    return data


def _inflate_stream(chunks: Iterator[Chunk], compression: Callable[[], _Decompressor]) -> Iterator[bytes]:
    """Decompress a stream of one or many members, none of which may be cut short."""
    engine: _Decompressor | None = None
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
            except _DECOMPRESSION_ERRORS as error:
                message = f"its compressed data is damaged ({error})"
                raise CorruptCheckpointError(message) from error
            data = engine.unused_data if engine.eof else b""
            if out:
                yield out
    if engine is not None and not engine.eof:
        message = "it is truncated: its compressed data ends in the middle"
        raise CorruptCheckpointError(message)


# What a decompressor of a stream takes and gives at a time. zlib copies what it has not used yet at every step.
_DEFLATED_SIZE = 1 << 20
_INFLATED_SIZE = 2 << 20


def _small(chunk: Chunk) -> Iterator[bytes]:
    for start in range(0, len(chunk), _DEFLATED_SIZE):
        yield bytes(chunk[start : start + _DEFLATED_SIZE])


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


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


def read(chunks: Iterable[Chunk], *, memory: int = MEMORY_BUDGET) -> Iterator[Entry]:
    """Read an archive made by anyone, in any compression that tarfile opens.

    Everything that carries a checksum is verified, up to the archive's very end, before the iterator is exhausted.

    Parameters
    ----------
    chunks : iterable of bytes
        The archive.
    memory : int
        Bytes that what is being inflated may take.

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
    stream = _Bytes(_inflate(iter(chunks), memory))
    with _damage_reported():
        tar = tarfile.TarFile(fileobj=cast("IO[bytes]", stream), tarinfo=_StrictTarInfo, errorlevel=2)
    members = iter(tar)
    while True:
        with _damage_reported():
            info = next(members, None)
        if info is None:
            break
        following = tar.offset
        # tarfile would remember every entry of the archive.
        tar.members.clear()  # type: ignore[attr-defined]
        info.name = safe_name(info.name)
        if not (info.isreg() or info.isdir() or info.issym() or info.islnk()):
            message = f"its entry {info.name!r} is a device or a fifo"
            raise UnsafeCheckpointError(message)
        if info.islnk():
            info.linkname = safe_name(info.linkname)
        if info.name:
            yield Entry(info, functools.partial(_content, stream, info))
        _skip(stream, following)
    for _ in stream.rest():
        # What follows the end marker is only verified.
        pass


def _skip(stream: _Bytes, position: int) -> None:
    """Pass over what nobody has read of an entry's content, and over its padding."""
    for _ in stream.pieces(position - stream.position):
        pass
    if stream.position != position:
        message = "it is truncated: an entry's content ends in the middle"
        raise CorruptCheckpointError(message)


def _content(stream: _Bytes, info: tarfile.TarInfo) -> Iterator[Chunk]:
    if not info.isreg():
        return
    if stream.position != info.offset_data:
        message = f"the content of {info.name!r} can be read once only, before the next entry"
        raise RuntimeError(message)
    # Only GNU tar makes sparse entries: pairs of where some bytes go and how many, zeros between them.
    done = 0
    for start, size in [*(info.sparse or [(0, info.size)]), (info.size, 0)]:
        if start < done:
            message = f"the parts of {info.name!r} overlap"
            raise CorruptCheckpointError(message)
        for position in range(done, start, CHUNK_SIZE):
            yield bytes(min(CHUNK_SIZE, start - position))
        done = start
        for piece in stream.pieces(size):
            done += len(piece)
            yield piece
    if done != info.size:
        message = f"the content of {info.name!r} ends in the middle: it is truncated"
        raise CorruptCheckpointError(message)


@contextlib.contextmanager
def _damage_reported() -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except (tarfile.TarError, ValueError, ArithmeticError, EOFError, LookupError) as error:
        message = f"it is damaged or truncated ({error})"
        raise CorruptCheckpointError(message) from error
