"""What every kind of storage offers: one object at a URI, written whole or not at all, read in chunks."""

from __future__ import annotations

import contextlib
import enum
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from flytekit_ckpt.options import StateOptions, StorageOptions
from flytekit_ckpt.pipeline import MEMORY_BUDGET, Chunk, Range, in_order
from flytekit_ckpt.storage.failures import GivenUpError, reported

PART_SIZE = 8 << 20
"""Bytes asked for or sent in one request; an object that fits into one part takes one request."""

CONCURRENCY = 8
"""Requests of one object that run at the same time."""

RETRIES = 8
"""Times that a request is repeated after a failure that may pass."""

TIMEOUT = 60.0
"""Seconds that storage may be silent, and may take for 4 MiB."""

Metadata = Mapping[str, str]
"""What is kept with an object and is no part of its bytes."""


@dataclass(frozen=True)
class Settings:
    """How objects are reached and moved, and how much may come of one.

    Attributes
    ----------
    options : mapping
        Keyword arguments of the fsspec filesystem; they go before what the platform configures.
    memory : int
        Bytes that one save or load may hold in memory.
    retries : int
        Times that a request is repeated after a failure that may pass.
    timeout : float
        Seconds that storage may be silent, and may take for 4 MiB, before a request counts as failed.
    restore_limit : int or None
        Bytes that a checkpoint may hold when it is restored; `None` for any.
    cancelled : threading.Event or None
        Once it is set, no request is tried again.
    """

    options: StorageOptions = field(default_factory=dict)
    memory: int = MEMORY_BUDGET
    retries: int = RETRIES
    timeout: float = TIMEOUT
    restore_limit: int | None = None
    cancelled: threading.Event | None = None

    @classmethod
    def of(cls, options: StateOptions) -> Settings:
        """Take the options that a user gave."""
        return cls(
            options.get("storage_options") or {},
            options.get("memory_budget", MEMORY_BUDGET),
            options.get("retries", RETRIES),
            options.get("timeout", TIMEOUT),
            options.get("restore_limit"),
        )

    @property
    def share(self) -> int:
        """What is being packed, and what is on its way, may take a quarter each: HTTP clients copy what they send."""
        return self.memory // 4


@dataclass(frozen=True)
class Stored:
    """An object that was found.

    Attributes
    ----------
    size : int
        Bytes.
    version : str or None
        Changes whenever the object is written; `None` where the storage tells nothing that does.
    chunks : iterator of bytes
        The content.
    metadata : mapping
        What was described when it was written; empty where the storage keeps none.
    """

    size: int
    version: str | None
    chunks: Iterator[Chunk]
    metadata: Metadata = field(default_factory=dict)


@dataclass(frozen=True)
class Written:
    """An object that was written: its size in bytes and its version, as in `Stored`; its CRC-32, if that was wanted."""

    size: int
    version: str | None
    crc32: str | None = field(default=None, compare=False)


class Previous(NamedTuple):
    """An object that ranges are taken from, and what it was when it was written."""

    object: StoredObject
    written: Written

    def get_range(self, part: Range) -> Iterator[Chunk]:
        """Read a range."""
        return self.object.get_range(part, self.written)


@dataclass(frozen=True)
class Tail:
    """The last bytes of an object: the object as it was written, its metadata, and the bytes."""

    object: Written
    metadata: Metadata
    content: bytes


@dataclass(frozen=True)
class State:
    """What is at a URI.

    Attributes
    ----------
    object : Written or None
        The object there, if there is one.
    metadata : mapping
        What was described when it was written.
    has_files : bool
        Whether objects lie below the URI, as if it were a folder. Not looked for where there is an object.
    """

    object: Written | None
    metadata: Metadata = field(default_factory=dict)
    has_files: bool = False


class Anything(enum.Enum):
    """Stands for whatever may be at a URI."""

    ANYTHING = enum.auto()


ANYTHING = Anything.ANYTHING

Replaced = Written | Anything | None
"""What a write may replace: an object as it was written, nothing at all (`None`), or `ANYTHING`."""


