"""What a checkpoint's bytes mean: a payload, a tree, or a folder that flytekit 1 left.

A payload is an object that holds the saved bytes as they are, a tree one that holds a gzip-compressed tar: both are
what Flyte 2 reads and writes. Payloads that a reader would take for something else are wrapped, that is stored as a
tree whose one member, `payload`, is marked.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from flytekit_ckpt import archive, members, storage
from flytekit_ckpt.archive import Unit
from flytekit_ckpt.entries import PAYLOAD_KEY, Entry, Exclude, file_chunks, safe_name, scan_folder, stream_entry
from flytekit_ckpt.errors import CheckpointError, CorruptCheckpointError, StorageError, UnsafeCheckpointError
from flytekit_ckpt.pipeline import CHUNK_SIZE, Callback, Chunk, Range, in_order
from flytekit_ckpt.recognition import Kind, recognise
from flytekit_ckpt.storage import Settings

logger = logging.getLogger("flytekit_ckpt")

_Item = TypeVar("_Item")

PAYLOAD_NAME = "payload"
"""File that a payload loads to in the new face, and the member that holds a wrapped one."""

LEGACY_PAYLOAD_NAME = "_dst_cp"
"""File that flytekit keeps written bytes in."""

OBJECT_NAME = "_flytecheckpoints"
"""Name of the object inside a local destination that is a folder."""

READ_TWICE = 1 << 30
"""Bytes that a file may have to be read once more for its checksum, where that must be known before it is sent."""

# What is kept as an object's metadata, where the storage keeps any: the shape, and the CRC-32 of a payload's bytes.
_SHAPE = "shape"
_CRC32 = "crc32"
# That an object was only carried forward: whoever saves replaces it.
_CARRIED = "carried"


@dataclass(frozen=True)
class Payload:
    """Bytes that were saved as they are: their number, and themselves."""

    size: int
    chunks: Iterator[Chunk]
    version: str | None


@dataclass(frozen=True)
class Tree:
    """A saved set of files, folders and links; each can be read before the next is asked for."""

    entries: Iterator[Entry]
    version: str | None


@dataclass(frozen=True)
class Event:
    """What the log record of a save or a restore carries as its `checkpoint` attribute.

    Attributes
    ----------
    operation : str
        `"saved"` or `"restored"`.
    shape : str
        `"payload"` or `"tree"`, `"nothing"` if there was no checkpoint.
    size : int
        Bytes of the object as stored (restored: of the payload, or of the tree's files).
    seconds : float
    uri : str
        The object, without credentials.
    """

    operation: str
    shape: str
    size: int
    seconds: float
    uri: str

    def log(self) -> None:
        message = "%s %s, %d bytes in %.3f s: %s"
        arguments = (self.operation, self.shape, self.size, self.seconds, self.uri)
        logger.info(message, *arguments, extra={"checkpoint": self})


def named_source(checkpoint_src: str | None) -> str | None:
    """Return the source that a platform names, `None` for the ways in which it says that there is none."""
    source = "" if checkpoint_src is None else os.fspath(checkpoint_src).strip().strip('"').strip()
    return source or None


def as_bytes(content: object) -> bytes:
    """Return what is bytes-like as bytes; anything else is a `TypeError`."""
    if isinstance(content, bytes):
        return content
    try:
        return memoryview(content).tobytes()  # type: ignore[arg-type]
    except TypeError as error:
        message = f"a checkpoint is bytes or a path, not {type(content).__name__}"
        raise TypeError(message) from error


def not_savable(path: Path) -> Exception:
    """Make the error for a path that is neither a file nor a folder."""
    if os.path.lexists(path):
        return ValueError(f"cannot save {path} as a checkpoint: it is neither a file nor a folder")
    return FileNotFoundError(errno.ENOENT, "there is nothing to save as a checkpoint", str(path))


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PutOptions:
    """Under which conditions an object is stored.

    Attributes
    ----------
    replaced : Written, None or ANYTHING
        What it may take the place of; if something else is there, `storage.ConflictError`.
    step : callable
        Called again and again while it is stored; what it raises ends that, and leaves what was there.
    mark : mapping
        Added to the object's metadata.
    """

    replaced: storage.Replaced = storage.ANYTHING
    step: Callable[[], object] = lambda: None
    mark: storage.Metadata = field(default_factory=dict)


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
        Told of the payload's bytes.
    options : PutOptions, optional
        What is stored under which conditions.
    """
    options = options or PutOptions()
    if callback is not None:
        if size is not None:
            callback.set_size(size)
        chunks = _told(chunks, callback)
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
        packed = archive.pack([entry], memory=settings.share)
        return _put(uri, packed, settings, "payload", options, size=lambda: known, describe=_tree_described)


class _Checksum:
    """The CRC-32 of a payload as it passes, told as soon as it is asked for: some storage must know it beforehand."""

    def __init__(self, file: Path | None, size: int | None) -> None:
        self._file = file
        self._size = size
        self._crc = 0
        self._seen = 0
        self._is_complete = False
        self._told: int | None = None

    def of(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        for chunk in chunks:
            self._crc = members.crc32(chunk, self._crc)
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
            return {_SHAPE: "payload", _CRC32: f"{self._crc:08x}"}
        if self._file is None or self._size is None or self._size > READ_TWICE:
            # A stream is gone once it is sent, and to read a large file twice would take too long.
            return {_SHAPE: "payload"}
        self._told = functools.reduce(lambda crc, chunk: members.crc32(chunk, crc), self._chunks_again(), 0)
        return {_SHAPE: "payload", _CRC32: f"{self._told:08x}"}

    def _chunks_again(self) -> Iterator[Chunk]:
        assert self._file is not None
        assert self._size is not None
        return file_chunks(self._file, self._size)


def _tree_described() -> storage.Metadata:
    # Its members carry checksums of their own.
    return {_SHAPE: "tree"}


def put_tree(
    uri: str,
    items: Iterable[Entry | Unit],
    settings: Settings,
    *,
    size: Callable[[], int],
    carried: storage.Written | None = None,
    callback: Callback | None = None,
    options: PutOptions | None = None,
) -> tuple[storage.Written, list[Unit]]:
    """Store sorted entries, and units of the object that is there, as a tree.

    Parameters
    ----------
    uri : str
        The object.
    items : iterable of Entry or Unit
        What the tree will hold.
    settings : Settings
        How the object is reached.
    size : callable
        Returns about how many bytes of file content the entries have.
    carried : storage.Written, optional
        The object that the units lie in.
    callback : fsspec callback, optional
        Told of the bytes of file content.
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
    before = 0 if carried is None else carried.size
    written = _put(
        uri,
        packed,
        settings,
        "tree",
        options or PutOptions(),
        size=lambda: size() + before,
        previous=carried,
        describe=_tree_described,
    )
    return written, units


def _told(chunks: Iterable[Chunk], callback: Callback) -> Iterator[Chunk]:
    for chunk in chunks:
        yield chunk
        callback.relative_update(len(chunk))


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
    previous: storage.Written | None = None,
) -> storage.Written:
    started = time.perf_counter()
    target = storage.at(_written_uri(uri), settings)
    written = target.put(
        _with_steps(chunks, options.step),
        size=size,
        previous=previous,
        describe=lambda: {**describe(), **options.mark},
        replaced=options.replaced,
    )
    Event("saved", shape, written.size, time.perf_counter() - started, storage.public(target.uri)).log()
    return written


def _with_steps(chunks: Iterator[_Item], step: Callable[[], object]) -> Iterator[_Item]:
    for chunk in chunks:
        step()
        yield chunk
    step()


def _written_uri(uri: str) -> str:
    """The object to write: inside a local destination that is a folder, else the URI itself."""
    path = storage.local_path(uri)
    return str(path / OBJECT_NAME) if path is not None and path.is_dir() else uri


def not_into_itself(uri: str) -> Exclude:
    """Exclude the object at a URI, and what is being written for it, from a folder that is saved there."""
    written = storage.local_path(_written_uri(uri))

    def reason(path: Path) -> str | None:
        assert written is not None
        is_object = path.name == written.name
        if not is_object and not storage.is_temporary(path.name, written):
            return None
        if os.path.realpath(path.parent) != os.path.realpath(written.parent):
            return None
        return "it is what the checkpoint itself is saved to" if is_object else ""

    return (lambda _: None) if written is None else reason


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def get(uri: str, settings: Settings, callback: Callback | None = None) -> Payload | Tree | None:
    """Open the checkpoint at a URI; `None` if there is none, or an empty object.

    Parameters
    ----------
    uri : str
        The object, or what flytekit 1 left.
    settings : Settings
        How it is reached.
    callback : fsspec callback, optional
        Told of the object's bytes as they are read.

    Raises
    ------
    StorageError, CorruptCheckpointError
        Now, or while the content is read; both name the URI.
    """
    with naming(uri):
        return _limited(uri, _found(uri, settings, callback), settings.restore_limit)


def _found(uri: str, settings: Settings, callback: Callback | None) -> Payload | Tree | None:
    path, is_folder = _located(uri)
    if path is not None and is_folder:
        return _told_of_files(_local_folder(path), callback)
    stored = storage.at(uri if path is None else str(path), settings).get()
    if stored is None:
        return None if path is not None else _told_of_files(_remote_folder(uri, settings), callback)
    chunks = stored.chunks
    if callback is not None:
        callback.set_size(stored.size)
        chunks = _told(chunks, callback)
    return _meaning(uri, stored, chunks, settings)


def _located(uri: str) -> tuple[Path | None, bool]:
    """Return the local path to read, if it is one, and whether that is a folder of loose files."""
    path = storage.local_path(uri)
    if path is None or not path.is_dir():
        return path, False
    return (path / OBJECT_NAME, False) if (path / OBJECT_NAME).is_file() else (path, True)


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


def _meaning(uri: str, stored: storage.Stored, content: Iterator[Chunk], settings: Settings) -> Payload | Tree | None:
    shape, crc = stored.metadata.get(_SHAPE), stored.metadata.get(_CRC32)
    kind, chunks = recognise(content if crc is None else _checked(uri, content, crc))
    if shape == "tree" and kind is not Kind.ARCHIVE:
        message = f"it was saved as an archive and is none any more: it is damaged. {_replaced(uri)}"
        raise CorruptCheckpointError(message)
    if kind is Kind.EMPTY:
        return None
    if kind is Kind.GZIP and shape is None:
        # Perhaps the beginning of an archive is damaged: then it is damaged as a gzip file too.
        chunks = members.intact(chunks)
    if kind in (Kind.OTHER, Kind.GZIP, Kind.ZEROS):
        return Payload(stored.size, _exactly(uri, chunks, stored.size), stored.version)
    entries = _named(uri, archive.read(chunks, memory=settings.share))
    first = next(entries, None)
    if first is not None and first.is_payload:
        return Payload(first.info.size, _single(uri, first, entries), stored.version)
    return Tree(entries if first is None else _first_then(first, entries), stored.version)


def look(
    uri: str, settings: Settings, is_carried: Callable[[storage.Written], bool]
) -> tuple[storage.Written | None, Payload | Tree | None]:
    """Look what is at a destination before something is added to it.

    Parameters
    ----------
    uri : str
        The object.
    settings : Settings
        How it is reached.
    is_carried : callable
        Tells whether an object was only carried forward.

    Returns
    -------
    Written or None
        The object that is to be replaced.
    Payload, Tree or None
        What has been saved there, in this package's format or in flytekit's.
    """
    target = storage.at(_written_uri(uri), settings)
    # A limit is for what is restored.
    settings = replace(settings, restore_limit=None)
    while True:
        state = target.state()
        if state.object is None:
            path = storage.local_path(uri)
            if path is not None and path.is_dir():
                return None, _local_folder(path)
            return None, _remote_folder(uri, settings) if state.has_files else None
        if _CARRIED in state.metadata or is_carried(state.object):
            return state.object, None
        stored = target.get()
        # Unless somebody has removed it in between.
        if stored is not None:
            with naming(uri):
                found = _meaning(target.uri, stored, stored.chunks, settings)
            return storage.Written(stored.size, stored.version), found


def link(source: str, destination: str, settings: Settings) -> bool:
    """Carry a checkpoint forward as `copy` does, if that takes no time; returns whether it did."""
    path, is_folder = _located(source)
    if path is None or is_folder or storage.local_path(destination) is None:
        return False
    target = _vacant(destination, settings)
    return target is not None and storage.at(str(path), settings).link_to(target, _MARK)


def is_linked(source: str, destination: str) -> bool:
    """Tell whether a destination is one and the same file as its source, which it was carried forward from."""
    theirs, ours = _located(source)[0], storage.local_path(_written_uri(destination))
    try:
        return theirs is not None and ours is not None and os.path.samefile(theirs, ours)
    except OSError:
        return False


def copy(source: str, destination: str, settings: Settings, given_up: Callable[[], bool]) -> storage.Written | None:
    """Carry a checkpoint forward, unless something is at the destination; what flytekit 1 left becomes one object.

    Parameters
    ----------
    source, destination : str
        URIs.
    settings : Settings
        How both are reached.
    given_up : callable
        Asked again and again whether to leave it, which raises `storage.GivenUpError`.

    Returns
    -------
    Written or None
        The copy; `None` if there was nothing to copy, or no room for it.
    """
    target = _vacant(destination, settings)
    if target is None:
        return None
    path, is_folder = _located(source)
    item = storage.at(source if path is None else str(path), settings)
    if not is_folder and item.exists():
        return item.copy_to(target, given_up, _MARK)
    found = get(source, replace(settings, restore_limit=None))

    def step() -> None:
        if given_up():
            raise storage.GivenUpError

    options = PutOptions(None, step, _MARK)
    if isinstance(found, Payload):
        return put_payload(destination, found.chunks, settings, size=found.size, options=options)
    if isinstance(found, Tree):
        return put_tree(destination, found.entries, settings, size=lambda: 0, options=options)[0]
    return None


_MARK = {_CARRIED: "yes"}


def _vacant(destination: str, settings: Settings) -> storage.StoredObject | None:
    """Give the object to write, if there is nothing at its URI yet."""
    target = storage.at(_written_uri(destination), settings)
    state = target.state()
    local = storage.local_path(destination)
    if state.object is not None or state.has_files or (local is not None and local.is_dir() and any(local.iterdir())):
        return None
    return target


def get_unit(uri: str, unit: Unit, written: storage.Written, settings: Settings) -> Iterator[Entry]:
    """Read the entries of one unit of an object, as it was written."""
    target = storage.at(_written_uri(uri), settings)
    members = target.get_range(Range(unit.start, unit.length), written)
    return _named(uri, archive.read(itertools.chain(members, [archive.end_of_archive()]), memory=settings.share))


def _checked(uri: str, chunks: Iterator[Chunk], stated: str) -> Iterator[Chunk]:
    """Pass an object's bytes on, and compare their checksum with the one that was kept with them."""
    crc = 0
    for chunk in chunks:
        crc = members.crc32(chunk, crc)
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


def _local_folder(path: Path) -> Payload | Tree | None:
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


def _remote_folder(uri: str, settings: Settings) -> Payload | Tree | None:
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


def _told_of_files(found: Payload | Tree | None, callback: Callback | None) -> Payload | Tree | None:
    """Have a callback told of what is read of loose files; how much that will be, nobody knows before."""
    if found is None or callback is None:
        return found
    if isinstance(found, Payload):
        return replace(found, chunks=_told(found.chunks, callback))
    told = (
        replace(entry, chunks=functools.partial(lambda chunks: _told(chunks(), callback), entry.chunks))
        for entry in found.entries
    )
    return replace(found, entries=told)


def _existing(item: storage.StoredObject) -> storage.Stored:
    stored = item.get()
    if stored is None:
        message = f"{storage.public(item.uri)} was removed while the checkpoint was being read. Try again"
        raise StorageError(message)
    return stored


@contextlib.contextmanager
def naming(uri: str) -> Iterator[None]:
    """Put the URI, and what to do, into the error of a room that knows no URI."""
    try:
        yield
    except CorruptCheckpointError as error:
        message = str(error)
        if storage.public(uri) in message:
            raise
        message = (
            f"the checkpoint at {storage.public(uri)} cannot be used: {message}. "
            "Nothing was restored; remove it to start afresh, or resume from an earlier one"
        )
        raise type(error)(message) from error


def log_nothing(uri: str) -> None:
    """Log that a restore found no checkpoint."""
    Event("restored", "nothing", 0, 0.0, storage.public(uri)).log()
