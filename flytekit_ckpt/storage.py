"""One object at a URI, through fsspec: chunks in, all or nothing; chunks out, read ahead.

Knows nothing of what the bytes mean. Local files and S3 have a path of their own, everything else goes through
fsspec's general interface.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import itertools
import os
import re
import uuid
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from flytekit_ckpt.entries import FileWriter
from flytekit_ckpt.errors import CheckpointError, StorageError
from flytekit_ckpt.options import StorageOptions, resolved
from flytekit_ckpt.pipeline import CHUNK_SIZE, MEMORY_BUDGET, Chunk, Range, in_order

PART_SIZE = 8 << 20
"""Bytes asked for or sent in one request; an object that fits into one part takes one request."""

LOCAL_SIZE = 256 << 10
"""Bytes read from a local file at a time: few, so that the same memory is used again and again."""

MIN_PART_SIZE = 5 << 20
"""Bytes that S3 wants in every part but the last."""

MAX_PART_SIZE = 5 << 30
"""Bytes that S3 takes in one part."""

COPY_SIZE = 256 << 20
"""Bytes that S3 is asked to copy in one request."""

MAX_PARTS = 10_000
"""Parts that S3 takes for one object."""

CONCURRENCY = 8
"""Requests of one object that run at the same time."""


@dataclass(frozen=True)
class Settings:
    """How objects are reached and moved.

    Attributes
    ----------
    options : mapping
        Keyword arguments of the fsspec filesystem; they go before what the platform configures.
    memory : int
        Bytes that one save or load may hold in memory.
    """

    options: StorageOptions = field(default_factory=dict)
    memory: int = MEMORY_BUDGET

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
        Changes whenever the object is written; `None` for an empty object on S3.
    chunks : iterator of bytes
        The content.
    """

    size: int
    version: str | None
    chunks: Iterator[Chunk]


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
        previous: Written | None = None,
    ) -> Written:
        """Write the object, atomically: readers see the previous object or this one, whole.

        An exception from `chunks` passes through and leaves the previous object.

        Parameters
        ----------
        chunks : iterable of bytes or Range
            The content; a range is taken from the object that is there now.
        size : callable, optional
            Returns about how many bytes there will be. Called only if they are many.
        previous : Written, optional
            The object that ranges are taken from, as it was written.

        Raises
        ------
        StorageError
            If the storage refuses or fails.
        CheckpointError
            If another writer has replaced the object that ranges are taken from.
        """
        source = iter(chunks)
        try:
            return self._put(source, size, previous)
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
    def get_range(self, part: Range, written: Written) -> Iterator[Chunk]:
        """Read some bytes of the object as it was written.

        Raises
        ------
        StorageError
            If the storage refuses or fails.
        CheckpointError
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
        self, chunks: Iterator[Chunk | Range], size: Callable[[], int] | None, previous: Written | None
    ) -> Written: ...

    def _in_order(
        self, fetch: Callable[[Range], list[bytes]], part: Range, size: int, threads: int = CONCURRENCY
    ) -> Iterator[bytes]:
        """Fetch some bytes in pieces of a size, several at a time."""
        end = part.start + part.length
        pieces = (Range(start, min(size, end - start)) for start in range(part.start, end, size))
        sized = ((piece.length, piece) for piece in pieces)
        for chunks in in_order(fetch, sized, threads=threads, memory=self._settings.share):
            yield from chunks

    @contextlib.contextmanager
    def _reporting(self, operation: str) -> Iterator[None]:
        """Turn whatever the storage raises into a `StorageError` that names the URI and holds no credentials."""
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:
            text = str(error).replace(self.uri, public(self.uri))
            for option in ("key", "secret", "token", "password", "account_key", "client_secret", "sas_token"):
                value = self._options.get(option)
                if isinstance(value, str) and len(value) > 3:
                    text = text.replace(value, "***")
            # The user and the password of an endpoint.
            text = re.sub(r"[^\s/@:'\"]+:[^\s/@'\"]+@", "***@", text)
            # S3 servers do not all put their error codes into words.
            cause = f"{_s3_code(error) or type(error).__name__} ({text})"
            message = f"cannot {operation} {public(self.uri)}: {cause}. {_advice(error)}"
            number = getattr(error, "errno", None)
            raise (StorageError(message) if number is None else StorageError(number, message)) from error


def at(uri: str, settings: Settings | None = None) -> StoredObject:
    """Name the object at a URI; a plain path or a `file://` URI is a local file."""
    path = local_path(uri)
    if path is not None:
        return LocalObject(path, settings)
    # But for the root of a store.
    uri = uri if uri.endswith("://") else uri.rstrip("/")
    return S3Object(uri, settings) if uri.startswith(("s3://", "s3a://")) else FsspecObject(uri, settings)


def overwritten(uri: str) -> CheckpointError:
    """Make the error for an object that has changed since it was written here."""
    message = (
        f"{public(uri)} was changed by another writer: what this checkpoint saved there before is gone. "
        "Save to a destination of its own, or save everything again with a new checkpoint"
    )
    return CheckpointError(message)


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


_CODE_ADVICE = {
    "NoSuchBucket": "The bucket does not exist: create it, or correct the URI",
    "PreconditionFailed": "It was overwritten meanwhile: try again",
}


def _advice(error: BaseException) -> str:
    code = _s3_code(error)
    if code in _CODE_ADVICE:
        return _CODE_ADVICE[code]
    if isinstance(error, PermissionError):
        return (
            "Check the credentials, and that they may read, write and list there "
            "(without the right to list, a bucket calls a missing object forbidden)"
        )
    if type(error).__name__ == "NoCredentialsError":
        return "Give credentials in storage_options, the FLYTE_AWS_* variables or the cloud SDK's own"
    if isinstance(error, ImportError):
        return "It is the package that reaches this kind of storage"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "Make room there, or save less"
    return "Check that it is reachable and that the storage options are right, then try again"


def _s3_code(error: BaseException | None) -> str:
    """The error code in S3's answer, "" if there is none in this exception or those behind it."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        error = error.__cause__
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# Local files
# ---------------------------------------------------------------------------------------------------------------------


