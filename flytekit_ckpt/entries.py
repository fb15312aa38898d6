"""Entries of an archive: files, folders and links, taken from the local disk and written to it.

Nothing here knows how an archive is encoded or where it is stored.
"""

from __future__ import annotations

import errno
import os
import stat
import tarfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path

from flytekit_ckpt.errors import CheckpointError, CorruptCheckpointError, UnsafeCheckpointError
from flytekit_ckpt.pipeline import CHUNK_SIZE, MEMORY_BUDGET, Chunk, in_order

FLUSH_SIZE = 8 << 20
"""Bytes after which a file that is being written is sent on to the disk."""

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
    path : pathlib.Path, optional
        The file on the local disk that holds the content, if one does: it can be read out of turn.
    """

    info: tarfile.TarInfo
    chunks: Callable[[], Iterator[Chunk]] = lambda: iter(())
    path: Path | None = None

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


# ---------------------------------------------------------------------------------------------------------------------
# From the local disk
# ---------------------------------------------------------------------------------------------------------------------


Exclude = Callable[[Path], str | None]
"""Says why a path is not to be saved: `None` for one that is, an empty string where nobody needs to know."""


def scan_folder(folder: Path, exclude: Exclude = lambda _: None) -> Iterator[Entry]:
    """Walk a folder's contents, sorted, without following links that stay inside it.

    A link that leads out of the folder, or is absolute, is given as what it points to: in the next container it would
    dangle. Hard links are files. Sockets, fifos, devices and links to nothing are left out with a warning.
    """
    return _Scan(os.path.realpath(folder), exclude, _warn_left_out).entries(folder)


def folder_size(folder: Path, exclude: Exclude = lambda _: None) -> int:
    """Sum up the bytes of the files that `scan_folder` will give."""
    entries = _Scan(os.path.realpath(folder), exclude, lambda *_: None).entries(folder)
    return sum(entry.info.size for entry in entries)


@dataclass(frozen=True)
class _Scan:
    """A walk through a folder.

    Attributes
    ----------
    root : str
        The folder that links are to stay in.
    exclude : callable
        Says why a path is not to be saved.
    left_out : callable
        Takes each path that is left out, and the reason.
    """

    root: str
    exclude: Exclude
    left_out: Callable[[Path, str], object]

    def entries(self, folder: Path, prefix: str = "", above: tuple[tuple[int, int], ...] = ()) -> Iterator[Entry]:
        here = os.stat(folder)
        identity = (here.st_dev, here.st_ino)
        if identity in above:
            self.left_out(folder, "a link leads from a folder back to itself")
            return
        for item in sorted(os.scandir(folder), key=lambda item: item.name):
            path, name = Path(item.path), prefix + item.name
            reason = self.exclude(path)
            if reason is not None:
                if reason:
                    self.left_out(path, reason)
                continue
            if item.is_symlink():
                link = os.readlink(path)
                if not os.path.exists(path):
                    self.left_out(path, f"it is a link to {link}, which does not exist")
                    continue
                if _stays_inside(path, link, self.root):
                    if _is_storable(os.stat(path)):
                        yield _link_entry(path, name, link)
                    else:
                        self.left_out(path, f"it is a link to {link}, which is neither a file nor a folder")
                    continue
            status = os.stat(path)
            if stat.S_ISDIR(status.st_mode):
                yield Entry(_header(name, status, tarfile.DIRTYPE))
                # Behind a link that leads out, links are judged by the folder that they lie in.
                inner = replace(self, root=os.path.realpath(path)) if item.is_symlink() else self
                yield from inner.entries(path, name + "/", (*above, identity))
            elif stat.S_ISREG(status.st_mode):
                yield file_entry(path, name, status)
            else:
                self.left_out(path, "it is neither a file, a folder nor a link")


def file_entry(path: Path, name: str, status: os.stat_result | None = None) -> Entry:
    """Describe the regular file `path` as the entry `name`; its content is read when the entry is packed."""
    status = status or os.stat(path)
    info = _header(name, status, tarfile.REGTYPE)
    info.size = status.st_size
    return Entry(info, lambda: file_chunks(path, info.size), path)


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


def _header(name: str, status: os.stat_result, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.mode = stat.S_IMODE(status.st_mode)
    # Owners are left at 0: they mean nothing in the next container, and equal folders give equal archives.
    seconds, nanoseconds = divmod(status.st_mtime_ns, 10**9)
    info.mtime = seconds
    if nanoseconds:
        info.pax_headers = {"mtime": str(Decimal(status.st_mtime_ns) / 10**9)}
    return info


def _link_entry(path: Path, name: str, link: str) -> Entry:
    info = _header(name, os.lstat(path), tarfile.SYMTYPE)
    info.linkname = link
    return Entry(info)


def _stays_inside(path: Path, link: str, root: str) -> bool:
    """Whether a link is relative and neither its text nor where it ends leaves the folder `root`."""
    if os.path.isabs(link):
        return False
    places = [os.path.normpath(os.path.join(os.path.realpath(path.parent), link))]
    try:
        os.stat(path)
    except OSError as error:
        # A circle, or more links after links than the system follows: it leads nowhere, and there may be any number.
        leads_nowhere = error.errno == errno.ELOOP
    else:
        leads_nowhere = False
    if not leads_nowhere:
        places.append(os.path.realpath(path))
    return all(os.path.commonpath((root, place)) == root for place in places)


def _is_storable(status: os.stat_result) -> bool:
    return stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)


def _warn_left_out(path: Path, reason: str) -> None:
    warnings.warn(f"{path} is left out of the checkpoint: {reason}", RuntimeWarning, stacklevel=3)


class OpenFile:
    """A regular file that several threads read at once, closed when the last of them lets go of it.

    A file that is replaced while it is being saved is saved as it was, and not a mixture.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError as error:
            message = f"{path} was removed while it was being saved: save again"
            raise CheckpointError(message) from error

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer from the file's `offset` on; a file that has fewer bytes by now is a `CheckpointError`."""
        while buffer:
            count = os.preadv(self._descriptor, [buffer], offset)
            if not count:
                raise self._shrank(offset)
            buffer = buffer[count:]
            offset += count

    def read(self, size: int, offset: int) -> bytes:
        """Read at least one byte and at most `size` of them from the file's `offset` on, as `read_into` does."""
        content = os.pread(self._descriptor, size, offset)
        if not content:
            raise self._shrank(offset)
        return content

    def _shrank(self, size: int) -> CheckpointError:
        return CheckpointError(f"{self._path} shrank to {size} bytes while it was being saved: save again")


