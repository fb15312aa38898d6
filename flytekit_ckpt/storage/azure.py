"""An object on Azure Blob Storage: one request when it fits into a part, blocks and ranged reads otherwise.

Its ETag tells one object from the next: the server compares it before it writes, copies or reads.
"""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

from flytekit_ckpt.pipeline import Chunk, Range, in_order
from flytekit_ckpt.storage.asynchronous import AsyncObject, Found, refused
from flytekit_ckpt.storage.failures import ConflictError, GivenUpError, IncompleteAnswerError, s3_code
from flytekit_ckpt.storage.general import filesystem_class
from flytekit_ckpt.storage.objects import (
    CONCURRENCY,
    PART_SIZE,
    Anything,
    Metadata,
    Replaced,
    Settings,
    StoredObject,
    Written,
)
from flytekit_ckpt.storage.parts import divide
from flytekit_ckpt.storage.requested import CONNECT_TIMEOUT, PACE, UPLOAD

_BETWEEN_LOOKS = 0.5
"""Seconds after which a copy that the server makes is looked at again."""

# A folder, where the account has a hierarchical namespace.
_FOLDER = "hdi_isfolder"


class AzureObject(AsyncObject):
    """An object on Azure Blob Storage."""

    _conflicts = frozenset({"BlobAlreadyExists", "ConditionNotMet", "TargetConditionNotMet"})
    # Such names are identifiers there.
    _prefix = "flytekit_ckpt_"

    def __init__(self, uri: str, settings: Settings | None = None) -> None:
        super().__init__(uri, settings)
        host = urlsplit(uri).hostname or ""
        if found := re.match(r"(.+)\.(?:dfs|blob)\.core\.windows\.net$", host):
            self._options.setdefault("account_name", found[1])

    @property
    def _filesystem(self) -> Any:
        return filesystem_class("abfs")(**self._options, use_listings_cache=False)

    def _divided(self, chunks: Iterator[Chunk], size: Callable[[], int] | None) -> Iterator[bytes]:
        # The server takes 50,000 blocks of up to 4,000 MiB.
        parts = divide(chunks, size, lambda _: iter(()))
        return (part for part in parts if isinstance(part, bytes))

    def _send_whole(self, content: bytes, metadata: Metadata, replaced: Replaced) -> str:
        arguments = {"metadata": self._named(metadata), **_condition(replaced)}
        answer = self._call(
            lambda blob, **limits: blob.upload_blob(content, overwrite=True, **arguments, **limits), len(content)
        )
        return _version(answer["etag"])

    def _send_parts(
        self, parts: Iterator[bytes], describe: Callable[[], Metadata], token: str, replaced: Replaced
    ) -> Written:
        def send(part: tuple[int, bytes]) -> tuple[int, str]:
            number, body = part
            # No other upload has such names, nor names of another length, which the server would refuse beside them.
            name = f"{token[:24]}{number:08d}"
            with self._reporting("write"):
                self._call(lambda blob, **limits: blob.stage_block(name, body, len(body), **limits), len(body))
            return len(body), name

        numbered = ((len(body), (number, body)) for number, body in enumerate(parts))
        # Blocks that are not committed go by themselves after a week.
        sent = list(in_order(send, numbered, threads=CONCURRENCY, memory=self._settings.share))
        with self._reporting("write"):
            described = self._named({**describe(), UPLOAD: token})
            names = [name for _, name in sent]
            version = self._appeared(lambda: self._commit(names, described, replaced), token)
        return Written(sum(size for size, _ in sent), version)

    def _commit(self, names: list[str], metadata: Metadata, replaced: Replaced) -> str:
        from azure.storage.blob import BlobBlock, BlockState

        blocks = [BlobBlock(block_id=name, state=BlockState.Uncommitted) for name in names]
        arguments = {"metadata": metadata, **_condition(replaced)}
        try:
            answer = self._call(lambda blob, **limits: blob.commit_block_list(blocks, **arguments, **limits), 10 * PACE)
        except OSError as error:
            # Whoever replaces an object removes the blocks that others have sent for it.
            if s3_code(error) == "InvalidBlockList" and not isinstance(replaced, Anything):
                raise ConflictError from error
            raise
        return _version(answer["etag"])

    def copy_to(self, target: StoredObject, given_up: Callable[[], bool], mark: Metadata) -> Written | None:
        if not isinstance(target, AzureObject):
            return StoredObject.copy_to(self, target, given_up, mark)
        with self._reporting("read"):
            try:
                properties = self._properties()
            except FileNotFoundError:
                return None
        if given_up():
            raise GivenUpError
        with target._reporting("write"):
            try:
                described = self._named({**self._described(properties.metadata), **mark})
                copy = target._begin_copy(self, properties.etag, described)
            except OSError as error:
                if s3_code(error) in self._conflicts and target.exists():
                    raise ConflictError from error
                raise
            # An object that is being copied is there, and empty.
            while copy["copy_status"] == "pending":
                if given_up():
                    target._end_copy(copy)
                    raise GivenUpError
                time.sleep(_BETWEEN_LOOKS)
                found = target._properties(complete=False)
                if found.copy.id != copy["copy_id"]:
                    raise ConflictError
                copy = {**copy, "etag": found.etag, "copy_status": found.copy.status}
            if copy["copy_status"] != "success":
                target._end_copy(copy)
                message = f"the server's copy came to be {copy['copy_status']}"
                raise OSError(message)
            return Written(int(properties.size), _version(copy["etag"]))

    def _begin_copy(self, source: AzureObject, version: str, metadata: dict[str, str]) -> dict[str, Any]:
        from azure.core import MatchConditions

        arguments = {
            **_condition(None),
            "source_etag": version,
            "source_match_condition": MatchConditions.IfNotModified,
            "metadata": metadata,
        }

        async def request(filesystem: Any) -> dict[str, Any]:
            # With the signature of an account that is reached with one.
            url = source._client(filesystem).url
            blob = self._client(filesystem)
            copied: dict[str, Any] = await _answered(blob.start_copy_from_url(url, **arguments, **self._limits))
            return copied

        begun: dict[str, Any] = self._requested(request, 10 * PACE)
        return begun

    def _end_copy(self, copy: dict[str, Any]) -> None:
        """Leave nothing of a copy that has not come to its end."""
        if copy["copy_status"] == "pending":
            try:
                self._call(lambda blob, **limits: blob.abort_copy(copy["copy_id"], **limits))
            except OSError as error:
                # It has just come to its end, or another one has taken its place.
                if s3_code(error) not in ("NoPendingCopyOperation", "CopyIdMismatch"):
                    raise
        found = self._properties(complete=False)
        if found.copy.id == copy["copy_id"] and found.copy.status != "success":
            arguments = _condition(Written(0, found.etag))
            self._call(lambda blob, **limits: blob.delete_blob(**arguments, **limits))

    def _properties(self, *, complete: bool = True) -> Any:
        found = self._call(lambda blob, **limits: blob.get_blob_properties(**limits))
        if _is_folder(found) or (complete and found.copy.status == "pending"):
            raise FileNotFoundError
        return found

    def _head(self) -> Found:
        found = self._properties(complete=False)
        return Found(int(found.size), _version(found.etag), self._described(found.metadata))

    def _opened(self) -> tuple[Found, bytes]:
        try:
            content, properties = self._download(Range(0, PART_SIZE))
        except OSError as error:
            # An empty object has no first byte.
            if s3_code(error) != "InvalidRange":
                raise
            content, properties = b"", self._properties()
        if properties.copy.status == "pending":
            raise FileNotFoundError
        size = int((properties.content_range or "/0").rpartition("/")[2])
        return Found(size, _version(properties.etag), self._described(properties.metadata)), content

    def _read(self, part: Range, version: str) -> bytes:
        return self._download(part, **_condition(Written(0, version)))[0]

    def _download(self, part: Range, **condition: Any) -> tuple[bytes, Any]:
        async def download(blob: Any, **limits: Any) -> tuple[bytes, Any]:
            stream = await blob.download_blob(part.start, part.length, **condition, **limits)
            content = await stream.readall()
            whole = int(stream.properties.content_range.rpartition("/")[2])
            if len(content) != min(part.length, whole - part.start):
                message = "the answer ends early"
                raise IncompleteAnswerError(message)
            return content, stream.properties

        downloaded: tuple[bytes, Any] = self._call(download, part.length)
        return downloaded

    def _listed(self, *, deep: bool) -> Iterator[str]:
        container, key = self._address
        prefix = key and key + "/"
        token: str | None = None

        async def page(filesystem: Any) -> tuple[list[Any], str | None]:
            client = filesystem.service_client.get_container_client(container)
            arguments = {"name_starts_with": prefix, "include": ["metadata"], **self._limits}
            found = client.list_blobs(**arguments) if deep else client.walk_blobs(delimiter="/", **arguments)
            pages = found.by_page(token)

            async def items() -> list[Any]:
                async for page in pages:
                    return [item async for item in page]
                return []

            return await _answered(items()), pages.continuation_token

        while True:
            listed, token = self._requested(page, PACE)
            for item in listed:
                if hasattr(item, "size") and not _is_folder(item):
                    yield str(item.name).removeprefix(prefix)
            if not token:
                return

    def _delete(self) -> None:
        self._call(lambda blob, **limits: blob.delete_blob(**limits))

    @property
    def _limits(self) -> dict[str, Any]:
        silent = self._settings.timeout
        # What is tried again, is here.
        return {"retry_total": 0, "connection_timeout": min(silent, CONNECT_TIMEOUT), "read_timeout": silent}

    def _client(self, filesystem: Any) -> Any:
        return filesystem.service_client.get_blob_client(*self._address)

    def _call(self, function: Callable[..., Awaitable[Any]], moved: int = 0) -> Any:
        async def request(filesystem: Any) -> Any:
            return await _answered(function(self._client(filesystem), **self._limits))

        return self._requested(request, moved)


async def _answered(request: Awaitable[Any]) -> Any:
    """Wait for an answer; one that refuses becomes an exception that says so in the form of S3's."""
    from azure.core.exceptions import HttpResponseError

    try:
        return await request
    except HttpResponseError as error:
        if error.response is None or error.status_code is None:
            raise
        code = str(error.response.headers.get("x-ms-error-code") or error.status_code)
        # What follows is for those who look after the server.
        message = str(error.message or "").partition("\n")[0]
        raise refused(error.status_code, code, message) from error


def _condition(replaced: Replaced) -> dict[str, Any]:
    """Give the arguments under which a request takes the place of this and nothing else."""
    from azure.core import MatchConditions

    if isinstance(replaced, Anything):
        return {}
    if replaced is None:
        return {"match_condition": MatchConditions.IfMissing}
    version = str(replaced.version).strip('"')
    return {"etag": f'"{version}"', "match_condition": MatchConditions.IfNotModified}


def _is_folder(properties: Any) -> bool:
    found = {name.lower(): value for name, value in (properties.metadata or {}).items()}
    return str(found.get(_FOLDER, "")).lower() == "true"


def _version(etag: str) -> str:
    return etag.strip('"')
