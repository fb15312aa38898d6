"""What the objects of Google's and Azure's stores have in common: requests of their own, over fsspec's connections.

fsspec's general interface keeps no metadata, knows no conditions and reads whatever version is there; the clients that
its filesystems hold do better.
"""

from __future__ import annotations

import contextlib
import itertools
import uuid
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar, NamedTuple

from flytekit_ckpt.errors import StorageError
from flytekit_ckpt.pipeline import Chunk, Range
from flytekit_ckpt.storage.failures import ConflictError, s3_code
from flytekit_ckpt.storage.general import in_folders
from flytekit_ckpt.storage.objects import (
    ANYTHING,
    PART_SIZE,
    Metadata,
    Previous,
    Replaced,
    State,
    Stored,
    StoredObject,
    Written,
)
from flytekit_ckpt.storage.requested import UPLOAD, RequestedObject


class Found(NamedTuple):
    """What a store knows of an object."""

    size: int
    version: str
    metadata: Metadata


class AsyncObject(RequestedObject):
    """An object in a store that is asked over the connections of fsspec's asynchronous filesystem."""

    _conflicts: ClassVar[frozenset[str]]
    """What the store answers to a request whose condition does not hold."""

    _prefix: ClassVar[str]
    """What stands before the names of this package's metadata."""

    # What a store has a request for --------------------------------------------------------------------------------

    @abstractmethod
    def _divided(self, chunks: Iterator[Chunk], size: Callable[[], int] | None) -> Iterator[bytes]:
        """Divide an object into the parts of an upload; one of no bytes is one part."""

    @abstractmethod
    def _send_whole(self, content: bytes, metadata: Metadata, replaced: Replaced) -> str:
        """Store an object of one part, and return its version."""

    @abstractmethod
    def _send_parts(
        self, parts: Iterator[bytes], describe: Callable[[], Metadata], token: str, replaced: Replaced
    ) -> Written:
        """Store an object of several parts, with a token among its metadata."""

    @abstractmethod
    def _head(self) -> Found:
        """Ask for what the store knows of the object; `FileNotFoundError` if it is not there."""

    @abstractmethod
    def _opened(self) -> tuple[Found, bytes]:
        """Read the first part, and what the store knows of the object; `FileNotFoundError` if it is not there."""

    @abstractmethod
    def _read(self, part: Range, version: str) -> bytes:
        """Read a part of this version of the object."""

    @abstractmethod
    def _listed(self, *, deep: bool) -> Iterator[str]:
        """List the keys below this one, relative to it: all of them, or those of one level."""

    @abstractmethod
    def _delete(self) -> None: ...

    # What comes of it ----------------------------------------------------------------------------------------------

    def _put(
        self,
        chunks: Iterator[Chunk | Range],
        size: Callable[[], int] | None,
        previous: Previous | None,
        describe: Callable[[], Metadata],
        replaced: Replaced,
    ) -> Written:
        parts = self._divided(self._all_bytes(chunks, previous), size)
        try:
            head = list(itertools.islice(parts, 2))
            if len(head) == 1:
                return self._put_whole(head[0], describe(), replaced)
            return self._send_parts(itertools.chain(head, parts), describe, uuid.uuid4().hex, replaced)
        except StorageError as error:
            if replaced is not ANYTHING and s3_code(error) in self._conflicts:
                raise ConflictError from error
            raise

    def _put_whole(self, content: bytes, metadata: Metadata, replaced: Replaced) -> Written:
        token = None if replaced is ANYTHING else uuid.uuid4().hex
        described = metadata if token is None else {**metadata, UPLOAD: token}
        with self._reporting("write"):
            version = self._appeared(lambda: self._send_whole(content, described, replaced), token)
        return Written(len(content), version)

    def _appeared(self, request: Callable[[], str], token: str | None) -> str:
        """Send the request with which an object appears, and return its version."""
        try:
            return request()
        except Exception as error:
            # The answer may be all that was lost; then it is this very object that is in the way of the next try.
            with contextlib.suppress(Exception):
                found = self._head() if token is not None else None
                if found is not None and found.metadata.get(UPLOAD) == token:
                    return found.version
            if s3_code(error) in self._conflicts:
                raise ConflictError from error
            raise

    def exists(self) -> bool:
        return self._current_version() is not None

    def _current_version(self) -> str | None:
        found = self._found()
        return None if found is None else found.version

    def _found(self) -> Found | None:
        with self._reporting("read"):
            try:
                return self._head()
            except FileNotFoundError as error:
                _let_pass_a_missing_object(error)
                return None

    def state(self) -> State:
        found = self._found()
        if found is not None:
            return State(Written(found.size, found.version), found.metadata)
        return State(None, has_files=next(self.files(), None) is not None)

    def get(self) -> Stored | None:
        with self._reporting("read"):
            try:
                found, head = self._opened()
            except FileNotFoundError as error:
                _let_pass_a_missing_object(error)
                return None

        def chunks() -> Iterator[Chunk]:
            if head:
                yield head
            if found.size > len(head):
                yield from self._pieces(Range(len(head), found.size - len(head)), found.version)

        return Stored(found.size, found.version, chunks(), found.metadata)

    def get_range(self, part: Range, written: Written) -> Iterator[Chunk]:
        try:
            yield from self._pieces(part, str(written.version))
        except StorageError as error:
            if s3_code(error) in self._conflicts or isinstance(error.__cause__, FileNotFoundError):
                raise ConflictError from error
            raise

    def _pieces(self, part: Range, version: str) -> Iterator[Chunk]:
        def fetch(piece: Range) -> list[bytes]:
            with self._reporting("read"):
                return [self._read(piece, version)]

        return self._in_order(fetch, part, PART_SIZE)

    def files(self) -> Iterator[tuple[str, StoredObject]]:
        with self._reporting("list"):
            found = sorted(self._listed(deep=True), key=in_folders)
        for name in found:
            # Consoles make empty objects that end in "/" to show a folder.
            if name and not name.endswith("/"):
                yield name, type(self)(f"{self.uri}/{name}", self._settings)

    def names(self) -> list[str]:
        with self._reporting("list"):
            return [name for name in self._listed(deep=False) if name]

    def remove(self) -> None:
        with self._reporting("remove"), contextlib.suppress(FileNotFoundError):
            self._delete()

    @property
    def _address(self) -> tuple[str, str]:
        """The bucket or container, and the key there."""
        bucket, _, key = self._key.partition("/")
        return bucket, key

    def _named(self, metadata: Metadata) -> dict[str, str]:
        return {self._prefix + name: value for name, value in metadata.items()}

    def _described(self, metadata: Mapping[str, str] | None) -> Metadata:
        # Stores differ in the case of its names.
        found = {name.lower(): value for name, value in (metadata or {}).items()}
        return {name.removeprefix(self._prefix): found[name] for name in found if name.startswith(self._prefix)}


def refused(status: int, code: str, message: str) -> OSError:
    """Make the exception for what a store answered, with the answer in the form that S3's have."""
    kinds = {401: PermissionError, 403: PermissionError, 404: FileNotFoundError}
    error = kinds.get(status, OSError)(message or code)
    error.response = {  # type: ignore[attr-defined]
        "Error": {"Code": code},
        "ResponseMetadata": {"HTTPStatusCode": status},
    }
    return error


def _let_pass_a_missing_object(error: FileNotFoundError) -> None:
    if s3_code(error) in ("NoSuchBucket", "ContainerNotFound"):
        raise error
