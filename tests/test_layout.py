"""What is kept with an object, and what is made of it: damage that the bytes alone do not show."""

from __future__ import annotations

import gzip
import io
import os
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flytekit_ckpt import (
    CheckpointError,
    CorruptCheckpointError,
    SyncCheckpoint,
    UnsafeCheckpointError,
    compression,
    storage,
)
from flytekit_ckpt.storage import PART_SIZE
from flytekit_ckpt.v2 import Checkpoint
from tests.conftest import Place
from tests.trees import make

LARGE = random.Random(1).randbytes(2 * PART_SIZE + 5)


def described(place: Place, uri: str) -> dict[str, str]:
    stored = storage.at(uri, place.settings).get()
    assert stored is not None
    return {name: value for name, value in stored.metadata.items() if name in ("shape", "crc32")}


def damage(place: Place, uri: str, content: bytes) -> None:
    """Change an object's bytes, and nothing else, as a disk does."""
    item = storage.at(uri, place.settings)
    stored = item.get()
    assert stored is not None
    if place.is_local:
        before = os.stat(uri)
        Path(uri).write_bytes(content)
        os.utime(uri, ns=(before.st_atime_ns, before.st_mtime_ns))
    else:
        item.put([content], describe=lambda: stored.metadata)


def bytes_at(place: Place, uri: str) -> bytes:
    stored = storage.at(uri, place.settings).get()
    assert stored is not None
    return b"".join(stored.chunks)


def loaded(place: Place, uri: str) -> Any:
    checkpoint = Checkpoint("", uri, storage_options=place.options)
    path = checkpoint.load_sync()
    return None if path is None else path.read_bytes()


@pytest.mark.parametrize("content", [b"", b"5", b"x" * 100_000, LARGE], ids=len)
def test_a_payloads_checksum_is_kept_with_it(place: Place, tmp_path: Path, content: bytes) -> None:
    uri = place.uri()
    (tmp_path / "file").write_bytes(content)
    Checkpoint(uri, storage_options=place.options).save_sync(tmp_path / "file")
    assert described(place, uri) == {"shape": "payload", "crc32": f"{compression.crc32(content):08x}"}
    assert bytes_at(place, uri) == content
    assert loaded(place, uri) == (content or None)


def test_a_tree_is_said_to_be_one(place: Place, tmp_path: Path) -> None:
    uri = place.uri()
    SyncCheckpoint(uri, storage_options=place.options).save(make(tmp_path / "folder", {"a": b"1"}))
    assert described(place, uri) == {"shape": "tree"}


def test_a_stream_that_is_sent_before_it_ends_has_no_checksum_on_s3(place: Place) -> None:
    uri = place.uri()
    SyncCheckpoint(uri, storage_options=place.options).save(io.BufferedReader(io.BytesIO(3 * LARGE)))  # type: ignore[arg-type]
    assert ("crc32" in described(place, uri)) == place.is_local
    assert loaded(place, uri) == 3 * LARGE