class LocalObject(StoredObject):
    """A file. It is written beside its place, flushed to the disk and renamed."""

    def __init__(self, path: Path, settings: Settings | None = None) -> None:
        super().__init__(str(path), settings)
        self._name = path
        # A link at the destination is the user's way to put the file elsewhere.
        self._path = Path(os.path.realpath(path))

    def _put(
        self,
        chunks: Iterator[Chunk | Range],
        size: Callable[[], int] | None,  # noqa: ARG002 - a file grows as it will
        previous: Written | None,
    ) -> Written:
        temporary = self._path.with_name(f".{self._path.name[:200]}.{uuid.uuid4().hex}.tmp")
        with contextlib.ExitStack() as files:
            try:
                with self._reporting("write"):
                    self._path.parent.mkdir(parents=True, exist_ok=True)
                    file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
                    files.callback(os.close, file)
                writer = FileWriter(file)
                old: list[io.FileIO] = []

                def write(chunk: Chunk | Range) -> int:
                    with self._reporting("write"):
                        if isinstance(chunk, Range):
                            return writer.written(_copy(old[0].fileno(), file, chunk))
                        return writer(chunk)

                def sized() -> Iterator[tuple[int, Chunk | Range]]:
                    for chunk in chunks:
                        if isinstance(chunk, Range) and not old:
                            old.append(files.enter_context(self._opened(previous)))
                        yield 0 if isinstance(chunk, Range) else len(chunk), chunk

                # In a thread, so that what follows is packed meanwhile.
                written = sum(in_order(write, sized(), threads=1, memory=self._settings.share))
                with self._reporting("write"):
                    os.fsync(file)
                    if self._path.is_dir():
                        self._path.rmdir()
                    os.replace(temporary, self._path)
                    self._flush_name()
                    return Written(written, _file_version(os.stat(self._path)))
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

    def _opened(self, written: Written | None) -> io.FileIO:
        """Open the file, if it is still the one that was written."""
        with self._reporting("read"):
            try:
                file = self._path.open("rb", buffering=0)
            except FileNotFoundError:
                raise overwritten(self.uri) from None
            if written is None or _file_version(os.fstat(file.fileno())) != written.version:
                file.close()
                raise overwritten(self.uri)
            return file

    def get(self) -> Stored | None:
        with self._reporting("read"):
            try:
                file = self._path.open("rb", buffering=0)
            except FileNotFoundError:
                return None
            status = os.fstat(file.fileno())
        return Stored(status.st_size, _file_version(status), self._chunks(file, Range(0, status.st_size)))

    def get_range(self, part: Range, written: Written) -> Iterator[Chunk]:
        return self._chunks(self._opened(written), part)

    def _chunks(self, file: io.FileIO, part: Range) -> Iterator[Chunk]:
        def fetch(piece: Range) -> list[bytes]:
            with self._reporting("read"):
                return [os.pread(file.fileno(), piece.length, piece.start)]

        with file:
            yield from self._in_order(fetch, part, LOCAL_SIZE, threads=1)

    def files(self) -> Iterator[tuple[str, StoredObject]]:
        with self._reporting("list"):
            paths = sorted(path for path in self._path.rglob("*") if path.is_file())
        for path in paths:
            yield path.relative_to(self._path).as_posix(), LocalObject(path, self._settings)

    def names(self) -> list[str]:
        with self._reporting("list"):
            try:
                return [item.name for item in os.scandir(self._path) if item.is_file()]
            except FileNotFoundError:
                return []

    def remove(self) -> None:
        with self._reporting("remove"):
            # Not what a link leads to.
            self._name.unlink(missing_ok=True)


