"""Units: members of an archive that hold whole entries, and can be carried over or read without the rest."""

from __future__ import annotations

import hashlib
import itertools
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from flytekit_ckpt.compression import deflated, inflated_exactly
from flytekit_ckpt.entries import KINDS, Entry, EntryInfo
from flytekit_ckpt.errors import CorruptCheckpointError
from flytekit_ckpt.members import MEMBER_LIMIT, note, note_size

LISTING_LIMIT = 4 << 20
"""Bytes that a unit's listing may take: an entry's header takes more of a member, so that no unit's is larger."""

ALIGNMENT = 4 << 10
"""Bytes of a block of most file systems: some share the blocks of two files, if they begin with one in both."""

ALIGNED_SIZE = 256 << 10
"""Bytes of a unit's first member from which on the unit begins with a block: a note fills the gap before it."""

# Numbers of the entries, bytes of their names.
_HEADER = struct.Struct("<II")
# A member's length in the archive, the length of what it inflates to, and the CRC-32 of that.
_MEMBER = struct.Struct("<III")


class Member(NamedTuple):
    """A member of a unit.

    Attributes
    ----------
    length : int
        Bytes in the archive.
    size : int
        Bytes of the tar stream that it inflates to.
    crc32 : int
        CRC-32 of those.
    """

    length: int
    size: int
    crc32: int


@dataclass(frozen=True)
class Unit:
    """Consecutive members that hold whole entries, and nothing but them.

    Attributes
    ----------
    first, last : list of str
        Sort keys of the first and the last entry.
    parts : frozenset of str
        Labels of the parts that the entries came from.
    start : int
        Where the members lie in the archive, in bytes.
    gap : int
        Bytes of the note before them.
    packed_members : bytes
        The members; see `members`.
    packed_entries : bytes
        What is known of the entries; see `entries`.
    seen : bytes
        What was seen of the files that were packed, as `seen` gives it; blank if they may change unseen.
    """

    first: list[str]
    last: list[str]
    parts: frozenset[str]
    start: int
    gap: int
    length: int
    packed_members: bytes
    packed_entries: bytes
    seen: bytes = b""

    @classmethod
    def of(cls, position: int, entries: Sequence[Entry], members: Sequence[Member]) -> Unit:
        """Describe members at a position, or behind the gap there, by what has been packed into them."""
        space = gap(position, members[0].length)
        return cls(
            entries[0].sort_key,
            entries[-1].sort_key,
            frozenset(entry.part for entry in entries),
            position + space,
            space,
            sum(member.length for member in members),
            b"".join(_MEMBER.pack(*member) for member in members),
            _listing(entries),
            seen(entries) if all(entry.identity is None or entry.identity.is_settled for entry in entries) else b"",
        )

    @classmethod
    def packed(cls, parts: frozenset[str], position: int, packed_members: bytes, packed_entries: bytes) -> Unit:
        """Take a unit as it was described, at a position or behind the gap there.

        Raises
        ------
        CorruptCheckpointError
            If the description is damaged.
        """
        unit = cls([], [], parts, position, 0, 0, packed_members, packed_entries)
        keys = [entry.name.split("/") for entry in unit.entries()]
        if any(key >= following for key, following in itertools.pairwise(keys)):
            raise _damaged()
        try:
            members = unit.members
        except struct.error as error:
            raise _damaged() from error
        if not members or any(member.size > MEMBER_LIMIT for member in members):
            raise _damaged()
        length = sum(member.length for member in members)
        return replace(unit.placed(position), first=keys[0], last=keys[-1], length=length)

    def placed(self, position: int) -> Unit:
        """Give the unit as it is in another archive, at a position or behind the gap there."""
        space = gap(position, _MEMBER.unpack_from(self.packed_members)[0])
        return replace(self, start=position + space, gap=space)

    @property
    def end(self) -> int:
        """Where what follows in the archive begins."""
        return self.start + self.length

    @property
    def members(self) -> list[Member]:
        return [Member(*numbers) for numbers in _MEMBER.iter_unpack(self.packed_members)]

    def entries(self) -> Iterator[EntryInfo]:
        """List the entries.

        Raises
        ------
        CorruptCheckpointError
            If the list is damaged.
        """
        try:
            count, names_size = _HEADER.unpack_from(self.packed_entries)
            fields = struct.Struct(f"<{count}s{count}q{count}q{names_size}s")
            if fields.size > LISTING_LIMIT:
                raise _damaged()
            kinds, *numbers, names = fields.unpack(inflated_exactly(self.packed_entries[_HEADER.size :], fields.size))
            decoded = names.decode("utf-8", "surrogateescape").split("\0")
        except (struct.error, ValueError) as error:
            raise _damaged() from error
        if len(decoded) != count or not count:
            raise _damaged()
        for index, name in enumerate(decoded):
            kind = KINDS.get(kinds[index : index + 1])
            if kind is None:
                raise _damaged()
            yield EntryInfo(name, kind, numbers[index], numbers[count + index])


def gap(position: int, length: int) -> int:
    """Give the bytes of the note before a unit whose first member has a length, where it would begin at a position."""
    if length < ALIGNED_SIZE or not position % ALIGNMENT:
        return 0
    return note_size(0) + -(position + note_size(0)) % ALIGNMENT


def filled(gap: int) -> bytes:
    """Make the note that fills a gap."""
    return note(bytes(gap - note_size(0)))


def seen(entries: Sequence[Entry]) -> bytes:
    """Sum up what can be seen of files without reading them; blank if one of the entries is made of something else."""
    digest = hashlib.blake2b(digest_size=16)
    for entry in entries:
        info = entry.info
        if info.isreg() and entry.identity is None:
            return b""
        told = (info.name, info.type, info.mode, info.size, entry.mtime_ns, info.linkname, entry.part)
        digest.update(repr((told, entry.identity and entry.identity[:3])).encode("utf-8", "surrogateescape"))
    return digest.digest()


def _listing(entries: Sequence[Entry]) -> bytes:
    count = len(entries)
    kinds = b"".join(entry.info.type for entry in entries)
    names = "\0".join(entry.name for entry in entries).encode("utf-8", "surrogateescape")
    numbers = [*(entry.info.size for entry in entries), *(entry.mtime_ns for entry in entries)]
    fields = struct.pack(f"<{count}s{count}q{count}q{len(names)}s", kinds, *numbers, names)
    return _HEADER.pack(count, len(names)) + deflated(fields)


def _damaged() -> CorruptCheckpointError:
    return CorruptCheckpointError("its index is damaged")
