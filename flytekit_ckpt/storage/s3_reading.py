"""An object on S3, looked at, read and listed."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from flytekit_ckpt.errors import StorageError
from flytekit_ckpt.pipeline import CHUNK_SIZE, Chunk, Range
from flytekit_ckpt.storage import s3_client
from flytekit_ckpt.storage.failures import ConflictError, IncompleteAnswerError, s3_code
from flytekit_ckpt.storage.general import in_folders
from flytekit_ckpt.storage.objects import PART_SIZE, Metadata, State, Stored, StoredObject, Tail, Written
from flytekit_ckpt.storage.requested import CONNECT_TIMEOUT, PACE, RequestedObject
from flytekit_ckpt.storage.s3_client import CHANGED, filesystem_kind, metadata_of, version_of
from flytekit_ckpt.storage.uris import public

logger = logging.getLogger("flytekit_ckpt")


class S3Reader(RequestedObject):
    """What is done with an object on S3 but writing it."""

    @property
    def _filesystem(self) -> Any:
        timeout = self._settings.timeout
        config = {
            "connect_timeout": min(timeout, CONNECT_TIMEOUT),
            "read_timeout": timeout,
            # What is tried again, is here.
            "retries": {"total_max_attempts": 1},
            **(self._options.get("config_kwargs") or {}),
        }
        return filesystem_kind()(**{**self._options, "config_kwargs": config}, use_listings_cache=False)

    def exists(self) -> bool:
        return self._current_version() is not None

    def _current_version(self) -> str | None:
        with self._reporting("read"):
            try:
                return self._head_version()
            except FileNotFoundError:
                return None

    def state(self) -> State:
        with self._reporting("read"):
            try:
                is_there, has_files = self._listed_beside()
                if not is_there:
                    return State(None, has_files=has_files)
            except PermissionError:
                logger.warning(
                    "%s may not be listed: files that flytekit has left below it are not seen", public(self.uri)
                )
            try:
                found = self._call("head_object")
            except FileNotFoundError:
                return State(None)
            except PermissionError:
                # Who may not list is not told that nothing is there.
                return State(None)
        return State(Written(int(found["ContentLength"]), version_of(found)), metadata_of(found))

    def _listed_beside(self) -> tuple[bool, bool]:
        """Tell whether the object is there, and whether others are below it: mostly in one request for both."""
        key = self._key.partition("/")[2]
        page = self._call("list_objects_v2", moved=PACE, Prefix=key, Delimiter="/")
        is_there = any(item["Key"] == key for item in page.get("Contents", []))
        has_files = any(item["Prefix"] == f"{key}/" for item in page.get("CommonPrefixes", []))
        if page.get("IsTruncated") and not (is_there or has_files):
            # Very many others have names that only begin like it; its own comes first.
            has_files = next(self.files(), None) is not None
        return is_there, has_files

    def _head_version(self) -> str:
        return version_of(self._call("head_object"))

    def get(self) -> Stored | None:
        head = self._found(Range(0, PART_SIZE))
        if head is None:
            return None

        def chunks() -> Iterator[Chunk]:
            yield from head.chunks
            if head.size > PART_SIZE:
                yield from self._pieces(Range(PART_SIZE, head.size - PART_SIZE), head.version)

        return Stored(head.size, head.version, chunks(), head.metadata)

    def tail(self, size: int) -> Tail | None:
        tail = self._found(Range(-size, size))
        if tail is None:
            return None
        return Tail(Written(tail.size, tail.version), tail.metadata, b"".join(tail.chunks))

    def _found(self, part: Range) -> _Piece | None:
        """Get a part of whatever is there."""
        with self._reporting("read"):
            try:
                return self._fetch(part, None)
            except FileNotFoundError as error:
                if s3_code(error) == "NoSuchBucket":
                    raise
                return None
            except OSError as error:
                # An empty object has no first byte.
                if s3_code(error) not in ("InvalidRange", "416"):
                    raise
                found = self._call("head_object")
                return _Piece([], 0, version_of(found), metadata_of(found))

    def get_range(self, part: Range, written: Written) -> Iterator[Chunk]:
        try:
            yield from self._pieces(part, written.version)
        except StorageError as error:
            if s3_code(error) in CHANGED:
                raise ConflictError from error
            raise

    def _pieces(self, part: Range, version: str | None) -> Iterator[Chunk]:
        def fetch(piece: Range) -> list[bytes]:
            with self._reporting("read"):
                return self._fetch(piece, version).chunks

        return self._in_order(fetch, part, PART_SIZE)

    def files(self) -> Iterator[tuple[str, StoredObject]]:
        with self._reporting("list"):
            found = sorted(self._listed(), key=in_folders)
        for name in found:
            # Consoles make empty objects that end in "/" to show a folder.
            if name and not name.endswith("/"):
                yield name, type(self)(f"{self.uri}/{name}", self._settings)

    def names(self) -> list[str]:
        with self._reporting("list"):
            return [name for name in self._listed(Delimiter="/") if name]

    def remove(self) -> None:
        with self._reporting("remove"):
            self._call("delete_object")

    def _listed(self, **arguments: Any) -> Iterator[str]:
        """List the keys below this one, a thousand with each request."""
        key = self._key.partition("/")[2]
        prefix = key and key + "/"
        while True:
            page = self._call("list_objects_v2", moved=PACE, Prefix=prefix, **arguments)
            for item in page.get("Contents", []):
                yield str(item["Key"]).removeprefix(prefix)
            if not page.get("IsTruncated"):
                return
            arguments["ContinuationToken"] = page["NextContinuationToken"]

    def _fetch(self, part: Range, version: str | None) -> _Piece:
        """Get a part of the object, of that version if one is given; a negative start counts from the end."""
        bucket, _, key = self._key.partition("/")
        place = f"{part.start}-{part.start + part.length - 1}" if part.start >= 0 else f"{part.start}"
        arguments: dict[str, Any] = {"Range": f"bytes={place}"}
        if version is not None:
            arguments["IfMatch"] = f'"{version}"'

        async def request(filesystem: Any) -> _Piece:
            answer = await filesystem._call_s3("get_object", Bucket=bucket, Key=key, **arguments)
            # As they come: nobody needs them in one piece.
            chunks: list[bytes] = []
            # Not `async with`: before aiobotocore 3.8 that gives another object, whose `read` takes no size.
            body = answer["Body"]
            try:
                while chunk := await body.read(CHUNK_SIZE):
                    chunks.append(chunk)
            finally:
                body.close()
            first, last, size = map(int, re.findall(r"\d+", answer["ContentRange"]))
            if sum(map(len, chunks)) != last - first + 1 or last + 1 not in (size, first + part.length):
                message = "the answer ends early"
                raise IncompleteAnswerError(message)
            return _Piece(chunks, size, version_of(answer), metadata_of(answer))

        answer: _Piece = self._requested(request, part.length)
        return answer

    def _call(self, method: str, *, moved: int = 0, headers: Mapping[str, str] | None = None, **arguments: Any) -> Any:
        """Send a request that moves about so many bytes."""
        bucket, _, key = self._key.partition("/")

        async def request(filesystem: Any) -> Any:
            return await s3_client.send_request(filesystem, method, headers or {}, Bucket=bucket, Key=key, **arguments)

        return self._requested(request, moved)


class _Piece(NamedTuple):
    """A part of an object, and what is known of the whole of it."""

    chunks: list[bytes]
    size: int
    version: str | None
    metadata: Metadata
