"""Legacy calls on the one-object layout: entries that accumulate going out, entries counted and read coming in."""

from __future__ import annotations

import contextlib
import functools
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from flytekit_ckpt import archive, layout, storage
from flytekit_ckpt.archive import Unit
from flytekit_ckpt.entries import Entry, in_part, stream_entry
from flytekit_ckpt.folders import scan_folder
from flytekit_ckpt.home import Home
from flytekit_ckpt.layout import PutOptions
from flytekit_ckpt.locks import ForkSafeLock
from flytekit_ckpt.merging import merge
from flytekit_ckpt.parts import Entries, Part
from flytekit_ckpt.pipeline import Callback, Chunk
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

    @property
    def home(self) -> Home | None:
        """The attempt's home, and what is known of it."""
        return self._resumption.home

    @property
    def saved(self) -> Saved:
        """What is known of what was saved; may be set to what another process has come to know of it."""
        with self._lock:
            return Saved(self._written, self._units, self._labels, self._has_others)

    @saved.setter
    def saved(self, saved: Saved) -> None:
        with self._lock:
            self._written, self._units, self._labels, self._has_others = saved

    def save(self, parts: Sequence[Part], callback: Callback | None = None) -> None:
        """Save parts, all of them in one go; each has a name of its own."""
        # Again and again, until nobody else's save comes in between.
        with self._lock, storage.turn(self._uri, self._settings.timeout) as sign:
            storage.undisturbed(lambda: self._try(parts, callback, sign), uri=self._uri)
            if self._written is not None:
                self._resumption.record(self._written)

    def _try(self, parts: Sequence[Part], callback: Callback | None, sign: Callable[[], None]) -> None:
        try:
            base = self._base(parts)
            options = replace(self._resumption.put_options, step=sign)
            try:
                self._written, self._units = self._put(base, parts, callback, options)
            except _DisorderError:
                # Another program's archive, whose entries are unpacked to be sorted.
                with tempfile.TemporaryDirectory(prefix="flytekit_ckpt-") as folder:
                    base = self._base(parts, Path(folder))
                    self._written, self._units = self._put(base, parts, callback, options)
        except storage.ConflictError:
            self._written = None
            raise
        self._has_others = base.has_others
        self._labels.update(base.labels)

    def _put(self, base: _Base, parts: Sequence[Part], callback: Callback | None, options: PutOptions) -> _Put:
        options = replace(options, replaced=base.replaced)
        is_alone = base.is_replaced_whole and len(parts) == 1
        items: Iterable[Entry | Unit] = base.items
        sizes: list[Callable[[], int]] = []

        def opened(unit: Unit) -> Iterator[Entry]:
            assert base.known is not None
            return layout.get_unit(self._uri, unit, written=base.known.written, settings=self._settings)

        with contextlib.ExitStack() as files:
            for part in parts:
                if isinstance(part, Entries):
                    entries = part.entries()
                    sizes.append(part.size)
                    if is_alone:
                        first, second = next(entries, None), next(entries, None)
                        if first is not None and second is None and _is_legacy_payload(first):
                            return self._put_payload(first.chunks(), first.info.size, callback, options)
                        entries = _chain(first, second, entries)
                elif is_alone:
                    return self._put_payload(part.chunks(), part.size(), callback, options)
                else:
                    content, size = files.enter_context(layout.sized(part.chunks(), part.size()))
                    entries = iter([part.entry(content, size)])
                    sizes.append(functools.partial(int, size))
                label = base.labels[part.name]
                newer = in_part(entries, label)
                items = newer if is_alone else merge(items, newer, label, opened)
            saved = set(base.labels.values())
            seen_before = base.known.units if base.known is not None else []
            return layout.put_tree(
                self._uri,
                archive.unchanged(
                    items,
                    [unit for unit in seen_before if unit.parts <= saved],
                    is_verified=self._resumption.is_verified,
                ),
                self._settings,
                size=lambda: sum(size() for size in sizes),
                previous=None if base.known is None else base.known.previous(self._settings),
                callback=callback,
                options=options,
            )

    def _put_payload(
        self, chunks: Iterable[Chunk], size: int | None, callback: Callback | None, options: PutOptions
    ) -> _Put:
        return layout.put_payload(self._uri, chunks, self._settings, size=size, callback=callback, options=options), []

    def _base(self, parts: Sequence[Part], scratch: Path | None = None) -> _Base:
        """Tell what parts are to be added to."""
        names = {part.name for part in parts}
        if self._written is not None:
            is_replaced_whole = not self._has_others and self._labels.keys() <= names
            items = self._units or ([] if is_replaced_whole else self._payload_again(self._written))
            # What was saved here first has none.
            labels = {name: self._labels.get(name) or ("" if name in self._labels else _new_label()) for name in names}
            if is_replaced_whole:
                items = []
            known: layout.Known | None = layout.Known(layout.written_uri(self._uri), self._written, self._units)
            return _Base(self._written, items, known, labels, self._has_others, is_replaced_whole)
        replaced, found = layout.look(self._uri, self._settings, self._resumption.carry_forward.has_carried)
        if found is None:
            is_lost = bool(self._labels.keys() - names)
            self._labels.clear()
            if is_lost:
                raise storage.overwritten(self._uri)
            labels = {name: _new_label() for name in names} if len(names) > 1 else dict.fromkeys(names, "")
            known = self._resumption.loaded() if any(isinstance(part, Entries) for part in parts) else None
            return _Base(replaced, [], known, labels, has_others=False, is_replaced_whole=True)
        # What has no label now may be anybody's.
        self._labels = {name: label for name, label in self._labels.items() if label}
        is_replaced_whole = isinstance(found, layout.Payload) and layout.LEGACY_PAYLOAD_NAME in names
        labels = {name: self._labels.get(name) or _new_label() for name in names}
        if isinstance(found, layout.Tree) and found.units is not None and replaced is not None:
            known = layout.Known(layout.written_uri(self._uri), replaced, found.units)
            return _Base(replaced, found.units, known, labels, has_others=True, is_replaced_whole=False)
        items = [] if is_replaced_whole else _entries(found, scratch)
        return _Base(replaced, items, None, labels, not is_replaced_whole, is_replaced_whole)

    def _payload_again(self, written: storage.Written) -> Iterable[Entry]:
        """What the object written last holds, if that is a payload."""
        found = layout.get(self._uri, replace(self._settings, restore_limit=None))
        if found is None or found.version != written.version:
            raise storage.ConflictError
        return _entries(found, None)


class Saved(NamedTuple):
    """What a `Destination` knows of what was saved there; see its attributes."""

    written: storage.Written | None
    units: list[Unit]
    labels: dict[str, str]
    has_others: bool


_Put = tuple[storage.Written, list[Unit]]


@dataclass(frozen=True)
class _Base:
    """What parts are added to.

    Attributes
    ----------
    replaced : Written or None
        The object that the new one takes the place of.
    items : iterable of Entry or Unit
        What it holds, sorted.
    known : Known or None
        The object that the units among them lie in, and where units lie that may come again.
    labels : dict of str to str
        That of each part.
    has_others : bool
        Whether something is there that was not saved here.
    is_replaced_whole : bool
        Whether the parts take the place of all of it.
    """

    replaced: storage.Written | None
    items: Iterable[Entry | Unit]
    known: layout.Known | None
    labels: dict[str, str]
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
