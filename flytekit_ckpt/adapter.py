"""Legacy calls on the one-object layout: entries that accumulate going out, entries counted and read coming in."""

from __future__ import annotations

import contextlib
import functools
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from flytekit_ckpt import layout, storage
from flytekit_ckpt.archive import Unit
from flytekit_ckpt.entries import Entry, file_entry, in_part, stream_entry
from flytekit_ckpt.errors import CheckpointError
from flytekit_ckpt.folders import folder_size, scan_folder
from flytekit_ckpt.layout import PutOptions
from flytekit_ckpt.locks import ForkSafeLock
from flytekit_ckpt.merging import merge
from flytekit_ckpt.pipeline import CHUNK_SIZE, Callback, Chunk
from flytekit_ckpt.resumption import Resumption
from flytekit_ckpt.unpacking import unpack


class Destination:
    """What is saved to one legacy checkpoint: parts that accumulate in one object, whoever saves them.

    A part is a named file, a folder, or the bytes last written. A part saved again replaces what it brought before.
    What was saved earlier, here or by anybody else, is carried over from the object itself: its sources may be gone,
    and a second copy of it is kept neither in memory nor on disk.

    The object is written under the condition that what is there is what was looked at; where somebody else came first,
    it is looked at again.

    Parameters
    ----------
    uri : str
        The object.
    resumption : Resumption
        What the attempt goes on from, which is told of each save.
    """

    def __init__(self, uri: str, resumption: Resumption) -> None:
        self._uri = uri
        self._settings = resumption.settings
        self._resumption = resumption
        # The labels of the parts that were saved here. A blank one is that of all entries without a label.
        self._labels: dict[str, str] = {}
        # What was written here last, and where its units lie; none if it is a payload.
        self._written: storage.Written | None = None
        self._units: list[Unit] = []
        # Whether it holds what was not saved here.
        self._has_others = False
        self._lock = ForkSafeLock()

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            return dict(vars(self))

    def save_bytes(self, content: Chunk, callback: Callback | None) -> None:
        """Save bytes as the entry `_dst_cp`."""
        self._save_stream(lambda: [content], len(content), callback)

    def save_reader(self, reader: IO[bytes], callback: Callback | None) -> None:
        """Save what a binary reader still has to give as the entry `_dst_cp`."""
        remaining = _Remaining(reader, self._uri)
        self._save_stream(remaining.chunks, remaining.size, callback)

    def save_file(self, path: Path, callback: Callback | None) -> None:
        """Save a regular file as the entry of its name."""
        self._save_entries(
            path.name, lambda: iter([file_entry(path, path.name)]), lambda: path.stat().st_size, callback
        )

    def save_folder(self, path: Path, callback: Callback | None) -> None:
        """Save a folder's contents as entries of their names, merged with other parts file by file."""
        exclude = layout.not_into_itself(self._uri)
        size = functools.partial(folder_size, path, exclude)
        self._save_entries(f"{path.resolve()}/", lambda: scan_folder(path, exclude), size, callback)

    def _save_stream(self, chunks: Callable[[], Iterable[Chunk]], size: int | None, callback: Callback | None) -> None:
        part = layout.LEGACY_PAYLOAD_NAME

        def put(base: _Base, options: PutOptions) -> _Put:
            if base.is_replaced_whole:
                return self._put_payload(chunks(), size, callback, options)
            with layout.sized(chunks(), size) as (content, known):
                return self._put_tree(
                    base, iter([stream_entry(part, content, known)]), lambda: known, callback, options
                )

        self._save(part, put)

    def _save_entries(
        self, part: str, scanned: Callable[[], Iterator[Entry]], size: Callable[[], int], callback: Callback | None
    ) -> None:
        def put(base: _Base, options: PutOptions) -> _Put:
            entries = scanned()
            if base.is_replaced_whole:
                first = next(entries, None)
                second = next(entries, None)
                if first is not None and second is None and _is_legacy_payload(first):
                    return self._put_payload(first.chunks(), first.info.size, callback, options)
                entries = _chain(first, second, entries)
            return self._put_tree(base, entries, size, callback, options)

        self._save(part, put)

    def _put_payload(
        self, chunks: Iterable[Chunk], size: int | None, callback: Callback | None, options: PutOptions
    ) -> _Put:
        return layout.put_payload(self._uri, chunks, self._settings, size=size, callback=callback, options=options), []

    def _put_tree(
        self,
        base: _Base,
        entries: Iterator[Entry],
        size: Callable[[], int],
        callback: Callback | None,
        options: PutOptions,
    ) -> _Put:
        items: Iterable[Entry | Unit] = in_part(entries, base.label)
        if not base.is_replaced_whole:
            opened = functools.partial(
                layout.get_unit, self._uri, written=base.units_in or storage.Written(0, None), settings=self._settings
            )
            items = merge(base.items, in_part(entries, base.label), base.label, opened)
        return layout.put_tree(
            self._uri, items, self._settings, size=size, carried=base.units_in, callback=callback, options=options
        )

    def _save(self, part: str, put: Callable[[_Base, PutOptions], _Put]) -> None:
        """Add a part to what is there, again and again until nobody else's save comes in between."""
        with self._lock, storage.turn(self._uri, self._settings.timeout) as sign:
            storage.undisturbed(lambda: self._try(part, put, sign), uri=self._uri)
            if self._written is not None:
                self._resumption.record(self._written)

    def _try(self, part: str, put: Callable[[_Base, PutOptions], _Put], sign: Callable[[], None]) -> None:
        def options(base: _Base) -> PutOptions:
            return replace(self._resumption.put_options, replaced=base.replaced, step=sign)

        try:
            base = self._base(part)
            try:
                self._written, self._units = put(base, options(base))
            except _DisorderError:
                # Another program's archive, whose entries are unpacked to be sorted.
                with tempfile.TemporaryDirectory(prefix="flytekit_ckpt-") as folder:
                    base = self._base(part, Path(folder))
                    self._written, self._units = put(base, options(base))
        except storage.ConflictError:
            self._written = None
            raise
        self._has_others = base.has_others
        self._labels[part] = base.label

    def _base(self, part: str, scratch: Path | None = None) -> _Base:
        """Tell what a part is to be added to."""
        if self._written is not None:
            is_replaced_whole = not self._has_others and self._labels.keys() <= {part}
            items = self._units or ([] if is_replaced_whole else self._payload_again(self._written))
            label = self._labels.get(part) or ("" if part in self._labels else _new_label())
            return _Base(self._written, items, self._written, label, self._has_others, is_replaced_whole)
        replaced, found = layout.look(self._uri, self._settings, self._resumption.carry_forward.has_carried)
        if found is None:
            is_lost = bool(self._labels.keys() - {part})
            self._labels.clear()
            if is_lost:
                raise storage.overwritten(self._uri)
            return _Base(replaced, [], None, "", has_others=False, is_replaced_whole=True)
        # What has no label now may be anybody's.
        self._labels = {name: label for name, label in self._labels.items() if label}
        is_replaced_whole = isinstance(found, layout.Payload) and part == layout.LEGACY_PAYLOAD_NAME
        items = [] if is_replaced_whole else _entries(found, scratch)
        label = self._labels.get(part) or _new_label()
        return _Base(replaced, items, None, label, not is_replaced_whole, is_replaced_whole)

    def _payload_again(self, written: storage.Written) -> Iterable[Entry]:
        """What the object written last holds, if that is a payload."""
        found = layout.get(self._uri, replace(self._settings, restore_limit=None))
        if found is None or found.version != written.version:
            raise storage.ConflictError
        return _entries(found, None)


