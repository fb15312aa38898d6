"""The legacy face where flytekit gives no example: bad input, failures, accumulation in one object, threads."""

from __future__ import annotations

import array
import asyncio
import copy
import filecmp
import io
import os
import pickle
import random
import shutil
import tarfile
import tempfile
import threading
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fsspec.callbacks import Callback

from flytekit_ckpt import Checkpoint as AbstractCheckpoint
from flytekit_ckpt import (
    CheckpointError,
    CorruptCheckpointError,
    StorageError,
    SyncCheckpoint,
    UnsafeCheckpointError,
    storage,
    v2,
)
from tests import s3_server
from tests.conftest import Place
from tests.trees import look, make


def stored(uri: str, place: Place) -> bytes:
    """The object's bytes, read without this package."""
    if place.is_local:
        return Path(uri).read_bytes()
    import s3fs

    return bytes(s3fs.S3FileSystem(**place.options, skip_instance_cache=True, use_listings_cache=False).cat_file(uri))


def restored(uri: str) -> dict[str, tuple[object, ...]]:
    attempt = SyncCheckpoint("", uri)
    folder = attempt.restore()
    assert folder is not None
    return look(folder, modes=False)


# Bad input: the documented error, and nothing written -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda cp, _: cp.write("text"), TypeError),
        (lambda cp, _: cp.write(None), TypeError),
        (lambda cp, _: cp.write(3), TypeError),
        (lambda cp, _: cp.write([1, 2]), TypeError),
        (lambda cp, _: cp.save(3), ValueError),
        (lambda cp, _: cp.save(None), ValueError),
        (lambda cp, _: cp.save(b"bytes"), ValueError),
        (lambda cp, _: cp.save(io.StringIO("text")), TypeError),
        (lambda cp, folder: cp.save((folder / "file").open()), TypeError),
        (lambda cp, folder: cp.save((folder / "out").open("wb")), io.UnsupportedOperation),
        (lambda cp, folder: cp.save(folder / "missing"), FileNotFoundError),
        (lambda cp, folder: cp.save(str(folder / "missing" / "file")), FileNotFoundError),
        (lambda cp, folder: cp.save(folder / "dangling"), ValueError),
        (lambda cp, _: cp.save("/dev/null"), ValueError),
    ],
)
def test_bad_input_is_the_documented_error_and_leaves_what_was_saved(
    call: Callable[[SyncCheckpoint, Path], None], error: type[Exception], place: Place, tmp_path: Path
) -> None:
    folder = make(tmp_path / "source", {"file": b"x", "dangling": "nowhere"})
    uri = place.uri()
    checkpoint = SyncCheckpoint(uri)
    with pytest.raises(error):
        call(checkpoint, folder)
    assert SyncCheckpoint("", uri).restore() is None
    checkpoint.write(b"before")
    with pytest.raises(error):
        call(checkpoint, folder)
    assert SyncCheckpoint("", uri).read() == b"before"


def test_a_reader_that_breaks_leaves_what_was_saved(place: Place) -> None:
    class Broken(io.RawIOBase):
        def __init__(self) -> None:
            self.calls = 0

        def readable(self) -> bool:
            return True

        def read(self, size: int = -1) -> bytes:
            self.calls += 1
            if self.calls == 30:
                raise RuntimeError("the network of the user's own reader")
            return b"x" * size

    uri = place.uri()
    checkpoint = SyncCheckpoint(uri)
    checkpoint.write(b"before")
    with pytest.raises(RuntimeError, match="the user's own reader"):
        checkpoint.save(Broken())  # type: ignore[arg-type]
    assert SyncCheckpoint("", uri).read() == b"before"


