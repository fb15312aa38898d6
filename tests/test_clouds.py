"""Google Cloud Storage and Azure: what a save leaves that is killed, fails or meets another; checksums; one version."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from flytekit_ckpt import CorruptCheckpointError, StorageError, SyncCheckpoint, storage
from flytekit_ckpt.pipeline import Range
from flytekit_ckpt.storage import PART_SIZE, AzureObject, GcsObject, Settings, Written, failures
from flytekit_ckpt.v2 import Checkpoint
from tests.conftest import Place, filesystem
from tests.trees import look, make

FACES = [SyncCheckpoint, Checkpoint]
SIZES = [10, 2 * PART_SIZE + 5]
NOISE = random.Random(7).randbytes(3 * PART_SIZE + 7)


@pytest.fixture(params=["gcs", "azure"])
def cloud(request: pytest.FixtureRequest) -> Place:
    place: Place = request.getfixturevalue(request.param)
    return place


def stored(place: Place, uri: str) -> tuple[bytes, dict[str, str]]:
    """An object's bytes and metadata, read without this package."""
    store = filesystem(place)
    return store.cat_file(uri), store.info(uri).get("metadata") or {}


def store(place: Place, uri: str, content: bytes, metadata: dict[str, str] | None = None) -> None:
    """Write an object without this package."""
    if uri.startswith("gs://"):
        filesystem(place).pipe_file(uri, content, metadata=metadata)
        return
    from azure.storage.blob import BlobServiceClient

    container, _, name = uri.removeprefix("abfs://").partition("/")
    with BlobServiceClient.from_connection_string(place.options["connection_string"]) as service:
        service.get_blob_client(container, name).upload_blob(content, overwrite=True, metadata=metadata)


def content(item: storage.StoredObject) -> bytes:
    found = item.get()
    assert found is not None
    return b"".join(found.chunks)


def save(face: Any, uri: str, data: Any, place: Place) -> None:
    checkpoint = face(uri, storage_options=place.options)
    if isinstance(checkpoint, Checkpoint):
        checkpoint.save_sync(data)
    elif isinstance(data, bytes):
        checkpoint.write(data)
    else:
        checkpoint.save(data)


# What is restored without a path goes with the checkpoint.
_loaded: list[Any] = []


@pytest.fixture(autouse=True)
def _loaded_until_the_end() -> Iterator[None]:
    yield
    _loaded.clear()


def load(face: Any, uri: str, place: Place) -> Any:
    checkpoint = face("", uri, storage_options=place.options)
    _loaded.append(checkpoint)
    return checkpoint.load_sync() if isinstance(checkpoint, Checkpoint) else checkpoint.restore()


