"""A payload or a tree stored as one object."""

from __future__ import annotations

import contextlib
import functools
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from flytekit_ckpt import archive, storage
from flytekit_ckpt.archive import Item, Unit
from flytekit_ckpt.compression import crc32
from flytekit_ckpt.entries import PAYLOAD_KEY, stream_entry
from flytekit_ckpt.errors import CheckpointError
from flytekit_ckpt.files import file_chunks
from flytekit_ckpt.layout.locations import written_uri
from flytekit_ckpt.layout.shapes import CARRIED, CRC32, PAYLOAD_NAME, SHAPE, Event, reporting
from flytekit_ckpt.pipeline import CHUNK_SIZE, Callback, Chunk, Range
from flytekit_ckpt.recognition import Kind, recognise
from flytekit_ckpt.storage import Settings

_Item = TypeVar("_Item")

READ_TWICE = 1 << 30
"""Bytes that a file may have to be read once more for its checksum, where that must be known before it is sent."""


@dataclass(frozen=True)
class PutOptions:
    """Under which conditions an object is stored.

    Attributes
    ----------
    replaced : Written, None or ANYTHING
        What it may take the place of; if something else is there, `storage.ConflictError`.
    step : callable
        Called repeatedly while it is stored; what it raises ends that, and leaves what was there.
    mark : mapping
        Added to the object's metadata.
    is_summed : bool
        Whether the CRC-32 of the object is wanted.
    """

    replaced: storage.Replaced = storage.ANYTHING
    step: Callable[[], object] = lambda: None
    mark: storage.Metadata = field(default_factory=dict)
    is_summed: bool = False


def put_payload(
    uri: str,
    chunks: Iterable[Chunk],
    settings: Settings,
    *,
    size: int | None = None,
    file: Path | None = None,
    keep_archives: bool = False,
    callback: Callback | None = None,
    options: PutOptions | None = None,
) -> storage.Written:
    """Store bytes as they are, or wrapped where a reader would take them for something else.

    Parameters
    ----------
    uri : str
        The object.
    chunks : iterable of bytes
        The payload.
    settings : Settings
        How the object is reached.
    size : int, optional
        Bytes of the payload, where known. A wrapped payload's size must be: where it is not, and only there, the
        payload takes a temporary file.
    file : pathlib.Path, optional
        The file that the bytes come from, if they do.
    keep_archives : bool, default False
        Store archives and empty payloads raw too, as Flyte 2 does: it unpacks the ones and ignores the others.
    callback : fsspec callback, optional
        Progress callback, called with the payload's bytes.
    options : PutOptions, optional
        What is stored under which conditions.
    """
    options = options or PutOptions()
    if callback is not None:
        if size is not None:
            callback.set_size(size)
        chunks = reporting(chunks, callback)
    kind, stream = recognise(chunks)
    raw_kinds = {Kind.OTHER, Kind.GZIP, Kind.ARCHIVE, Kind.EMPTY} if keep_archives else {Kind.OTHER, Kind.GZIP}
    if kind in raw_kinds:
        known_size = None if size is None else lambda: size
        checksum = _Checksum(file, size)
        return _put(
            uri, checksum.of(stream), settings, "payload", options, size=known_size, describe=checksum.described
        )
    with sized(stream, size) as (content, known):
        entry = stream_entry(PAYLOAD_NAME, content, known)
        entry.info.pax_headers = {PAYLOAD_KEY: "1"}
        packed = archive.pack([entry], memory=settings.share, is_indexed=False)
        return _put(uri, packed, settings, "payload", options, size=lambda: known, describe=_tree_described)


