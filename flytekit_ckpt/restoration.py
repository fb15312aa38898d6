"""A checkpoint written into a folder, all of it or nothing."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from flytekit_ckpt import storage
from flytekit_ckpt.entries import Entry, EntryInfo, stream_entry
from flytekit_ckpt.errors import CheckpointError, StorageError
from flytekit_ckpt.layout import Event, Found, Payload, naming
from flytekit_ckpt.patterns import Patterns
from flytekit_ckpt.scratch import Held, remove_tree
from flytekit_ckpt.storage import Settings
from flytekit_ckpt.unpacking import unpack


def restore(
    found: Found,
    payload_name: str,
    folder: Path,
    settings: Settings,
    *,
    emptied: bool = False,
    only: Patterns | None = None,
) -> list[str]:
    """Write a checkpoint into a folder, all of it or nothing; files of the same names are replaced.

    Parameters
    ----------
    found : Found
        The checkpoint, and where it was found.
    payload_name : str
        File name for a payload.
    folder : pathlib.Path
        An existing folder.
    settings : Settings
        How much memory there is.
    emptied : bool, default False
        Whether what lay in the folder before is removed.
    only : Patterns, optional
        Whether a payload is wanted, by its name; of a tree, those entries were found that are.

    Returns
    -------
    list of str
        The checkpoint's top-level entries.
    """
    started = time.perf_counter()
    seen = _Counter()
    uri, content = found.uri, found.content
    if isinstance(content, Payload):
        is_wanted = only is None or only.match(payload_name)
        entries: Iterable[Entry] = [stream_entry(payload_name, content.chunks, content.size)] if is_wanted else []
    else:
        entries = content.entries
    with naming(uri), _local_failures(uri, folder), _staging(folder) as staging:
        unpacked = unpack(seen.counting(entries), staging, memory=settings.share // 4)
        if emptied:
            _empty(folder, but=staging)
        for place in _conflicts(staging, folder, os.path.realpath(folder)):
            message = f"cannot restore {storage.public(uri)}: {place} is in the way. Move it, or restore elsewhere"
            raise StorageError(message)
        _place(staging, folder)
        unpacked.set_folder_attributes(folder)
    shape = "payload" if isinstance(content, Payload) else "tree"
    Event("restored", shape, seen.bytes, time.perf_counter() - started, storage.public(uri), found.origin).log()
    return unpacked.names


@contextlib.contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """Make a folder inside another one, so that moving from it is renaming."""
    staging = Held.made_inside(folder)
    try:
        yield staging.path
    finally:
        staging.remove()


class _Counter:
    def __init__(self) -> None:
        self.bytes = 0

    def counting(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        for entry in entries:
            self.bytes += entry.info.size if entry.info.isreg() else 0
            yield entry


@contextlib.contextmanager
def _local_failures(uri: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        message = f"cannot restore {storage.public(uri)} into {folder}: {error}. Check its permissions and free space"
        raise StorageError(error.errno, message) from error


def listed(found: Found, payload_name: str) -> list[EntryInfo]:
    """List a checkpoint's entries, by its index where it has one."""
    content = found.content
    if isinstance(content, Payload):
        return [EntryInfo(payload_name, "file", content.size, None)]
    with naming(found.uri):
        if content.units is not None:
            return [entry for unit in content.units for entry in unit.entries()]
        return [entry.described for entry in content.entries]


def _empty(folder: Path, but: Path) -> None:
    for item in os.scandir(folder):
        if item.is_dir(follow_symlinks=False):
            if item.name != but.name:
                remove_tree(Path(item.path))
        else:
            os.unlink(item.path)


def _conflicts(source: Path, target: Path, root: str) -> Iterator[Path]:
    """Yield what in `target` is a folder where `source` has a file, or the reverse, or leads out of `root`."""
    for item, place in _merged(source, target):
        if os.path.lexists(place):
            is_folder = item.is_dir(follow_symlinks=False)
            if is_folder:
                is_in_the_way = not place.is_dir() or not Path(os.path.realpath(place)).is_relative_to(root)
            else:
                is_in_the_way = place.is_dir() and not place.is_symlink()
            if is_in_the_way:
                yield place


def _place(source: Path, target: Path) -> None:
    """Move the contents of a folder into another one on the same disk, merging folders."""
    for item, place in _merged(source, target):
        if not (item.is_dir(follow_symlinks=False) and place.is_dir()):
            os.replace(item.path, place)


def _merged(source: Path, target: Path) -> Iterator[tuple[os.DirEntry[str], Path]]:
    """Yield what lies in a folder, and in those of its folders that another one has too, with its place there."""
    waiting = [(source, target)]
    while waiting:
        source, target = waiting.pop()
        for item in os.scandir(source):
            place = target / item.name
            if item.is_dir(follow_symlinks=False) and place.is_dir():
                waiting.append((Path(item.path), place))
            yield item, place