def _copy(source: int, target: int, part: Range) -> int:
    """Copy bytes from one file to the end of another, by the file system where it can."""
    done = 0
    while done < part.length:
        offset = part.start + done
        try:
            count = os.copy_file_range(source, target, min(COPY_SIZE, part.length - done), offset)
        except (AttributeError, OSError):
            # Not on this system, or not between these two files; a disk that fails will fail here too.
            count = os.write(target, os.pread(source, min(LOCAL_SIZE, part.length - done), offset))
        if not count:
            message = f"the file ends at {offset}"
            raise EOFError(message)
        done += count
    return done


def _file_version(status: os.stat_result) -> str:
    return f"{status.st_ino}-{status.st_mtime_ns}-{status.st_size}"


# ---------------------------------------------------------------------------------------------------------------------
# Anything that fsspec reaches
# ---------------------------------------------------------------------------------------------------------------------


class FsspecObject(StoredObject):
    """An object behind fsspec's general interface."""

    def __init__(self, uri: str, settings: Settings | None = None) -> None:
        super().__init__(uri, settings)
        self._protocol = uri.partition("://")[0]
        self._options = resolved(self._protocol, self._settings.options)

    @property
    def _filesystem(self) -> Any:
        # Asked for at every use: fsspec hands out the same instance, but a fresh one in a forked process.
        return self._connected()

    def _connected(self, **arguments: Any) -> Any:
        return _filesystem_class(self._protocol)(**self._options, use_listings_cache=False, **arguments)

    @property
    def _key(self) -> str:
        return str(self._filesystem._strip_protocol(self.uri))

    def _put(
        self,
        chunks: Iterator[Chunk | Range],
        size: Callable[[], int] | None,  # noqa: ARG002 - its filesystem divides the object as it will
        previous: Written | None,
    ) -> Written:
        written = 0
        with self._reporting("write"):
            # An instance of its own: a transaction takes every file that is opened through the instance.
            filesystem, key = self._connected(skip_instance_cache=True), self._key
            with contextlib.suppress(NotImplementedError):
                filesystem.makedirs(key.rpartition("/")[0], exist_ok=True)
            filesystem.start_transaction()
        try:
            with self._reporting("write"):
                file = filesystem.open(key, "wb")
            for chunk in self._all_bytes(chunks, previous):
                with self._reporting("write"):
                    file.write(chunk)
                written += len(chunk)
            with self._reporting("write"):
                file.close()
                filesystem.end_transaction()
        except BaseException:
            with contextlib.suppress(Exception):
                filesystem.transaction.complete(commit=False)
            raise
        with self._reporting("read"):
            return Written(written, _info_version(filesystem.info(key)))

    def _all_bytes(self, chunks: Iterator[Chunk | Range], previous: Written | None) -> Iterator[Chunk]:
        """Read the ranges among the chunks."""
        for chunk in chunks:
            if isinstance(chunk, Range):
                yield from self.get_range(chunk, previous or Written(0, None))
            else:
                yield chunk

    def get(self) -> Stored | None:
        with self._reporting("read"):
            try:
                info = self._filesystem.info(self._key)
            except FileNotFoundError:
                return None
            if info["type"] == "directory":
                return None
        size = int(info["size"])
        return Stored(size, _info_version(info), self._chunks(Range(0, size)))

    def get_range(self, part: Range, written: Written) -> Iterator[Chunk]:
        with self._reporting("read"):
            if _info_version(self._filesystem.info(self._key)) != written.version:
                raise overwritten(self.uri)
        return self._chunks(part)

    def _chunks(self, part: Range) -> Iterator[Chunk]:
        def fetch(piece: Range) -> list[bytes]:
            with self._reporting("read"):
                end = piece.start + piece.length
                return [bytes(self._filesystem.cat_file(self._key, start=piece.start, end=end))]

        return self._in_order(fetch, part, PART_SIZE)

    def files(self) -> Iterator[tuple[str, StoredObject]]:
        with self._reporting("list"):
            prefix = self._key + "/"
            found = sorted(self._filesystem.find(self._key))
        for key in found:
            name = str(key).removeprefix(prefix)
            # Consoles make empty objects that end in "/" to show a folder.
            if str(key).startswith(prefix) and name and not name.endswith("/"):
                yield name, type(self)(f"{self.uri}/{name}", self._settings)

    def names(self) -> list[str]:
        with self._reporting("list"):
            try:
                found = self._filesystem.ls(self._key, detail=True)
            except FileNotFoundError:
                return []
        # An object is listed as lying in itself.
        files = (item["name"].rpartition("/") for item in found if item["type"] == "file")
        return [name for folder, _, name in files if folder.strip("/") == self._key.strip("/")]

    def remove(self) -> None:
        with self._reporting("remove"), contextlib.suppress(FileNotFoundError):
            self._filesystem.rm_file(self._key)


