"""One object at a URI: whole or not at all, a bounded part of it in memory."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import os
import random
import sys
import threading
import time
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.config import Config
from fsspec.asyn import sync
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flytekit_ckpt import storage
from flytekit_ckpt.errors import StorageError
from flytekit_ckpt.pipeline import Range
from flytekit_ckpt.storage import PART_SIZE, S3Object, Settings, s3_client, slots
from flytekit_ckpt.storage import parts as division
from tests import s3_server
from tests.conftest import Place

NOISE = random.Random(3).randbytes(3 * PART_SIZE + 7)


@pytest.fixture(params=["local", "s3", "gcs", "azure", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """The kinds of storage: local files, S3, Google's and Azure's, and anything else that fsspec reaches."""
    if request.param == "local":
        return Place(str(tmp_path / "objects"))
    if request.param == "memory":
        return Place(f"memory://{uuid.uuid4().hex}")
    return request.getfixturevalue(request.param)


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
    item = storage.at(root.uri(), root.settings)
    assert item.get() is None
    assert item.put(pieces(NOISE[:size], chunk)).size == size
    assert content(item.get()) == NOISE[:size]


@pytest.mark.parametrize("size", [5, 2 * PART_SIZE])
def test_what_a_put_is_to_replace_is_the_only_thing_that_it_replaces(place: Place, size: int) -> None:
    item = storage.at(place.uri(), place.settings)
    first = item.put([NOISE[:size]], replaced=None)
    with pytest.raises(storage.ConflictError):
        item.put([NOISE[1 : size + 1]], replaced=None)
    assert content(item.get()) == NOISE[:size]
    second = item.put([NOISE[2 : size + 2]], replaced=first)
    with pytest.raises(storage.ConflictError):
        item.put([NOISE[3 : size + 3]], replaced=first)
    assert content(item.get()) == NOISE[2 : size + 2]
    # What is not under a condition goes out without one, also over the same connection.
    item.put([b"anything"])
    with pytest.raises(storage.ConflictError):
        item.put([NOISE[4 : size + 4]], replaced=second)
    assert content(item.get()) == b"anything"


def test_an_object_is_replaced_and_its_version_tells(root: Place) -> None:
    item = storage.at(root.uri(), root.settings)
    versions = set()
    for size in (2 * PART_SIZE, 5, 0, 6):
        written = item.put(pieces(NOISE[:size], PART_SIZE))
        found = item.get()
        assert content(found) == NOISE[:size]
        assert found is not None
        if found.version is not None and written.version is not None:
            assert found.version == written.version
            versions.add(found.version)
    assert len(versions) in (3, 4)


@pytest.mark.parametrize("parts_before", [0, 1, 3])
def test_a_failing_source_leaves_the_previous_object_and_nothing_else(root: Place, parts_before: int) -> None:
    def broken() -> Iterator[bytes]:
        yield from pieces(NOISE[: parts_before * PART_SIZE + 5], 1 << 20)
        raise KeyError("the source's own error")

    uri = root.uri()
    item = storage.at(uri, root.settings)
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
        storage.at(uri + name, root.settings).put([name.encode()])
    found = {name: content(item.get()) for name, item in storage.at(uri, root.settings).files()}
    assert found == {"a": b"/a", "b/c": b"/b/c", "b/d e": b"/b/d e"}
    assert list(storage.at(uri + "-nothing", root.settings).files()) == []


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
    item = S3Object(s3.uri(), s3.settings)
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


def sent(item: S3Object) -> list[Any]:
    """Have every request kept as it is handed to the HTTP client."""
    item.put([b"warm", b"up"])
    kept: list[Any] = []
    item._filesystem.s3.meta.events.register("before-send.s3", lambda request, **_: kept.append(request))
    return kept


def test_a_small_object_is_sent_unasked_and_a_large_one_is_not(s3: Place) -> None:
    item = S3Object(s3.uri(), Settings({**s3.options, "client_kwargs": {"region_name": "eu-west-1"}}))
    kept = sent(item)
    for size in (s3_client.SMALL, s3_client.SMALL + 1):
        item.put([NOISE[:size]])
        assert content(item.get()) == NOISE[:size]
    small, large = (request for request in kept if request.method == "PUT")
    assert "Expect" not in small.headers
    assert large.headers["Expect"] == b"100-continue"


with_checksums = pytest.mark.skipif(
    "request_checksum_calculation" not in Config.OPTION_DEFAULTS, reason="this botocore sends none of its own accord"
)


@with_checksums
@pytest.mark.parametrize("calculation", ["when_supported", "when_required"])
def test_every_body_has_the_checksum_that_botocore_would_send(s3: Place, calculation: str) -> None:
    config = {"request_checksum_calculation": calculation}
    item = S3Object(s3.uri(), Settings({**s3.options, "config_kwargs": config}))
    kept = sent(item)
    item.put([b"small"])
    item.put(pieces(NOISE, 1 << 20))
    assert content(item.get()) == NOISE
    bodies = [b"small", *pieces(NOISE, PART_SIZE)]
    expected = sorted(base64.b64encode(zlib.crc32(body).to_bytes(4, "big")) for body in bodies)
    told = [request.headers.get("x-amz-checksum-crc32") for request in kept if request.method == "PUT"]
    assert sorted(filter(None, told)) == (expected if calculation == "when_supported" else [])
    assert len(told) == len(bodies)


@pytest.mark.parametrize("endpoint", ["http://10.0.0.1:9000", "https://s3.amazonaws.com"])
def test_over_tls_the_checksum_is_left_to_botocore(endpoint: str) -> None:
    config = SimpleNamespace(request_checksum_calculation="when_supported")
    client = SimpleNamespace(meta=SimpleNamespace(config=config, endpoint_url=endpoint))
    filesystem = SimpleNamespace(s3_additional_kwargs={})
    assert s3_client._wants_checksum(filesystem, client) is endpoint.startswith("http:")


@with_checksums
def test_another_checksum_that_the_user_wants_is_sent_alone(s3: Place) -> None:
    wanted = {"ChecksumAlgorithm": "SHA256"}
    item = S3Object(s3.uri(), Settings({**s3.options, "s3_additional_kwargs": wanted}))
    kept = sent(item)
    item.put(pieces(NOISE, 1 << 20))
    told = [{name.lower() for name in request.headers if "checksum-" in name.lower()} for request in kept]
    assert {"x-amz-checksum-sha256", "x-amz-sdk-checksum-algorithm"} in told
    assert not any("x-amz-checksum-crc32" in names for names in told)


def test_a_body_is_sent_again_when_the_server_sends_it_elsewhere(s3: Place) -> None:
    item = S3Object(s3.uri(), Settings({**s3.options, "client_kwargs": {"region_name": "eu-west-2"}}))
    kept = sent(item)
    item.put([NOISE[:PART_SIZE]])
    # As botocore does, before it follows.
    kept[-1].reset_stream()
    assert b"".join(asyncio.run(received(kept[-1].body))) == NOISE[:PART_SIZE]


async def received(body: Any) -> list[bytes]:
    return [bytes(piece) async for piece in body]


def test_conditions_reach_a_bucket_in_another_region(s3: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    regional: list[Any] = []

    async def get_s3(filesystem: Any, bucket: str | None = None) -> Any:
        """Give another client than the filesystem's own, as s3fs does with `cache_regions`."""
        if not regional:
            options = {"aws_access_key_id": s3.options["key"], "aws_secret_access_key": s3.options["secret"]}
            made = filesystem.session.create_client("s3", endpoint_url=s3.options["endpoint_url"], **options)
            regional.append(await made.__aenter__())
        return regional[0]

    monkeypatch.setattr(s3_client.filesystem_kind(), "get_s3", get_s3)
    item = S3Object(s3.uri(), Settings({**s3.options, "client_kwargs": {"region_name": "eu-west-3"}}))
    item.put([b"theirs"], replaced=None)
    with pytest.raises(storage.ConflictError):
        item.put([b"ours"], replaced=None)
    assert content(item.get()) == b"theirs"
    sync(item._filesystem.loop, regional[0].close)


