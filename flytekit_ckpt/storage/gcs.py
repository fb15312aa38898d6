"""An object on Google Cloud Storage: one request when it fits into a part, resumable uploads and ranges otherwise.

Its generation tells one object from the next: the server compares it before it writes, copies or reads.
"""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import quote

from flytekit_ckpt.pipeline import Chunk, Range, in_order
from flytekit_ckpt.storage.asynchronous import AsyncObject, Found, refused
from flytekit_ckpt.storage.failures import ConflictError, GivenUpError, IncompleteAnswerError, s3_code
from flytekit_ckpt.storage.objects import PART_SIZE, Anything, Metadata, Replaced, StoredObject, Written
from flytekit_ckpt.storage.parts import equal_parts
from flytekit_ckpt.storage.requested import CONNECT_TIMEOUT, PACE, UPLOAD

# Reads of an object that is replaced again and again between two requests.
_TRIES = 5

# Where a request was answered "permanently redirected", it means that more of an upload is awaited.
_MORE = 308
_CANCELLED = 499


class _Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    content: bytes

    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.content)
        return found


class GcsObject(AsyncObject):
    """An object on Google Cloud Storage."""

    _conflicts = frozenset({"PreconditionFailed"})
    _prefix = "flytekit-ckpt-"

    @property
    def _filesystem(self) -> Any:
        # Not the class that gcsfs registers, which asks of what kind the bucket is, through another protocol.
        from gcsfs.core import GCSFileSystem

        return GCSFileSystem(**self._options, use_listings_cache=False)

    @property
    def _resource(self) -> str:
        bucket, key = self._address
        return f"/b/{quote(bucket, safe='')}/o/{quote(key, safe='')}"

    @property
    def _uploads(self) -> str:
        return f"/upload/storage/v1/b/{quote(self._address[0], safe='')}/o"

    def _divided(self, chunks: Iterator[Chunk], size: Callable[[], int] | None) -> Iterator[bytes]:  # noqa: ARG002
        # The server takes any number of parts, whose sizes are multiples of 256 KiB.
        return equal_parts(chunks, PART_SIZE)

    def _send_whole(self, content: bytes, metadata: Metadata, replaced: Replaced) -> str:
        boundary = uuid.uuid4().hex
        resource = json.dumps({"name": self._address[1], "metadata": self._named(metadata)})
        body = (
            f"--{boundary}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n{resource}\r\n"
            f"--{boundary}\r\nContent-Type: application/octet-stream\r\n\r\n"
        ).encode() + content
        body += f"\r\n--{boundary}--\r\n".encode()
        return self._version_of(
            self._call(
                "POST",
                self._uploads,
                {"uploadType": "multipart", **_condition(replaced)},
                {"Content-Type": f'multipart/related; boundary="{boundary}"'},
                body,
            )
        )

    def _send_parts(
        self, parts: Iterator[bytes], describe: Callable[[], Metadata], token: str, replaced: Replaced
    ) -> Written:
        resource = {"name": self._address[1], "metadata": self._named({**describe(), UPLOAD: token})}
        with self._reporting("write"):
            try:
                answer = self._call(
                    "POST",
                    self._uploads,
                    {"uploadType": "resumable", **_condition(replaced)},
                    {"Content-Type": "application/json", "X-Upload-Content-Type": "application/octet-stream"},
                    json.dumps(resource).encode(),
                )
            except OSError as error:
                if s3_code(error) in self._conflicts:
                    raise ConflictError from error
                raise
        upload = _Upload(self, answer.headers["Location"])

        def send(part: tuple[bytes, bool]) -> tuple[int, str | None]:
            body, is_last = part
            with self._reporting("write"):
                if not is_last:
                    return len(body), upload.send(body, is_last=False)
                return len(body), self._appeared(lambda: str(upload.send(body, is_last=True)), token)

        try:
            # One after the other, for that is what the server takes, while the next one is made.
            sized = ((len(body), (body, is_last)) for body, is_last in _with_last(parts))
            sent = list(in_order(send, sized, threads=1, memory=self._settings.share))
        except BaseException:
            with contextlib.suppress(Exception):
                self._call("DELETE", upload.session)
            raise
        return Written(sum(size for size, _ in sent), sent[-1][1])

    def copy_to(self, target: StoredObject, given_up: Callable[[], bool], mark: Metadata) -> Written | None:
        if not isinstance(target, GcsObject):
            return StoredObject.copy_to(self, target, given_up, mark)
        with self._reporting("read"):
            try:
                found = self._head()
            except FileNotFoundError:
                return None
        path = f"/storage/v1{self._resource}/rewriteTo{target._resource}"
        arguments = {**_condition(None), "ifSourceGenerationMatch": found.version}
        as_json = {"Content-Type": "application/json"}
        resource = json.dumps({"metadata": self._named({**found.metadata, **mark})}).encode()
        with target._reporting("write"):
            while True:
                if given_up():
                    raise GivenUpError
                try:
                    # A large object, or one that goes elsewhere, takes several.
                    answer = self._call("POST", path, arguments, as_json, resource, moved=10 * PACE).json()
                except OSError as error:
                    if s3_code(error) in self._conflicts and target.exists():
                        raise ConflictError from error
                    raise
                if answer["done"]:
                    return Written(found.size, str(answer["resource"]["generation"]))
                arguments["rewriteToken"] = answer["rewriteToken"]

    def _head(self) -> Found:
        found = self._call("GET", f"/storage/v1{self._resource}").json()
        return Found(int(found.get("size", 0)), str(found["generation"]), self._described(found.get("metadata")))

    def _opened(self) -> tuple[Found, bytes]:
        for remaining in reversed(range(_TRIES)):
            # The answer that brings the bytes does not bring the metadata.
            found = self._head()
            if not found.size:
                return found, b""
            try:
                return found, self._read(Range(0, min(found.size, PART_SIZE)), found.version)
            except OSError as error:
                if not remaining or s3_code(error) not in self._conflicts:
                    raise
        raise AssertionError

    def _read(self, part: Range, version: str) -> bytes:
        asked = {"Range": f"bytes={part.start}-{part.start + part.length - 1}"}
        path, arguments = f"/download/storage/v1{self._resource}", {"alt": "media", "ifGenerationMatch": version}

        def check(answer: _Answer) -> None:
            if answer.headers.get("X-Goog-Generation", version) != version:
                raise refused(412, "PreconditionFailed", "another object is there by now")
            if len(answer.content) != part.length:
                message = "the answer ends early"
                raise IncompleteAnswerError(message)

        return self._call("GET", path, arguments, asked, moved=part.length, check=check).content

    def _listed(self, *, deep: bool) -> Iterator[str]:
        bucket, key = self._address
        prefix = key and key + "/"
        arguments = {"prefix": prefix, "fields": "items(name),nextPageToken", **({} if deep else {"delimiter": "/"})}
        while True:
            page = self._call("GET", f"/storage/v1/b/{quote(bucket, safe='')}/o", arguments, moved=PACE).json()
            for item in page.get("items", ()):
                yield str(item["name"]).removeprefix(prefix)
            if not page.get("nextPageToken"):
                return
            arguments["pageToken"] = page["nextPageToken"]

    def _delete(self) -> None:
        self._call("DELETE", f"/storage/v1{self._resource}")

    def _version_of(self, answer: _Answer) -> str:
        return str(answer.json()["generation"])

    def _call(
        self,
        method: str,
        path: str,
        arguments: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        *,
        moved: int = 0,
        check: Callable[[_Answer], None] = lambda _: None,
    ) -> _Answer:
        """Send a request until its answer can be used."""

        async def request(filesystem: Any) -> _Answer:
            answer = await self._send(filesystem, method, path, arguments or {}, headers or {}, body)
            check(answer)
            return answer

        answered: _Answer = self._requested(request, moved or len(body or b""))
        return answered

    async def _send(
        self,
        filesystem: Any,
        method: str,
        path: str,
        arguments: Mapping[str, str],
        headers: Mapping[str, str],
        body: bytes | memoryview | None,
    ) -> _Answer:
        import aiohttp

        await filesystem._set_session()
        silent = self._settings.timeout
        async with filesystem.session.request(
            method=method,
            url=path if path.startswith("http") else filesystem._location.rstrip("/") + path,
            params=filesystem._get_params(dict(arguments)),
            headers=filesystem._get_headers(dict(headers)),
            data=body,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=min(silent, CONNECT_TIMEOUT), sock_read=silent),
            allow_redirects=False,
        ) as answer:
            content = await answer.read()
            if answer.status < 400 or answer.status == _CANCELLED:
                return _Answer(answer.status, answer.headers, content)
        raise _refusal(answer.status, content, is_of_bucket=path.endswith("/o"))