class StoredObject(ABC):
    """The object at one URI.

    Parameters
    ----------
    uri : str
        Where it is.
    settings : Settings, optional
        How it is reached.
    """

    def __init__(self, uri: str, settings: Settings | None = None) -> None:
        self.uri = uri
        self._settings = settings or Settings()
        self._options = dict(self._settings.options)

    def put(
        self,
        chunks: Iterable[Chunk | Range],
        *,
        size: Callable[[], int] | None = None,
        previous: Previous | None = None,
        describe: Callable[[], Metadata] = dict,
        replaced: Replaced = ANYTHING,
    ) -> Written:
        """Write the object, atomically: readers see the previous object or this one, whole.

        An exception from `chunks` passes through and leaves the previous object.

        Parameters
        ----------
        chunks : iterable of bytes or Range
            The content; a range is taken from another object, or from the one that is there now.
        size : callable, optional
            Returns about how many bytes there will be. Called only if they are many.
        previous : Previous, optional
            The object that ranges are taken from, as it was written.
        describe : callable, optional
            Returns metadata for the object. Called as late as the storage can take it: after the last chunk was taken
            where that is possible, which on S3 it is only for what fits into one part.
        replaced : Written, None or ANYTHING, default ANYTHING
            What the object is to take the place of: an object as it was written, or nothing. If something else is there
            it stays. Atomic where the storage offers that; elsewhere it is looked at right before the object appears.

        Raises
        ------
        ConflictError
            If something else than `replaced` is at the URI, or the object that ranges are taken from is not there.
        StorageError
            If the storage refuses or fails.
        """
        source = iter(chunks)
        try:
            return self._put(source, size, previous, describe, replaced)
        finally:
            close = getattr(source, "close", None)
            if close is not None:
                close()

    def link_to(self, target: StoredObject, mark: Metadata) -> bool:  # noqa: ARG002
        """Make the same object elsewhere at once, without moving its bytes, if nothing is there.

        Parameters
        ----------
        target : StoredObject
            Where to.
        mark : mapping
            Added to the metadata there, unless both are one and the same file then.

        Returns
        -------
        bool
            Whether that could be done; `copy_to` can.

        Raises
        ------
        ConflictError
            If something is at the target.
        """
        return False

    def copy_to(self, target: StoredObject, given_up: Callable[[], bool], mark: Metadata) -> Written | None:
        """Write the same object elsewhere, with its metadata, if nothing is there; nothing where this one is not there.

        By the server or the file system where both lie with the same one. What someone else has written to the target
        meanwhile stays, as for a write with a condition.

        Parameters
        ----------
        target : StoredObject
            Where to.
        given_up : callable
            Called repeatedly; tells whether to leave it, which leaves what was at the target.
        mark : mapping
            Added to the metadata, where the storage keeps any.

        Returns
        -------
        Written or None
            The copy.

        Raises
        ------
        GivenUpError
            If it was given up.
        ConflictError
            If something is at the target.
        StorageError
            If the storage refuses or fails.
        """
        stored = self.get()
        if stored is None:
            return None

        def chunks() -> Iterator[Chunk]:
            for chunk in stored.chunks:
                if given_up():
                    raise GivenUpError
                yield chunk

        described = {**stored.metadata, **mark}
        return target.put(chunks(), size=lambda: stored.size, describe=lambda: described, replaced=None)

    @abstractmethod
    def exists(self) -> bool:
        """Tell whether the object is there, without reading it."""

    @abstractmethod
    def state(self) -> State:
        """Look what is there, in as few requests as possible, without reading it."""

    @abstractmethod
    def get(self) -> Stored | None:
        """Open the object; `None` if nothing is there.

        Raises
        ------
        StorageError
            If the storage refuses or fails, now or while the chunks are read.
        """

    def tail(self, size: int) -> Tail | None:
        """Read up to `size` bytes at the object's end; `None` if nothing is there.

        Raises
        ------
        StorageError
            If the storage refuses or fails.
        ConflictError
            If another writer replaces it meanwhile.
        """
        state = self.state()
        if state.object is None:
            return None
        start = max(0, state.object.size - size)
        content = b"".join(self.get_range(Range(start, state.object.size - start), state.object))
        return Tail(state.object, state.metadata, content)

    @abstractmethod
    def get_range(self, part: Range, written: Written) -> Iterator[Chunk]:
        """Read some bytes of the object as it was written.

        Raises
        ------
        StorageError
            If the storage refuses or fails.
        ConflictError
            If another writer has replaced it.
        """

    @abstractmethod
    def files(self) -> Iterator[tuple[str, StoredObject]]:
        """List what lies below this URI as if it were a folder: names relative to it and their objects, sorted."""

    @abstractmethod
    def names(self) -> list[str]:
        """List the objects directly below this URI as if it were a folder, by their names there, in one pass."""

    @abstractmethod
    def remove(self) -> None:
        """Remove the object, if it is there."""

    @abstractmethod
    def _put(
        self,
        chunks: Iterator[Chunk | Range],
        size: Callable[[], int] | None,
        previous: Previous | None,
        describe: Callable[[], Metadata],
        replaced: Replaced,
    ) -> Written: ...

    @staticmethod
    def _all_bytes(chunks: Iterator[Chunk | Range], previous: Previous | None) -> Iterator[Chunk]:
        """Read the ranges among the chunks."""
        for chunk in chunks:
            if isinstance(chunk, Range):
                assert previous is not None
                yield from previous.get_range(chunk)
            else:
                yield chunk

    def _in_order(
        self, fetch: Callable[[Range], list[bytes]], part: Range, size: int, threads: int = CONCURRENCY
    ) -> Iterator[bytes]:
        """Fetch some bytes in pieces of a size, several at a time."""
        end = part.start + part.length
        pieces = (Range(start, min(size, end - start)) for start in range(part.start, end, size))
        sized = ((piece.length, piece) for piece in pieces)
        for chunks in in_order(fetch, sized, threads=threads, memory=self._settings.share):
            yield from chunks

    def _reporting(self, operation: str) -> contextlib.AbstractContextManager[None]:
        return reported(operation, self.uri, self._options)
