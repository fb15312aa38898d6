"""One object at a URI, through fsspec: chunks in, all or nothing; chunks out, read ahead.

Knows nothing of what the bytes mean. Local files and S3 have a path of their own, everything else goes through
fsspec's general interface.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from flytekit_ckpt.errors import CheckpointError, StorageError

PART_SIZE = 8 << 20
"""Bytes asked for or sent in one request; an object that fits into one part takes one request."""

BUDGET = 64 << 20
"""Bytes of one object that may wait in memory for the network."""

CONCURRENCY = 8
"""Requests of one object that run at the same time."""

StorageOptions = Mapping[str, Any]
"""Keyword arguments of the fsspec filesystem, for example `{"endpoint_url": ..., "key": ..., "secret": ...}`."""

_Sized = TypeVar("_Sized")
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class Stored:
    """An object that was found.

    Attributes
    ----------
    size : int
        Bytes.
    version : str or None
        Changes whenever the object is written; `None` where the storage has no such thing.
    chunks : iterator of bytes
        The content.
    """

    size: int
    version: str | None
    chunks: Iterator[bytes]


@dataclass(frozen=True)
class Written:
    """An object that was written: its size in bytes and its version, as in `Stored`."""

    size: int
    version: str | None


class StoredObject(ABC):
    """The object at one URI.

    Parameters
    ----------
    uri : str
        Where it is.
    options : mapping, optional
        Keyword arguments of the fsspec filesystem; they go before the environment.
    """

    def __init__(self, uri: str, options: StorageOptions | None = None) -> None:
        self.uri = uri
        self._options = dict(options or {})

    def put(self, chunks: Iterable[bytes]) -> Written:
        """Write the object, atomically: readers see the previous object or this one, whole.

        An exception from `chunks` passes through and leaves the previous object.

        Raises
        ------
        StorageError
            If the storage refuses or fails.
        """
        source = iter(chunks)
        try:
            return self._put(source)
        finally:
            close = getattr(source, "close", None)
            if close is not None:
                close()

    @abstractmethod
    def get(self) -> Stored | None:
        """Open the object; `None` if nothing is there.

        Raises
        ------
        StorageError
            If the storage refuses or fails, now or while the chunks are read.
        """

    @abstractmethod
    def files(self) -> Iterator[tuple[str, StoredObject]]:
        """List what lies below this URI as if it were a folder: names relative to it and their objects, sorted."""

    @abstractmethod
    def _put(self, chunks: Iterator[bytes]) -> Written: ...

    @contextlib.contextmanager
    def _reporting(self, operation: str) -> Iterator[None]:
        """Turn whatever the storage raises into a `StorageError` that names the URI and holds no credentials."""
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:
            text = str(error).replace(self.uri, public(self.uri))
            for option in ("key", "secret", "token", "password", "account_key", "sas_token"):
                value = self._options.get(option)
                if isinstance(value, str) and value:
                    text = text.replace(value, "***")
            # S3 servers do not all put their error codes into words.
            cause = f"{_s3_code(error) or type(error).__name__} ({text})"
            message = f"cannot {operation} {public(self.uri)}: {cause}. {_advice(error)}"
            number = getattr(error, "errno", None)
            raise (StorageError(message) if number is None else StorageError(number, message)) from error


def at(uri: str, options: StorageOptions | None = None) -> StoredObject:
    """Name the object at a URI; a plain path or a `file://` URI is a local file."""
    path = local_path(uri)
    if path is not None:
        return LocalObject(path)
    if uri.startswith(("s3://", "s3a://")):
        return S3Object(uri.rstrip("/"), options)
    return FsspecObject(uri.rstrip("/"), options)


def local_path(uri: str) -> Path | None:
    """Return the local path that a URI means, or `None` if it is not local."""
    for scheme in ("file://", "local://", "file:"):
        if uri.startswith(scheme):
            return Path(uri[len(scheme) :])
    return None if "://" in uri else Path(uri)


def public(uri: str) -> str:
    """Return a URI without the user, password and query that it may carry."""
    if "://" not in uri:
        return uri
    parts = urlsplit(uri)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"


def _advice(error: BaseException) -> str:
    code = _s3_code(error)
    if code == "NoSuchBucket":
        return "The bucket does not exist: create it, or correct the URI"
    if isinstance(error, PermissionError):
        return (
            "Check the credentials, and that they may read, write and list there "
            "(without the right to list, a bucket calls a missing object forbidden)"
        )
    if type(error).__name__ == "NoCredentialsError":
        return "Give credentials in storage_options, the FLYTE_AWS_* variables or the cloud SDK's own"
    if isinstance(error, OSError) and error.errno is not None and error.errno in _NO_SPACE:
        return "Make room there, or save less"
    return "Check that it is reachable and that the storage options are right, then try again"


_NO_SPACE = {28, 122}  # ENOSPC, EDQUOT


def _s3_code(error: BaseException | None) -> str:
    """The error code in S3's answer, "" if there is none in this exception or those behind it."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        error = error.__cause__
    return ""


