"""Which failures are tried again, how often, and what comes of them."""

from __future__ import annotations

import errno
import ssl
import time
from typing import Any

import aiohttp
import botocore.exceptions
import fsspec.exceptions
import pytest
import s3fs.errors

from flytekit_ckpt import StorageError, storage
from flytekit_ckpt.storage import failures
from tests.conftest import Place


def answer(status: int, code: str) -> Exception:
    response = {"Error": {"Code": code, "Message": "words"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error = botocore.exceptions.ClientError(response, "PutObject")  # type: ignore[arg-type]
    return s3fs.errors.translate_boto_error(error)


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (answer(503, "SlowDown"), True),
        (answer(500, "InternalError"), True),
        (answer(429, "TooManyRequests"), True),
        (answer(400, "RequestTimeout"), True),
        (answer(400, "BadDigest"), True),
        (answer(403, "AccessDenied"), False),
        (answer(404, "NoSuchKey"), False),
        (answer(412, "PreconditionFailed"), False),
        (answer(400, "InvalidPart"), False),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (botocore.exceptions.EndpointConnectionError(endpoint_url="x"), True),
        (botocore.exceptions.ReadTimeoutError(endpoint_url="x"), True),
        (botocore.exceptions.SSLError(endpoint_url="x", error="y"), False),
        (botocore.exceptions.NoCredentialsError(), False),
        (botocore.exceptions.ParamValidationError(report="x"), False),
        (aiohttp.ClientPayloadError(), True),
        (aiohttp.ServerDisconnectedError(), True),
        (fsspec.exceptions.FSTimeoutError(), True),
        (ssl.SSLCertVerificationError(), False),
        (PermissionError(), False),
        (FileNotFoundError(), False),
        (OSError(errno.ENOSPC, "full"), False),
        (ValueError(), False),
    ],
    ids=repr,
)
def test_only_what_may_pass_is_tried_again(error: Exception, passes: bool) -> None:
    assert failures.may_pass(error) is passes
    outer = OSError("translated")
    outer.__cause__ = error
    assert failures.may_pass(outer) is passes


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Record the waits between tries, and do not wait."""
    waited: list[float] = []
    monkeypatch.setattr("tenacity.nap.time.sleep", waited.append)
    return waited


def test_tries_are_bounded_and_spread(waits: list[float]) -> None:
    tried = []

    def fail() -> None:
        tried.append(time.monotonic())
        raise ConnectionResetError

    for _ in range(20):
        tried.clear()
        with pytest.raises(ConnectionResetError):
            failures.tried_again(fail, retries=8, uri="s3://a/b")
        assert len(tried) == 9
    assert max(waits) <= failures.LONGEST_WAIT
    assert len(set(waits)) == len(waits) == 160
    # Later ones are longer.
    assert sum(waits[7::8]) > 10 * sum(waits[::8])


def test_what_cannot_pass_is_tried_once(waits: list[float]) -> None:
    tried = []

    def fail() -> None:
        tried.append(1)
        raise PermissionError

    with pytest.raises(PermissionError):
        failures.tried_again(fail, retries=8, uri="s3://a/b")
    assert len(tried) == 1
    assert not waits


def test_the_retries_are_as_many_as_the_caller_says(s3: Place, waits: list[float]) -> None:
    options = {**s3.options, "endpoint_url": "http://127.0.0.1:9"}
    for retries in (0, 3):
        waits.clear()
        item = storage.at(s3.uri(), storage.Settings(options, retries=retries))
        for call in (item.get, item.exists, item.names, item.remove, lambda item=item: item.put([b"x"])):
            waits.clear()
            with pytest.raises(StorageError, match=r"127\.0\.0\.1:9"):
                call()
            assert len(waits) == retries


def test_any_storage_is_read_again(waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    item = storage.at("memory://again/object")
    item.put([b"content"])
    for name in ("info", "cat_file", "ls", "find", "rm_file"):
        real = getattr(MemoryFileSystem, name)
        left = [ConnectionResetError(), TimeoutError()]

        def hindered(self: Any, *arguments: Any, real: Any = real, left: Any = left, **named: Any) -> Any:
            if left:
                raise left.pop()
            return real(self, *arguments, **named)

        monkeypatch.setattr(MemoryFileSystem, name, hindered)
    stored = item.get()
    assert stored is not None
    assert b"".join(stored.chunks) == b"content"
    assert storage.at("memory://again").names() == ["object"]
    assert [name for name, _ in storage.at("memory://again").files()] == ["object"]
    item.remove()
    assert item.get() is None
    assert len(waits) == 10
