"""An object on S3: one request when it fits into a part, multipart uploads and ranged reads otherwise."""

from __future__ import annotations

import contextlib
import itertools
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from flytekit_ckpt.errors import StorageError
from flytekit_ckpt.pipeline import Chunk, Range, in_order
from flytekit_ckpt.storage import s3_client
from flytekit_ckpt.storage.failures import ConflictError, GivenUpError, s3_code
from flytekit_ckpt.storage.general import warn_of_no_conditions
from flytekit_ckpt.storage.objects import (
    ANYTHING,
    CONCURRENCY,
    PART_SIZE,
    Metadata,
    Previous,
    Replaced,
    StoredObject,
    Written,
)
from flytekit_ckpt.storage.parts import copied_ranges, divide
from flytekit_ckpt.storage.requested import PACE, UPLOAD
from flytekit_ckpt.storage.s3_client import (
    CHANGED,
    CONFLICTS,
    condition,
    metadata_of,
    prefixed,
    version_of,
)
from flytekit_ckpt.storage.s3_reading import S3Reader

# Servers that have refused a condition, by their endpoints, and how they say so.
_without_conditions: set[str] = set()
_NO_CONDITIONS = {"NotImplemented", "501"}

_BETWEEN_ABORTS = (0.1, 0.5, 0.0)
"""Seconds to wait after each."""


class S3Object(S3Reader):
    """An object on S3."""

    def _put(
        self,
        chunks: Iterator[Chunk | Range],
        size: Callable[[], int] | None,
        previous: Previous | None,
        describe: Callable[[], Metadata],
        replaced: Replaced,
    ) -> Written:
        if previous is not None and not isinstance(previous.object, S3Object):
            chunks = self._all_bytes(chunks, previous)

        def fetched(part: Range) -> Iterator[Chunk]:
            assert previous is not None
            return previous.get_range(part)

        parts = divide(chunks, size, fetched)
        try:
            head = list(itertools.islice(parts, 2))
            if len(head) == 1 and isinstance(head[0], bytes):
                return self._put_whole(head[0], describe(), replaced)
            return self._put_parts(itertools.chain(head, parts), describe(), previous, replaced)
        except StorageError as error:
            if (replaced is not ANYTHING or previous is not None) and s3_code(error) in CHANGED:
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
        previous: Previous | None,
        replaced: Replaced,
    ) -> Written:
        """Upload an object in parts; ranges are those of another object, as it was written."""
        token = uuid.uuid4().hex
        with self._reporting("write"):
            described = prefixed({**metadata, UPLOAD: token})
            upload = self._call("create_multipart_upload", Metadata=described)["UploadId"]

        def send(part: tuple[int, bytes | Range]) -> tuple[int, dict[str, Any]]:
            number, body = part
            arguments = {"UploadId": upload, "PartNumber": number}
            with self._reporting("write"):
                if isinstance(body, Range):
                    assert previous is not None
                    tag = self._copy_part(previous, body, arguments)
                    return body.length, {"PartNumber": number, "ETag": tag}
                answer = self._call("upload_part", moved=len(body), Body=body, **arguments)
                return len(body), {"PartNumber": number, "ETag": answer["ETag"]}

        try:
            numbered = (
                (0 if isinstance(body, Range) else len(body), (number, body)) for number, body in enumerate(parts, 1)
            )
            sent = list(in_order(send, numbered, threads=CONCURRENCY, memory=self._settings.share))
            with self._reporting("write"):
                if previous is not None and isinstance(previous.object, S3Object):
                    previous.object._check(previous.written)
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
            return await s3_client.send_request(
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

    def _copy_part(self, previous: Previous, part: Range, arguments: dict[str, Any]) -> str:
        assert isinstance(previous.object, S3Object)
        bucket, _, key = previous.object._key.partition("/")
        answer = self._call(
            "upload_part_copy",
            CopySource={"Bucket": bucket, "Key": key},
            CopySourceRange=f"bytes={part.start}-{part.start + part.length - 1}",
            CopySourceIfMatch=f'"{previous.written.version}"',
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

        return target._put_parts(parts(), described, Previous(self, Written(size, version_of(found))), None)

    def _check(self, written: Written) -> None:
        # Not every server looks at the condition under which a part is copied.
        if self._head_version() != written.version:
            raise ConflictError
