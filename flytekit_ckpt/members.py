"""Gzip members: what is compressed and inflated on its own, several side by side.

A gzip file may be made of many members, and any gzip reader takes such a file. Ours hold up to `MEMBER_SIZE` bytes each
and state their own compressed length in the header's extra field, so that the next one is found without inflating this
one. Notes are members without content, whose extra field holds something that other readers pass over.
"""

from __future__ import annotations

import struct

from flytekit_ckpt.compression import GZIP_MAGIC, crc32, deflated, inflated_exactly
from flytekit_ckpt.errors import CorruptCheckpointError

MEMBER_SIZE = 2 << 20
"""Bytes of what is compressed in one member."""

MEMBER_LIMIT = 16 << 20
"""Bytes of the largest member that is held in memory: one that claims to be larger is none of ours, and a stream."""

STORED_ABOVE = 0.9
"""Share of its bytes that a member must compress to; one that does not (the weights of a model) is stored instead."""

# RFC 1952: magic, deflate, flags = extra field, no time, no hint, unknown system, then the field: its length, our
# two-letter id, the data's length, and the member's whole length in bytes.
_MEMBER_HEADER = struct.Struct("<4sIBBH2sHI")
_MEMBER_MARK = b"FC"
_MEMBER_TRAILER = struct.Struct("<II")
# RFC 1951: the length of a stored block is a 16-bit number.
_STORED_BLOCK = struct.Struct("<BHH")
_STORED_BLOCK_SIZE = 0xFFFF
_SAMPLE_SIZE = 4 << 10


HEADER_SIZE = _MEMBER_HEADER.size
"""Bytes of a member from which its length can be told."""


def member(data: memoryview) -> bytes:
    """Make a member of some bytes: compressed, or stored where that is hardly more."""
    shrunk = _shrunk(data)
    body = [shrunk] if shrunk is not None else _stored(data)
    length = _MEMBER_HEADER.size + sum(map(len, body)) + _MEMBER_TRAILER.size
    header = _MEMBER_HEADER.pack(GZIP_MAGIC + b"\x08\x04", 0, 0, 255, 8, _MEMBER_MARK, 4, length)
    return b"".join((header, *body, _MEMBER_TRAILER.pack(crc32(data), len(data))))


def _shrunk(data: memoryview) -> bytes | None:
    """Compress, if samples of the data and the whole of it become smaller."""
    if len(data) > 8 * _SAMPLE_SIZE:
        starts = range(0, len(data), len(data) // 4)
        sample = b"".join(data[start : start + _SAMPLE_SIZE] for start in starts)
        if len(deflated(sample)) > STORED_ABOVE * len(sample):
            return None
    body = deflated(data)
    return body if len(body) <= STORED_ABOVE * len(data) else None


def _stored(data: memoryview) -> list[bytes | memoryview]:
    pieces: list[bytes | memoryview] = []
    for start in range(0, len(data), _STORED_BLOCK_SIZE):
        block = data[start : start + _STORED_BLOCK_SIZE]
        is_last = start + len(block) == len(data)
        pieces += (_STORED_BLOCK.pack(is_last, len(block), len(block) ^ 0xFFFF), block)
    return pieces


def stated_length(header: bytes | bytearray) -> int:
    """The length that one of our members states, 0 for anything else, and for what is too short or long to be ours."""
    if len(header) < _MEMBER_HEADER.size or not header.startswith(GZIP_MAGIC):
        return 0
    _, _, _, _, _, mark, _, length = _MEMBER_HEADER.unpack_from(header)
    is_ours = mark == _MEMBER_MARK and _MEMBER_HEADER.size + _MEMBER_TRAILER.size <= length <= MEMBER_LIMIT
    return int(length) if is_ours else 0


def stated_crc32(member: bytes) -> int:
    """The CRC-32 that one of our members states of what it inflates to."""
    return int(_MEMBER_TRAILER.unpack(member[-_MEMBER_TRAILER.size :])[0])


def inflated_member(member: bytes | memoryview) -> bytes:
    """Inflate one of our members.

    Raises
    ------
    CorruptCheckpointError
        If it is damaged.
    """
    crc, size = _MEMBER_TRAILER.unpack(member[-_MEMBER_TRAILER.size :])
    if size > MEMBER_LIMIT:
        message = "its compressed data is damaged (a member of an impossible size)"
        raise CorruptCheckpointError(message)
    try:
        data = inflated_exactly(member[_MEMBER_HEADER.size : -_MEMBER_TRAILER.size], size)
    except ValueError as error:
        raise CorruptCheckpointError(str(error)) from error
    if crc32(data) != crc:
        message = "its compressed data is damaged or truncated (checksum or length differ)"
        raise CorruptCheckpointError(message)
    return data


# ---------------------------------------------------------------------------------------------------------------------

# RFC 1952: as above, but the field has an id of its own, and any length.
_NOTE_HEADER = struct.Struct("<4sIBBH2sH")
_NOTE_MARK = b"FI"
# Of no content: deflate's empty block, its CRC-32 and its length.
_NOTE_BODY = b"\x03\x00" + bytes(8)

NOTE_SIZE = 0xFFFF - 4
"""Bytes that a member's extra field takes, beside its own header."""


def note(content: bytes) -> bytes:
    """Make a member that holds nothing but, where other readers do not look, up to `NOTE_SIZE` bytes."""
    header = _NOTE_HEADER.pack(GZIP_MAGIC + b"\x08\x04", 0, 0, 255, 4 + len(content), _NOTE_MARK, len(content))
    return header + content + _NOTE_BODY


def note_size(length: int) -> int:
    """Give the bytes of a member that is a note of a length."""
    return _NOTE_HEADER.size + length + len(_NOTE_BODY)


def note_length(header: bytes) -> int:
    """The length of the note that `HEADER_SIZE` bytes may begin, 0 for anything else."""
    if len(header) < _NOTE_HEADER.size or not header.startswith(GZIP_MAGIC):
        return 0
    *_, mark, length = _NOTE_HEADER.unpack_from(header)
    return note_size(length) if mark == _NOTE_MARK else 0


def noted(start: bytes) -> bytes | None:
    """Give what a member that `start` begins with was made to hold; `None` if it is no note."""
    if len(start) < _NOTE_HEADER.size:
        return None
    *_, length = _NOTE_HEADER.unpack_from(start)
    content = start[_NOTE_HEADER.size : _NOTE_HEADER.size + length]
    return content if length <= NOTE_SIZE and start.startswith(note(content)) else None