@pytest.mark.parametrize("content", [b"5", b"x" * 1000, gzip.compress(b"y" * 100_000), LARGE], ids=len)
def test_a_damaged_payload_is_an_error(place: Place, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    uri = place.uri()
    Checkpoint(uri, storage_options=place.options).save_sync(tmp_path / "file")
    chosen = random.Random(len(content))
    for _ in range(10 if len(content) < PART_SIZE else 2):
        flipped = bytearray(content)
        flipped[chosen.randrange(len(content))] ^= 1 << chosen.randrange(8)
        for damaged in (bytes(flipped), content[: chosen.randrange(len(content))], content + b"\0"):
            damage(place, uri, damaged)
            with pytest.raises(CorruptCheckpointError) as caught:
                loaded(place, uri)
            assert uri in str(caught.value)
            with pytest.raises(CorruptCheckpointError):
                SyncCheckpoint("", uri, storage_options=place.options).read()
    damage(place, uri, content)
    assert loaded(place, uri) == content


@pytest.mark.parametrize("content", [b"", b"\x1f", b"garbage", bytes(1000)])
def test_what_was_a_tree_and_is_none_is_an_error(place: Place, tmp_path: Path, content: bytes) -> None:
    uri = place.uri()
    SyncCheckpoint(uri, storage_options=place.options).save(make(tmp_path / "folder", {"a": b"1"}))
    damage(place, uri, content)
    with pytest.raises(CorruptCheckpointError, match="saved as an archive"):
        loaded(place, uri)


def test_what_another_program_wrote_into_the_file_can_be_accepted(tmp_path: Path) -> None:
    path = tmp_path / "object"
    SyncCheckpoint(str(path)).write(b"ours")
    path.write_bytes(b"theirs")
    with pytest.raises(CorruptCheckpointError, match=rf"setfattr -x {storage.ATTRIBUTE} {path}"):
        SyncCheckpoint("", str(path)).read()
    os.removexattr(path, storage.ATTRIBUTE)
    assert SyncCheckpoint("", str(path)).read() == b"theirs"


@pytest.mark.parametrize("attribute", [b"", b"[]", b"{", b'{"crc32": 5}', b'{"shape": null}', b"\xff", b"[" * 40_000])
def test_an_attribute_that_says_nothing_is_passed_over(tmp_path: Path, attribute: bytes) -> None:
    path = tmp_path / "object"
    SyncCheckpoint(str(path)).write(b"5")
    try:
        os.setxattr(path, storage.ATTRIBUTE, attribute)
    except OSError:
        pytest.skip("the file system takes no attribute of this size")
    if b"crc32" in attribute:
        with pytest.raises(CorruptCheckpointError):
            SyncCheckpoint("", str(path)).read()
    else:
        assert SyncCheckpoint("", str(path)).read() == b"5"


def test_a_file_that_changes_between_checksum_and_upload_is_an_error(s3: Place, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(2 * LARGE)
    uri = s3.uri()
    SyncCheckpoint(uri, storage_options=s3.options).write(b"before")

    class Changing:
        """Changes the file again and again while it is read."""

        read = 0

        def set_size(self, size: int) -> None: ...

        def relative_update(self, inc: int = 1) -> None:
            self.read += 1
            with file.open("r+b") as opened:
                opened.seek(-1, 2)
                opened.write(b"%c" % self.read)

    with pytest.raises(CheckpointError, match="changed while it was being saved"):
        Checkpoint(uri, storage_options=s3.options).save_sync(file, callback=Changing())
    assert loaded(s3, uri) == b"before"


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.binary(max_size=40)
    | st.binary(max_size=600).map(lambda rest: b"\x1f\x8b\x08" + rest)
    | st.tuples(st.binary(max_size=2000), st.integers(0, 100), st.integers(0, 7)).map(
        lambda made: bytes(b ^ (i == made[1]) << made[2] for i, b in enumerate(gzip.compress(made[0])))
    )
)
def test_bytes_come_back_as_written_whatever_they_look_like(tmp_path: Path, content: bytes) -> None:
    uri = str(tmp_path / "object")
    SyncCheckpoint(uri).write(content)
    assert SyncCheckpoint("", uri).read() == content
    # Where nothing can be kept with them too.
    try:
        os.removexattr(uri, storage.ATTRIBUTE)
        assert SyncCheckpoint("", uri).read() == content
    except CorruptCheckpointError:
        # A gzip file that is damaged further on than its first tar header would be: it could be a damaged archive.
        with pytest.raises((OSError, EOFError)):
            gzip.decompress(content)


# Limits ---------------------------------------------------------------------------------------------------------------


def test_more_than_the_limit_is_refused_before_it_is_written(place: Place, tmp_path: Path) -> None:
    tree, payload, wrapped = place.uri(), place.uri(), place.uri()
    SyncCheckpoint(tree, storage_options=place.options).save(make(tmp_path / "s", {"a": bytes(600), "b": bytes(400)}))
    SyncCheckpoint(payload, storage_options=place.options).write(b"x" * 1000)
    SyncCheckpoint(wrapped, storage_options=place.options).write(bytes(1000))
    target = make(tmp_path / "target", {"mine": b"1"})
    for uri in (tree, payload, wrapped):
        small = {"storage_options": place.options, "restore_limit": 999}
        with pytest.raises(UnsafeCheckpointError, match=rf"{uri}.*999 bytes.*restore_limit"):
            SyncCheckpoint("", uri, **small).restore(target)
        assert os.listdir(target) == ["mine"]
        with pytest.raises(UnsafeCheckpointError):
            Checkpoint("", uri, **small).load_sync()
        if uri != tree:
            with pytest.raises(UnsafeCheckpointError):
                SyncCheckpoint("", uri, **small).read()
        enough = {"storage_options": place.options, "restore_limit": 1000}
        assert SyncCheckpoint("", uri, **enough).restore() is not None


def test_what_flytekit_1_left_is_limited_too(place: Place) -> None:
    prefix = place.uri()
    for name in ("a", "b"):
        storage.at(f"{prefix}/{name}", place.settings).put([bytes(600)])
    with pytest.raises(UnsafeCheckpointError):
        SyncCheckpoint("", prefix, storage_options=place.options, restore_limit=1000).restore()


def test_what_was_saved_is_carried_whatever_the_limit(place: Place, tmp_path: Path) -> None:
    uri = place.uri()
    checkpoint = SyncCheckpoint(uri, storage_options=place.options, restore_limit=10)
    checkpoint.write(b"x" * 100)
    checkpoint.save(make(tmp_path, {"model": b"1"}) / "model")
    target = make(tmp_path / "target", {})
    SyncCheckpoint("", uri, storage_options=place.options).restore(target)
    assert sorted(os.listdir(target)) == ["_dst_cp", "model"]


# What killed restores leave -------------------------------------------------------------------------------------------


def test_a_restore_removes_what_a_killed_one_left_and_nothing_else(tmp_path: Path) -> None:
    uri = str(tmp_path / "object")
    SyncCheckpoint(uri).write(b"5")
    folder = make(tmp_path / "folder", {".flytekit_ckpt-dead": None, ".flytekit_ckpt-dead/half": b"1", "mine": b"2"})
    (folder / ".flytekit_ckpt-file").write_bytes(b"3")
    SyncCheckpoint("", uri).restore(folder)
    assert sorted(os.listdir(folder)) == [".flytekit_ckpt-file", "_dst_cp", "mine"]


def test_two_restores_into_one_folder_do_not_disturb_each_other(tmp_path: Path) -> None:
    outer, inner = str(tmp_path / "outer"), str(tmp_path / "inner")
    SyncCheckpoint(outer).save(make(tmp_path / "a", {"a": b"1", "b": b"2"}))
    SyncCheckpoint(inner).save(make(tmp_path / "b", {"c": b"3"}))
    folder = make(tmp_path / "folder", {})

    class Between:
        """Restores the other checkpoint when this one's bytes come."""

        def set_size(self, size: int) -> None: ...

        def relative_update(self, inc: int = 1) -> None:
            SyncCheckpoint("", inner).restore(folder)

    SyncCheckpoint("", outer).restore(folder, callback=Between())
    assert sorted(os.listdir(folder)) == ["a", "b", "c"]
