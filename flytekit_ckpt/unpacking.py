"""Entries written to the local disk, inside a folder and nowhere else."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from flytekit_ckpt.entries import Entry
from flytekit_ckpt.errors import CorruptCheckpointError, UnsafeCheckpointError
from flytekit_ckpt.files import FileWriter
from flytekit_ckpt.folders import stays_inside
from flytekit_ckpt.pipeline import LITTLE, MEMORY_BUDGET, in_order


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
        path = f"{root}/{name}"
        try:
            above = name.rpartition("/")[0]
            if above not in made:
                for parent in _parents(name, made):
                    if parent in links:
                        message = f"its entry {name!r} lies behind a link"
                        raise UnsafeCheckpointError(message)
                    os.mkdir(f"{root}/{parent}")
                    made.add(parent)
                names.add(name.partition("/")[0])
            links.pop(name, None)
            if info.isdir():
                if name not in made:
                    os.mkdir(path)
                    made.add(name)
                folders[name] = (info.mode & 0o777, entry.mtime_ns)
                continue
            if info.isreg():
                _write(entry, path, memory)
                continue
            if os.path.lexists(path):
                os.unlink(path)
            if info.issym():
                links[name] = (info.linkname, entry.mtime_ns)
            else:
                os.link(f"{root}/{info.linkname}", path, follow_symlinks=False)
        except (FileExistsError, IsADirectoryError, NotADirectoryError, FileNotFoundError) as error:
            message = f"its entry {name!r} contradicts an earlier one ({error})"
            raise CorruptCheckpointError(message) from error
    for name, (link, _) in links.items():
        os.symlink(link, f"{root}/{name}")
    for name, (link, mtime_ns) in links.items():
        path = f"{root}/{name}"
        if stays_inside(path, link, root):
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
    end = name.find("/")
    while end >= 0:
        if name[:end] not in made:
            yield name[:end]
        end = name.find("/", end + 1)


_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW


def _write(entry: Entry, path: str, memory: int) -> None:
    try:
        descriptor = os.open(path, _NEW_FILE, 0o600)
    except FileExistsError:
        # In a tar, the last entry of a name counts.
        os.unlink(path)
        descriptor = os.open(path, _NEW_FILE, 0o600)
    try:
        writer = FileWriter(descriptor)
        if entry.info.size <= LITTLE:
            size = sum(map(writer, entry.chunks()))
        else:
            # In a thread, so that a large file is written while what follows is inflated.
            pieces = ((len(chunk), chunk) for chunk in entry.chunks())
            size = sum(in_order(writer, pieces, threads=1, memory=memory))
        if size != entry.info.size:
            message = f"{entry.name!r} has {size} bytes instead of the {entry.info.size} announced"
            raise CorruptCheckpointError(message)
        os.fchmod(descriptor, entry.info.mode & 0o777)
        os.utime(descriptor, ns=(entry.mtime_ns,) * 2)
    finally:
        os.close(descriptor)
