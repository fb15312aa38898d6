"""The loose files that flytekit 1 leaves at its destination, on the local disk or below a prefix."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from flytekit_ckpt import storage
from flytekit_ckpt.entries import Entry, safe_name, stream_entry
from flytekit_ckpt.errors import StorageError
from flytekit_ckpt.folders import scan_folder
from flytekit_ckpt.layout.locations import not_into_itself
from flytekit_ckpt.layout.shapes import LEGACY_PAYLOAD_NAME, OBJECT_NAME, Payload, Tree, reporting
from flytekit_ckpt.pipeline import Callback, in_order
from flytekit_ckpt.storage import Settings


def local_folder(path: Path) -> Payload | Tree | None:
    """A folder of loose files on the local disk, as flytekit 1 leaves them."""
    try:
        children = list(path.iterdir())
    except OSError as error:
        raise StorageError(error.errno, f"cannot read {path}: {error}. Check its permissions") from error
    # What a save that was killed has left is no checkpoint.
    children = [child for child in children if not storage.is_temporary(child.name, path / OBJECT_NAME)]
    if not children:
        return None
    if [child.name for child in children] == [LEGACY_PAYLOAD_NAME] and children[0].is_file():
        stored = storage.at(str(children[0])).get()
        return None if stored is None else Payload(stored.size, stored.chunks, None)
    return Tree(scan_folder(path, not_into_itself(str(path))), None)


def remote_folder(uri: str, settings: Settings) -> Payload | Tree | None:
    """Objects below a prefix, as flytekit 1 leaves them; one list request where there are none."""
    files = storage.at(uri, settings).files()
    found = next(files, None)
    if found is None:
        return None
    following = next(files, None)
    if following is None and found[0] == LEGACY_PAYLOAD_NAME:
        stored = _existing(found[1])
        return Payload(stored.size, stored.chunks, None)
    pair = [found] if following is None else [found, following]
    return Tree(_remote_entries(itertools.chain(pair, files), settings), None)


def _remote_entries(files: Iterator[tuple[str, storage.StoredObject]], settings: Settings) -> Iterator[Entry]:
    """Open several objects at a time: opening one brings its first part along."""

    def opened(found: tuple[str, storage.StoredObject]) -> Entry:
        name, item = found
        stored = _existing(item)
        return stream_entry(safe_name(name), stored.chunks, stored.size)

    sized_files = ((storage.PART_SIZE, found) for found in files)
    yield from in_order(opened, sized_files, threads=storage.CONCURRENCY, memory=settings.share)


def reporting_files(found: Payload | Tree | None, callback: Callback | None) -> Payload | Tree | None:
    """Report what is read of loose files to a progress callback; the total is not known beforehand."""
    if found is None or callback is None:
        return found
    if isinstance(found, Payload):
        return replace(found, chunks=reporting(found.chunks, callback))
    told = (
        replace(entry, chunks=functools.partial(lambda chunks: reporting(chunks(), callback), entry.chunks))
        for entry in found.entries
    )
    return replace(found, entries=told)


def _existing(item: storage.StoredObject) -> storage.Stored:
    stored = item.get()
    if stored is None:
        message = f"{storage.public(item.uri)} was removed while the checkpoint was being read. Try again"
        raise StorageError(message)
    return stored
