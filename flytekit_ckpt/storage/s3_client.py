"""How S3 is spoken to through s3fs: its filesystem, headers of a request, and what its answers are taken for."""

from __future__ import annotations

import base64
import contextvars
import functools
import io
from collections.abc import AsyncIterator, Mapping
from typing import Any

from flytekit_ckpt import compression
from flytekit_ckpt.storage import forks
from flytekit_ckpt.storage.objects import Anything, Metadata, Replaced

# Not with underscores: there are proxies that drop such headers.
PREFIX = "flytekit-ckpt-"


SMALL = 64 << 10
"""Bytes that are on their way before an answer could stop them."""

_PIECE = 1 << 20


async def send_request(filesystem: Any, method: str, headers: Mapping[str, str], **arguments: Any) -> Any:
    """Send a request with headers that not every botocore has a name for."""
    if headers or "Body" in arguments:
        await filesystem.set_session()
        client = await filesystem.get_s3(arguments["Bucket"])
        for event, handler in (("before-call.s3", _change_headers), ("before-send.s3", _divide_body)):
            client.meta.events.register(event, handler, unique_id=handler.__qualname__)
        _headers.set(headers)
        if "Body" in arguments and _wants_checksum(filesystem, client):
            # botocore's own takes twenty times as long, while all connections wait.
            crc = compression.crc32(arguments["Body"])
            arguments["ChecksumCRC32"] = base64.b64encode(crc.to_bytes(4, "big")).decode()
    return await filesystem._call_s3(method, **arguments)


def _wants_checksum(filesystem: Any, client: Any) -> bool:
    """Tell whether botocore would send a CRC-32 ahead of a body; not every botocore does, and users may forbid it.

    Over TLS it sends one behind the body, and needs no other hash of it then.
    """
    chosen = getattr(client.meta.config, "request_checksum_calculation", None)
    is_ahead = chosen == "when_supported" and client.meta.endpoint_url.startswith("http:")
    return is_ahead and "ChecksumAlgorithm" not in filesystem.s3_additional_kwargs


def _divide_body(request: Any, **_: Any) -> None:
    if isinstance(request.body, io.BytesIO):
        # Not its buffer, which would be a copy.
        request.body = _Pieces(memoryview(request.body.getvalue()))


class _Pieces:
    """A body that aiohttp sends as it is; of a file it makes many small copies."""

    def __init__(self, content: memoryview) -> None:
        self._content = content

    async def __aiter__(self) -> AsyncIterator[memoryview]:
        for start in range(0, len(self._content), _PIECE):
            yield self._content[start : start + _PIECE]

    def seek(self, position: int) -> None:
        """Do nothing: whoever follows a server to another one begins anew in any case."""


# Of the request that the running task sends.
_headers: contextvars.ContextVar[Mapping[str, str]] = contextvars.ContextVar("_headers", default={})  # noqa: B039


def _change_headers(params: dict[str, Any], **_: Any) -> None:
    params["headers"].update(_headers.get())
    body = params.get("body")
    if isinstance(body, io.BytesIO) and len(body.getvalue()) <= SMALL:
        # To ask first whether it may be sent takes longer than to send it.
        params["headers"].pop("Expect", None)


def condition(replaced: Replaced) -> dict[str, str]:
    """Give the headers under which a request takes the place of this and nothing else."""
    if isinstance(replaced, Anything):
        return {}
    # Not in quotes: older gateways of Ceph compare it letter by letter.
    return {"If-None-Match": "*"} if replaced is None else {"If-Match": str(replaced.version)}


@functools.cache
def filesystem_kind() -> Any:
    """Make s3fs's filesystem without retries of its own; imported when S3 is first used."""
    from s3fs import S3FileSystem

    class SingleTryFileSystem(S3FileSystem):  # type: ignore[misc]
        """Leaves it to its user to try again: retries of retries would multiply."""

        retries = 1

        @staticmethod
        def close_session(loop: Any, s3: Any) -> None:
            if not forks.is_inherited(loop):
                S3FileSystem.close_session(loop, s3)

    return SingleTryFileSystem


def version_of(answer: Mapping[str, Any]) -> str:
    """Return the entity tag in an answer."""
    # Servers differ in which of their answers put the tag in quotes.
    return str(answer.get("ETag", "")).strip('"')


def prefixed(metadata: Metadata) -> dict[str, str]:
    """Return metadata under the names that it has on S3."""
    return {PREFIX + name: value for name, value in metadata.items()}


def metadata_of(answer: Mapping[str, Any]) -> Metadata:
    """Return this package's metadata in an answer."""
    # Servers differ in the case of its names.
    found = {name.lower(): value for name, value in (answer.get("Metadata") or {}).items()}
    return {name.removeprefix(PREFIX): value for name, value in found.items() if name.startswith(PREFIX)}


# What S3 answers to a request for a part of an object that is another one by now, or gone.
CHANGED = {"PreconditionFailed", "412", "NoSuchKey", "404", "InvalidRange", "416"}

# What it answers to one whose condition does not hold, or not any more, because another one came first.
CONFLICTS = {"PreconditionFailed", "412", "ConditionalRequestConflict", "409", "NoSuchKey", "404"}
