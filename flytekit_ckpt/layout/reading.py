"""A checkpoint opened: what its bytes mean, verified as they pass."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import replace

from flytekit_ckpt import archive, inflation, storage
from flytekit_ckpt.archive import Unit
from flytekit_ckpt.compression import crc32
from flytekit_ckpt.entries import Entry
from flytekit_ckpt.errors import CorruptCheckpointError, StorageError, UnsafeCheckpointError
from flytekit_ckpt.layout.locations import located, written_uri
from flytekit_ckpt.layout.loose import local_folder, remote_folder, reporting_files
from flytekit_ckpt.layout.selection import Known, indexed, selected, size_of
from flytekit_ckpt.layout.shapes import CRC32, SHAPE, Payload, Tree, naming, reporting
from flytekit_ckpt.patterns import Patterns
from flytekit_ckpt.pipeline import Callback, Chunk, Range
from flytekit_ckpt.recognition import Kind, recognise
from flytekit_ckpt.storage import Settings


def get(
    uri: str, settings: Settings, callback: Callback | None = None, only: Patterns | None = None
) -> Payload | Tree | None:
    """Open the checkpoint at a URI; `None` if there is none, or an empty object.

    Parameters
    ----------
    uri : str
        The object, or what flytekit 1 left.
    settings : Settings
        How it is reached.
    callback : fsspec callback, optional
        Progress callback, called with the object's bytes as they are read.
    only : Patterns, optional
        The entries of a tree that are wanted. Where it has an index, nothing is read but that until an entry is asked
        for, and then only what holds those that are wanted; elsewhere it is read through.

    Raises
    ------
    StorageError, CorruptCheckpointError
        Now, or while the content is read; both name the URI.
    """
    with naming(uri):
        return _limited(uri, _found(uri, settings, callback, only), settings.restore_limit)


def _found(uri: str, settings: Settings, callback: Callback | None, only: Patterns | None) -> Payload | Tree | None:
    path, is_folder = located(uri)
    if path is not None and is_folder:
        return _chosen(reporting_files(local_folder(path), callback), only)
    target = storage.at(uri if path is None else str(path), settings)
    if only is not None and (found := indexed(target)) is not None:
        return _selected(target, found, only, settings, callback)
    return _chosen(_whole(uri, target, settings, callback), only)


def _whole(
    uri: str, target: storage.StoredObject, settings: Settings, callback: Callback | None
) -> Payload | Tree | None:
    stored = target.get()
    if stored is None:
        is_local = storage.local_path(uri) is not None
        return None if is_local else reporting_files(remote_folder(uri, settings), callback)
    chunks = stored.chunks
    if callback is not None:
        callback.set_size(stored.size)
        chunks = reporting(chunks, callback)
    return meaning(uri, stored, chunks, settings)


def _selected(
    target: storage.StoredObject, found: Known, only: Patterns, settings: Settings, callback: Callback | None
) -> Tree:
    """A tree whose index has been read."""

    def entries() -> Iterator[Entry]:
        if callback is not None:
            callback.set_size(size_of(found, only))
        passing = (lambda chunks: chunks) if callback is None else functools.partial(reporting, callback=callback)
        try:
            yield from selected(target, found, only, settings, passing)
        except storage.ConflictError as error:
            message = f"cannot read {storage.public(target.uri)}: another writer has replaced it meanwhile. Try again"
            raise StorageError(message) from error

    return Tree(_named(target.uri, entries()), found.written.version, found.metadata, found.units)


def _chosen(found: Payload | Tree | None, only: Patterns | None) -> Payload | Tree | None:
    """Leave out the entries of a tree that are not wanted."""
    if only is None or not isinstance(found, Tree):
        return found

    def entries(given: Iterator[Entry]) -> Iterator[Entry]:
        for entry in given:
            if only.match(entry.name):
                if entry.info.islnk() and not only.match(entry.info.linkname):
                    message = (
                        f"the entry {entry.name!r} is a hard link to {entry.info.linkname!r}, which `only` leaves out: "
                        "name that too"
                    )
                    raise ValueError(message)
                yield entry

    return replace(found, entries=entries(found.entries))


def _limited(uri: str, found: Payload | Tree | None, limit: int | None) -> Payload | Tree | None:
    """Refuse what is larger than the user takes, before it is written or held in memory."""
    if limit is None or found is None:
        return found

    def refused() -> UnsafeCheckpointError:
        message = (
            f"the checkpoint at {storage.public(uri)} holds more than the {limit} bytes that `restore_limit` allows. "
            "Nothing was restored; raise the limit if you trust it"
        )
        return UnsafeCheckpointError(message)

    def counted(entries: Iterator[Entry]) -> Iterator[Entry]:
        size = 0
        for entry in entries:
            size += entry.info.size if entry.info.isreg() else 0
            if size > limit:
                raise refused()
            yield entry

    if isinstance(found, Tree):
        return replace(found, entries=counted(found.entries))
    if found.size > limit:
        raise refused()
    return found


def meaning(uri: str, stored: storage.Stored, content: Iterator[Chunk], settings: Settings) -> Payload | Tree | None:
    """Tell what an object's bytes are; `None` for one without any."""
    shape, crc = stored.metadata.get(SHAPE), stored.metadata.get(CRC32)
    kind, chunks = recognise(content if crc is None else _checked(uri, content, crc))
    if shape == "tree" and kind is not Kind.ARCHIVE:
        message = f"it was saved as an archive and is none any more: it is damaged. {_replaced(uri)}"
        raise CorruptCheckpointError(message)
    if kind is Kind.EMPTY:
        return None
    if kind is Kind.GZIP and shape is None:
        # Perhaps the beginning of an archive is damaged: then it is damaged as a gzip file too.
        chunks = inflation.intact(chunks)
    if kind in (Kind.OTHER, Kind.GZIP, Kind.ZEROS):
        return Payload(stored.size, _exactly(uri, chunks, stored.size), stored.version, stored.metadata)
    entries = _named(uri, archive.read(chunks, memory=settings.share))
    first = next(entries, None)
    if first is not None and first.is_payload:
        return Payload(first.info.size, _single(uri, first, entries), stored.version, stored.metadata)
    return Tree(entries if first is None else _first_then(first, entries), stored.version, stored.metadata)