def _filesystem_class(protocol: str) -> Any:
    """Return fsspec's own filesystem for a protocol.

    Flyte 2 registers obstore's in place of some: those only work inside an event loop, and what a failed save has sent
    replaces the object.
    """
    import fsspec
    from fsspec.registry import known_implementations

    found = fsspec.get_filesystem_class(protocol)
    if found.__module__.partition(".")[0] != "obstore":
        return found
    known = known_implementations[protocol]
    module, _, name = known["class"].rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ImportError(known["err"]) from error


def _info_version(info: Mapping[str, Any]) -> str:
    """Tell versions apart by what the filesystem knows of the object; when it was read is no part of that."""
    telling = "size etag md5 md5hash content_md5 checksum generation mtime modified updated created last_modified"
    return " ".join(f"{name}={info[name]}" for name in sorted(info) if name.lower() in telling.split())


# ---------------------------------------------------------------------------------------------------------------------
# S3
# ---------------------------------------------------------------------------------------------------------------------


class S3Object(FsspecObject):
    """An object on S3: one request when it fits into a part, multipart uploads and ranged reads otherwise."""

    @property
    def _filesystem(self) -> Any:
        from s3fs import S3FileSystem

        return S3FileSystem(**self._options, use_listings_cache=False)

    def _put(
        self, chunks: Iterator[Chunk | Range], size: Callable[[], int] | None, previous: Written | None
    ) -> Written:
        def fetched(part: Range) -> Iterator[Chunk]:
            return self.get_range(part, previous or Written(0, None))

        try:
            return self._put_divided(divide(chunks, size, fetched), previous)
        except StorageError as error:
            if previous is not None and _s3_code(error) in _CHANGED:
                raise overwritten(self.uri) from error
            raise

    def _put_divided(self, parts: Iterator[bytes | Range], previous: Written | None) -> Written:
        head = list(itertools.islice(parts, 2))
        if len(head) == 1 and isinstance(head[0], bytes):
            with self._reporting("write"):
                answer = self._call("put_object", Body=head[0])
                return Written(len(head[0]), _version(answer))
        with self._reporting("write"):
            upload = self._call("create_multipart_upload")["UploadId"]
        try:
            return self._put_parts(upload, itertools.chain(head, parts), previous)
        except BaseException:
            with contextlib.suppress(Exception):
                self._call("abort_multipart_upload", UploadId=upload)
            raise

    def _put_parts(self, upload: str, parts: Iterator[bytes | Range], previous: Written | None) -> Written:
        def send(part: tuple[int, bytes | Range]) -> tuple[int, dict[str, Any]]:
            number, body = part
            arguments = {"UploadId": upload, "PartNumber": number}
            with self._reporting("write"):
                if isinstance(body, Range):
                    return body.length, {"PartNumber": number, "ETag": self._copy_part(body, previous, arguments)}
                answer = self._call("upload_part", Body=body, **arguments)
                return len(body), {"PartNumber": number, "ETag": answer["ETag"]}

        numbered = (
            (0 if isinstance(body, Range) else len(body), (number, body)) for number, body in enumerate(parts, 1)
        )
        sent = list(in_order(send, numbered, threads=CONCURRENCY, memory=self._settings.share))
        with self._reporting("write"):
            if previous is not None and _version(self._call("head_object")) != previous.version:
                # Not every server looks at the condition under which a part is copied.
                raise overwritten(self.uri)
            answer = self._call(
                "complete_multipart_upload", UploadId=upload, MultipartUpload={"Parts": [part for _, part in sent]}
            )
            # Ceph's gateway leaves the tag out of this one answer.
            version = _version(answer) or _version(self._call("head_object"))
        return Written(sum(size for size, _ in sent), version)

    def _copy_part(self, part: Range, previous: Written | None, arguments: dict[str, Any]) -> str:
        bucket, _, key = self._key.partition("/")
        assert previous is not None
        answer = self._call(
            "upload_part_copy",
            CopySource={"Bucket": bucket, "Key": key},
            CopySourceRange=f"bytes={part.start}-{part.start + part.length - 1}",
            CopySourceIfMatch=f'"{previous.version}"',
            **arguments,
        )
        return str(answer["CopyPartResult"]["ETag"])

    def get(self) -> Stored | None:
        with self._reporting("read"):
            try:
                head, size, version = self._fetch(Range(0, PART_SIZE), None)
            except FileNotFoundError as error:
                if _s3_code(error) == "NoSuchBucket":
                    raise
                return None
            except OSError as error:
                # An empty object has no first byte.
                if _s3_code(error) not in ("InvalidRange", "416"):
                    raise
                head, size, version = [], 0, None

        def chunks() -> Iterator[Chunk]:
            yield from head
            if size > PART_SIZE:
                yield from self.get_range(Range(PART_SIZE, size - PART_SIZE), Written(size, version))

        return Stored(size, version, chunks())

    def get_range(self, part: Range, written: Written) -> Iterator[Chunk]:
        def fetch(piece: Range) -> list[bytes]:
            with self._reporting("read"):
                return self._fetch(piece, written.version)[0]

        return self._in_order(fetch, part, PART_SIZE)

    def _call(self, method: str, **arguments: Any) -> Any:
        bucket, _, key = self._key.partition("/")
        return self._filesystem.call_s3(method, Bucket=bucket, Key=key, **arguments)

    def _fetch(self, part: Range, version: str | None) -> tuple[list[bytes], int, str | None]:
        """Get a part of the object (of that version, if one is given), the object's size and its version."""
        from fsspec.asyn import sync
        from s3fs.core import _error_wrapper

        filesystem = self._filesystem
        bucket, _, key = self._key.partition("/")
        arguments = {"Range": f"bytes={part.start}-{part.start + part.length - 1}"}
        if version is not None:
            arguments["IfMatch"] = f'"{version}"'

        async def call() -> tuple[list[bytes], int, str | None]:
            answer = await filesystem._call_s3("get_object", Bucket=bucket, Key=key, **arguments)
            # As they come: nobody needs them in one piece.
            chunks: list[bytes] = []
            async with answer["Body"] as body:
                while chunk := await body.read(CHUNK_SIZE):
                    chunks.append(chunk)
            return chunks, int(answer["ContentRange"].rpartition("/")[2]), _version(answer)

        # Retries what broke while the body was read, as s3fs does for its own reads.
        answer: tuple[list[bytes], int, str | None] = sync(
            filesystem.loop, _error_wrapper, call, retries=filesystem.retries
        )
        return answer


