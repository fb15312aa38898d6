"""One object at a URI: whole or not at all, a bounded part of it in memory."""

from __future__ import annotations

import os
import random
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flytekit_ckpt import storage
from flytekit_ckpt.errors import StorageError
from flytekit_ckpt.storage import BUDGET, PART_SIZE, S3Object
from tests import s3_server
from tests.conftest import Place

NOISE = random.Random(3).randbytes(3 * PART_SIZE + 7)


@pytest.fixture(params=["local", "s3", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """The three kinds of storage: local files, S3, and anything else that fsspec reaches."""
    if request.param == "local":
        return Place(str(tmp_path / "objects"))
    if request.param == "memory":
        return Place(f"memory://{uuid.uuid4().hex}")
    return request.getfixturevalue("s3")


def pieces(content: bytes, size: int) -> Iterator[bytes]:
    return (content[start : start + size] for start in range(0, len(content), size))


def content(found: storage.Stored | None) -> bytes:
    assert found is not None
    whole = b"".join(found.chunks)
    assert len(whole) == found.size
    return whole


@pytest.mark.parametrize("size", [0, 1, PART_SIZE - 1, PART_SIZE, PART_SIZE + 1, 3 * PART_SIZE + 7])
@pytest.mark.parametrize("chunk", [1 << 16, PART_SIZE, 20 << 20])
def test_what_is_put_is_got(root: Place, size: int, chunk: int) -> None:
    item = storage.at(root.uri(), root.options)
    assert item.get() is None
    assert item.put(pieces(NOISE[:size], chunk)).size == size
    assert content(item.get()) == NOISE[:size]


def test_an_object_is_replaced_and_its_version_tells(root: Place) -> None:
    item = storage.at(root.uri(), root.options)
    versions = set()
    for size in (2 * PART_SIZE, 5, 0, 6):
        written = item.put(pieces(NOISE[:size], PART_SIZE))
        found = item.get()
        assert content(found) == NOISE[:size]
        assert found is not None
        if found.version is not None and written.version is not None:
            assert found.version == written.version
            versions.add(found.version)
    assert len(versions) in ({"memory://": [0]}.get(root.root[:9]) or [3, 4])


@pytest.mark.parametrize("parts_before", [0, 1, 3])
def test_a_failing_source_leaves_the_previous_object_and_nothing_else(root: Place, parts_before: int) -> None:
    def broken() -> Iterator[bytes]:
        yield from pieces(NOISE[: parts_before * PART_SIZE + 5], 1 << 20)
        raise KeyError("the source's own error")

    uri = root.uri()
    item = storage.at(uri, root.options)
    for previous in (None, b"previous"):
        if previous:
            item.put([previous])
        with pytest.raises(KeyError, match="the source's own error"):
            item.put(broken())
        found = item.get()
        assert (found if previous is None else content(found)) == previous
    if root.is_local and not root.root.startswith("memory"):
        assert os.listdir(root.root) == [uri.rpartition("/")[2]]
    if isinstance(item, S3Object):
        assert "Uploads" not in uploads(item)


def uploads(item: S3Object) -> dict[str, Any]:
    bucket, _, key = item._key.partition("/")
    answer: dict[str, Any] = item._filesystem.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=key)
    return answer


def test_files_below_a_prefix_are_listed_without_its_siblings(root: Place) -> None:
    uri = root.uri()
    for name in ("/b/c", "/a", "-sibling/x", "/b/d e"):
        storage.at(uri + name, root.options).put([name.encode()])
    found = {name: content(item.get()) for name, item in storage.at(uri, root.options).files()}
    assert found == {"a": b"/a", "b/c": b"/b/c", "b/d e": b"/b/d e"}
    assert list(storage.at(uri + "-nothing", root.options).files()) == []


# S3 -------------------------------------------------------------------------------------------------------------------


def requests(item: S3Object, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the S3 requests of every filesystem instance."""
    made: list[str] = []
    kind = type(item._filesystem)
    original = kind._call_s3

    async def recorded(self: Any, method: str, *arguments: Any, **named: Any) -> Any:
        made.append(method)
        return await original(self, method, *arguments, **named)

    monkeypatch.setattr(kind, "_call_s3", recorded)
    monkeypatch.setattr(
        kind, "call_s3", lambda self, *a, **k: __import__("fsspec").asyn.sync(self.loop, self._call_s3, *a, **k)
    )
    return made


def test_a_small_object_takes_one_request_each_way_and_no_thread(s3: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    item = S3Object(s3.uri(), s3.options)
    item.put([b"warm", b"up"])
    made = requests(item, monkeypatch)
    started: list[str] = []
    start = threading.Thread.start

    def recorded(thread: threading.Thread) -> None:
        started.append(thread.name)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", recorded)
    item.put([b"small"])
    assert content(item.get()) == b"small"
    assert made == ["put_object", "get_object"]
    # moto's server, in this process, starts its own.
    assert not [name for name in started if name.startswith("flytekit_ckpt")]


def test_a_missing_object_takes_one_request(s3: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    item = S3Object(s3.uri(), s3.options)
    made = requests(item, monkeypatch)
    assert item.get() is None
    assert made == ["get_object"]


def test_an_object_that_is_overwritten_while_it_is_read_is_an_error_and_no_mixture(s3: Place) -> None:
    item = S3Object(s3.uri(), s3.options)
    item.put([bytes(3 * PART_SIZE)])
    found = item.get()
    item.put([b"1" * 3 * PART_SIZE])
    with pytest.raises(StorageError, match="PreconditionFailed"):
        content(found)


def test_a_slow_store_holds_up_the_source(s3: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    original = S3Object._call
    taken = 0

    def slow(self: S3Object, method: str, **arguments: Any) -> Any:
        if method == "upload_part":
            gate.wait(20)
        return original(self, method, **arguments)

    def source() -> Iterator[bytes]:
        nonlocal taken
        for _ in range(2 * BUDGET // PART_SIZE):
            taken += PART_SIZE
            yield NOISE[:PART_SIZE]

    monkeypatch.setattr(S3Object, "_call", slow)
    item = S3Object(s3.uri(), s3.options)
    thread = threading.Thread(target=item.put, args=(source(),))
    thread.start()
    seen = -1
    while seen != taken or taken <= PART_SIZE:
        # Until the source, once it has begun, stands still.
        seen = taken
        time.sleep(0.5)
    assert taken <= BUDGET + 3 * PART_SIZE
    gate.set()
    thread.join()
    assert taken == 2 * BUDGET
    found = item.get()
    assert found is not None
    assert found.size == 2 * BUDGET


def test_a_reader_that_stops_leaves_no_thread_behind(s3: Place) -> None:
    item = S3Object(s3.uri(), s3.options)
    item.put([NOISE])
    found = item.get()
    assert found is not None
    next(found.chunks)
    next(found.chunks)
    found.chunks.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("flytekit_ckpt")]


def test_ten_thousand_parts_hold_the_largest_object_that_s3_takes() -> None:
    sizes = [PART_SIZE << number // 1000 for number in range(10_000)]
    assert sum(sizes) >= 5 << 40
    assert max(sizes) <= 5 << 30


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.binary(max_size=40)), st.integers(1, 8))
def test_parts_are_full_but_for_the_last(chunks: list[bytes], size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "PART_SIZE", size)
        parts = list(storage._parts(iter(chunks)))
    assert b"".join(parts) == b"".join(chunks)
    assert all(len(part) == size for part in parts[:-1])
    assert len(parts) == 1 or 0 < len(parts[-1]) <= size


def test_options_come_from_the_call_then_flytes_variables_then_the_sdks(
    s3: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not s3_server.checks_credentials():
        pytest.skip("moto's server lets everybody in")
    for variable in ("FLYTE_AWS_ENDPOINT", "FLYTE_AWS_ACCESS_KEY_ID", "FLYTE_AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(variable)
    endpoint, key, secret = (s3.options[name] for name in ("endpoint_url", "key", "secret"))

    def works(options: dict[str, Any] | None = None) -> bool:
        item = storage.at(f"{s3.root}/options", options)
        item._filesystem.clear_instance_cache()  # type: ignore[attr-defined]
        try:
            item.put([b"x"])
        except StorageError:
            return False
        return True

    def variables(prefix: str, key: str, secret: str) -> None:
        monkeypatch.setenv(f"{prefix}_ACCESS_KEY_ID", key)
        monkeypatch.setenv(f"{prefix}_SECRET_ACCESS_KEY", secret)

    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    variables("AWS", key, secret)
    assert works()
    variables("FLYTE_AWS", "wrong", "wrong")
    assert not works()
    assert works(dict(s3.options))
    assert not works({"endpoint_url": endpoint})
    variables("AWS", "wrong", "wrong")
    variables("FLYTE_AWS", key, secret)
    monkeypatch.setenv("FLYTE_AWS_ENDPOINT", endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert works()
    assert works({"client_kwargs": {"endpoint_url": endpoint}})
    # Half of a key pair from one place and half from another would be nobody's.
    assert not works({"key": "wrong", "secret": "wrong"})


# Local files and names ------------------------------------------------------------------------------------------------


def test_a_link_at_the_destination_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere/file")
    storage.at(str(tmp_path / "link")).put([b"x"])
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "elsewhere" / "file").read_bytes() == b"x"


def test_a_new_file_has_the_modes_that_the_user_wants(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        storage.at(str(tmp_path / "file")).put([b"x"])
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


@pytest.mark.skipif(os.geteuid() == 0, reason="root may do everything")
def test_a_folder_without_permission_is_a_storage_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="Check the credentials"):
        storage.at(str(tmp_path / "file")).put([b"x"])
    tmp_path.chmod(0o700)


def test_a_full_disk_is_a_storage_error_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no full device")
    real = os.open

    def opened(path: str, flags: int, mode: int = 0o777) -> int:
        return real("/dev/full", os.O_WRONLY) if flags & os.O_CREAT else real(path, flags, mode)

    monkeypatch.setattr(os, "open", opened)
    with pytest.raises(StorageError, match=r"No space left on device.*Make room") as caught:
        storage.at(str(tmp_path / "file")).put([b"x"])
    assert caught.value.errno == 28


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("/a/b", "/a/b"),
        ("a/b", "a/b"),
        ("file:///a/b", "/a/b"),
        ("file:/a/b", "/a/b"),
        ("local:///a/b", "/a/b"),
        ("s3://a/b", None),
        ("memory://a", None),
    ],
)
def test_local_uris_are_told_from_others(uri: str, path: str | None) -> None:
    assert storage.local_path(uri) == (None if path is None else Path(path))


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("s3://bucket/a b/c", "s3://bucket/a b/c"),
        ("ftp://user:secret@host:21/a", "ftp://host:21/a"),
        ("https://host/a?sig=secret", "https://host/a"),
        ("/a/b?c", "/a/b?c"),
    ],
)
def test_credentials_in_a_uri_are_not_shown(uri: str, shown: str) -> None:
    assert storage.public(uri) == shown
