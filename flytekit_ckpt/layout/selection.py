"""A part of a checkpoint: what its index says, and what is read of it without the rest."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from flytekit_ckpt import archive, storage
from flytekit_ckpt.archive import Unit, index
from flytekit_ckpt.entries import Entry
from flytekit_ckpt.errors import CorruptCheckpointError
from flytekit_ckpt.layout.locations import located
from flytekit_ckpt.patterns import Patterns
from flytekit_ckpt.pipeline import Chunk, Range
from flytekit_ckpt.storage import Settings

GAP = 1 << 20
"""Bytes that are read for nothing rather than begin another read: about what arrives in the time of a request."""


RUN = 64 << 20
"""Bytes of units that are read at once, so that not more names than theirs are in memory."""


@dataclass(frozen=True)
class Known:
    """An object that holds a tree, and where its units lie.

    Attributes
    ----------
    uri : str
        The object.
    written : Written
        It, as it was written.
    units : list of Unit
        What it holds.
    metadata : mapping
        What was described when it was written.
    """

    uri: str
    written: storage.Written
    units: list[Unit]
    metadata: storage.Metadata = field(default_factory=dict)

    def previous(self, settings: Settings) -> storage.Previous:
        """Name the object that the units lie in."""
        return storage.Previous(storage.at(self.uri, settings), self.written)


def indexed(target: storage.StoredObject) -> Known | None:
    """Read an object's index; `None` if there is no object, or it has none that is whole."""
    # What was replaced in between is read through, whatever it is.
    with contextlib.suppress(storage.ConflictError):
        tail = target.tail(index.TAIL_SIZE)
        place = None if tail is None else index.place(tail.content, tail.object.size)
        if tail is None or place is None:
            return None
        if place.length <= len(tail.content):
            content = tail.content[-place.length :]
        else:
            missing = Range(place.start, place.length - len(tail.content))
            content = b"".join((*target.get_range(missing, tail.object), tail.content))
        units = index.decoded(content)
        return None if units is None else Known(target.uri, tail.object, units, tail.metadata)
    return None


def known(uri: str, settings: Settings) -> Known | None:
    """Read where the units of a tree lie that has been loaded; `None` if it has no index."""
    path, is_folder = located(uri)
    if path is not None and is_folder:
        return None
    return indexed(storage.at(uri if path is None else str(path), settings))


def selected(
    target: storage.StoredObject,
    found: Known,
    only: Patterns,
    settings: Settings,
    passing: Callable[[Iterator[Chunk]], Iterator[Chunk]],
) -> Iterator[Entry]:
    """Read the entries that are chosen, and as little as possible beside them.

    Parameters
    ----------
    target : StoredObject
        The object.
    found : Known
        What its index says.
    only : Patterns
        Which entries are wanted.
    settings : Settings
        How much memory there is.
    passing : callable
        Passes on the bytes of the object that are read.

    Raises
    ------
    CorruptCheckpointError
        If the object holds something else than its index says.
    ConflictError
        If another writer has replaced the object.
    """
    for run in _runs(found.units, only):
        missing = {entry.name for unit in run for entry in unit.entries() if only.match(entry.name)}
        members = passing(target.get_range(Range(run[0].start, _length(run)), found.written))
        for entry in archive.read(itertools.chain(members, [archive.end_of_archive()]), memory=settings.share):
            if only.match(entry.name):
                missing.discard(entry.name)
                yield entry
        if missing:
            message = f"its index lists {min(missing)!r}, which it does not hold: restore all of it, without `only`"
            raise CorruptCheckpointError(message)


def size_of(found: Known, only: Patterns) -> int:
    """Tell how many bytes of the object `selected` will read."""
    return sum(map(_length, _runs(found.units, only)))


def _runs(units: list[Unit], only: Patterns) -> Iterator[list[Unit]]:
    """Yield the units that hold what is chosen, together where they lie near each other, with what lies between."""
    run: list[Unit] = []
    between: list[Unit] = []
    for unit in units:
        if not any(only.match(entry.name) for entry in unit.entries()):
            between.append(unit)
            continue
        if run and (_length(between) > GAP or _length(run) > RUN):
            yield run
            run, between = [], []
        if run:
            run += between
        run.append(unit)
        between = []
    if run:
        yield run


def _length(units: list[Unit]) -> int:
    return units[-1].start + units[-1].length - units[0].start if units else 0