_Put = tuple[storage.Written, list[Unit]]


@dataclass(frozen=True)
class _Base:
    """What a part is added to.

    Attributes
    ----------
    replaced : Written or None
        The object that the new one takes the place of.
    items : iterable of Entry or Unit
        What it holds, sorted.
    units_in : Written or None
        The object that the units among them lie in.
    label : str
        The part's.
    has_others : bool
        Whether something is there that was not saved here.
    is_replaced_whole : bool
        Whether the part takes the place of all of it.
    """

    replaced: storage.Written | None
    items: Iterable[Entry | Unit]
    units_in: storage.Written | None
    label: str
    has_others: bool
    is_replaced_whole: bool


def _new_label() -> str:
    # At random, so that no two who save to one destination choose the same.
    return uuid.uuid4().hex[:12]


def _entries(found: layout.Payload | layout.Tree, scratch: Path | None) -> Iterable[Entry]:
    """What somebody has saved, sorted; in an empty folder of its own if one is given."""
    if isinstance(found, layout.Payload):
        return [stream_entry(layout.LEGACY_PAYLOAD_NAME, found.chunks, found.size)]
    if scratch is None:
        return _in_order(found.entries)
    unpack(found.entries, scratch)
    return scan_folder(scratch)


class _DisorderError(Exception):
    """Entries cannot be merged as they come."""


def _in_order(entries: Iterable[Entry]) -> Iterator[Entry]:
    last: list[str] = []
    for entry in entries:
        # What a hard link leads to may be replaced.
        if entry.sort_key <= last or entry.info.islnk():
            raise _DisorderError
        last = entry.sort_key
        yield entry


def read_single(uri: str, found: layout.Payload | layout.Tree, origin: layout.Origin) -> bytes | None:
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
    layout.Event("restored", shape, len(content), time.perf_counter() - started, storage.public(uri), origin).log()
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


class _Remaining:
    """What a binary reader still has to give, more than once if it can seek."""

    def __init__(self, reader: IO[bytes], uri: str) -> None:
        self._reader = reader
        self._uri = uri
        self._is_read = False
        self._start: int | None = None
        # Bytes from the reader's position to its end, if it can seek.
        self.size: int | None = None
        with contextlib.suppress(OSError, ValueError):
            start = reader.tell()
            self.size = max(reader.seek(0, 2) - start, 0)
            reader.seek(start)
            self._start = start

    def chunks(self) -> Iterator[Chunk]:
        if self._is_read:
            if self._start is None:
                message = (
                    f"{storage.public(self._uri)} was changed by another writer while a stream was saved there, which "
                    "cannot be read again: what was there before is still there; save the stream's content once more"
                )
                raise CheckpointError(message)
            self._reader.seek(self._start)
        self._is_read = True
        while True:
            chunk = self._reader.read(CHUNK_SIZE)
            if not isinstance(chunk, (bytes, bytearray, memoryview)):
                message = f"a checkpoint is bytes, but the reader gives {type(chunk).__name__}: open it in binary mode"
                raise TypeError(message)
            if not chunk:
                break
            yield bytes(chunk)