def _in_order(
    function: Callable[[_Sized], _Answer], items: Iterable[tuple[int, _Sized]], concurrency: int = CONCURRENCY
) -> Iterator[_Answer]:
    """Map in threads, answers in order of the items, while the sizes of those under way stay within `BUDGET`."""
    waiting: deque[tuple[int, Future[_Answer]]] = deque()
    held = 0
    with ThreadPoolExecutor(concurrency, thread_name_prefix="flytekit_ckpt") as pool:
        try:
            for size, item in items:
                while waiting and (held + size > BUDGET or len(waiting) >= concurrency):
                    done, answer = waiting.popleft()
                    yield answer.result()
                    held -= done
                waiting.append((size, pool.submit(function, item)))
                held += size
            while waiting:
                yield waiting.popleft()[1].result()
        finally:
            for _, answer in waiting:
                answer.cancel()


# ---------------------------------------------------------------------------------------------------------------------
# Local files
# ---------------------------------------------------------------------------------------------------------------------


class LocalObject(StoredObject):
    """A file. It is written beside its place, flushed to the disk and renamed."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        # A link at the destination is the user's way to put the file elsewhere.
        self._path = Path(os.path.realpath(path))

    def _put(self, chunks: Iterator[bytes]) -> Written:
        temporary = self._path.with_name(f".{self._path.name[:200]}.{uuid.uuid4().hex}.tmp")
        size = 0
        try:
            with self._reporting("write"):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                file = open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb", buffering=0)  # noqa: SIM115
            with file:
                for chunk in chunks:
                    with self._reporting("write"):
                        view = memoryview(chunk)
                        while view:
                            view = view[file.write(view) :]
                    size += len(chunk)
                with self._reporting("write"):
                    os.fsync(file.fileno())
            with self._reporting("write"):
                if self._path.is_dir():
                    self._path.rmdir()
                os.replace(temporary, self._path)
                self._flush_name()
                return Written(size, _file_version(os.stat(self._path)))
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise

    def _flush_name(self) -> None:
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def get(self) -> Stored | None:
        with self._reporting("read"):
            try:
                file = self._path.open("rb", buffering=0)
            except FileNotFoundError:
                return None
            status = os.fstat(file.fileno())

        def chunks() -> Iterator[bytes]:
            with file:
                while True:
                    with self._reporting("read"):
                        chunk = file.read(1 << 20)
                    if not chunk:
                        break
                    yield chunk

        return Stored(status.st_size, _file_version(status), chunks())

    def files(self) -> Iterator[tuple[str, StoredObject]]:
        with self._reporting("list"):
            paths = sorted(path for path in self._path.rglob("*") if path.is_file())
        for path in paths:
            yield path.relative_to(self._path).as_posix(), LocalObject(path)


def _file_version(status: os.stat_result) -> str:
    return f"{status.st_ino}-{status.st_mtime_ns}-{status.st_size}"


# ---------------------------------------------------------------------------------------------------------------------
# Anything that fsspec reaches
# ---------------------------------------------------------------------------------------------------------------------


class FsspecObject(StoredObject):
    """An object behind fsspec's general interface."""

    @property
    def _filesystem(self) -> Any:
        # Asked for at every use: fsspec hands out the same instance, but a fresh one in a forked process.
        return self._connected()

    def _connected(self, **arguments: Any) -> Any:
        import fsspec

        return fsspec.filesystem(self.uri.partition("://")[0], **self._options, use_listings_cache=False, **arguments)

    @property
    def _key(self) -> str:
        return str(self._filesystem._strip_protocol(self.uri))

    def _put(self, chunks: Iterator[bytes]) -> Written:
        size = 0
        with self._reporting("write"):
            # An instance of its own: a transaction takes every file that is opened through the instance.
            filesystem, key = self._connected(skip_instance_cache=True), self._key
            with contextlib.suppress(NotImplementedError):
                filesystem.makedirs(key.rpartition("/")[0], exist_ok=True)
            filesystem.start_transaction()
        try:
            with self._reporting("write"):
                file = filesystem.open(key, "wb")
            for chunk in chunks:
                with self._reporting("write"):
                    file.write(chunk)
                size += len(chunk)
            with self._reporting("write"):
                file.close()
                filesystem.end_transaction()
        except BaseException:
            with contextlib.suppress(Exception):
                filesystem.transaction.complete(commit=False)
            raise
        return Written(size, None)

    def get(self) -> Stored | None:
        with self._reporting("read"):
            try:
                info = self._filesystem.info(self._key)
            except FileNotFoundError:
                return None
            if info["type"] == "directory":
                return None
        size = int(info["size"])

        def fetch(start: int) -> bytes:
            with self._reporting("read"):
                return bytes(self._filesystem.cat_file(self._key, start=start, end=min(start + PART_SIZE, size)))

        return Stored(size, None, _in_order(fetch, ((PART_SIZE, start) for start in range(0, size, PART_SIZE))))

    def files(self) -> Iterator[tuple[str, StoredObject]]:
        with self._reporting("list"):
            prefix = self._key + "/"
            found = sorted(self._filesystem.find(self._key))
        for key in found:
            name = str(key).removeprefix(prefix)
            # Consoles make empty objects that end in "/" to show a folder.
            if str(key).startswith(prefix) and name and not name.endswith("/"):
                yield name, type(self)(f"{self.uri}/{name}", self._options)


