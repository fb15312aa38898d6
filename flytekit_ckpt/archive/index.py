"""The index of an archive: what it holds and where, so that a part of it can be found without reading the rest.

It is kept behind the end of the archive, in the extra fields of gzip members without content, which every other reader
passes over. The last of them has a fixed length and says where the index begins. An index is a help: what is damaged,
or was left out, costs a reading through. What an entry is, its header in the archive decides.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator

from flytekit_ckpt.archive.units import Unit
from flytekit_ckpt.errors import CorruptCheckpointError
from flytekit_ckpt.members import NOTE_SIZE, crc32, note, note_size, noted
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
    """Tell where an archive's index lies, its last member included; `None` if it has none.

    Parameters
    ----------
    tail : bytes
        The last bytes of the archive.
    size : int
        Bytes of the archive.
    """
    end = _end(tail)
    if end is None:
        return None
    start, length, _ = end
    members = -(-length // NOTE_SIZE) * note_size(0) + length + note_size(_END.size)
    return Range(start, members) if length <= INDEX_LIMIT and start + members == size else None


def _end(tail: bytes) -> tuple[int, int, int] | None:
    last = noted(tail[-note_size(_END.size) :])
    if last is None or len(last) != _END.size:
        return None
    version, start, length, crc = _END.unpack(last)
    return (start, length, crc) if version == _VERSION else None


def decoded(members: bytes) -> list[Unit] | None:
    """Read an index; `None` if it is damaged.

    Parameters
    ----------
    members : bytes
        What lies at the `place`.
    """
    end = _end(members)
    if end is None:
        return None
    start, length, crc = end
    pieces: list[bytes] = []
    position = 0
    while (found := noted(members[position : position + note_size(NOTE_SIZE)])) is not None:
        pieces.append(found)
        position += note_size(len(found))
    content = b"".join(pieces[:-1])
    if position != len(members) or len(content) != length or crc32(content) != crc:
        return None
    try:
        units = list(_units(content))
    except (struct.error, ValueError, CorruptCheckpointError):
        return None
    ends_at = units[-1].start + units[-1].length if units else 0
    return units if 0 < start - ends_at <= _END_OF_ARCHIVE_LIMIT else None


def _units(content: bytes) -> Iterator[Unit]:
    position = start = 0
    while position < len(content):
        fields: list[bytes] = []
        lengths = _UNIT.unpack_from(content, position)
        position += _UNIT.size
        for length in lengths:
            fields.append(content[position : position + length])
            position += length
        labels, members, entries = fields
        unit = Unit.packed(frozenset(labels.decode().split("\0")), start, members, entries)
        start += unit.length
        yield unit