def _version(answer: Mapping[str, Any]) -> str:
    # Servers differ in which of their answers put the tag in quotes.
    return str(answer.get("ETag", "")).strip('"')


# What S3 answers to a request for a part of an object that is another one by now, or gone.
_CHANGED = {"PreconditionFailed", "412", "NoSuchKey", "404", "InvalidRange", "416"}


def divide(
    chunks: Iterator[Chunk | Range],
    size: Callable[[], int] | None,
    fetched: Callable[[Range], Iterator[Chunk]],
) -> Iterator[bytes | Range]:
    """Divide an object into parts for a multipart upload: bytes to send, and ranges for the server to copy.

    S3 takes `MAX_PARTS` parts of at least `MIN_PART_SIZE`, the last excepted, and objects up to 5 TiB. Where `size`
    tells how large the object will be, the parts to send are equal; where it does not, they double every thousand.

    Parameters
    ----------
    chunks : iterator of bytes or Range
        The object.
    size : callable, optional
        Returns about how many bytes there will be; called once one part is full.
    fetched : callable
        Reads a range that is too small for a part of its own.
    """
    buffer = _Buffer()
    equal = None
    number = 0
    for chunk in _joined(chunks):
        if not isinstance(chunk, Range):
            pieces, copied = iter((chunk,)), None
        elif chunk.length < 2 * PART_SIZE:
            pieces, copied = fetched(chunk), None
        else:
            missing = max(0, MIN_PART_SIZE - buffer.size) if buffer.size else 0
            pieces = fetched(Range(chunk.start, missing))
            copied = Range(chunk.start + missing, chunk.length - missing)
        for piece in pieces:
            buffer.add(piece)
            # More than a part, so that the last one is never empty.
            while buffer.size > (part_size := _part_size(number, equal)):
                if size is not None and equal is None:
                    # With some room for a folder that grows while it is being saved.
                    equal = max(PART_SIZE, size() * 21 // 20 // MAX_PARTS)
                    continue
                yield buffer.take(part_size)
                number += 1
        if copied is not None:
            if buffer.size:
                yield buffer.take(buffer.size)
            count = -(-copied.length // COPY_SIZE)
            for index in range(count):
                start, end = (copied.length * edge // count for edge in (index, index + 1))
                yield Range(copied.start + start, end - start)
            number += 1 + count
    if buffer.size or not number:
        yield buffer.take(buffer.size)


def _part_size(number: int, equal: int | None) -> int:
    if equal is None:
        return PART_SIZE << number // 1000
    # Equal, unless there is so much more than was told that the parts would run out.
    return min(equal << max(0, number - MAX_PARTS * 96 // 100) // 40, MAX_PART_SIZE)


def _joined(chunks: Iterator[Chunk | Range]) -> Iterator[Chunk | Range]:
    """Make one range of those that follow each other."""
    last: Range | None = None
    for chunk in chunks:
        if last is not None and isinstance(chunk, Range) and chunk.start == last.start + last.length:
            last = Range(last.start, last.length + chunk.length)
            continue
        if last is not None:
            yield last
        last = chunk if isinstance(chunk, Range) else None
        if not isinstance(chunk, Range):
            yield chunk
    if last is not None:
        yield last


class _Buffer:
    """Chunks that wait to become a part; each byte is copied once."""

    def __init__(self) -> None:
        self._chunks: deque[memoryview] = deque()
        self.size = 0

    def add(self, chunk: Chunk) -> None:
        self._chunks.append(memoryview(chunk))
        self.size += len(chunk)

    def take(self, size: int) -> bytes:
        taken: list[memoryview] = []
        left = size
        while left:
            chunk = self._chunks.popleft()
            if len(chunk) > left:
                self._chunks.appendleft(chunk[left:])
                chunk = chunk[:left]
            taken.append(chunk)
            left -= len(chunk)
        self.size -= size
        return b"".join(taken)
