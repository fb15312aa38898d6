"""Files that are as they were when they were saved: their members are carried over instead of made again."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from flytekit_ckpt.archive.units import Unit, seen
from flytekit_ckpt.entries import Entry
from flytekit_ckpt.members import noted
from flytekit_ckpt.pipeline import Chunk, Range

RUN = 64 << 20
"""Bytes of ranges that are made one, if they follow each other: a large checkpoint has very many."""


@dataclass(frozen=True)
class Unchanged:
    """A unit that would be the same again.

    Attributes
    ----------
    unit : Unit
        The unit.
    size : int
        Bytes of content of its files.
    """

    unit: Unit
    size: int


@dataclass(frozen=True)
class Compared:
    """A unit that seems to be the same: its members are made again and compared, and carried over if they are."""

    unit: Unit
    entries: list[Entry]


def unchanged(
    items: Iterable[Entry | Unit], units: Sequence[Unit], *, is_verified: bool
) -> Iterator[Entry | Unit | Unchanged | Compared]:
    """Find what is to be saved among what has been saved.

    Parameters
    ----------
    items : iterable of Entry or Unit
        What is to be saved, sorted.
    units : sequence of Unit
        What has been saved of the same files, sorted.
    is_verified : bool
        Whether files are compared by content that are the same by size, times and inode.
    """
    collected: list[Entry] = []
    known = iter(units)
    unit = next(known, None)
    for item in items:
        if not isinstance(item, Entry) or (item.info.isreg() and item.identity is None):
            # The content of an entry that is no file must be read before the next is asked for.
            yield from collected
            collected = []
            yield item
            continue
        key = item.sort_key
        while unit is not None and unit.last < key:
            yield from collected
            collected = []
            unit = next(known, None)
        if unit is None or key < unit.first:
            yield item
            continue
        collected.append(item)
        if key == unit.last:
            yield from _judged(unit, collected, is_verified=is_verified)
            collected = []
            unit = next(known, None)
    yield from collected


def _judged(unit: Unit, entries: list[Entry], *, is_verified: bool) -> Iterator[Entry | Unchanged | Compared]:
    if unit.seen and not is_verified and unit.seen == seen(entries):
        yield Unchanged(unit, sum(entry.info.size for entry in entries))
    elif unit.parts == {entry.part for entry in entries} and _are_listed(unit, entries):
        yield Compared(unit, entries)
    else:
        yield from entries


def _are_listed(unit: Unit, entries: list[Entry]) -> bool:
    listed = list(unit.entries())
    return len(listed) == len(entries) and all(map(_is_listed, listed, entries))


def _is_listed(listed: object, entry: Entry) -> bool:
    return listed == entry.described


def repeated(chunks: Iterator[Chunk | Range], size: int) -> tuple[bytes | None, Iterator[Chunk | Range]]:
    """Find out whether an archive is going to be the very one that its ranges lie in.

    Parameters
    ----------
    chunks : iterator of bytes or Range
        The archive, as `pack` gives it.
    size : int
        Bytes of the one that the ranges lie in.

    Returns
    -------
    bytes or None
        What that one must end with, for both to be the same; `None` if they cannot be.
    iterator of bytes or Range
        The archive again, of which no more has been taken than its first new member, perhaps in larger ranges.
    """
    carried: list[Range] = []
    end: list[Chunk] = []
    position = 0
    for chunk in chunks:
        if isinstance(chunk, Range):
            may_be = not end and chunk.start == position
        else:
            # One member ends the archive, and behind it is its index.
            may_be = not end or noted(bytes(chunk)) is not None
        if not may_be:
            return None, itertools.chain(carried, end, [chunk], chunks)
        if not isinstance(chunk, Range):
            end.append(chunk)
            position += len(chunk)
            continue
        position += chunk.length
        if carried and carried[-1].length < RUN:
            last = carried.pop()
            carried.append(Range(last.start, last.length + chunk.length))
        else:
            carried.append(chunk)
    return b"".join(end) if position == size else None, itertools.chain(carried, end)