class _Upload:
    """A resumable upload: what the server has of it is asked for after a failure, and only the rest sent again."""

    def __init__(self, target: GcsObject, session: str) -> None:
        self.session = session
        self._target = target
        self._received = 0
        self._is_broken = False

    def send(self, part: bytes, *, is_last: bool) -> str | None:
        """Send the next part, and return the object's version if it is the last one."""
        if self._is_broken:
            # The part before this one is not there.
            raise GivenUpError
        self._is_broken = True
        start, end = self._received, self._received + len(part)
        total = str(end) if is_last else "*"
        is_first_try = True

        async def ask(filesystem: Any, span: str, body: bytes | memoryview) -> str | None:
            headers = {"Content-Range": f"bytes {span}/{total}"}
            answer = await self._target._send(filesystem, "PUT", self.session, {}, headers, body)
            if answer.status == _MORE:
                arrived = answer.headers.get("Range")
                self._received = int(arrived.rpartition("-")[2]) + 1 if arrived else 0
                return None
            return self._target._version_of(answer)

        async def request(filesystem: Any) -> str | None:
            nonlocal is_first_try
            if not is_first_try and (version := await ask(filesystem, "*", b"")) is not None:
                return version
            is_first_try = False
            while start <= self._received < end:
                before = self._received
                rest = memoryview(part)[before - start :]
                if (version := await ask(filesystem, f"{before}-{end - 1}", rest)) is not None:
                    return version
                if self._received <= before:
                    break
            if self._received != end or is_last:
                message = f"the server has {self._received} of {end} bytes"
                raise IncompleteAnswerError(message)
            return None

        version: str | None = self._target._requested(request, len(part))
        self._is_broken = False
        return version


def _with_last(parts: Iterator[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Tell the last part from the others."""
    before = next(parts)
    for part in parts:
        yield before, False
        before = part
    yield before, True


def _condition(replaced: Replaced) -> dict[str, str]:
    """Give the arguments under which a request takes the place of this and nothing else."""
    if isinstance(replaced, Anything):
        return {}
    # No object is generation 0.
    return {"ifGenerationMatch": "0" if replaced is None else str(replaced.version)}


def _refusal(status: int, content: bytes, *, is_of_bucket: bool) -> OSError:
    message, code = content.decode(errors="replace").strip(), ""
    with contextlib.suppress(ValueError, TypeError, LookupError, AttributeError):
        error = json.loads(content)["error"]
        message = str(error["message"])
        code = str(error["errors"][0]["reason"])
    if status == 412:
        code = "PreconditionFailed"
    elif status == 404 and (is_of_bucket or "bucket does not exist" in message):
        # Nothing else can be missing where an upload begins, or objects are listed.
        code = "NoSuchBucket"
    return refused(status, code or str(status), message)