# ---------------------------------------------------------------------------------------------------------------------
# S3
# ---------------------------------------------------------------------------------------------------------------------


class S3Object(FsspecObject):
    """An object on S3: one request when it fits into a part, multipart uploads and ranged reads otherwise.

    Options come from `options`, then from the `FLYTE_AWS_*` variables that Flyte sets in its containers, then from
    fsspec's configuration and the AWS SDK's own variables and files.
    """

    def __init__(self, uri: str, options: StorageOptions | None = None) -> None:
        super().__init__(uri, _with_flyte_variables(dict(options or {})))

    @property
    def _filesystem(self) -> Any:
        # Not by its protocol: Flyte 2 registers a filesystem of its own under "s3".
        from s3fs import S3FileSystem

        return S3FileSystem(**self._options, use_listings_cache=False)

    def _put(self, chunks: Iterator[bytes]) -> Written:
        parts = _parts(chunks)
        first = next(parts)
        second = next(parts, None)
        if second is None:
            with self._reporting("write"):
                answer = self._call("put_object", Body=first)
                return Written(len(first), _version(answer))
        with self._reporting("write"):
            upload = self._call("create_multipart_upload")["UploadId"]
        try:
            return self._put_parts(upload, _chain_parts(first, second, parts))
        except BaseException:
            with contextlib.suppress(Exception):
                self._call("abort_multipart_upload", UploadId=upload)
            raise

    def _put_parts(self, upload: str, parts: Iterator[bytes]) -> Written:
        def send(part: tuple[int, bytes]) -> tuple[int, dict[str, Any]]:
            number, body = part
            with self._reporting("write"):
                answer = self._call("upload_part", UploadId=upload, PartNumber=number, Body=body)
            return len(body), {"PartNumber": number, "ETag": answer["ETag"]}

        numbered = ((len(body), (number, body)) for number, body in enumerate(parts, 1))
        sent = list(_in_order(send, numbered))
        with self._reporting("write"):
            answer = self._call(
                "complete_multipart_upload", UploadId=upload, MultipartUpload={"Parts": [part for _, part in sent]}
            )
            # Ceph's gateway leaves the tag out of this one answer.
            version = _version(answer) or _version(self._call("head_object"))
        return Written(sum(size for size, _ in sent), version)

    def get(self) -> Stored | None:
        with self._reporting("read"):
            try:
                head, size, version = self._fetch(0, None)
            except FileNotFoundError as error:
                if _s3_code(error) == "NoSuchBucket":
                    raise
                return None
            except OSError as error:
                # An empty object has no first byte.
                if _s3_code(error) not in ("InvalidRange", "416"):
                    raise
                head, size, version = b"", 0, None

        def fetch(start: int) -> bytes:
            with self._reporting("read"):
                return self._fetch(start, version)[0]

        def chunks() -> Iterator[bytes]:
            yield head
            if len(head) < size:
                yield from _in_order(fetch, ((PART_SIZE, start) for start in range(len(head), size, PART_SIZE)))

        return Stored(size, version, chunks())

    def _call(self, method: str, **arguments: Any) -> Any:
        bucket, _, key = self._key.partition("/")
        return self._filesystem.call_s3(method, Bucket=bucket, Key=key, **arguments)

    def _fetch(self, start: int, version: str | None) -> tuple[bytes, int, str | None]:
        """Get a part of the object (of that version, if one is given), the object's size and its version."""
        from fsspec.asyn import sync
        from s3fs.core import _error_wrapper

        filesystem = self._filesystem
        bucket, _, key = self._key.partition("/")
        arguments = {"Range": f"bytes={start}-{start + PART_SIZE - 1}"}
        if version is not None:
            arguments["IfMatch"] = f'"{version}"'

        async def call() -> tuple[bytes, int, str | None]:
            answer = await filesystem._call_s3("get_object", Bucket=bucket, Key=key, **arguments)
            async with answer["Body"] as body:
                data = await body.read()
            return data, int(answer["ContentRange"].rpartition("/")[2]), _version(answer)

        # Retries what broke while the body was read, as s3fs does for its own reads.
        answer: tuple[bytes, int, str | None] = sync(filesystem.loop, _error_wrapper, call, retries=filesystem.retries)
        return answer