def test_a_missing_object_takes_one_request(s3: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    item = S3Object(s3.uri(), s3.settings)
    made = requests(item, monkeypatch)
    assert item.get() is None
    assert made == ["get_object"]


def test_an_object_that_is_overwritten_while_it_is_read_is_an_error_and_no_mixture(s3: Place) -> None:
    item = S3Object(s3.uri(), s3.settings)
    item.put([bytes(3 * PART_SIZE)])
    found = item.get()
    item.put([b"1" * 3 * PART_SIZE])
    with pytest.raises(StorageError, match="PreconditionFailed"):
        content(found)


def test_a_large_object_is_asked_for_in_ranges_a_few_ahead_of_the_reader(
    s3: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = S3Object(s3.uri(), Settings(s3.options, memory=16 * PART_SIZE))
    long = NOISE * 4
    item.put([long])
    asked: list[Range] = []
    original = S3Object._fetch

    def recorded(self: S3Object, part: Range, version: str | None) -> Any:
        asked.append(part)
        return original(self, part, version)

    monkeypatch.setattr(S3Object, "_fetch", recorded)
    found = item.get()
    assert found is not None
    assert asked == [Range(0, PART_SIZE)]
    got = 0
    while got <= PART_SIZE:
        got += len(next(found.chunks))
    time.sleep(0.5)
    # A quarter of the memory.
    assert len(asked) <= 1 + 4
    for chunk in found.chunks:
        got += len(chunk)
    assert got == len(long)
    ranges = sorted(asked, key=lambda part: part.start)
    assert [part.start for part in ranges] == list(range(0, len(long), PART_SIZE))
    assert all(part.length == PART_SIZE for part in ranges[:-1])
    assert ranges[-1].start + ranges[-1].length == len(long)


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
        for _ in range(16):
            taken += PART_SIZE
            yield NOISE[:PART_SIZE]

    monkeypatch.setattr(S3Object, "_call", slow)
    item = S3Object(s3.uri(), Settings(s3.options, memory=16 * PART_SIZE))
    thread = threading.Thread(target=item.put, args=(source(),))
    thread.start()
    seen = -1
    while seen != taken or taken <= PART_SIZE:
        # Until the source, once it has begun, stands still.
        seen = taken
        time.sleep(0.5)
    # A quarter of the memory on its way, one part that waits, one that fills up and one that was taken to see it full.
    assert taken <= (4 + 3) * PART_SIZE
    gate.set()
    thread.join()
    assert taken == 16 * PART_SIZE
    found = item.get()
    assert found is not None
    assert found.size == 16 * PART_SIZE


def test_a_reader_that_stops_leaves_no_thread_behind(s3: Place) -> None:
    item = S3Object(s3.uri(), s3.settings)
    item.put([NOISE])
    found = item.get()
    assert found is not None
    next(found.chunks)
    next(found.chunks)
    found.chunks.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("flytekit_ckpt")]


def sizes_of_parts(chunk: int, count: int, known: int | None) -> list[int]:
    """Divide an object into parts without making one."""
    sizes: list[int] = []

    class Buffer:
        size = 0

        def add(self, piece: range) -> None:
            self.size += len(piece)

        def take(self, size: int) -> bytes:
            self.size -= size
            sizes.append(size)
            return b""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(division, "_Buffer", Buffer)
        chunks: Any = itertools.repeat(range(chunk), count)
        for _ in division.divide(chunks, None if known is None else lambda: known, lambda _: iter(())):
            pass
    return sizes


def test_ten_thousand_parts_hold_the_largest_object_that_s3_takes() -> None:
    chunk = 16 << 20
    count = (5 << 40) // chunk
    for known in (None, 5 << 40, (5 << 40) * 100 // 104, (5 << 40) * 100 // 120):
        sizes = sizes_of_parts(chunk, count, known)
        assert sum(sizes) == 5 << 40
        assert len(sizes) <= division.MAX_PARTS
        assert max(sizes) <= division.MAX_PART_SIZE
        if known is not None and known * 104 // 100 > 5 << 40:
            assert len(set(sizes[:-1])) == 1


def test_parts_grow_only_when_they_must() -> None:
    assert set(sizes_of_parts(1 << 20, 100, 100 << 20)[:-1]) == {PART_SIZE}
    asked = []
    list(division.divide(iter([bytes(PART_SIZE)]), lambda: asked.append(1) or 0, lambda _: iter(())))
    assert not asked


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.binary(max_size=40)), st.integers(1, 8))
def test_parts_are_full_but_for_the_last(chunks: list[bytes], size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(division, "PART_SIZE", size)
        parts = list(division.divide(iter(chunks), None, lambda _: iter(())))
    assert b"".join(parts) == b"".join(chunks)  # type: ignore[arg-type]
    assert all(len(part) == size for part in parts[:-1])  # type: ignore[arg-type]
    assert len(parts) == 1 or 0 < len(parts[-1]) <= size  # type: ignore[arg-type]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(0, 30).map(bytes) | st.builds(Range, st.integers(0, 100), st.integers(1, 60)), max_size=8),
    st.booleans(),
)
def test_parts_with_ranges_among_them_are_what_s3_takes(chunks: list[bytes | Range], is_size_known: bool) -> None:
    old = random.Random(5).randbytes(200)

    def resolved(part: Any) -> bytes:
        return old[part.start : part.start + part.length] if isinstance(part, Range) else part

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("PART_SIZE", 8), ("MIN_PART_SIZE", 5), ("COPY_SIZE", 25)):
            patch.setattr(division, name, value)
        parts = list(
            division.divide(iter(chunks), (lambda: 100) if is_size_known else None, lambda r: iter([resolved(r)]))
        )
    assert b"".join(map(resolved, parts)) == b"".join(map(resolved, chunks))
    assert all(len(resolved(part)) >= 5 for part in parts[:-1])
    assert all(8 <= part.length <= 25 for part in parts if isinstance(part, Range))
    # What lies in ranges of two parts and more is not fetched, but for the bytes that a part before one lacks.
    ranges = list(division._joined(iter(chunks)))
    large = sum(r.length for r in ranges if isinstance(r, Range) and r.length >= 16)
    assert sum(part.length for part in parts if isinstance(part, Range)) >= large - 5 * len(ranges)


