"""Entries of an archive: files, folders and links, described.

Nothing here knows how an archive is encoded or where it is stored.
"""

from __future__ import annotations

import os
import re
import stat
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

from flytekit_ckpt.errors import UnsafeCheckpointError
from flytekit_ckpt.files import file_chunks
from flytekit_ckpt.pipeline import Chunk

PART_KEY = "flytekit_ckpt.part"
"""PAX keyword with the label of the part (one saved file or folder) that an entry came from."""

PAYLOAD_KEY = "flytekit_ckpt.payload"
"""PAX keyword on the single member of an archive that wraps a payload."""


# What this package writes, and no more than fits.
_PLAIN_TIME = re.compile(r"([0-9]{1,9}|[1-3][0-9]{9})\.([0-9]{1,9})")


class EntryInfo(NamedTuple):
    """What a checkpoint's index tells of one file, folder or link.

    Attributes
    ----------
    name : str
        Relative, with ``/`` between components.
    kind : str
        `"file"`, `"folder"` or `"link"`.
    size : int
        Bytes of content; 0 for what is no file.
    mtime_ns : int or None
        Modification time, in nanoseconds since 1970; `None` of a checkpoint that is bytes.
    """

    name: str
    kind: str
    size: int
    mtime_ns: int | None


KINDS = {
    tarfile.REGTYPE: "file",
    tarfile.AREGTYPE: "file",
    tarfile.CONTTYPE: "file",
    tarfile.GNUTYPE_SPARSE: "file",
    tarfile.DIRTYPE: "folder",
    tarfile.SYMTYPE: "link",
    tarfile.LNKTYPE: "link",
}
"""What the types of tar entries are to a user."""


SETTLED_NS = 2 * 10**9
"""Nanoseconds after which the next change of a file shows in its times: they are no coarser than that."""


class Identity(NamedTuple):
    """Which file an entry was made of.

    Attributes
    ----------
    device, inode, ctime_ns : int
        As `os.stat` gives them.
    is_settled : bool
        Whether any later change of it shows in its size and times.
    """

    device: int
    inode: int
    ctime_ns: int
    is_settled: bool


@dataclass(frozen=True)
class Entry:
    """One file, folder or link of an archive.

    Attributes
    ----------
    info : tarfile.TarInfo
        Name (relative, ``/`` between components), type, size in bytes, mode, link target; the modification time and our
        own keywords are in its PAX headers.
    chunks : callable, optional
        Returns the content of a regular file as an iterator of byte strings, `info.size` bytes in all. An entry read
        from an archive can only be read before the next entry is asked for.
    path : str, optional
        The file on the local disk that holds the content, if one does: it can be read out of turn.
    identity : Identity, optional
        Which file that is.
    """

    info: tarfile.TarInfo
    chunks: Callable[[], Iterator[Chunk]] = lambda: iter(())
    path: str | None = None
    identity: Identity | None = None

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def sort_key(self) -> list[str]:
        """Depth first, siblings by name: the order of every archive that this package writes."""
        return self.info.name.split("/")

    @property
    def part(self) -> str:
        """Label of the saved file or folder that this entry came from; blank for one that was saved first."""
        return self.info.pax_headers.get(PART_KEY, "")

    @property
    def described(self) -> EntryInfo:
        """What a list says of it."""
        return EntryInfo(self.name, KINDS[self.info.type], self.info.size, self.mtime_ns)

    @property
    def mtime_ns(self) -> int:
        """Modification time, in nanoseconds since 1970; 0 for one that makes no sense."""
        plain = _PLAIN_TIME.fullmatch(self.info.pax_headers.get("mtime", ""))
        if plain is not None:
            return int(plain[1] + plain[2].ljust(9, "0"))
        try:
            seconds = Decimal(str(self.info.pax_headers.get("mtime", self.info.mtime)))
        except (ArithmeticError, ValueError):
            return 0
        # Also of what is not a number at all this is false. As an integer it might have a million digits.
        return int(seconds * 10**9) if seconds.is_finite() and abs(seconds) < 1 << 32 else 0

    @property
    def is_payload(self) -> bool:
        return PAYLOAD_KEY in self.info.pax_headers


def file_entry(
    path: str | Path,
    name: str,
    status: os.stat_result | None = None,
    mapped: frozenset[tuple[int, int]] | None = frozenset(),
) -> Entry:
    """Describe the regular file `path` as the entry `name`; its content is read when the entry is packed.

    Parameters
    ----------
    path : str or pathlib.Path
        The file.
    name : str
        The entry's name.
    status : os.stat_result, optional
        What `os.stat` has just given of it.
    mapped : frozenset, optional
        What `files.mapped_files` has given.
    """
    status = status or os.stat(path)
    info = header(name, status, tarfile.REGTYPE)
    info.size = status.st_size
    device, inode = status.st_dev, status.st_ino
    age = time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns)
    is_settled = age > SETTLED_NS and mapped is not None and (device, inode) not in mapped
    identity = Identity(device, inode, status.st_ctime_ns, is_settled)
    return Entry(info, lambda: file_chunks(path, info.size), os.fspath(path), identity)


def stream_entry(name: str, chunks: Iterable[Chunk], size: int) -> Entry:
    """Describe `size` bytes of content that come from elsewhere as the entry `name`."""
    info = tarfile.TarInfo(name)
    info.size = size
    info.mtime = int(time.time())
    return Entry(info, lambda: iter(chunks))


def in_part(entries: Iterable[Entry], part: str) -> Iterator[Entry]:
    """Mark entries as coming from a part, for a later save to know whose they are."""
    for entry in entries:
        headers = {key: value for key, value in entry.info.pax_headers.items() if key != PART_KEY}
        entry.info.pax_headers = {**headers, PART_KEY: part} if part else headers
        yield entry


def header(name: str, status: os.stat_result, kind: bytes) -> tarfile.TarInfo:
    """Describe what has this status as an entry's header, without owners."""
    info = tarfile.TarInfo(name)
    info.type = kind
    info.mode = stat.S_IMODE(status.st_mode)
    # Owners are left at 0: they mean nothing in the next container, and equal folders give equal archives.
    seconds, nanoseconds = divmod(status.st_mtime_ns, 10**9)
    info.mtime = seconds
    if nanoseconds:
        info.pax_headers = {"mtime": _decimal(seconds, nanoseconds)}
    return info


def _decimal(seconds: int, nanoseconds: int) -> str:
    if seconds > 0:
        return f"{seconds}.{nanoseconds:09}".rstrip("0")
    return str(Decimal(seconds * 10**9 + nanoseconds) / 10**9)


def safe_name(name: str) -> str:
    """Return a name that someone else wrote as an entry's name, without `.` and empty parts; refuse one that leads out.

    Raises
    ------
    UnsafeCheckpointError
        If it is absolute or has a `..` in it.
    """
    rooted = f"/{name}"
    if not ("//" in rooted or "/." in rooted or rooted.endswith("/")):
        # As nearly all are.
        return name
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts:
        message = f"its entry {name!r} lies outside the folder it would be restored to"
        raise UnsafeCheckpointError(message)
    return "/".join(parts)
