"""Legacy calls on the one-object layout: entries that accumulate going out, entries counted and read coming in."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from flytekit_ckpt import layout, storage
from flytekit_ckpt.archive import Unit
from flytekit_ckpt.entries import Entry, file_entry, folder_size, in_part, scan_folder, stream_entry
from flytekit_ckpt.locks import ForkSafeLock
from flytekit_ckpt.pipeline import CHUNK_SIZE, Callback, Chunk
from flytekit_ckpt.storage import Settings


class Destination:
    """What one legacy checkpoint saves: parts that accumulate in one object.

    A part is a named file, a folder, or the bytes last written. A part saved again replaces what it brought before.
    Parts saved earlier are carried over from the object itself: their sources may be gone, and a second copy of them is
    kept neither in memory nor on disk.

    Parameters
    ----------
    uri : str
        The object.
    settings : Settings
        How it is reached.
    """

    def __init__(self, uri: str, settings: Settings) -> None:
        self._uri = uri
        self._settings = settings
        self._parts: dict[str, int] = {}
        self._written: storage.Written | None = None
        # The units of a tree; none while the object is a payload.
        self._units: list[Unit] = []
        self._lock = ForkSafeLock()

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            return dict(vars(self))

    def save_bytes(self, content: bytes) -> None:
        """Save bytes as the entry `_dst_cp`."""
        self._save_stream([content], len(content), None)

    def save_reader(self, reader: IO[bytes], callback: Callback | None) -> None:
        """Save what a binary reader still has to give as the entry `_dst_cp`."""
        self._save_stream(_chunks(reader), _remaining(reader), callback)

    def save_file(self, path: Path, callback: Callback | None) -> None:
        """Save a regular file as the entry of its name."""
        entry = file_entry(path, path.name)
        self._save_entries(path.name, iter([entry]), lambda: entry.info.size, callback)

    def save_folder(self, path: Path, callback: Callback | None) -> None:
        """Save a folder's contents as entries of their names, merged with other parts file by file."""
        size = functools.partial(folder_size, path)
        self._save_entries(f"{path.resolve()}/", scan_folder(path), size, callback)

    def _save_stream(self, chunks: Iterable[Chunk], size: int | None, callback: Callback | None) -> None:
        with self._lock:
            part = layout.LEGACY_PAYLOAD_NAME
            if self._parts.keys() <= {part}:
                self._put_payload(part, chunks, size, callback)
                return
            with layout.sized(chunks, size) as (content, known):
                self._put_tree(part, iter([stream_entry(part, content, known)]), lambda: known, callback)

    def _save_entries(
        self, part: str, entries: Iterator[Entry], size: Callable[[], int], callback: Callback | None
    ) -> None:
        with self._lock:
            if self._parts.keys() <= {part}:
                first = next(entries, None)
                second = next(entries, None)
                if first is not None and second is None and _is_legacy_payload(first):
                    self._put_payload(part, first.chunks(), first.info.size, callback)
                    return
                entries = _chain(first, second, entries)
            self._put_tree(part, entries, size, callback)

    def _put_payload(self, part: str, chunks: Iterable[Chunk], size: int | None, callback: Callback | None) -> None:
        written = layout.put_payload(self._uri, chunks, self._settings, size=size, callback=callback)
        self._remember(part, written, [])

    def _put_tree(
        self, part: str, entries: Iterator[Entry], size: Callable[[], int], callback: Callback | None
    ) -> None:
        number = self._parts.get(part, len(self._parts))
        items: Iterable[Entry | Unit] = in_part(entries, number)
        carried = self._written if self._parts.keys() - {part} else None
        if carried is not None:
            opened = functools.partial(layout.get_unit, self._uri, written=carried, settings=self._settings)
            items = merge(self._carried(carried), in_part(entries, number), number, opened)
        written, units = layout.put_tree(
            self._uri, items, self._settings, size=size, carried=carried, callback=callback
        )
        self._remember(part, written, units)

    def _remember(self, part: str, written: storage.Written, units: list[Unit]) -> None:
        self._parts.setdefault(part, len(self._parts))
        self._written = written
        self._units = units

    def _carried(self, written: storage.Written) -> Iterable[Entry | Unit]:
        """What the object written last holds."""
        if self._units:
            return self._units
        # A limit is for what others have written.
        found = layout.get(self._uri, replace(self._settings, restore_limit=None))
        if found is None or found.version != written.version:
            raise storage.overwritten(self._uri)
        if isinstance(found, layout.Payload):
            return [stream_entry(layout.LEGACY_PAYLOAD_NAME, found.chunks, found.size)]
        return []


def merge(
    older: Iterable[Entry | Unit],
    newer: Iterable[Entry],
    replaced: int,
    opened: Callable[[Unit], Iterable[Entry]],
) -> Iterator[Entry | Unit]:
    """Merge what an object holds with what is to be saved, both sorted, file by file.

    Where both have a name, the newer one stays. Where one has a file and the other a folder, the newer one replaces it
    with everything below. A unit that nothing newer touches is passed on as it is; only one that loses some of its
    entries, and not all, is opened.

    Parameters
    ----------
    older : iterable of Entry or Unit
        What the object holds.
    newer : iterable of Entry
        What is to be saved.
    replaced : int
        The part whose older entries go.
    opened : callable
        Reads the entries of a unit.
    """
    ahead = _Newer(newer)
    for item in older:
        first, last, parts = (
            (item.first, item.last, item.parts)
            if isinstance(item, Unit)
            else (item.sort_key, item.sort_key, {item.part})
        )
        if parts == {replaced}:
            continue
        yield from ahead.before(first)
        if replaced not in parts and not ahead.touches(first, last):
            yield item
        elif first != last and isinstance(item, Unit):
            for entry in opened(item):
                yield from ahead.before(entry.sort_key)
                if entry.part != replaced and not ahead.touches(entry.sort_key, entry.sort_key):
                    yield entry
    yield from ahead.before(None)


class _Newer:
    """Newer entries, handed on as their turn comes."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._entries = iter(entries)
        self._next = next(self._entries, None)
        # The last entry handed on, if it is not a folder: it takes the place of all that was below its name.
        self._file: list[str] | None = None

    def before(self, key: list[str] | None) -> Iterator[Entry]:
        """Hand on the entries that come before a name, all that are left for `None`."""
        while self._next is not None and (key is None or self._next.sort_key < key):
            self._file = None if self._next.info.isdir() else self._next.sort_key
            yield self._next
            self._next = next(self._entries, None)

    def touches(self, first: list[str], last: list[str]) -> bool:
        """Tell whether a newer entry lies between two names, or takes the place of the first; call `before` first."""
        if self._next is not None and self._next.sort_key <= last:
            return True
        return self._file is not None and first[: len(self._file)] == self._file


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
    content: list[Chunk] = []
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


def _chunks(reader: IO[bytes]) -> Iterator[Chunk]:
    while True:
        chunk = reader.read(CHUNK_SIZE)
        if not isinstance(chunk, (bytes, bytearray, memoryview)):
            message = f"a checkpoint is bytes, but the reader gives {type(chunk).__name__}: open it in binary mode"
            raise TypeError(message)
        if not chunk:
            break
        yield bytes(chunk)