@pytest.mark.parametrize("length", [16, 40, 20_000])
def test_very_many_ranges_take_no_more_parts_than_s3_takes(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An object of whose files every other one has changed, at a small fraction of S3's sizes."""
    for name, value in (
        ("PART_SIZE", 8),
        ("MIN_PART_SIZE", 5),
        ("COPY_SIZE", 256),
        ("MAX_PARTS", 400),
        ("MAX_PART_SIZE", 5 << 10),
    ):
        monkeypatch.setattr(division, name, value)
    # S3 takes 5 << 20 of these bytes, a tenth of what so many of the largest parts would hold.
    count = (200 << 10) // (length + 9)
    chunks = itertools.chain.from_iterable((Range(2 * number * length, length), b"x" * 9) for number in range(count))
    total = count * (length + 9)
    parts = list(division.divide(chunks, lambda: total, lambda part: iter([bytes(part.length)])))
    sizes = [part.length if isinstance(part, Range) else len(part) for part in parts]
    assert sum(sizes) == total
    assert len(parts) <= 400
    assert max(sizes) <= 5 << 10
    assert min(sizes[:-1]) >= 5


def test_the_largest_object_is_copied_in_as_many_parts_as_s3_takes() -> None:
    ranges = division.copied_ranges(Range(0, 5 << 40))
    assert sum(part.length for part in ranges) == 5 << 40
    assert len(ranges) <= division.MAX_PARTS
    assert max(part.length for part in ranges) <= division.MAX_PART_SIZE


def test_ranges_that_follow_each_other_become_one() -> None:
    chunks: list[bytes | Range] = [Range(0, 5), Range(5, 2), Range(8, 1), b"a", Range(9, 3), Range(12, 1)]
    assert list(division._joined(iter(chunks))) == [Range(0, 7), Range(8, 1), b"a", Range(9, 4)]


def test_ranges_are_taken_from_the_object_before(root: Place) -> None:
    item = storage.at(root.uri(), root.settings)
    written = item.put([NOISE])
    size = 2 * PART_SIZE + 10
    new: list[bytes | Range] = [
        b"head",
        Range(3, size),
        Range(3 + size, 5),
        b"middle",
        Range(1, 2),
        Range(9, 0),
        b"end",
    ]
    again = item.put(new, previous=storage.Previous(item, written))
    wanted = b"head" + NOISE[3 : size + 8] + b"middle" + NOISE[1:3] + b"end"
    assert again.size == len(wanted)
    assert content(item.get()) == wanted
    assert b"".join(item.get_range(Range(4, 6), again)) == wanted[4:10]


def test_large_ranges_are_copied_by_the_server(s3: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    item = S3Object(s3.uri(), s3.settings)
    written = item.put([NOISE])
    made = requests(item, monkeypatch)
    item.put([b"head", Range(0, len(NOISE))], previous=storage.Previous(item, written))
    # The bytes that the first part lacks are the only ones fetched.
    assert sorted(set(made) - {"head_object"}) == [
        "complete_multipart_upload",
        "create_multipart_upload",
        "get_object",
        "upload_part",
        "upload_part_copy",
    ]
    assert made.count("get_object") == made.count("upload_part_copy") == 1


@pytest.mark.parametrize("head", [[b"head"], []])
@pytest.mark.parametrize("length", [10, 3 * PART_SIZE])
def test_ranges_of_an_object_that_someone_replaced_are_an_error(
    root: Place, length: int, head: list[bytes | Range]
) -> None:
    item = storage.at(root.uri(), root.settings)
    written = item.put([NOISE])
    theirs = NOISE[::-1]
    storage.at(item.uri, root.settings).put([theirs])
    with pytest.raises(storage.ConflictError):
        item.put([*head, Range(0, length)], previous=storage.Previous(item, written), replaced=written)
    assert content(item.get()) == theirs
    with pytest.raises(storage.ConflictError):
        b"".join(item.get_range(Range(0, 10), written))


def test_options_come_from_the_call_then_flytes_variables_then_the_sdks(
    s3: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not s3_server.checks_credentials():
        pytest.skip("moto's server lets everybody in")
    for variable in ("FLYTE_AWS_ENDPOINT", "FLYTE_AWS_ACCESS_KEY_ID", "FLYTE_AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(variable)
    endpoint, key, secret = (s3.options[name] for name in ("endpoint_url", "key", "secret"))

    def works(options: dict[str, Any] | None = None) -> bool:
        item = storage.at(f"{s3.root}/options", Settings(options or {}))
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


@pytest.mark.parametrize(
    ("protocol", "package", "options"),
    [("gs", "gcsfs", {"token": "anon"}), ("abfs", "adlfs", {"account_name": "a", "account_key": "a2V5"})],
)
def test_where_flyte_registers_a_filesystem_fsspecs_own_is_asked_for(
    protocol: str, package: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("flyte.storage")
    item = storage.at(f"{protocol}://bucket/key", Settings(options))
    with monkeypatch.context() as patch:
        for name in (package, f"{package}.core"):
            patch.setitem(sys.modules, name, None)
        with pytest.raises(StorageError, match=f"{protocol}://bucket/key.*{package}.*reaches this kind of storage"):
            item.get()
    pytest.importorskip(package, reason="the extra `clouds` is not installed")
    assert type(item._filesystem).__module__.partition(".")[0] == package  # type: ignore[attr-defined]


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
    full = os.open("/dev/full", os.O_WRONLY)
    monkeypatch.setattr(slots, "temporary", lambda path: contextlib.nullcontext((full, path)))
    with pytest.raises(StorageError, match=r"No space left on device.*Make room") as caught:
        storage.at(str(tmp_path / "file")).put([b"x"])
    os.close(full)
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