def running(code: str, *arguments: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(json.dumps, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


# Kills and failures ---------------------------------------------------------------------------------------------------

SAVE = """
import json, os, sys, time
from flytekit_ckpt import storage
uri, options, parts = map(json.loads, sys.argv[1:])
def chunks():
    for _ in range(parts):
        yield os.urandom(storage.PART_SIZE)
    # Until what was given is on its way, or there.
    time.sleep(0.5)
    print("sent", flush=True)
    time.sleep(60)
storage.at(uri, storage.Settings(options)).put(chunks())
"""


@pytest.mark.parametrize("previous", [None, b"previous"])
def test_a_process_that_is_killed_while_it_saves_leaves_the_previous_object(
    cloud: Place, previous: bytes | None
) -> None:
    uri = cloud.uri()
    item = storage.at(uri, cloud.settings)
    if previous:
        item.put([previous])
    process = running(SAVE, uri, cloud.options, 4)
    assert process.stdout is not None
    assert process.stdout.readline() == "sent\n"
    process.kill()
    process.wait()
    assert (item.get() is None) if previous is None else (content(item) == previous)
    assert filesystem(cloud).find(uri) == ([] if previous is None else [uri.partition("://")[2]])
    # What it has left disturbs nobody.
    for after in (NOISE, b"after"):
        item.put([after])
        assert content(item) == after


@pytest.mark.parametrize("face", FACES)
def test_a_save_that_is_killed_at_any_moment_leaves_one_checkpoint_or_the_other(
    cloud: Place, face: Any, tmp_path: Any
) -> None:
    code = f"""
    import json, sys
    from flytekit_ckpt import SyncCheckpoint
    from flytekit_ckpt.v2 import Checkpoint
    uri, options, folder = map(json.loads, sys.argv[1:])
    checkpoint = {face.__name__}(uri, storage_options=options)
    print("begun", flush=True)
    checkpoint.{"save" if face is SyncCheckpoint else "save_sync"}(folder)
    """
    trees = [make(tmp_path / str(number), {"a": b"%d" % number, "b": os.urandom(12 << 20)}) for number in range(2)]
    uri = cloud.uri()
    save(face, uri, trees[0], cloud)
    outcomes: Counter[int] = Counter()
    for number in range(8):
        process = running(code, uri, cloud.options, str(trees[1]))
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(number * 0.1)
        process.kill()
        process.wait()
        try:
            found = look(load(face, uri, cloud))
        except StorageError as error:
            # What the killed one had sent already may come to its end just now; loaded again, it is the new one.
            if "overwritten meanwhile" not in str(error):
                raise
            found = look(load(face, uri, cloud))
        outcomes[[look(tree) for tree in trees].index(found)] += 1
        save(face, uri, trees[0], cloud)
    assert outcomes[0]


def test_a_source_that_raises_ends_the_upload(cloud: Place) -> None:
    def broken() -> Iterator[bytes]:
        yield NOISE
        raise KeyError("the source's own error")

    uri = cloud.uri()
    with pytest.raises(KeyError, match="the source's own error"):
        storage.at(uri, cloud.settings).put(broken())
    assert filesystem(cloud).find(uri) == []
    if uri.startswith("gs://"):
        methods = [method for method, path in cloud.server.requests if "upload_id=" in path]  # type: ignore[union-attr]
        assert methods[-1] == "DELETE"


# Checksums ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("face", "kind"), [(SyncCheckpoint, "bytes"), (Checkpoint, "bytes"), (Checkpoint, "file")])
def test_a_flipped_bit_in_a_payload_is_noticed(cloud: Place, face: Any, size: int, kind: str, tmp_path: Any) -> None:
    uri, data = cloud.uri(), NOISE[:size]
    path = tmp_path / "file"
    path.write_bytes(data)
    save(face, uri, data if kind == "bytes" else path, cloud)
    before, metadata = stored(cloud, uri)
    assert before == data
    assert len([name for name in metadata if name.endswith(("shape", "crc32"))]) == 2
    damaged = bytearray(before)
    damaged[size // 2] ^= 1
    store(cloud, uri, bytes(damaged), metadata)
    with pytest.raises(CorruptCheckpointError, match=uri):
        load(face, uri, cloud)


def test_the_checksum_of_a_stream_is_kept_on_azure(azure: Place) -> None:
    uri = azure.uri()
    SyncCheckpoint(uri, storage_options=azure.options).save(io.BytesIO(NOISE))
    _, metadata = stored(azure, uri)
    assert metadata["flytekit_ckpt_crc32"]


def test_an_archive_that_is_none_any_more_is_noticed(cloud: Place, tmp_path: Any) -> None:
    uri = cloud.uri()
    save(SyncCheckpoint, uri, make(tmp_path / "tree", {"a": b"1"}), cloud)
    _, metadata = stored(cloud, uri)
    store(cloud, uri, b"something else", metadata)
    with pytest.raises(CorruptCheckpointError, match="saved as an archive"):
        load(SyncCheckpoint, uri, cloud)


# Conditions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_a_write_replaces_what_it_may_and_nothing_else(cloud: Place, size: int) -> None:
    uri = cloud.uri()
    item = storage.at(uri, cloud.settings)
    with pytest.raises(storage.ConflictError):
        item.put([NOISE[:size]], replaced=Written(1, "1"))
    assert not item.exists()
    first = item.put([NOISE[:size]], replaced=None)
    with pytest.raises(storage.ConflictError):
        item.put([b"other" * size], replaced=None)
    assert content(item) == NOISE[:size]
    second = item.put([NOISE[1 : size + 1]], replaced=first)
    with pytest.raises(storage.ConflictError):
        item.put([b"other" * size], replaced=first)
    assert content(item) == NOISE[1 : size + 1]
    item.remove()
    with pytest.raises(storage.ConflictError):
        item.put([b"other" * size], replaced=second)
    assert not item.exists()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("is_there", [True, False])
def test_what_another_writes_meanwhile_is_not_replaced(cloud: Place, size: int, is_there: bool) -> None:
    uri = cloud.uri()
    item = storage.at(uri, cloud.settings)
    replaced = item.put([b"before"]) if is_there else None

    def chunks() -> Iterator[bytes]:
        yield NOISE[:size]
        storage.at(uri, cloud.settings).put([b"theirs"])

    with pytest.raises(storage.ConflictError):
        item.put(chunks(), replaced=replaced)
    assert content(item) == b"theirs"


@pytest.mark.parametrize("size", SIZES)
def test_of_several_writers_one_writes(cloud: Place, size: int) -> None:
    uri, outcomes = cloud.uri(), Counter[str]()
    item, gate = storage.at(uri, cloud.settings), threading.Barrier(6)

    def write(number: int) -> None:
        def chunks() -> Iterator[bytes]:
            yield bytes([number]) * size
            gate.wait(30)

        try:
            storage.at(uri, cloud.settings).put(chunks(), replaced=None)
        except storage.ConflictError:
            outcomes["refused"] += 1
        else:
            outcomes["written"] += 1

    threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == {"written": 1, "refused": 5}
    found = content(item)
    assert len(found) == size
    assert len(set(found)) == 1


def test_uploads_to_one_object_do_not_mix(cloud: Place) -> None:
    uri = cloud.uri()
    theirs = storage.at(uri, cloud.settings)

    def chunks() -> Iterator[bytes]:
        yield bytes(4 * PART_SIZE)
        time.sleep(0.5)
        theirs.put([b"1" * (2 * PART_SIZE + 1)])

    if uri.startswith("gs://"):
        storage.at(uri, cloud.settings).put(chunks())
        assert content(theirs) == bytes(4 * PART_SIZE)
        return
    # Azure gives up the blocks of all others when an object is replaced.
    with pytest.raises(StorageError, match="Another writer saved there meanwhile"):
        storage.at(uri, cloud.settings).put(chunks())
    assert content(theirs) == b"1" * (2 * PART_SIZE + 1)


# Lost answers ---------------------------------------------------------------------------------------------------------


class Network:
    """Loses requests, or their answers."""

    def __init__(self, patch: pytest.MonkeyPatch, place: Place) -> None:
        self.lost: list[str] = []
        self.choose: Callable[[str], str | None] = lambda _: None
        kind, name = (GcsObject, "_send") if place.root.startswith("gs://") else (None, "_answered")
        patch.setattr("tenacity.nap.time.sleep", lambda _: None)
        if kind is not None:
            send = kind._send

            async def sent(item: Any, filesystem: Any, method: str, path: str, *arguments: Any) -> Any:
                return await self.faulty(f"{method} {path}", lambda: send(item, filesystem, method, path, *arguments))

            patch.setattr(kind, name, sent)
            return
        from flytekit_ckpt.storage import azure

        answered = azure._answered

        async def asked(request: Any) -> Any:
            try:
                return await self.faulty(request.__qualname__, lambda: answered(request))
            finally:
                request.close()

        patch.setattr(azure, name, asked)

    async def faulty(self, what: str, request: Callable[[], Any]) -> Any:
        fault = self.choose(what)
        if fault is not None:
            self.lost.append(what)
        if fault == "before":
            raise ConnectionResetError
        answer = await request()
        if fault == "after":
            raise ConnectionResetError
        return answer


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("fault", ["before", "after"])
def test_every_request_may_be_lost_once(cloud: Place, size: int, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(monkeypatch, cloud)
    item = storage.at(cloud.uri(), cloud.settings)
    other = storage.at(cloud.uri(), cloud.settings)
    seen: Counter[str] = Counter()

    def once(what: str) -> str | None:
        seen[what] += 1
        return fault if seen[what] == 1 else None

    network.choose = once
    first = item.put([NOISE[:size]], replaced=None)
    seen.clear()
    second = item.put([NOISE[1 : size + 1]], replaced=first)
    found = item.get()
    assert found is not None
    assert (found.version, b"".join(found.chunks)) == (second.version, NOISE[1 : size + 1])
    seen.clear()
    item.put([NOISE[:size]])
    assert content(item) == NOISE[:size]
    assert item.files()
    assert network.lost
    network.choose = lambda _: None
    if fault == "before":
        seen.clear()
        network.choose = once
        item.copy_to(other, lambda: False, {})
        assert content(other) == NOISE[:size]


@pytest.mark.parametrize("face", FACES)
def test_requests_that_are_lost_at_random_cost_nothing(
    cloud: Place, face: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, chance = Network(monkeypatch, cloud), random.Random(11)
    network.choose = lambda _: chance.choice(["before", "after"]) if chance.random() < 0.15 else None
    tree = make(tmp_path / "tree", {"a": b"1", "sub": None, "sub/b": os.urandom(20 << 20)})
    uri = cloud.uri()
    for number in range(6):
        save(face, uri, b"%d" % number, cloud)
        found = load(face, uri, cloud)
        assert (found / "_dst_cp" if face is SyncCheckpoint else found).read_bytes() == b"%d" % number
        # What one instance saves is added to what others have saved there.
        of_tree = cloud.uri()
        save(face, of_tree, tree, cloud)
        assert look(load(face, of_tree, cloud)) == look(tree)
    assert len(network.lost) > 5


def test_a_store_that_is_never_reached_is_an_error_in_bounded_time(
    cloud: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Network(monkeypatch, cloud)
    uri = cloud.uri()
    item = storage.at(uri, Settings(cloud.options, retries=2))
    item.put([b"before"])
    network.choose = lambda _: "before"
    for call in (item.get, item.exists, item.names, item.remove, lambda: item.put([b"x"]), lambda: item.put([NOISE])):
        network.lost.clear()
        with pytest.raises(StorageError, match=uri):
            call()
        assert len(network.lost) >= 3
    network.choose = lambda _: None
    assert content(item) == b"before"


@pytest.mark.parametrize("protocol", ["gs", "abfs"])
def test_retries_are_counted_once(protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gcsfs" if protocol == "gs" else "adlfs", reason="the extra `clouds` is not installed")
    waited: list[float] = []
    monkeypatch.setattr("tenacity.nap.time.sleep", waited.append)
    nowhere = "http://127.0.0.1:9"
    options = {
        "gs": {"token": "anon", "endpoint_url": nowhere},
        "abfs": {"connection_string": f"AccountName=a;AccountKey=a2V5;BlobEndpoint={nowhere}/a"},
    }
    item = storage.at(f"{protocol}://bucket/key", Settings(options[protocol], retries=3))
    started = time.monotonic()
    for call in (item.get, item.exists, item.names, item.remove, lambda: item.put([b"x"]), lambda: item.put([NOISE])):
        waited.clear()
        with pytest.raises(StorageError, match=f"{protocol}://bucket/key.*127.0.0.1:9"):
            call()
        # Each part of an upload has its own.
        assert len(waited) >= 3
    # The clients' own retries would wait for real.
    assert time.monotonic() - started < 8


def test_no_part_is_sent_after_one_that_failed(gcs: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    send, spans = GcsObject._send, []

    async def sent(self: Any, filesystem: Any, method: str, path: str, arguments: Any, headers: Any, body: Any) -> Any:
        if method == "PUT":
            spans.append(headers["Content-Range"])
            if len(spans) == 2:
                # As long as the next one is not there to be sent.
                time.sleep(0.3)
                raise PermissionError
        return await send(self, filesystem, method, path, arguments, headers, body)

    monkeypatch.setattr(GcsObject, "_send", sent)
    item = storage.at(gcs.uri(), gcs.settings)
    with pytest.raises(StorageError):
        item.put([NOISE])
    assert len(spans) == 2
    assert not item.exists()


# Reading --------------------------------------------------------------------------------------------------------------


def test_an_object_that_is_replaced_while_it_is_read_is_an_error_and_no_mixture(cloud: Place) -> None:
    item = storage.at(cloud.uri(), cloud.settings)
    written = item.put([bytes(3 * PART_SIZE)])
    found = item.get()
    assert found is not None
    theirs = item.put([b"1" * 3 * PART_SIZE])
    with pytest.raises(StorageError, match="overwritten meanwhile"):
        b"".join(found.chunks)
    with pytest.raises(storage.ConflictError):
        b"".join(item.get_range(Range(5, 10), written))
    assert b"".join(item.get_range(Range(5, 10), theirs)) == b"1" * 10
    item.remove()
    with pytest.raises(storage.ConflictError):
        b"".join(item.get_range(Range(5, 10), theirs))


@pytest.mark.parametrize("length", SIZES)
def test_what_has_ranges_of_an_object_does_not_replace_another(cloud: Place, length: int) -> None:
    item = storage.at(cloud.uri(), cloud.settings)
    before = item.put([NOISE])

    def chunks() -> Iterator[bytes | Range]:
        yield Range(0, length)
        yield b"after"
        store(cloud, item.uri, b"theirs")

    with pytest.raises(storage.ConflictError):
        item.put(chunks(), previous=storage.Previous(item, before), replaced=before)
    assert content(item) == b"theirs"


def test_an_object_that_is_replaced_between_two_requests_is_read_again(
    gcs: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = storage.at(gcs.uri(), gcs.settings)
    item.put([b"old"], describe=lambda: {"shape": "old"})
    head, left = GcsObject._head, [b"newer", b"newest"]

    def replaced(self: GcsObject) -> Any:
        found = head(self)
        if left:
            store(gcs, item.uri, left.pop(0))
        return found

    monkeypatch.setattr(GcsObject, "_head", replaced)
    found = item.get()
    assert found is not None
    assert (b"".join(found.chunks), found.metadata) == (b"newest", {})


def test_an_answer_that_is_short_is_asked_for_again(cloud: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    item = storage.at(cloud.uri(), cloud.settings)
    item.put([NOISE])
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _: None)
    left = [1, 1]
    if cloud.root.startswith("gs://"):
        send = GcsObject._send

        async def sent(self: Any, *arguments: Any) -> Any:
            answer = await send(self, *arguments)
            if "/download/" in arguments[2] and left:
                left.pop()
                return answer._replace(content=answer.content[:-1])
            return answer

        monkeypatch.setattr(GcsObject, "_send", sent)
    else:
        from azure.storage.blob.aio import StorageStreamDownloader

        readall = StorageStreamDownloader.readall

        async def read(self: Any) -> Any:
            answer = await readall(self)
            return answer[: -left.pop()] if left else answer

        monkeypatch.setattr(StorageStreamDownloader, "readall", read)
    assert content(item) == NOISE
    assert not left


# Copies ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_the_server_copies_with_metadata_unless_something_is_there(
    cloud: Place, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    item, target = (storage.at(cloud.uri(), cloud.settings) for _ in range(2))
    item.put([NOISE[:size]], describe=lambda: {"shape": "payload", "crc32": "12345678"})
    with monkeypatch.context() as patch:
        for kind in (GcsObject, AzureObject):
            for name in ("_read", "_opened", "_send_whole", "_send_parts"):
                patch.delattr(kind, name)
                patch.setattr(kind, "__abstractmethods__", frozenset())
        copied = item.copy_to(target, lambda: False, {"carried": "yes"})
        assert copied == target.state().object
        described = {name: value for name, value in target.state().metadata.items() if name != "upload"}
        assert described == {"shape": "payload", "crc32": "12345678", "carried": "yes"}
        with pytest.raises(storage.ConflictError):
            item.copy_to(target, lambda: False, {})
        with pytest.raises(storage.GivenUpError):
            item.copy_to(storage.at(cloud.uri(), cloud.settings), lambda: True, {})
        missing = storage.at(cloud.uri(), cloud.settings)
        missing.copy_to(target, lambda: False, {})
    found = target.get()
    assert found is not None
    assert b"".join(found.chunks) == NOISE[:size]
    assert {"shape": "payload", "crc32": "12345678"}.items() <= found.metadata.items()
    assert not missing.exists()


def test_a_copy_in_several_requests_is_given_up_between_them(gcs: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    item, target = (storage.at(gcs.uri(), gcs.settings) for _ in range(2))
    item.put([b"x"])
    call, tokens = GcsObject._call, []

    def slow(self: Any, method: str, path: str, arguments: Any = None, *rest: Any, **named: Any) -> Any:
        if "/rewriteTo/" not in path or len(tokens) == 2:
            return call(self, method, path, arguments, *rest, **named)
        tokens.append(arguments.get("rewriteToken"))
        answer = {"done": False, "rewriteToken": str(len(tokens))}
        return type("", (), {"json": lambda self: answer})()

    monkeypatch.setattr(GcsObject, "_call", slow)
    answers = iter([False, True])
    with pytest.raises(storage.GivenUpError):
        item.copy_to(target, lambda: next(answers), {})
    assert not target.exists()
    tokens.clear()
    item.copy_to(target, lambda: False, {})
    assert tokens == [None, "1"]
    assert content(target) == b"x"


def test_a_copy_that_goes_on_behind_the_answer_is_awaited_or_ended(
    azure: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Azurite's copies are done when it answers."""
    item, target = (AzureObject(azure.uri(), azure.settings) for _ in range(2))
    item.put([b"x"])
    begin, properties = AzureObject._begin_copy, AzureObject._properties
    looks, ended = [0], []

    def begun(self: Any, *arguments: Any) -> Any:
        return {**begin(self, *arguments), "copy_status": "pending"}

    def looked(self: Any, *, complete: bool = True) -> Any:
        found = properties(self, complete=False)
        looks[0] += 1
        if self is target and looks[0] < 3:
            found.copy.status = "pending"
            if complete:
                raise FileNotFoundError
        return found

    monkeypatch.setattr(AzureObject, "_begin_copy", begun)
    monkeypatch.setattr(AzureObject, "_properties", looked)
    monkeypatch.setattr("flytekit_ckpt.storage.azure._BETWEEN_LOOKS", 0.01)
    item.copy_to(target, lambda: False, {})
    assert looks[0] == 3
    assert content(target) == b"x"
    target.remove()
    looks[0] = 0
    monkeypatch.setattr(AzureObject, "_end_copy", lambda self, copy: ended.append(copy["copy_status"]))
    answers = iter([False, True])
    with pytest.raises(storage.GivenUpError):
        item.copy_to(target, lambda: next(answers), {})
    assert ended == ["pending"]


def test_what_is_left_of_a_copy_that_failed_is_removed_and_one_that_is_done_stays(
    azure: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    item, target = (AzureObject(azure.uri(), azure.settings) for _ in range(2))
    item.put([b"x"])
    item.copy_to(target, lambda: False, {})
    copy = {"copy_id": target._properties().copy.id, "copy_status": "pending"}
    target._end_copy(copy)
    assert content(target) == b"x"
    properties = AzureObject._properties

    def failed(self: Any, *, complete: bool = True) -> Any:
        found = properties(self, complete=complete)
        found.copy.status = "failed"
        return found

    monkeypatch.setattr(AzureObject, "_properties", failed)
    target._end_copy({**copy, "copy_id": "another"})
    target._end_copy({**copy, "copy_status": "failed"})
    monkeypatch.undo()
    assert not target.exists()


# What lies there ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("face", FACES)
def test_checkpoints_go_and_come(cloud: Place, face: Any, tmp_path: Any) -> None:
    tree = make(tmp_path / "tree", {"a": b"1", "empty": None, "sub": None, "sub/b": os.urandom(100_000), "sub/l": "b"})
    file = tmp_path / "file"
    file.write_bytes(NOISE)
    for data in (b"\0" * 1000, NOISE, file, tree):
        uri = cloud.uri()
        assert load(face, uri, cloud) is None
        save(face, uri, data, cloud)
        for other in FACES:
            found = load(other, uri, cloud)
            if data is tree:
                assert look(found) == look(tree)
                continue
            files = [found] if found.is_file() else [path for path in found.rglob("*") if path.is_file()]
            assert [path.read_bytes() for path in files] == [NOISE if data is file else data]


def test_what_one_attempt_saves_accumulates(cloud: Place, tmp_path: Any) -> None:
    uri = cloud.uri()
    checkpoint = SyncCheckpoint(uri, storage_options=cloud.options)
    parts = {"one": os.urandom(9 << 20), "two": b"2"}
    for name, data in parts.items():
        (tmp_path / name).write_bytes(data)
        checkpoint.save(tmp_path / name)
    found = load(SyncCheckpoint, uri, cloud)
    assert {path.name: path.read_bytes() for path in found.iterdir()} == parts
    store(cloud, uri, b"another writer's")
    (tmp_path / "three").write_bytes(b"3")
    checkpoint.save(tmp_path / "three")
    found = load(SyncCheckpoint, uri, cloud)
    assert {path.name: path.read_bytes() for path in found.iterdir()} == {
        "_dst_cp": b"another writer's", "three": b"3"
    }  # fmt: skip


@pytest.mark.parametrize("face", FACES)
def test_a_part_is_loaded_and_what_has_not_changed_is_carried_over(cloud: Place, face: Any, tmp_path: Any) -> None:
    source = make(tmp_path / "source", {"large": NOISE, "small": None, "small/a": b"a"})
    first, second = cloud.uri(), cloud.uri()
    checkpoint = face(first, storage_options=cloud.options)
    save = checkpoint.save if face is SyncCheckpoint else checkpoint.save_sync
    save(source)
    (source / "small" / "a").write_bytes(b"changed")
    save(source)
    assert look(load(face, first, cloud)) == look(source)
    attempt = face(second, first, storage_options=cloud.options)
    assert [entry.name for entry in attempt.entries()] == ["large", "small", "small/a"]
    loaded = attempt.restore() if face is SyncCheckpoint else attempt.load_sync()
    part = attempt.restore(only="small") if face is SyncCheckpoint else attempt.load_sync(only="small")
    assert [path.name for path in part.iterdir()] == ["small"]
    (loaded / "small" / "a").write_bytes(b"changed again")
    (attempt.save if face is SyncCheckpoint else attempt.save_sync)(loaded)
    assert look(load(face, second, cloud)) == look(loaded)


def test_what_flytekit_1_left_below_a_prefix_is_loaded(cloud: Place) -> None:
    prefix = cloud.uri()
    left = {"model": os.urandom(100), "log/text": b"text", "log/deep/er": b"", "a b/c%20d": b"odd"}
    for name, data in left.items():
        store(cloud, f"{prefix}/{name}", data)
    store(cloud, f"{prefix}-sibling/other", b"other")
    for face in FACES:
        folder = load(face, prefix, cloud)
        found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert found == left
    assert storage.at(prefix, cloud.settings).names() == ["model"]
    payload = cloud.uri()
    store(cloud, f"{payload}/_dst_cp", b"5")
    assert SyncCheckpoint("", payload, storage_options=cloud.options).read() == b"5"


def test_long_lists_come_in_pages(cloud: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = cloud.uri()
    names = [f"ckpt-{number:02d}" for number in range(12)]
    for name in names:
        store(cloud, f"{prefix}/{name}", b"x")
    store(cloud, f"{prefix}/below/x", b"x")
    if prefix.startswith("gs://"):
        call = GcsObject._call

        def paged(self: Any, method: str, path: str, arguments: Any = None, *rest: Any, **named: Any) -> Any:
            more = {"maxResults": "5"} if path.endswith("/o") else {}
            return call(self, method, path, {**(arguments or {}), **more}, *rest, **named)

        monkeypatch.setattr(GcsObject, "_call", paged)
    else:
        limits = AzureObject._limits.fget  # type: ignore[attr-defined]
        monkeypatch.setattr(AzureObject, "_limits", property(lambda self: {**limits(self), "results_per_page": 5}))
    item = storage.at(prefix, cloud.settings)
    assert sorted(item.names()) == names
    assert [name for name, _ in item.files()] == sorted([*names, "below/x"])


def test_folders_of_a_hierarchical_namespace_are_no_objects(azure: Place) -> None:
    """Azurite has no such accounts; their folders look like this to whoever asks for objects."""
    uri = azure.uri()
    for name, is_folder in (("", True), ("/sub", True), ("/sub/file", False)):
        store(azure, uri + name, b"x" if not is_folder else b"", {"hdi_isfolder": "true"} if is_folder else None)
    item = storage.at(uri, azure.settings)
    assert item.get() is None
    assert not item.exists()
    assert [name for name, _ in item.files()] == ["sub/file"]
    assert item.names() == []


def test_an_account_that_the_uri_names_is_taken() -> None:
    pytest.importorskip("adlfs")
    uri = "abfss://container@account.dfs.core.windows.net/a/b"
    item = AzureObject(uri, Settings({"account_key": "a2V5"}))
    assert item._filesystem.account_name == "account"
    assert item._address == ("container", "a/b")
    assert AzureObject(uri, Settings({"account_name": "mine"}))._options["account_name"] == "mine"


# Failures -------------------------------------------------------------------------------------------------------------


def test_no_bucket_and_no_permission_are_errors_that_say_what_to_do_and_no_secret(cloud: Place) -> None:
    if cloud.root.startswith("gs://"):
        secret = "ya29.never-to-be-shown"
        wrong, advice = {**cloud.options, "token": secret}, "bucket does not exist"
    else:
        secret = "bmV2ZXIgdG8gYmUgc2hvd24="
        right = cloud.options["connection_string"]
        wrong = {"connection_string": right.replace(cloud.server.key, secret)}  # type: ignore[union-attr]
        advice = "container does not exist"
    elsewhere = cloud.root + "-missing/x"
    for data in (b"x", NOISE):
        for face in FACES:
            with pytest.raises(StorageError, match=advice) as error:
                save(face, elsewhere, data, cloud)
            assert elsewhere in str(error.value)
    with pytest.raises(StorageError, match=advice):
        load(SyncCheckpoint, elsewhere, cloud)
    refusing = storage.at(cloud.uri(), Settings(wrong, retries=0))
    for call in (refusing.get, refusing.exists, refusing.names, refusing.remove, lambda: refusing.put([NOISE])):
        with pytest.raises(StorageError, match="Check the credentials") as error:
            call()
        assert secret not in str(error.value)


@pytest.mark.parametrize("part", ["AccountKey", "SharedAccessSignature"])
def test_the_secrets_of_a_connection_string_are_not_shown(part: str) -> None:
    with (
        pytest.raises(StorageError) as error,
        failures.reported(
            "read", "abfs://a/b", {"connection_string": f"AccountName=name;{part}=se=1&cret==;EndpointSuffix=x"}
        ),
    ):
        raise ValueError("bad: se=1&cret==")
    assert "cret" not in str(error.value)


def test_only_what_may_pass_is_tried_again() -> None:
    exceptions = pytest.importorskip("azure.core.exceptions", reason="the extra `clouds` is not installed")
    from google.auth.exceptions import RefreshError, TransportError

    from flytekit_ckpt.storage.asynchronous import refused

    for error in (
        exceptions.ServiceRequestError("x"),
        exceptions.ServiceResponseError("x"),
        exceptions.IncompleteReadError("x"),
        TransportError("x"),
        *(refused(status, "", "") for status in (408, 429, 500, 502, 503, 504)),
    ):
        assert failures.may_pass(error), error
    unsafe = exceptions.ServiceRequestError("x")
    unsafe.__cause__ = type("ClientConnectorCertificateError", (OSError,), {})()
    for error in (
        exceptions.ResourceNotFoundError("x"),
        exceptions.ClientAuthenticationError("x"),
        RefreshError("x"),
        unsafe,
        *(refused(status, "", "") for status in (400, 401, 403, 404, 409, 412, 416)),
    ):
        assert not failures.may_pass(error), error


# Processes ------------------------------------------------------------------------------------------------------------

FORK = """
import json, os, signal, sys
from flytekit_ckpt import storage
uri, options = map(json.loads, sys.argv[1:])
item = storage.at(uri, storage.Settings(options))
item.put([b"1"])
child = os.fork()
# Neither outlives a test that waits in vain.
signal.alarm(50)
if not child:
    assert b"".join(item.get().chunks) == b"1"
    item.put([bytes(2 * storage.PART_SIZE)])
    sys.exit(3)
assert os.waitpid(child, 0)[1] == 3 << 8
found = item.get()
assert found.size == 2 * storage.PART_SIZE
assert not any(b"".join(found.chunks))
item.put([b"2"])
print("done")
"""


def test_a_fork_has_connections_of_its_own(cloud: Place) -> None:
    process = running(FORK, cloud.uri(), cloud.options)
    try:
        assert process.communicate(timeout=60)[0] == "done\n"
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)


MEMORY = """
import itertools, json, sys, tracemalloc
from flytekit_ckpt import storage
uri, options = map(json.loads, sys.argv[1:])
item = storage.at(uri, storage.Settings(options, memory=8 * storage.PART_SIZE))
item.put([b"1"])
tracemalloc.start()
chunk = bytes(1 << 20)
item.put(itertools.repeat(chunk, 160))
size = sum(map(len, item.get().chunks))
print(json.dumps([size, tracemalloc.get_traced_memory()[1]]))
"""


def test_a_large_object_takes_little_memory(cloud: Place) -> None:
    output, _ = running(MEMORY, cloud.uri(), cloud.options).communicate(timeout=120)
    size, peak = json.loads(output)
    assert size == 160 << 20
    assert peak < 80 << 20