@pytest.mark.parametrize("options", [{}, {"key": "wrong", "secret": "never to be shown"}])
def test_a_bucket_that_is_not_there_and_wrong_credentials_are_storage_errors(
    s3: Place, options: dict[str, str]
) -> None:
    if options and not s3_server.checks_credentials():
        pytest.skip("moto's server lets everybody in")
    uri = f"{s3.root}/x" if options else "s3://no-such-bucket/x"
    checkpoint = SyncCheckpoint(uri, uri, storage_options={**s3.options, **options})
    calls: list[Callable[[], object]] = [checkpoint.read, checkpoint.restore, lambda: checkpoint.write(b"x")]
    for call in calls:
        with pytest.raises(StorageError, match=uri) as caught:
            call()
        assert isinstance(caught.value, OSError)
        assert caught.value.__cause__ is not None
        assert all(secret not in str(caught.value) for secret in (*s3.options.values(), "never to be shown")[1:])


def test_a_destination_that_cannot_be_written_is_a_storage_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=f"cannot write {tmp_path}/file/checkpoint"):
        SyncCheckpoint(str(tmp_path / "file" / "checkpoint")).write(b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_restoring_to_what_is_no_folder_is_flytekits_value_error(tmp_path: Path) -> None:
    uri = str(tmp_path / "checkpoint")
    SyncCheckpoint(uri).write(b"x")
    attempt = SyncCheckpoint("", uri)
    for path in (tmp_path / "missing", uri):
        with pytest.raises(ValueError, match=r"Checkpoints can be restored to a directory only\."):
            attempt.restore(path)
    assert attempt.read() == b"x"


def test_the_abstract_class_asks_for_every_method() -> None:
    assert AbstractCheckpoint.__abstractmethods__ == {"prev_exists", "restore", "save", "read", "write"}
    assert issubclass(SyncCheckpoint, AbstractCheckpoint)


# Damaged and hostile checkpoints --------------------------------------------------------------------------------------


def archive_with(name: str, kind: bytes = tarfile.REGTYPE) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for member, type_ in (("good", tarfile.REGTYPE), (name, kind)):
            info = tarfile.TarInfo(member)
            info.type = type_
            tar.addfile(info)
    return out.getvalue()


@pytest.mark.parametrize(
    "content",
    [archive_with("../evil"), archive_with("/evil"), archive_with("a/../../evil"), archive_with("x", tarfile.FIFOTYPE)],
    ids=["dots", "absolute", "dots inside", "fifo"],
)
def test_an_unsafe_archive_is_refused_and_nothing_is_written(content: bytes, tmp_path: Path) -> None:
    source = tmp_path / "checkpoint"
    source.write_bytes(content)
    target = make(tmp_path / "outer" / "target", {"mine": b"x"})
    with pytest.raises(UnsafeCheckpointError, match=str(source)):
        SyncCheckpoint("", str(source)).restore(target)
    assert look(tmp_path / "outer", modes=False).keys() == {"target", "target/mine"}


def test_a_truncated_archive_is_an_error_that_leaves_the_users_folder_as_it_was(place: Place, tmp_path: Path) -> None:
    folder = make(tmp_path / "source", {"a": os.urandom(200_000), "b": b"x" * 100_000})
    uri = place.uri()
    SyncCheckpoint(uri).save(folder)
    content = stored(uri, place)
    target = make(tmp_path / "target", {"a": b"mine", "other": b"mine too"})
    before = look(target)
    for cut in (20, 1000, len(content) // 2, len(content) - 1):
        truncated = tmp_path / f"truncated-{cut}"
        truncated.write_bytes(content[:cut])
        attempt = SyncCheckpoint("", str(truncated))
        calls: list[Callable[[], object]] = [attempt.read, attempt.restore, lambda a=attempt: a.restore(target)]
        for call in calls:
            with pytest.raises(CorruptCheckpointError, match=str(truncated)):
                call()
        assert look(target) == before


def test_a_folder_is_merged_through_the_users_link_only_if_that_stays_inside(tmp_path: Path) -> None:
    uri = str(tmp_path / "checkpoint")
    SyncCheckpoint(uri).save(make(tmp_path / "source", {"a": b"new", "data": None, "data/b": b"new"}))
    inside = make(tmp_path / "inside", {"real": None, "real/c": b"old", "data": "real"})
    SyncCheckpoint("", uri).restore(inside)
    merged = make(tmp_path / "merged", {"a": b"new", "real": None, "real/b": b"new", "real/c": b"old", "data": "real"})
    assert look(inside, modes=False) == look(merged, modes=False)
    (tmp_path / "elsewhere").mkdir()
    outside = make(tmp_path / "outside", {"a": b"old"})
    (outside / "data").symlink_to("../elsewhere")
    with pytest.raises(StorageError, match="outside/data is in the way"):
        SyncCheckpoint("", uri).restore(outside)
    assert not list((tmp_path / "elsewhere").iterdir())
    assert (outside / "a").read_bytes() == b"old"


def test_a_conflict_with_the_users_folder_is_an_error_before_anything_is_replaced(tmp_path: Path) -> None:
    uri = str(tmp_path / "checkpoint")
    SyncCheckpoint(uri).save(make(tmp_path / "source", {"a": b"new", "b": None, "b/c": b"new"}))
    target = make(tmp_path / "target", {"a": b"old", "b": b"a file here"})
    before = look(target)
    with pytest.raises(StorageError, match="is in the way"):
        SyncCheckpoint("", uri).restore(target)
    assert look(target) == before


# Accumulation ---------------------------------------------------------------------------------------------------------


def test_parts_are_carried_over_though_their_sources_are_gone(place: Place, tmp_path: Path) -> None:
    uri = place.uri()
    checkpoint = SyncCheckpoint(uri)
    big = os.urandom(20_000_000)
    for name, content in (("model.pt", big), ("opt.pt", b"2")):
        path = make(tmp_path / name, {name: content}) / name
        checkpoint.save(path)
        path.unlink()
    folder = make(tmp_path / "logs", {"sub": None, "sub/log": b"3"})
    checkpoint.save(folder)
    shutil.rmtree(folder)
    checkpoint.write(b"4")
    checkpoint.write(b"5")
    found = restored(uri)
    assert {name: entry[1] for name, entry in found.items() if entry[0] == "file"} == {
        "model.pt": big,
        "opt.pt": b"2",
        "sub/log": b"3",
        "_dst_cp": b"5",
    }


def test_a_set_of_just_written_bytes_is_stored_as_they_are(place: Place, tmp_path: Path) -> None:
    path = make(tmp_path / "source", {"_dst_cp": b"raw"}) / "_dst_cp"
    for item in (b"raw", path, path.parent):
        uri = place.uri()
        checkpoint = SyncCheckpoint(uri)
        checkpoint.write(item) if isinstance(item, bytes) else checkpoint.save(item)
        assert stored(uri, place) == b"raw"


def test_equal_folders_give_equal_objects_whatever_order_they_are_made_in(tmp_path: Path) -> None:
    content = {"b": b"1", "a": None, "a/x": b"2", "a.txt": b"3"}
    objects = []
    for number, names in enumerate((sorted(content), ["b", "a.txt", "a", "a/x"])):
        folder = make(tmp_path / f"source-{number}", {name: content[name] for name in names})
        for path in (folder, *folder.rglob("*")):
            os.utime(path, ns=(0, 1_700_000_000_123_456_789))
        SyncCheckpoint(uri := str(tmp_path / f"checkpoint-{number}")).save(folder)
        objects.append(Path(uri).read_bytes())
    assert objects[0] == objects[1]


def test_what_another_instance_has_saved_stays(place: Place, tmp_path: Path) -> None:
    uri = place.uri()
    checkpoint = SyncCheckpoint(uri)
    checkpoint.save(make(tmp_path / "source", {"a": b"1"}))
    SyncCheckpoint(uri).write(b"of another instance")
    checkpoint.save(make(tmp_path / "later", {"b": b"2"}))
    assert {name: entry[1] for name, entry in restored(uri).items()} == {
        "a": b"1", "b": b"2", "_dst_cp": b"of another instance"
    }  # fmt: skip


def test_what_is_removed_by_somebody_is_told_once(place: Place, tmp_path: Path) -> None:
    uri = place.uri()
    checkpoint = SyncCheckpoint(uri)
    checkpoint.save(make(tmp_path / "source", {"a": b"1"}))
    storage.at(uri, place.settings).remove()
    with pytest.raises(CheckpointError, match="removed by somebody else"):
        checkpoint.write(b"2")
    checkpoint.write(b"2")
    assert SyncCheckpoint("", uri).read() == b"2"


@pytest.mark.parametrize("content", [b"plain", b"", bytes(600), archive_with("x")])
@pytest.mark.parametrize("after_a_folder", [False, True])
def test_a_reader_that_cannot_seek_is_saved_whole(
    content: bytes, after_a_folder: bool, place: Place, tmp_path: Path
) -> None:
    uri = place.uri()
    checkpoint = SyncCheckpoint(uri)
    if after_a_folder:
        checkpoint.save(make(tmp_path / "source", {"a": b"1"}))
    read_end, write_end = os.pipe()
    with open(write_end, "wb") as writer:
        writer.write(content)
    with open(read_end, "rb") as reader:
        checkpoint.save(reader)
    assert restored(uri)["_dst_cp"][1] == content


@pytest.mark.parametrize("content", [bytearray(b"abc"), memoryview(b"abc"), array.array("b", b"abc")])
def test_anything_bytes_like_is_written(content: bytes, place: Place) -> None:
    uri = place.uri()
    SyncCheckpoint(uri).write(content)
    assert SyncCheckpoint("", uri).read() == b"abc"


def test_a_folder_that_changes_while_it_is_saved_leaves_what_was_saved(place: Place, tmp_path: Path) -> None:
    folder = make(tmp_path / "source", {"a": b"1" * 1000})
    uri = place.uri()
    checkpoint = SyncCheckpoint(uri)
    checkpoint.save(folder)
    before = stored(uri, place)
    shrinking = folder / "b"
    shrinking.write_bytes(b"2" * 3_000_000)
    original = os.stat

    def stat_then_shrink(path: object, **arguments: object) -> os.stat_result:
        status = original(path, **arguments)  # type: ignore[arg-type, call-overload]
        if str(path) == str(shrinking):
            os.truncate(shrinking, 10)
        return status  # type: ignore[no-any-return]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "stat", stat_then_shrink)
        with pytest.raises(CheckpointError, match="shrank to 10 bytes"):
            checkpoint.save(folder)
    assert stored(uri, place) == before


# Local paths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SyncCheckpoint, v2.Checkpoint])
def test_a_directory_at_the_destination_stays_one(tmp_path: Path, kind: Any) -> None:
    uri = tmp_path / "__cp"
    uri.mkdir()
    assert SyncCheckpoint("", str(uri)).restore() is None
    for content in (b"x", b"y"):
        checkpoint = kind(str(uri))
        checkpoint.write(content) if kind is SyncCheckpoint else checkpoint.save_sync(content)
        assert SyncCheckpoint("", str(uri)).read() == content
    assert look(uri, modes=False).keys() == {"_flytecheckpoints"}


def test_a_temporary_directory_may_be_the_destination() -> None:
    with tempfile.TemporaryDirectory() as folder:
        SyncCheckpoint(folder).write(b"5")
        assert SyncCheckpoint("", folder).read() == b"5"


def test_files_in_the_directory_at_the_destination_are_part_of_the_checkpoint_as_in_flytekit(tmp_path: Path) -> None:
    uri = make(tmp_path / "cp", {"model.pt": b"of flytekit", "opt.pt": b"old", "sub": None, "sub/x": b"1"})
    SyncCheckpoint(str(uri)).save(make(tmp_path / "source", {"opt.pt": b"new"}) / "opt.pt")
    wanted = {"model.pt": b"of flytekit", "opt.pt": b"new", "sub/x": b"1"}
    found = {name: entry[1] for name, entry in restored(str(uri)).items() if entry[0] == "file"}
    assert found == wanted
    # And no second time: what is loose is older now than what was saved.
    SyncCheckpoint(str(uri)).write(b"5")
    found = {name: entry[1] for name, entry in restored(str(uri)).items() if entry[0] == "file"}
    assert found == {**wanted, "_dst_cp": b"5"}
    assert look(uri, modes=False).keys() >= {"model.pt", "opt.pt", "_flytecheckpoints"}


@pytest.mark.parametrize("inside", ["cp", "sub/cp", "."])
def test_a_destination_inside_the_saved_folder_is_left_out_of_it(tmp_path: Path, inside: str) -> None:
    folder = make(tmp_path / "source", {"a": os.urandom(1000), "sub": None})
    checkpoint = SyncCheckpoint(str(folder / inside))
    for _ in range(3):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            checkpoint.save(folder)
    assert "it is what the checkpoint itself is saved to" in str(caught[0].message)
    assert restored(str(folder / inside)).keys() == {"a", "sub"}
    # Of the same name elsewhere is something else.
    make(folder / "other", {"cp": b"mine", "_flytecheckpoints": b"mine"})
    with pytest.warns(RuntimeWarning, match="left out"):
        checkpoint.save(folder)
    assert {"other/cp", "other/_flytecheckpoints"} <= restored(str(folder / inside)).keys()


@pytest.mark.parametrize("form", ["file://{}", "file:{}", "{}"])
def test_every_form_of_a_local_path_is_the_same_file(form: str, tmp_path: Path) -> None:
    SyncCheckpoint(form.format(tmp_path / "new folder" / "cp")).write(b"x")
    assert SyncCheckpoint("", form.format(tmp_path / "new folder" / "cp")).read() == b"x"
    assert [path.name for path in tmp_path.iterdir()] == ["new folder"]
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["cp"]


# Temporary folders and threads ----------------------------------------------------------------------------------------


def test_a_restored_temporary_folder_lives_as_long_as_the_instance(tmp_path: Path) -> None:
    uri = str(tmp_path / "checkpoint")
    source = make(tmp_path / "source", {"a": None, "a/b": b"1"})
    (source / "a").chmod(0o500)
    SyncCheckpoint(uri).save(source)
    attempt = SyncCheckpoint("", uri)
    folder = attempt.restore()
    assert folder is not None
    assert folder.name == SyncCheckpoint.SRC_LOCAL_FOLDER
    assert attempt.restore(tmp_path) == folder
    del attempt
    assert not folder.parent.exists()


def test_a_few_bytes_take_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    uri = str(tmp_path / "checkpoint")
    SyncCheckpoint(uri).write(b"5")
    assert SyncCheckpoint("", uri).read() == b"5"


def test_saves_from_many_threads_all_end_up_in_the_object(place: Place, tmp_path: Path) -> None:
    uri = place.uri()
    checkpoint = SyncCheckpoint(uri)
    files = [make(tmp_path / str(n), {f"file-{n}": str(n).encode()}) / f"file-{n}" for n in range(8)]
    threads = [threading.Thread(target=checkpoint.save, args=(path,)) for path in files]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    attempt = SyncCheckpoint("", uri)
    folders: list[object] = []
    threads = [threading.Thread(target=lambda: folders.append(attempt.restore())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 1
    assert {name: entry[1] for name, entry in restored(uri).items()} == {f"file-{n}": str(n).encode() for n in range(8)}


# Progress -------------------------------------------------------------------------------------------------------------


class Seen(Callback):  # type: ignore[misc]
    """An fsspec callback that remembers what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        self.steps.append(inc)


@pytest.mark.parametrize("kind", ["folder", "file", "reader"])
def test_a_callback_is_told_of_every_byte(kind: str, place: Place, tmp_path: Path) -> None:
    noise = random.Random(1).randbytes(9_000_000)
    source = make(tmp_path / "source", {"a": noise, "b": b"x" * 9_000_000, "c": b"1", "link": "a"})
    uri = place.uri()
    saved = Seen()
    cp = SyncCheckpoint(uri, storage_options=place.options)
    if kind == "reader":
        with (source / "a").open("rb") as reader:
            cp.save(reader, callback=saved)
    else:
        cp.save(source if kind == "folder" else source / "a", callback=saved)
    assert saved.value == saved.size == (18_000_001 if kind == "folder" else 9_000_000)
    assert len(saved.steps) > 2
    restored = Seen()
    target = tmp_path / "target"
    target.mkdir()
    SyncCheckpoint("", uri, storage_options=place.options).restore(target, callback=restored)
    stored = storage.at(uri, place.settings).get()
    assert stored is not None
    assert restored.value == restored.size == stored.size
    assert len(restored.steps) > 2


@pytest.mark.parametrize("kind", ["folder", "file", "bytes"])
def test_the_new_face_tells_a_callback_too(kind: str, place: Place, tmp_path: Path) -> None:
    noise = random.Random(1).randbytes(9_000_000)
    source = make(tmp_path / "source", {"a": noise})
    uri = place.uri()
    saved, loaded = Seen(), Seen()

    async def save_and_load() -> None:
        data = {"folder": source, "file": source / "a", "bytes": noise}[kind]
        await v2.Checkpoint(uri, storage_options=place.options).save(data, callback=saved)
        await v2.Checkpoint("", uri, storage_options=place.options).load(callback=loaded)

    asyncio.run(save_and_load())
    assert saved.value == saved.size == len(noise)
    stored = storage.at(uri, place.settings).get()
    assert stored is not None
    assert loaded.value == loaded.size == stored.size


def test_a_callback_is_told_of_what_flytekit_left(place: Place, tmp_path: Path) -> None:
    uri = place.uri()
    for name in ("a", "b/c"):
        storage.at(f"{uri}/{name}", place.settings).put([b"1" * 1000])
    seen = Seen()
    target = tmp_path / "target"
    target.mkdir()
    SyncCheckpoint("", uri, storage_options=place.options).restore(target, callback=seen)
    assert seen.value == 2000


def test_memory_stays_within_the_budget(place: Place, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with (source / "big").open("wb") as file:
        for seed in range(20):
            file.write(random.Random(seed).randbytes(10_000_000))
    uri = place.uri()
    for budget in (16 << 20, 64 << 20):
        target = tmp_path / f"target-{budget}"
        target.mkdir()
        cp = SyncCheckpoint(uri, uri, storage_options=place.options, memory_budget=budget)
        tracemalloc.start()
        cp.save(source)
        cp.restore(target)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # On S3 a few parts are needed in any case: one fills up, one is made of it, the HTTP client copies others.
        assert peak < budget + (0 if place.is_local else 5 * storage.PART_SIZE)
        assert filecmp.cmp(source / "big", target / "big", shallow=False)
        shutil.rmtree(target)


# In another process ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SyncCheckpoint, v2.Checkpoint])
def test_a_checkpoint_may_be_sent_to_another_process(place: Place, tmp_path: Path, kind: type) -> None:
    (tmp_path / "model").write_text("weights")
    (tmp_path / "optimizer").write_text("moments")
    source, destination = place.uri(), place.uri()
    SyncCheckpoint(source).save(tmp_path / "model")
    first = kind(destination, source, storage_options=place.options)
    load = "restore" if kind is SyncCheckpoint else "load_sync"
    save = "save" if kind is SyncCheckpoint else "save_sync"
    first_folder = getattr(first, load)()
    getattr(first, save)(tmp_path / "model")

    sent = pickle.loads(pickle.dumps(first))
    folder = getattr(sent, load)()
    assert folder != first_folder
    assert (folder / "model").read_text() == "weights"
    getattr(sent, save)(tmp_path / "optimizer")
    if kind is SyncCheckpoint:
        # What was saved before is carried over there too, and here what was saved there.
        assert restored(destination).keys() == {"model", "optimizer"}
        (tmp_path / "scheduler").write_text("rate")
        first.save(tmp_path / "scheduler")
        assert restored(destination).keys() == {"model", "optimizer", "scheduler"}
    assert copy.deepcopy(first).prev_exists()
