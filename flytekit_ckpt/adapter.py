"""Legacy calls on the one-object layout: entries that accumulate going out, entries counted and read coming in."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from flytekit_ckpt import layout, storage
from flytekit_ckpt.entries import CHUNK_SIZE, Entry, file_entry, in_part, merge, scan_folder, stream_entry
from flytekit_ckpt.errors import CheckpointError


class Destination:
    """What one legacy checkpoint saves: parts that accumulate in one object.

    A part is a named file, a folder, or the bytes last written. A part saved again replaces what it brought before.
    Parts saved earlier are carried over from the object itself: their sources may be gone, and a second copy of them is
    kept neither in memory nor on disk.

    Parameters
    ----------
    uri : str
        The object.
    options : mapping, optional
        Keyword arguments of the fsspec filesystem.
    """

    def __init__(self, uri: str, options: storage.StorageOptions | None) -> None:
        self._uri = uri
        self._options = options
        self._parts: dict[str, int] = {}
        self._written: storage.Written | None = None
        self._lock = threading.Lock()

    def save_bytes(self, content: bytes) -> None:
        """Save bytes as the entry `_dst_cp`."""
        self._save_stream([content], len(content))

    def save_reader(self, reader: IO[bytes]) -> None:
        """Save what a binary reader still has to give as the entry `_dst_cp`."""
        self._save_stream(_chunks(reader), _remaining(reader))

    def save_file(self, path: Path) -> None:
        """Save a regular file as the entry of its name."""
        self._save_entries(path.name, iter([file_entry(path, path.name)]))

    def save_folder(self, path: Path) -> None:
        """Save a folder's contents as entries of their names, merged with other parts file by file."""
        self._save_entries(f"{path.resolve()}/", scan_folder(path))

    def _save_stream(self, chunks: Iterable[bytes], size: int | None) -> None:
        with self._lock:
            part = layout.LEGACY_PAYLOAD_NAME
            if self._parts.keys() <= {part}:
                written = layout.put_payload(self._uri, chunks, self._options, size=size)
                self._remember(part, written)
                return
            with layout.sized(chunks, size) as (content, known):
                self._put_tree(part, iter([stream_entry(part, content, known)]))

    def _save_entries(self, part: str, entries: Iterator[Entry]) -> None:
        with self._lock:
            if self._parts.keys() <= {part}:
                first = next(entries, None)
                second = next(entries, None)
                if first is not None and second is None and _is_legacy_payload(first):
                    written = layout.put_payload(self._uri, first.chunks(), self._options, size=first.info.size)
                    self._remember(part, written)
                    return
                entries = _chain(first, second, entries)
            self._put_tree(part, entries)

    def _put_tree(self, part: str, entries: Iterator[Entry]) -> None:
        number = self._parts.get(part, len(self._parts))
        entries = in_part(entries, number)
        if self._parts.keys() - {part}:
            entries = merge(older=self._carried(number), newer=entries)
        self._remember(part, layout.put_tree(self._uri, entries, self._options))

    def _remember(self, part: str, written: storage.Written) -> None:
        self._parts.setdefault(part, len(self._parts))
        self._written = written

    def _carried(self, replaced: int) -> Iterator[Entry]:
        """Entries of the object written last, but for those of the part that is being replaced."""
        found = layout.get(self._uri, self._options)
        if found is None or (self._written is not None and found.version != self._written.version):
            message = (
                f"{storage.public(self._uri)} was changed by another writer: what this checkpoint saved there before "
                "is gone. Save to a destination of its own, or save everything again with a new checkpoint"
            )
            raise CheckpointError(message)
        if isinstance(found, layout.Payload):
            # Only one part has been saved so far.
            content = stream_entry(layout.LEGACY_PAYLOAD_NAME, found.chunks, found.size)
            yield content
            return
        for entry in found.entries:
            if entry.part != replaced:
                yield entry


def read_single(uri: str, found: layout.Payload | layout.Tree) -> bytes | None:
    """Return the content of a checkpoint's one entry; `None` if it has no entry.

    Raises
    ------
    ValueError
        If it has more than one.
    IsADirectoryError
        If the one is a folder.
    """
    started = time.perf_counter()
    with layout.naming(uri):
        if isinstance(found, layout.Payload):
            shape, content = "payload", b"".join(found.chunks)
        else:
            single = _single_content(uri, found.entries)
            if single is None:
                return None
            shape, content = "tree", single
    layout.Event("restored", shape, len(content), time.perf_counter() - started, storage.public(uri)).log()
    return content


def _single_content(uri: str, entries: Iterator[Entry]) -> bytes | None:
    content: list[bytes] = []
    names: set[str] = set()
    is_file = True
    for entry in entries:
        names.add(entry.name.partition("/")[0])
        is_file = is_file and entry.info.isreg()
        # In a tar, the last entry of a name counts; of several names, none does.
        content[:] = entry.chunks() if is_file and len(names) == 1 else ()
    check_single(uri, sorted(names))
    if not names:
        return None
    if not is_file:
        message = f"the one entry of {storage.public(uri)} is a folder, {min(names)!r}: use restore() and read it there"
        raise IsADirectoryError(message)
    return b"".join(content)


def check_single(uri: str, names: list[str]) -> None:
    """Refuse to choose between entries, in flytekit's words."""
    if len(names) > 1:
        message = f"Expected exactly one checkpoint - found {len(names)} in {storage.public(uri)}: use restore()"
        raise ValueError(message)


def _is_legacy_payload(entry: Entry) -> bool:
    return entry.name == layout.LEGACY_PAYLOAD_NAME and entry.info.isreg()


def _chain(first: Entry | None, second: Entry | None, rest: Iterator[Entry]) -> Iterator[Entry]:
    yield from (entry for entry in (first, second) if entry is not None)
    yield from rest


def _remaining(reader: IO[bytes]) -> int | None:
    """Bytes between a reader's position and its end, `None` if it cannot seek."""
    try:
        position = reader.tell()
        end = reader.seek(0, 2)
        reader.seek(position)
    except (OSError, ValueError):
        return None
    return max(end - position, 0)


def _chunks(reader: IO[bytes]) -> Iterator[bytes]:
    while True:
        chunk = reader.read(CHUNK_SIZE)
        if not isinstance(chunk, (bytes, bytearray, memoryview)):
            message = f"a checkpoint is bytes, but the reader gives {type(chunk).__name__}: open it in binary mode"
            raise TypeError(message)
        if not chunk:
            break
        yield bytes(chunk)
