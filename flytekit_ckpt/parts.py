"""The parts of a legacy checkpoint: a named file, a folder, or the bytes last written."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from flytekit_ckpt import layout, storage
from flytekit_ckpt.entries import Entry, file_entry, stream_entry
from flytekit_ckpt.errors import CheckpointError
from flytekit_ckpt.files import file_chunks, mapped_files
from flytekit_ckpt.folders import folder_size, scan_folder
from flytekit_ckpt.pipeline import CHUNK_SIZE, Chunk


@dataclass(frozen=True)
class Entries(ABC):
    """A part that is entries.

    Attributes
    ----------
    name : str
        What tells it from other parts: saved again, it replaces what it brought before.
    """

    name: str

    @abstractmethod
    def entries(self) -> Iterator[Entry]:
        """Give the entries, sorted; it may be called more than once."""

    @abstractmethod
    def size(self) -> int:
        """Give about the bytes of their content."""


@dataclass(frozen=True)
class File(Entries):
    """A regular file, as the entry of a name."""

    path: Path

    def entries(self) -> Iterator[Entry]:
        return iter([file_entry(self.path, self.name, mapped=mapped_files())])

    def size(self) -> int:
        return self.path.stat().st_size


@dataclass(frozen=True)
class Folder(Entries):
    """A folder's contents, as entries of their names, without what is saved at a URI itself."""

    path: Path
    uri: str

    @classmethod
    def at(cls, path: Path, uri: str) -> Folder:
        return cls(f"{path.resolve()}/", path, uri)

    def entries(self) -> Iterator[Entry]:
        return scan_folder(self.path, layout.not_into_itself(self.uri))

    def size(self) -> int:
        return folder_size(self.path, layout.not_into_itself(self.uri))


class Stream(ABC):
    """A part that is bytes, as the entry `_dst_cp`."""

    name = layout.LEGACY_PAYLOAD_NAME

    @abstractmethod
    def chunks(self) -> Iterable[Chunk]:
        """Give the bytes, more than once where that can be done."""

    @abstractmethod
    def size(self) -> int | None:
        """Give their number, `None` where only the end will tell."""

    def entry(self, chunks: Iterable[Chunk], size: int) -> Entry:
        return stream_entry(self.name, chunks, size)


@dataclass(frozen=True)
class Bytes(Stream):
    """Bytes in memory."""

    content: Chunk

    def chunks(self) -> Iterable[Chunk]:
        return [self.content]

    def size(self) -> int:
        return len(self.content)


@dataclass(frozen=True)
class Content(Stream):
    """The content of a file, whatever its name."""

    path: Path

    def chunks(self) -> Iterable[Chunk]:
        return file_chunks(self.path, self.size())

    def size(self) -> int:
        return self.path.stat().st_size


@dataclass
class Reader(Stream):
    """What a binary reader still has to give."""

    reader: IO[bytes]
    uri: str
    _is_read: bool = field(default=False, init=False)
    # Where it is, and how much follows, if it can seek.
    _start: int | None = field(default=None, init=False)
    _size: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            start = self.reader.tell()
            self._size = max(self.reader.seek(0, 2) - start, 0)
            self.reader.seek(start)
            self._start = start

    def size(self) -> int | None:
        return self._size

    def chunks(self) -> Iterator[Chunk]:
        if self._is_read:
            if self._start is None:
                message = (
                    f"{storage.public(self.uri)} was changed by another writer while a stream was saved there, which "
                    "cannot be read again: what was there before is still there; save the stream's content once more"
                )
                raise CheckpointError(message)
            self.reader.seek(self._start)
        self._is_read = True
        while True:
            chunk = self.reader.read(CHUNK_SIZE)
            if not isinstance(chunk, (bytes, bytearray, memoryview)):
                message = f"a checkpoint is bytes, but the reader gives {type(chunk).__name__}: open it in binary mode"
                raise TypeError(message)
            if not chunk:
                break
            yield bytes(chunk)


Part = Entries | Stream
