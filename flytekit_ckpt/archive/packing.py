"""Entries packed into an archive: entries in, chunks of bytes out.

The gzip file is made of many members (`flytekit_ckpt.members`). They belong to units: a large entry is a unit of its
own, small ones share one. A unit's members can be carried over from one archive into the next as they are.
"""

from __future__ import annotations

import functools
import tarfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from flytekit_ckpt.archive import index
from flytekit_ckpt.archive.reuse import Compared, Unchanged
from flytekit_ckpt.archive.units import Member, Unit, filled, gap
from flytekit_ckpt.compression import byte_sum, crc32
from flytekit_ckpt.entries import Entry
from flytekit_ckpt.errors import CheckpointError
from flytekit_ckpt.files import OpenFile, file_content
from flytekit_ckpt.members import MEMBER_SIZE, member, stated_crc32
from flytekit_ckpt.pipeline import MEMORY_BUDGET, Range, in_order, processors

LARGE_ENTRY = MEMBER_SIZE // 4
"""Bytes of content from which on an entry has members of its own."""


Item = Entry | Unit | Unchanged | Compared
"""What an archive can be made of."""


def pack(
    items: Iterable[Item],
    *,
    memory: int = MEMORY_BUDGET,
    record: Callable[[Unit], object] = lambda _: None,
    progress: Callable[[int], object] = lambda _: None,
    is_indexed: bool = True,
) -> Iterator[bytes | Range]:
    """Turn sorted entries, and units of an earlier archive, into an archive.

    Parameters
    ----------
    items : iterable of Entry, Unit, Unchanged or Compared
        What the archive will hold.
    memory : int
        Bytes that the members under way may take.
    record : callable, optional
        Takes each unit of the new archive, in order.
    progress : callable, optional
        Takes the bytes of file content in each member that is done.
    is_indexed : bool, default True
        Whether an index follows the end of the archive.

    Yields
    ------
    bytes or Range
        One gzip member each, the compressed form of about `MEMBER_SIZE` bytes of tar stream; or, for a unit that is
        carried over, where its members lie in the earlier archive. The index comes last.
    """
    plans = ((_cost(plan), plan) for plan in _Planner().plans(items))
    threads = min(processors(), max(1, memory // (4 * MEMBER_SIZE)))
    made = _Made(record)
    entries: list[Entry] = []
    members: list[Member] = []
    for plan, data in in_order(_Packer(), plans, threads=threads, memory=memory):
        if members and (not isinstance(plan, _Plan) or not plan.continues):
            made.add(Unit.of(made.end, entries, members))
            entries, members = [], []
        if not isinstance(plan, _Plan):
            unit = plan.unit if isinstance(plan, Unchanged) else plan
            placed = unit.placed(made.end)
            yield from _carried(unit.start, unit.length, unit.gap, placed.gap)
            made.add(placed)
            progress(plan.size if isinstance(plan, Unchanged) else 0)
            continue
        progress(plan.content)
        entries += plan.entries
        if plan.earlier is not None and data is None:
            space = 0 if members else gap(made.end, plan.earlier.length)
            members.append(plan.earlier)
            yield from _carried(plan.earlier_start, plan.earlier.length, plan.earlier_gap, space)
            continue
        assert data is not None
        space = 0 if members else gap(made.end, len(data))
        members.append(Member(len(data), plan.size, stated_crc32(data)))
        if space:
            yield filled(space)
        yield data
    if members:
        made.add(Unit.of(made.end, entries, members))
    end = end_of_archive()
    yield end
    if is_indexed:
        yield from index.encoded(made.units, made.end + len(end))


class _Made:
    """What has been made of an archive."""

    def __init__(self, record: Callable[[Unit], object]) -> None:
        self.units: list[Unit] = []
        self.end = 0
        self._record = record

    def add(self, unit: Unit) -> None:
        """Take a unit of which all chunks have been given."""
        self.units.append(unit)
        self._record(unit)
        self.end = unit.end


def _carried(start: int, length: int, earlier_gap: int, space: int) -> Iterator[bytes | Range]:
    """Give what is carried over from an earlier archive, behind a gap."""
    if space == earlier_gap:
        # So the note is the same too. What follows each other in both archives is one range then.
        yield Range(start - space, space + length)
        return
    if space:
        yield filled(space)
    yield Range(start, length)


def end_of_archive() -> bytes:
    """Make the member that ends an archive: two zero blocks, of which every tar program writes a whole record."""
    return member(memoryview(bytes(tarfile.RECORDSIZE)))


@dataclass
class _Slice:
    """Bytes of a large file, which are read when they are packed."""

    file: OpenFile
    offset: int
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, part: slice) -> _Slice:
        start, stop, _ = part.indices(self.length)
        return _Slice(self.file, self.offset + start, stop - start)


@dataclass
class _Plan:
    """A member to be: pieces of the tar stream, some of them still on the disk.

    Attributes
    ----------
    continues : bool
        Whether it belongs to the unit of the plan before.
    pieces : list
        What it is made of.
    size, content : int
        Bytes of all pieces, and of those that are content of files.
    entries : list of Entry
        Those that begin in it.
    earlier : Member, optional
        The member of an earlier archive that it may be the same as, where that lies, and behind which gap.
    """

    continues: bool = False
    pieces: list[bytes | memoryview | _Slice] = field(default_factory=list)
    size: int = 0
    content: int = 0
    entries: list[Entry] = field(default_factory=list)
    earlier: Member | None = None
    earlier_start: int = 0
    earlier_gap: int = 0

    def add(self, piece: bytes | memoryview | _Slice) -> None:
        self.pieces.append(piece)
        self.size += len(piece)


_Carried = Unit | Unchanged


def _cost(plan: _Plan | _Carried) -> int:
    return 2 * plan.size if isinstance(plan, _Plan) else 0


class _Planner:
    """Divides the tar stream into members."""

    def __init__(self) -> None:
        self._plan = _Plan()

    def plans(self, items: Iterable[Item]) -> Iterator[_Plan | _Carried]:
        for item in items:
            if isinstance(item, Entry):
                yield from self._add(item)
                continue
            yield from self._finish()
            if isinstance(item, Compared):
                yield from self._add_compared(item)
            else:
                yield item
        yield from self._finish()

    def _add_compared(self, item: Compared) -> Iterator[_Plan]:
        """Divide entries as they were divided before."""
        pieces: deque[tuple[bytes | memoryview | _Slice, bool]] = deque()
        for entry in item.entries:
            pieces.append((_tar_header(entry.info), False))
            pieces.extend((piece, True) for piece in _content_to_pack(entry, is_large=len(item.entries) == 1))
            pieces.append((bytes(-entry.info.size % tarfile.BLOCKSIZE), False))
        members = item.unit.members
        if sum(len(piece) for piece, _ in pieces) != sum(earlier.size for earlier in members):
            for entry in item.entries:
                yield from self._add(entry)
            return
        start = item.unit.start
        for number, earlier in enumerate(members):
            plan = _Plan(number > 0, earlier=earlier, earlier_start=start)
            plan.earlier_gap = 0 if number else item.unit.gap
            plan.entries = [] if number else item.entries
            while plan.size < earlier.size:
                piece, is_content = pieces.popleft()
                taken, rest = piece[: earlier.size - plan.size], piece[earlier.size - plan.size :]
                plan.add(taken)
                plan.content += len(taken) if is_content else 0
                if len(rest):
                    pieces.appendleft((rest, is_content))
            yield plan
            start += earlier.length

    def _add(self, entry: Entry) -> Iterator[_Plan]:
        header = _tar_header(entry.info)
        is_large = entry.info.size >= LARGE_ENTRY
        if is_large or self._plan.size + len(header) + entry.info.size > MEMBER_SIZE:
            yield from self._finish()
        self._plan.entries.append(entry)
        self._plan.add(header)
        size = 0
        for content in _content_to_pack(entry, is_large=is_large):
            size += len(content)
            piece = content
            while len(piece):
                room = MEMBER_SIZE - self._plan.size
                if not room:
                    yield from self._finish(continued=True)
                    continue
                taken = piece[:room]
                self._plan.add(taken)
                self._plan.content += len(taken)
                piece = piece[room:]
        if size != entry.info.size:
            message = f"{entry.name} has {size} bytes instead of the {entry.info.size} announced: save again"
            raise CheckpointError(message)
        self._plan.add(bytes(-size % tarfile.BLOCKSIZE))
        if is_large:
            yield from self._finish()

    def _finish(self, *, continued: bool = False) -> Iterator[_Plan]:
        if self._plan.size:
            yield self._plan
            self._plan = _Plan(continued)


# Link target, magic and version, names of owner and group, device, prefix of the name, padding.
_TAR_REST = bytes(100) + b"ustar\x0000" + bytes(247)


def _tar_header(info: tarfile.TarInfo) -> bytes:
    """Encode an entry's header, PAX records first: what tarfile does, ten times as fast for what is common."""
    name = info.name + "/" if info.isdir() and not info.name.endswith("/") else info.name
    if not (
        name.isascii()
        and len(name) <= 100
        and (info.isreg() or info.isdir())
        and info.size < 1 << 33
        and 0 <= info.mtime < 1 << 33
        and not (info.uid or info.gid or info.uname or info.gname)
    ):
        return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
    header = _tar_block(name, info.mode & 0o7777, info.size, int(info.mtime), info.type)
    records = b"".join(_pax_record(key, value) for key, value in info.pax_headers.items())
    if not records:
        return header
    padding = bytes(-len(records) % tarfile.BLOCKSIZE)
    return _pax_block(len(records)) + records + padding + header


def _tar_block(name: str, mode: int, size: int, mtime: int, kind: bytes) -> bytes:
    # Name, mode, owner, group, size, time; then the checksum, of whose own bytes each counts as a blank; and the type.
    fields = (name.encode().ljust(100, b"\0"), mode, size, mtime)
    start = b"%b%07o\x000000000\x000000000\0%011o\0%011o\0" % fields
    rest = kind + _TAR_REST
    return b"%b%06o\0 %b" % (start, byte_sum(start) + 8 * 0x20 + byte_sum(rest), rest)


@functools.lru_cache(64)
def _pax_block(size: int) -> bytes:
    return _tar_block("././@PaxHeader", 0, size, 0, tarfile.XHDTYPE)


def _pax_record(key: str, value: str) -> bytes:
    """Encode a record, which begins with its own length in decimal."""
    record = f" {key}={value}\n".encode("utf-8", "surrogateescape")
    length = len(record) + len(str(len(record)))
    return str(len(record) + len(str(length))).encode() + record


def _content_to_pack(entry: Entry, *, is_large: bool) -> Iterator[memoryview | _Slice]:
    if entry.path is None:
        yield from (memoryview(chunk) for chunk in entry.chunks())
    elif is_large:
        yield _Slice(OpenFile(entry.path), 0, entry.info.size)
    elif entry.info.size:
        # At once: a member may hold a thousand of them, and threads would wait for each other at every call.
        yield memoryview(file_content(entry.path, entry.info.size))


class _Packer:
    """Makes members of plans, in any number of threads; a new buffer for each member would cost more than its CRC."""

    def __init__(self) -> None:
        self._spare: list[bytearray] = []

    def __call__(self, plan: _Plan | _Carried) -> tuple[_Plan | _Carried, bytes | None]:
        """Make the member; none for what is to be carried over."""
        if not isinstance(plan, _Plan):
            return plan, None
        try:
            buffer = self._spare.pop()
        except IndexError:
            buffer = bytearray(plan.size)
        if len(buffer) < plan.size:
            buffer = bytearray(plan.size)
        view = memoryview(buffer)[: plan.size]
        position = 0
        for piece in plan.pieces:
            place = view[position : position + len(piece)]
            if isinstance(piece, _Slice):
                piece.file.read_into(place, piece.offset)
            else:
                place[:] = piece
            position += len(piece)
        plan.pieces.clear()
        is_same = plan.earlier is not None and plan.earlier.crc32 == crc32(view)
        data = None if is_same else member(view)
        self._spare.append(buffer)
        return plan, data
