"""Entries of an archive: files, folders and links, described.

Nothing here knows how an archive is encoded or where it is stored.
"""

from __future__ import annotations

import os
import stat
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from flytekit_ckpt.errors import UnsafeCheckpointError
from flytekit_ckpt.files import file_chunks
from flytekit_ckpt.pipeline import Chunk

PART_KEY = "flytekit_ckpt.part"
"""PAX keyword with the label of the part (one saved file or folder) that an entry came from."""

PAYLOAD_KEY = "flytekit_ckpt.payload"
"""PAX keyword on the single member of an archive that wraps a payload."""


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
    """

    info: tarfile.TarInfo
    chunks: Callable[[], Iterator[Chunk]] = lambda: iter(())
    path: str | None = None

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
    def is_payload(self) -> bool:
        return PAYLOAD_KEY in self.info.pax_headers


def file_entry(path: str | Path, name: str, status: os.stat_result | None = None) -> Entry:
    """Describe the regular file `path` as the entry `name`; its content is read when the entry is packed."""
    status = status or os.stat(path)
    info = header(name, status, tarfile.REGTYPE)
    info.size = status.st_size
    return Entry(info, lambda: file_chunks(path, info.size), os.fspath(path))


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