class _Checksum:
    """The CRC-32 of a payload as it passes, known as early as it can be: some storage must have it before the bytes."""

    def __init__(self, file: Path | None, size: int | None) -> None:
        self._file = file
        self._size = size
        self._crc = 0
        self._seen = 0
        self._is_complete = False
        self._told: int | None = None

    def of(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        for chunk in chunks:
            self._crc = crc32(chunk, self._crc)
            self._seen += len(chunk)
            # What comes in one chunk is known before it is sent.
            self._is_complete = self._seen == self._size
            yield chunk
        self._is_complete = True
        if self._told is not None and self._told != self._crc:
            message = f"{self._file} was changed while it was being saved: save again"
            raise CheckpointError(message)

    def described(self) -> storage.Metadata:
        if self._is_complete:
            return {SHAPE: "payload", CRC32: f"{self._crc:08x}"}
        if self._file is None or self._size is None or self._size > READ_TWICE:
            # A stream is gone once it is sent, and to read a large file twice would take too long.
            return {SHAPE: "payload"}
        self._told = functools.reduce(lambda crc, chunk: crc32(chunk, crc), self._chunks_again(), 0)
        return {SHAPE: "payload", CRC32: f"{self._told:08x}"}

    def _chunks_again(self) -> Iterator[Chunk]:
        assert self._file is not None
        assert self._size is not None
        return file_chunks(self._file, self._size)


def _tree_described() -> storage.Metadata:
    # Its members carry checksums of their own.
    return {SHAPE: "tree"}


def put_tree(
    uri: str,
    items: Iterable[Item],
    settings: Settings,
    *,
    size: Callable[[], int],
    previous: storage.Previous | None = None,
    callback: Callback | None = None,
    options: PutOptions | None = None,
) -> tuple[storage.Written, list[Unit]]:
    """Store sorted entries, and units of another object, as a tree.

    Parameters
    ----------
    uri : str
        The object.
    items : iterable of archive.Item
        What the tree will hold.
    settings : Settings
        How the object is reached.
    size : callable
        Returns about how many bytes of file content the entries have.
    previous : storage.Previous, optional
        The object that the units lie in.
    callback : fsspec callback, optional
        Progress callback, called with the bytes of file content.
    options : PutOptions, optional
        What is stored under which conditions.

    Returns
    -------
    storage.Written, list of Unit
        The object, and where its units lie.
    """
    if callback is not None:
        callback.set_size(size())
    units: list[Unit] = []
    packed = archive.pack(
        items,
        memory=settings.share,
        record=units.append,
        progress=callback.relative_update if callback is not None else lambda _: None,
    )
    before = 0 if previous is None else previous.written.size
    written = _put(
        uri,
        packed,
        settings,
        "tree",
        options or PutOptions(),
        size=lambda: size() + before,
        previous=previous,
        describe=_tree_described,
    )
    return written, units


@contextlib.contextmanager
def sized(chunks: Iterable[Chunk], size: int | None) -> Iterator[tuple[Iterable[Chunk], int]]:
    """Give a stream with its size; one of unknown size goes through a temporary file, since tar states it first."""
    if size is not None:
        yield chunks, size
        return
    with tempfile.TemporaryFile(prefix="flytekit_ckpt-") as file:
        for chunk in chunks:
            file.write(chunk)
        length = file.tell()
        file.seek(0)
        yield iter(functools.partial(file.read, CHUNK_SIZE), b""), length


def _put(
    uri: str,
    chunks: Iterator[Chunk | Range],
    settings: Settings,
    shape: str,
    options: PutOptions,
    *,
    size: Callable[[], int] | None,
    describe: Callable[[], storage.Metadata],
    previous: storage.Previous | None = None,
) -> storage.Written:
    started = time.perf_counter()
    target = storage.at(written_uri(uri), settings)
    crc: list[int] = [0] if options.is_summed else []

    def described() -> storage.Metadata:
        return {**describe(), **options.mark}

    with contextlib.closing(_with_steps(_summed(chunks, crc), options.step)) as passing:
        content: Iterator[Chunk | Range] = passing
        end = None
        if previous is not None and previous.object.uri == target.uri:
            end, kept = archive.repeated(content, previous.written.size)
            # What has been taken already is not written yet.
            content = _with_steps(kept, options.step)
        if previous is not None and end is not None and _is_there(target, previous.written, end, described()):
            written = previous.written
        else:
            written = target.put(content, size=size, previous=previous, describe=described, replaced=options.replaced)
    Event("saved", shape, written.size, time.perf_counter() - started, storage.public(target.uri)).log()
    return replace(written, crc32=f"{crc[0]:08x}") if crc else written


def _is_there(target: storage.StoredObject, written: storage.Written, end: bytes, described: storage.Metadata) -> bool:
    """Tell whether an object is what was written, ends like this and is described so."""
    tail = target.tail(len(end))
    return (
        tail is not None
        and tail.object == written
        and tail.content == end
        and described.items() <= tail.metadata.items()
        and CARRIED not in tail.metadata
    )


def _summed(chunks: Iterable[Chunk | Range], crc: list[int]) -> Iterator[Chunk | Range]:
    """Pass an object on, and its CRC-32 at the end; none of one whose bytes do not all come by here."""
    for chunk in chunks:
        if isinstance(chunk, Range):
            crc.clear()
        elif crc:
            crc[0] = crc32(chunk, crc[0])
        yield chunk


def _with_steps(chunks: Iterator[_Item], step: Callable[[], object]) -> Generator[_Item]:
    for chunk in chunks:
        step()
        yield chunk
    step()