def _version(answer: Mapping[str, Any]) -> str:
    # Servers differ in which of their answers put the tag in quotes.
    return str(answer.get("ETag", "")).strip('"')


def _with_flyte_variables(options: dict[str, Any]) -> dict[str, Any]:
    endpoint = os.environ.get("FLYTE_AWS_ENDPOINT")
    if endpoint and "endpoint_url" not in options and "endpoint_url" not in options.get("client_kwargs", {}):
        options["endpoint_url"] = endpoint
    key, secret = os.environ.get("FLYTE_AWS_ACCESS_KEY_ID"), os.environ.get("FLYTE_AWS_SECRET_ACCESS_KEY")
    if key and secret and options.keys().isdisjoint(("key", "secret", "token", "anon", "profile", "session")):
        options.update(key=key, secret=secret)
    return options


def _parts(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Cut a stream into parts, at least one.

    S3 takes 10,000 parts: they double every thousand, so that the largest object that S3 takes (5 TiB) fits though its
    size is not known before.
    """
    part = bytearray()
    number = 0
    for chunk in chunks:
        part += chunk
        while len(part) > (size := PART_SIZE << number // 1000):
            yield bytes(part[:size])
            del part[:size]
            number += 1
    yield bytes(part)


def _chain_parts(first: bytes, second: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield second
    yield from rest
