"""An archive made by anyone, read entry by entry and verified to its end."""

from __future__ import annotations

import contextlib
import functools
import tarfile
from collections.abc import Iterable, Iterator
from typing import IO, TYPE_CHECKING, cast

from flytekit_ckpt.archive.plain_headers import read_plain
from flytekit_ckpt.entries import Entry, safe_name
from flytekit_ckpt.errors import CheckpointError, CorruptCheckpointError, UnsafeCheckpointError
from flytekit_ckpt.inflation import ByteStream, inflated
from flytekit_ckpt.pipeline import CHUNK_SIZE, MEMORY_BUDGET, Chunk

if TYPE_CHECKING:
    from typing_extensions import Self

HEADER_LIMIT = 4 << 20
"""Bytes that all the headers of one entry may take: they are in memory as a whole, and an attacker's are any size."""

LINK_LIMIT = 4096
"""Characters of what a link leads to, which no system takes more of; links are made last, all of them."""

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


class _Headers:
    """What tarfile reads of an archive, as the file that it asks for; nobody else reads headers."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self.left = HEADER_LIMIT

    def read(self, size: int, /) -> bytes:
        self.left -= size
        if size < 0 or self.left < 0:
            message = f"an entry's headers are damaged, or larger than {HEADER_LIMIT} bytes"
            raise CorruptCheckpointError(message)
        return b"".join(self._stream.pieces(size))

    def tell(self) -> int:
        return self._stream.position


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
    stream = ByteStream(inflated(iter(chunks), memory))
    for info, following in _infos(stream):
        if info.size < 0 or "\0" in info.name or "\0" in info.linkname or len(info.linkname) > LINK_LIMIT:
            message = f"the header of its entry {info.name!r} is damaged"
            raise CorruptCheckpointError(message)
        info.name = safe_name(info.name)
        if not (info.isreg() or info.isdir() or info.issym() or info.islnk()):
            message = f"its entry {info.name!r} is a device or a fifo"
            raise UnsafeCheckpointError(message)
        if info.islnk():
            info.linkname = safe_name(info.linkname)
        if info.name:
            yield Entry(info, functools.partial(_content, stream, info))
        left = following - stream.position
        if 0 < left <= len(stream.at_hand()):
            stream.take(left)
        elif left:
            _skip(stream, following)
    for _ in stream.rest():
        # What follows the end marker is only verified.
        pass


def _infos(stream: ByteStream) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Read headers, each with the position of the one that follows; the stream must be there for the next."""
    strictly = _StrictReader(stream)
    while True:
        info = None if strictly.has_globals else read_plain(stream.at_hand(), stream.position)
        if info is not None:
            stream.take(info.offset_data - info.offset)
            yield info, info.offset_data + info.size + -info.size % tarfile.BLOCKSIZE
            continue
        info = strictly.next()
        if info is None:
            return
        yield info, strictly.following


class _StrictReader:
    """Has tarfile read headers, and takes whatever is wrong with them for damage."""

    def __init__(self, stream: ByteStream) -> None:
        self._headers = _Headers(stream)
        self._tar: tarfile.TarFile | None = None
        self._infos: Iterator[tarfile.TarInfo] = iter(())

    @property
    def has_globals(self) -> bool:
        """Whether there are PAX headers that hold for every entry that follows."""
        return self._tar is not None and bool(self._tar.pax_headers)

    @property
    def following(self) -> int:
        """Where the header after the last one is to be."""
        assert self._tar is not None
        return self._tar.offset

    def next(self) -> tarfile.TarInfo | None:
        """Read the header that the stream is at; `None` at the archive's end."""
        headers = self._headers
        with _damage_reported():
            if self._tar is None:
                headers.left = HEADER_LIMIT
                # It reads the first one at once.
                self._tar = tarfile.TarFile(fileobj=cast("IO[bytes]", headers), tarinfo=_StrictTarInfo, errorlevel=2)
                self._infos = iter(self._tar)
            else:
                # Those that hold for every entry that follows stay in memory.
                headers.left = HEADER_LIMIT - sum(map(len, self._tar.pax_headers.values()))
                self._tar.offset = headers.tell()
            info = next(self._infos, None)
        # tarfile would remember every entry of the archive.
        self._tar.members.clear()  # type: ignore[attr-defined]
        return info


def _skip(stream: ByteStream, position: int) -> None:
    """Pass over what nobody has read of an entry's content, and over its padding."""
    for _ in stream.pieces(position - stream.position):
        pass
    if stream.position != position:
        message = "it is truncated: an entry's content ends in the middle"
        raise CorruptCheckpointError(message)


def _content(stream: ByteStream, info: tarfile.TarInfo) -> Iterator[Chunk]:
    if not info.isreg():
        return
    if stream.position != info.offset_data:
        message = f"the content of {info.name!r} can be read once only, before the next entry"
        raise RuntimeError(message)
    if info.sparse is None and 0 < info.size <= len(stream.at_hand()):
        yield stream.take(info.size)
        return
    # Only GNU tar makes sparse entries: pairs of where some bytes go and how many, zeros between them.
    # The stubs have the type of one number.
    sparse = cast("list[tuple[int, int]] | None", info.sparse)
    extents = [(0, info.size)] if sparse is None else [extent for extent in sparse if extent[1]]
    done = 0
    for start, size in [*extents, (info.size, 0)]:
        if start < done or size < 0:
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
    except (tarfile.TarError, ValueError, ArithmeticError, EOFError, LookupError, RecursionError) as error:
        message = f"it is damaged or truncated ({error})"
        raise CorruptCheckpointError(message) from error
