"""The index of an archive: what it holds and where, so that a part of it can be found without reading the rest.

It is kept behind the end of the archive, in the extra fields of gzip members without content, which every other reader
passes over. The last of them has a fixed length and says where the index begins. An index is a help: what is damaged,
or was left out, costs a reading through. What an entry is, its header in the archive decides.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from flytekit_ckpt.archive.units import Unit
from flytekit_ckpt.compression import crc32
from flytekit_ckpt.errors import CorruptCheckpointError
from flytekit_ckpt.inflation import inflated
from flytekit_ckpt.members import MEMBER_SIZE, NOTE_SIZE, note, note_size, noted
from flytekit_ckpt.pipeline import Range

INDEX_LIMIT = 32 << 20
"""Bytes of the largest index that is written or read: that of some millions of files."""

TAIL_SIZE = 128 << 10
"""Bytes at an object's end in which to look for it; most indexes lie in there as a whole."""

# The version of this format, where the index begins and what its length and its CRC-32 are.
_END = struct.Struct("<BQQI")
_VERSION = 1
# Bytes of the labels, the members and the entries of a unit.
_UNIT = struct.Struct("<III")
# An archive ends with one member of zeros, whose length depends on the library that compresses.
_END_OF_ARCHIVE_LIMIT = 4 << 10


def encoded(units: Iterable[Unit], start: int) -> Iterator[bytes]:
    """Make the members that hold an index.

    Parameters
    ----------
    units : iterable of Unit
        All of an archive's.
    start : int
        Where the first of these members will lie.

    Yields
    ------
    bytes
        Members; none if the index would be too large.
    """
    records: list[bytes] = []
    size = 0
    for unit in units:
        labels = "\0".join(sorted(unit.parts)).encode()
        lengths = _UNIT.pack(len(labels), len(unit.packed_members), len(unit.packed_entries))
        record = b"".join((lengths, labels, unit.packed_members, unit.packed_entries))
        size += len(record)
        if size > INDEX_LIMIT:
            return
        records.append(record)
    content = b"".join(records)
    for position in range(0, len(content), NOTE_SIZE):
        yield note(content[position : position + NOTE_SIZE])
    yield note(_END.pack(_VERSION, start, len(content), crc32(content)))


def place(tail: bytes, size: int) -> Range | None:
    """Tell where an archive's index lies, with what may be the end of the archive before it; `None` if it has none.

    Parameters
    ----------
    tail : bytes
        The last bytes of the archive.
    size : int
        Bytes of the archive.
    """
    end = _end(tail)
    if end is None or end.length > INDEX_LIMIT or end.start + end.size != size:
        return None
    before = min(end.start, _END_OF_ARCHIVE_LIMIT)
    return Range(end.start - before, before + end.size)


class _End(NamedTuple):
    """Where an index begins, the length and the CRC-32 of what it holds."""

    start: int
    length: int
    crc32: int

    @property
    def size(self) -> int:
        """Bytes of its members."""
        return -(-self.length // NOTE_SIZE) * note_size(0) + self.length + note_size(_END.size)


def _end(tail: bytes) -> _End | None:
    last = noted(tail[-note_size(_END.size) :])
    if last is None or len(last) != _END.size:
        return None
    version, *end = _END.unpack(last)
    return _End(*end) if version == _VERSION else None


def decoded(found: bytes) -> list[Unit] | None:
    """Read an index; `None` if it is damaged, or leaves something out.

    Parameters
    ----------
    found : bytes
        What lies at the `place`.
    """
    end = _end(found)
    if end is None:
        return None
    pieces: list[bytes] = []
    position = len(found) - end.size
    while (piece := noted(found[position : position + note_size(NOTE_SIZE)])) is not None:
        pieces.append(piece)
        position += note_size(len(piece))
    content = b"".join(pieces[:-1])
    if position != len(found) or len(content) != end.length or crc32(content) != end.crc32:
        return None
    try:
        units = list(_units(content))
    except (struct.error, ValueError, CorruptCheckpointError):
        return None
    if any(unit.last >= following.first for unit, following in itertools.pairwise(units)):
        return None
    # What no unit holds is the end of the archive, and nothing else.
    rest = end.start - (units[-1].end if units else 0)
    return units if 0 < rest <= _END_OF_ARCHIVE_LIMIT and _is_end(found[: len(found) - end.size][-rest:]) else None


def _is_end(member: bytes) -> bool:
    try:
        return not any(b"".join(inflated(iter([member]), MEMBER_SIZE)))
    except CorruptCheckpointError:
        return False


def _units(content: bytes) -> Iterator[Unit]:
    position = end = 0
    while position < len(content):
        fields: list[bytes] = []
        lengths = _UNIT.unpack_from(content, position)
        position += _UNIT.size
        for length in lengths:
            fields.append(content[position : position + length])
            position += length
        labels, members, entries = fields
        unit = Unit.packed(frozenset(labels.decode().split("\0")), end, members, entries)
        end = unit.end
        yield unit
