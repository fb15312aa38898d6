"""What an object holds, merged with what is to be saved, file by file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from flytekit_ckpt.archive import Unit
from flytekit_ckpt.entries import Entry


def merge(
    older: Iterable[Entry | Unit],
    newer: Iterable[Entry],
    replaced: str,
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
    replaced : str
        Label of the part whose older entries go.
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
