"""An object on S3: one request when it fits into a part, multipart uploads and ranged reads otherwise."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from flytekit_ckpt.errors import StorageError
from flytekit_ckpt.pipeline import CHUNK_SIZE, Chunk, Range, in_order
from flytekit_ckpt.storage.failures import ConflictError, GivenUpError, IncompleteAnswerError, s3_code
from flytekit_ckpt.storage.general import in_folders, warn_of_no_conditions
from flytekit_ckpt.storage.objects import (
    ANYTHING,
    CONCURRENCY,
    PART_SIZE,
    Metadata,
    Replaced,
    State,
    Stored,
    StoredObject,
    Written,
)
from flytekit_ckpt.storage.parts import copied_ranges, divide
from flytekit_ckpt.storage.requested import CONNECT_TIMEOUT, PACE, UPLOAD, RequestedObject
from flytekit_ckpt.storage.s3_client import (
    CHANGED,
    CONFLICTS,
    condition,
    filesystem_kind,
    metadata_of,
    prefixed,
    send_request,
    version_of,
)
from flytekit_ckpt.storage.uris import public

logger = logging.getLogger("flytekit_ckpt")

# Servers that have refused a condition, by their endpoints, and how they say so.
_without_conditions: set[str] = set()
_NO_CONDITIONS = {"NotImplemented", "501"}

_BETWEEN_ABORTS = (0.1, 0.5, 0.0)
"""Seconds to wait after each."""


class S3Object(RequestedObject):
    """An object on S3."""

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

    def _put(
        self,
        chunks: Iterator[Chunk | Range],
        size: Callable[[], int] | None,
        previous: Written | None,
        describe: Callable[[], Metadata],
        replaced: Replaced,
    ) -> Written:
        def fetched(part: Range) -> Iterator[Chunk]:
            return self.get_range(part, previous or Written(0, None))

        parts = divide(chunks, size, fetched)
        try:
            head = list(itertools.islice(parts, 2))
            if len(head) == 1 and isinstance(head[0], bytes):
                return self._put_whole(head[0], describe(), replaced)
            return self._put_parts(itertools.chain(head, parts), describe(), self._key, previous, replaced)
        except StorageError as error:
            if replaced is not ANYTHING and s3_code(error) in CHANGED:
                raise ConflictError from error
            raise

    def _put_whole(self, content: bytes, metadata: Metadata, replaced: Replaced) -> Written:
        token = uuid.uuid4().hex
        described = metadata if replaced is ANYTHING else {**metadata, UPLOAD: token}
        arguments = {"Body": content, "Metadata": prefixed(described)}
        with self._reporting("write"):
            try:
                answer = self._conditional(
                    replaced,
                    lambda headers: self._call("put_object", moved=len(content), headers=headers, **arguments),
                )
            except OSError as error:
                if s3_code(error) not in CONFLICTS:
                    raise
                # It may be this very object that is in the way: the answer to an earlier try was lost.
                answer = self._uploaded(token)
                if answer is None:
                    raise ConflictError from error
            return Written(len(content), version_of(answer))

    def _uploaded(self, token: str) -> Mapping[str, Any] | None:
        """What the server says of the object, if it is the one with this token."""
        try:
            found: Mapping[str, Any] = self._call("head_object")
        except FileNotFoundError:
            return None
        return found if metadata_of(found).get(UPLOAD) == token else None

    def _put_parts(
        self,
        parts: Iterable[bytes | Range],
        metadata: Metadata,
        source: str,
        previous: Written | None,
        replaced: Replaced,
    ) -> Written:
        """Upload an object in parts; ranges are those of the object with the key `source`, as it was written."""
        token = uuid.uuid4().hex
        with self._reporting("write"):
            described = prefixed({**metadata, UPLOAD: token})
            upload = self._call("create_multipart_upload", Metadata=described)["UploadId"]

        def send(part: tuple[int, bytes | Range]) -> tuple[int, dict[str, Any]]:
            number, body = part
            arguments = {"UploadId": upload, "PartNumber": number}
            with self._reporting("write"):
                if isinstance(body, Range):
                    tag = self._copy_part(source, body, previous, arguments)
                    return body.length, {"PartNumber": number, "ETag": tag}
                answer = self._call("upload_part", moved=len(body), Body=body, **arguments)
                return len(body), {"PartNumber": number, "ETag": answer["ETag"]}

        try:
            numbered = (
                (0 if isinstance(body, Range) else len(body), (number, body)) for number, body in enumerate(parts, 1)
            )
            sent = list(in_order(send, numbered, threads=CONCURRENCY, memory=self._settings.share))
            with self._reporting("write"):
                if previous is not None:
                    self._at(source)._check(previous)
                version = self._complete(upload, [part for _, part in sent], token, replaced)
        except BaseException:
            self._abort(upload)
            raise
        return Written(sum(size for size, _ in sent), version)

    def _abort(self, upload: str) -> None:
        """Abort an upload until the server knows nothing of it: a part on its way may come in after the first time."""
        with contextlib.suppress(Exception):
            for seconds in _BETWEEN_ABORTS:
                self._call("abort_multipart_upload", UploadId=upload)
                time.sleep(seconds)

    def _complete(self, upload: str, parts: list[dict[str, Any]], token: str, replaced: Replaced) -> str:
        bucket, _, key = self._key.partition("/")
        arguments = {"UploadId": upload, "MultipartUpload": {"Parts": parts}}

        async def request(filesystem: Any, headers: Mapping[str, str]) -> Any:
            if replaced is not ANYTHING:
                # Not every server looks at the condition: Ceph's gateway does not where an upload is completed. So it
                # is looked at here too, each time that this is tried.
                try:
                    found = version_of(await filesystem._call_s3("head_object", Bucket=bucket, Key=key))
                except FileNotFoundError:
                    found = None
                if found != (None if replaced is None else replaced.version):
                    raise ConflictError
            return await send_request(
                filesystem, "complete_multipart_upload", headers, Bucket=bucket, Key=key, **arguments
            )

        try:
            # The server may take long over ten thousand parts.
            answer = self._conditional(
                replaced, lambda headers: self._requested(lambda filesystem: request(filesystem, headers), 10 * PACE)
            )
        except Exception as error:
            # The answer may be all that was lost, and the server knows nothing of the upload any more.
            with contextlib.suppress(Exception):
                uploaded = self._uploaded(token)
                if uploaded is not None:
                    return version_of(uploaded)
            if replaced is not ANYTHING and s3_code(error) in {*CONFLICTS, "NoSuchUpload"}:
                raise ConflictError from error
            raise
        if version_of(answer):
            return version_of(answer)
        # Ceph's gateway leaves the tag out of this one answer; and somebody may have replaced the object already.
        uploaded = self._uploaded(token)
        return f"{token}, replaced" if uploaded is None else version_of(uploaded)

    def _conditional(self, replaced: Replaced, request: Callable[[Mapping[str, str]], Any]) -> Any:
        """Send a request under a condition; to a server that takes none, after a look at what is there."""
        headers = condition(replaced)
        server = str(self._options.get("endpoint_url"))
        if headers and server not in _without_conditions:
            try:
                return request(headers)
            except OSError as error:
                if s3_code(error) not in _NO_CONDITIONS:
                    raise
                _without_conditions.add(server)
                warn_of_no_conditions(self._protocol)
        self._compare(replaced)
        return request({})

    def _copy_part(self, source: str, part: Range, previous: Written | None, arguments: dict[str, Any]) -> str:
        bucket, _, key = source.partition("/")
        assert previous is not None
        answer = self._call(
            "upload_part_copy",
            CopySource={"Bucket": bucket, "Key": key},
            CopySourceRange=f"bytes={part.start}-{part.start + part.length - 1}",
            CopySourceIfMatch=f'"{previous.version}"',
            **arguments,
        )
        return str(answer["CopyPartResult"]["ETag"])

    def copy_to(self, target: StoredObject, given_up: Callable[[], bool], mark: Metadata) -> Written | None:
        if not isinstance(target, S3Object):
            return StoredObject.copy_to(self, target, given_up, mark)
        with self._reporting("read"):
            try:
                found = self._call("head_object")
            except FileNotFoundError:
                return None
        size, described = int(found["ContentLength"]), {**metadata_of(found), **mark}
        if given_up():
            raise GivenUpError
        if size <= PART_SIZE:
            # Not every server looks at the condition when it copies, as Ceph's gateway; all that know it do for this.
            return StoredObject.copy_to(self, target, given_up, mark)

        def parts() -> Iterator[Range]:
            for part in copied_ranges(Range(0, size)):
                if given_up():
                    raise GivenUpError
                yield part

        return target._put_parts(parts(), described, self._key, Written(size, version_of(found)), None)

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

    def _check(self, written: Written) -> None:
        # Not every server looks at the condition under which a part is copied.
        if self._head_version() != written.version:
            raise ConflictError

    def _head_version(self) -> str:
        return version_of(self._call("head_object"))

    def _at(self, key: str) -> S3Object:
        return self if key == self._key else S3Object(f"s3://{key}", self._settings)

    def get(self) -> Stored | None:
        with self._reporting("read"):
            try:
                head = self._fetch(Range(0, PART_SIZE), None)
            except FileNotFoundError as error:
                if s3_code(error) == "NoSuchBucket":
                    raise
                return None
            except OSError as error:
                # An empty object has no first byte.
                if s3_code(error) not in ("InvalidRange", "416"):
                    raise
                found = self._call("head_object")
                head = _Piece([], 0, version_of(found), metadata_of(found))

        def chunks() -> Iterator[Chunk]:
            yield from head.chunks
            if head.size > PART_SIZE:
                yield from self._pieces(Range(PART_SIZE, head.size - PART_SIZE), head.version)

        return Stored(head.size, head.version, chunks(), head.metadata)

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
        """Get a part of the object, of that version if one is given."""
        bucket, _, key = self._key.partition("/")
        arguments: dict[str, Any] = {"Range": f"bytes={part.start}-{part.start + part.length - 1}"}
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
            size = int(answer["ContentRange"].rpartition("/")[2])
            if sum(map(len, chunks)) != min(part.length, size - part.start):
                message = "the answer ends early"
                raise IncompleteAnswerError(message)
            return _Piece(chunks, size, version_of(answer), metadata_of(answer))

        answer: _Piece = self._requested(request, part.length)
        return answer

    def _call(self, method: str, *, moved: int = 0, headers: Mapping[str, str] | None = None, **arguments: Any) -> Any:
        """Send a request that moves about so many bytes."""
        bucket, _, key = self._key.partition("/")

        async def request(filesystem: Any) -> Any:
            return await send_request(filesystem, method, headers or {}, Bucket=bucket, Key=key, **arguments)

        return self._requested(request, moved)


class _Piece(NamedTuple):
    """A part of an object, and what is known of the whole of it."""

    chunks: list[bytes]
    size: int
    version: str | None
    metadata: Metadata