def get_unit(uri: str, unit: Unit, written: storage.Written, settings: Settings) -> Iterator[Entry]:
    """Read the entries of one unit of an object, as it was written."""
    target = storage.at(written_uri(uri), settings)
    members = target.get_range(Range(unit.start, unit.length), written)
    return _named(uri, archive.read(itertools.chain(members, [archive.end_of_archive()]), memory=settings.share))


def _checked(uri: str, chunks: Iterator[Chunk], stated: str) -> Iterator[Chunk]:
    """Pass an object's bytes on, and compare their checksum with the one that was kept with them."""
    crc = 0
    for chunk in chunks:
        crc = crc32(chunk, crc)
        yield chunk
    if f"{crc:08x}" != stated:
        message = f"its bytes are not those that were saved (their CRC-32 is {crc:08x}, not {stated}). {_replaced(uri)}"
        raise CorruptCheckpointError(message)


def _replaced(uri: str) -> str:
    # Others write into a file that is there, and its attributes stay.
    path = storage.local_path(uri)
    command = "" if path is None else f": `setfattr -x {storage.ATTRIBUTE} {path}`"
    return f"If another program has written it since, remove what is kept with it{command}"


def _exactly(uri: str, chunks: Iterator[Chunk], size: int) -> Iterator[Chunk]:
    """Pass a payload on; raw bytes carry no checksum, but their number is known."""
    seen = 0
    with naming(uri):
        for chunk in chunks:
            seen += len(chunk)
            yield chunk
    if seen != size:
        message = f"cannot read {storage.public(uri)}: it ended after {seen} of {size} bytes. Try again"
        raise StorageError(message)


def _single(uri: str, entry: Entry, rest: Iterator[Entry]) -> Iterator[Chunk]:
    """The content of a wrapped payload, verified to the archive's end."""
    with naming(uri):
        yield from entry.chunks()
        if next(rest, None) is not None:
            message = "it holds more than the one payload that it is marked for"
            raise CorruptCheckpointError(message)


def _first_then(first: Entry, rest: Iterator[Entry]) -> Iterator[Entry]:
    yield first
    yield from rest


def _named(uri: str, entries: Iterator[Entry]) -> Iterator[Entry]:
    with naming(uri):
        yield from entries