def file_chunks(path: Path, size: int) -> Iterator[bytes]:
    """Read exactly `size` bytes of a file; a file that has fewer by now is a `CheckpointError`."""
    file = OpenFile(path)
    done = 0
    while done < size:
        chunk = file.read(min(CHUNK_SIZE, size - done), done)
        done += len(chunk)
        yield chunk


# ---------------------------------------------------------------------------------------------------------------------
# To the local disk
# ---------------------------------------------------------------------------------------------------------------------


class Unpacked:
    """What `unpack` made of some entries.

    Attributes
    ----------
    names : list of str
        The top-level entries, sorted.
    """

    def __init__(self, names: Iterable[str], folders: dict[str, tuple[int, int]]) -> None:
        self.names = sorted(names)
        self._folders = folders

    def set_folder_attributes(self, folder: Path) -> None:
        """Give the folders their modes and times, once their contents lie where they will stay."""
        # What lies in a folder comes first: nothing may be left to do in one that has lost its rights.
        for name, (mode, mtime_ns) in sorted(self._folders.items(), reverse=True):
            os.chmod(folder / name, mode)
            os.utime(folder / name, ns=(mtime_ns, mtime_ns))


def safe_name(name: str) -> str:
    """Return a name that someone else wrote as an entry's name, without `.` and empty parts; refuse one that leads out.

    Raises
    ------
    UnsafeCheckpointError
        If it is absolute or has a `..` in it.
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts:
        message = f"its entry {name!r} lies outside the folder it would be restored to"
        raise UnsafeCheckpointError(message)
    return "/".join(parts)


def unpack(entries: Iterable[Entry], folder: Path, *, memory: int = MEMORY_BUDGET // 16) -> Unpacked:
    """Write entries into an empty folder of the caller's own.

    Nothing is written outside it: links are made last, so that nothing is written through one, and those that lead out
    are left out with a warning. Modes lose their setuid, setgid and sticky bits.

    Parameters
    ----------
    entries : iterable of Entry
        What to write.
    folder : pathlib.Path
        Where to.
    memory : int
        Bytes that may wait to be written.

    Raises
    ------
    CorruptCheckpointError
        If the entries contradict each other.
    UnsafeCheckpointError
        If an entry lies behind a link.
    OSError
        If the disk refuses, for example because it is full.
    """
    root = os.path.realpath(folder)
    names: set[str] = set()
    made: set[str] = set()
    # Where each leads, and its time: an attacker's headers are large.
    links: dict[str, tuple[str, int]] = {}
    folders: dict[str, tuple[int, int]] = {}
    for entry in entries:
        name, info = entry.name, entry.info
        path = os.path.join(root, name)
        try:
            for parent in _parents(name, made):
                if parent in links:
                    message = f"its entry {name!r} lies behind a link"
                    raise UnsafeCheckpointError(message)
                os.mkdir(os.path.join(root, parent))
                made.add(parent)
            names.add(name.partition("/")[0])
            links.pop(name, None)
            if info.isdir():
                if name not in made:
                    os.mkdir(path)
                    made.add(name)
                folders[name] = (info.mode & 0o777, _mtime_ns(info))
                continue
            if os.path.lexists(path):
                # In a tar, the last entry of a name counts.
                os.unlink(path)
            if info.issym():
                links[name] = (info.linkname, _mtime_ns(info))
            elif info.islnk():
                os.link(os.path.join(root, info.linkname), path, follow_symlinks=False)
            else:
                _write(entry, path, memory)
        except (FileExistsError, IsADirectoryError, NotADirectoryError, FileNotFoundError) as error:
            message = f"its entry {name!r} contradicts an earlier one ({error})"
            raise CorruptCheckpointError(message) from error
    for name, (link, _) in links.items():
        os.symlink(link, os.path.join(root, name))
    for name, (link, mtime_ns) in links.items():
        path = os.path.join(root, name)
        if _stays_inside(Path(path), link, root):
            os.utime(path, ns=(mtime_ns, mtime_ns), follow_symlinks=False)
        else:
            os.unlink(path)
            warnings.warn(
                f"the link {name!r} is not restored: it leads out of the checkpoint, to {link!r}",
                RuntimeWarning,
                stacklevel=2,
            )
    return Unpacked(names, folders)


def _parents(name: str, made: set[str]) -> Iterator[str]:
    """Yield the folders above an entry that are still to be made, from above.

    One by one: of the names of all of them, those of an attacker's entry fill the memory before the disk refuses.
    """
    if name.rpartition("/")[0] in made:
        return
    end = name.find("/")
    while end >= 0:
        if name[:end] not in made:
            yield name[:end]
        end = name.find("/", end + 1)


def _write(entry: Entry, path: str, memory: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        # In a thread, so that a large file is written while what follows is inflated.
        pieces = ((len(chunk), chunk) for chunk in entry.chunks())
        size = sum(in_order(FileWriter(descriptor), pieces, threads=1, memory=memory))
        if size != entry.info.size:
            message = f"{entry.name!r} has {size} bytes instead of the {entry.info.size} announced"
            raise CorruptCheckpointError(message)
        os.fchmod(descriptor, entry.info.mode & 0o777)
        os.utime(descriptor, ns=(_mtime_ns(entry.info),) * 2)
    finally:
        os.close(descriptor)


class FileWriter:
    """Writes chunks to a new file, one after the other, and has the system send them on to the disk.

    So they neither pile up in memory, which a container may have little of, nor are all waited for at the end.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._written = 0
        self._flushed = 0

    def __call__(self, chunk: Chunk) -> int:
        """Write a whole chunk; returns its size in bytes."""
        view = memoryview(chunk)
        while view:
            view = view[os.write(self._descriptor, view) :]
        return self.written(len(chunk))

    def written(self, size: int) -> int:
        """Take note of bytes that have been appended to the file; returns their number."""
        self._written += size
        length = self._written - self._flushed
        if length >= FLUSH_SIZE and hasattr(os, "posix_fadvise"):
            # Linux begins to write what is not on the disk yet, and drops from its cache only what is.
            os.posix_fadvise(self._descriptor, self._flushed, length, os.POSIX_FADV_DONTNEED)
            self._flushed = self._written
        return size


def _mtime_ns(info: tarfile.TarInfo) -> int:
    try:
        seconds = Decimal(str(info.pax_headers.get("mtime", info.mtime)))
    except (ArithmeticError, ValueError):
        return 0
    # Also of what is not a number at all this is false. As an integer it might have a million digits.
    return int(seconds * 10**9) if seconds.is_finite() and abs(seconds) < 1 << 32 else 0
