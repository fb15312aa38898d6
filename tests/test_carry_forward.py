"""The previous attempt's checkpoint at this attempt's destination, before this attempt has saved anything."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flytekit_ckpt import StorageError, SyncCheckpoint, layout, runner, storage
from flytekit_ckpt.storage import local, parts, s3_client
from flytekit_ckpt.v2 import Checkpoint
from tests.conftest import Place, Task
from tests.test_storage import requests
from tests.trees import look, make

FACES = [SyncCheckpoint, Checkpoint]


@pytest.fixture(params=["local", "s3", "gcs", "azure", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "memory":
        return Place(f"memory://{uuid.uuid4().hex}")
    return Place(str(tmp_path / "checkpoints")) if request.param == "local" else request.getfixturevalue(request.param)


def load(checkpoint: Any) -> Any:
    return checkpoint.restore() if isinstance(checkpoint, SyncCheckpoint) else checkpoint.load_sync()


def save(checkpoint: Any, data: Any) -> None:
    if isinstance(checkpoint, Checkpoint):
        checkpoint.save_sync(data)
    elif isinstance(data, bytes):
        checkpoint.write(data)
    else:
        checkpoint.save(data)


def carried(checkpoint: Any) -> None:
    """Wait until what was begun has come to its end."""
    if (copying := checkpoint._resumption.carry_forward._copying) is not None:
        copying.result()


def attempt(kind: Any, place: Place, source: str | None, **options: Any) -> tuple[str, Any]:
    uri = place.uri()
    return uri, kind(uri, source, storage_options=place.options, **options)


@pytest.fixture(params=["bytes", "folder", "large"])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "folder":
        return make(tmp_path / "data", {"a": b"1", "sub": None, "sub/b": b"2" * 10_000, "sub/l": "b"})
    return os.urandom(20 << 20) if request.param == "large" else b"5"


@pytest.mark.parametrize("kind", FACES)
def test_attempts_that_load_and_die_hand_on_what_they_loaded(place: Place, kind: Any, data: Any) -> None:
    source, first = attempt(kind, place, None)
    save(first, data)
    for number in range(3):
        source, checkpoint = attempt(FACES[number % 2], place, source)
        assert load(checkpoint) is not None
        carried(checkpoint)
    _, last = attempt(Checkpoint, place, source)
    found = last.load_sync()
    if isinstance(data, bytes):
        assert found.read_bytes() == data
    else:
        assert look(found) == look(data)


def test_reading_bytes_counts_as_loading(place: Place) -> None:
    source, first = attempt(SyncCheckpoint, place, None)
    first.write(b"5")
    again, second = attempt(SyncCheckpoint, place, source)
    second.read()
    carried(second)
    assert attempt(SyncCheckpoint, place, again)[1].read() == b"5"


def test_what_flytekit_1_left_is_carried_as_one_object(place: Place) -> None:
    prefix = place.uri()
    for name in ("model", "log/text"):
        storage.at(f"{prefix}/{name}", place.settings).put([name.encode()])
    uri, checkpoint = attempt(SyncCheckpoint, place, prefix)
    restored = checkpoint.restore()
    carried(checkpoint)
    assert storage.at(uri, place.settings).exists()
    assert look(attempt(Checkpoint, place, uri)[1].load_sync(), modes=False) == look(restored, modes=False)


def test_nothing_is_carried_where_nothing_is_there_wanted_or_free(place: Place) -> None:
    source, first = attempt(SyncCheckpoint, place, None)
    first.write(b"5")
    unwanted, checkpoint = attempt(SyncCheckpoint, place, source, carry_forward=False)
    checkpoint.read()
    carried(checkpoint)
    assert layout.get(unwanted, place.settings) is None
    missing, checkpoint = attempt(SyncCheckpoint, place, place.uri())
    assert checkpoint.read() is None
    assert layout.get(missing, place.settings) is None
    taken, other = attempt(SyncCheckpoint, place, None)
    other.write(b"newer")
    checkpoint = SyncCheckpoint(taken, source, storage_options=place.options)
    checkpoint.read()
    carried(checkpoint)
    assert attempt(SyncCheckpoint, place, taken)[1].read() == b"newer"


def test_a_local_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    SyncCheckpoint(str(tmp_path / "first")).write(b"5")
    folder = make(tmp_path / "second", {"flytekit's": b"own"})
    checkpoint = SyncCheckpoint(str(folder), str(tmp_path / "first"))
    checkpoint.read()
    carried(checkpoint)
    assert list(folder.iterdir()) == [folder / "flytekit's"]


@pytest.mark.parametrize("kind", FACES)
def test_a_save_waits_for_it_and_stays(place: Place, kind: Any) -> None:
    source, first = attempt(kind, place, None)
    save(first, os.urandom(100_000))
    for number in range(20):
        uri, checkpoint = attempt(kind, place, source)
        load(checkpoint)
        time.sleep(number * 0.0005)
        save(checkpoint, b"%d" % number)
        carried(checkpoint)
        assert attempt(SyncCheckpoint, place, uri)[1].read() == b"%d" % number


@pytest.mark.parametrize("kind", FACES)
def test_a_save_by_another_instance_waits_for_it_and_stays(place: Place, kind: Any) -> None:
    """A task may ask for both faces of its attempt, and each carries what it has loaded."""
    source, first = attempt(kind, place, None)
    save(first, os.urandom(100_000))
    for number in range(20):
        uri, checkpoint = attempt(kind, place, source)
        others = [face(uri, source, storage_options=place.options) for face in FACES]
        for loading in (checkpoint, *others):
            load(loading)
        time.sleep(number * 0.0005)
        save(others[number % 2], b"%d" % number)
        for loading in (checkpoint, *others):
            carried(loading)
        assert attempt(SyncCheckpoint, place, uri)[1].read() == b"%d" % number


def test_instances_may_be_made_while_another_saves_to_the_same_destination(tmp_path: Path) -> None:
    uri = str(tmp_path / "checkpoint")
    made, is_over = [SyncCheckpoint(uri) for _ in range(2000)], threading.Event()
    saving = made[0]

    def make_instances() -> None:
        while not is_over.is_set():
            made.append(SyncCheckpoint(uri))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=make_instances)
    thread.start()
    try:
        for _ in range(20):
            with saving._resumption.carry_forward.paused():
                pass
    finally:
        is_over.set()
        thread.join()
        sys.setswitchinterval(interval)


def test_a_save_by_another_instance_gives_it_up_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, destination = tmp_path / "first", tmp_path / "second"
    SyncCheckpoint(str(source)).write(b"5")
    begun = held(monkeypatch)
    loading, saving = SyncCheckpoint(str(destination), str(source)), Checkpoint(f"file://{destination}", str(source))
    loading.read()
    assert begun.wait(10)
    saving.save_sync(b"6")
    copying = loading._resumption.carry_forward._copying
    assert copying is not None
    assert copying.done()
    assert SyncCheckpoint("", str(destination)).read() == b"6"


@pytest.mark.parametrize("size", [10, 20 << 20])
def test_what_another_process_saves_meanwhile_stays(
    place: Place, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "COPY_SIZE", 6 << 20)
    loose, (source, first) = place.uri(), attempt(SyncCheckpoint, place, None)
    first.write(os.urandom(size))
    for name in ("model", "log/text"):
        storage.at(f"{loose}/{name}", place.settings).put([name.encode()])
    elsewhere = str(tmp_path / "elsewhere")
    SyncCheckpoint(elsewhere).write(os.urandom(size))
    for origin in (source, loose, elsewhere):
        target = storage.at(place.uri(), place.settings)

        def save(target: storage.StoredObject = target) -> bool:
            target.put([b"newer"])
            return False

        with pytest.raises(storage.ConflictError):
            layout.copy(origin, target.uri, place.settings, save)
        assert attempt(SyncCheckpoint, place, target.uri)[1].read() == b"newer"


@pytest.mark.parametrize("size", [10, 17 << 20])
def test_a_server_that_knows_conditions_is_given_one(s3: Place, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceph's gateway does not look at it when an upload is completed, so the refusal is the test's."""
    monkeypatch.setattr(parts, "COPY_SIZE", 6 << 20)
    source, first = attempt(SyncCheckpoint, s3, None)
    first.write(os.urandom(size))
    real = s3_client.send_request
    conditions = []

    async def sent(filesystem: Any, method: str, headers: Any, **arguments: Any) -> Any:
        if "If-None-Match" not in headers:
            return await real(filesystem, method, headers, **arguments)
        conditions.append((method, headers["If-None-Match"]))
        refusal = OSError("refused")
        refusal.response = {"Error": {"Code": "PreconditionFailed"}}  # type: ignore[attr-defined]
        raise refusal

    monkeypatch.setattr(s3_client, "send_request", sent)
    target = storage.at(s3.uri(), s3.settings)
    with pytest.raises(storage.ConflictError):
        storage.at(source, s3.settings).copy_to(target, lambda: False, {})
    assert conditions == [("put_object" if size == 10 else "complete_multipart_upload", "*")]
    assert not target.exists()


@pytest.mark.parametrize("has_links", [True, False])
def test_a_file_that_appears_at_the_last_moment_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    SyncCheckpoint(str(tmp_path / "first")).write(b"5")
    target = tmp_path / "second"
    real = os.fsync

    def fsync(file: int) -> None:
        real(file)
        target.write_bytes(b"newer")

    def link(*_: object) -> None:
        raise OSError(95, "no hard links here")

    monkeypatch.setattr(os, "fsync", fsync)
    if not has_links:
        monkeypatch.setattr(os, "link", link)
    with pytest.raises(storage.ConflictError):
        layout.copy(str(tmp_path / "first"), str(target), storage.Settings({}), lambda: False)
    assert target.read_bytes() == b"newer"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]
    target.unlink()
    monkeypatch.setattr(os, "fsync", real)
    assert layout.copy(str(tmp_path / "first"), str(target), storage.Settings({}), lambda: False)
    assert SyncCheckpoint("", str(target)).read() == b"5"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Have copies take until they are given up."""
    begun, deadline = threading.Event(), time.monotonic() + 10

    def copy(source: str, destination: str, settings: Any, given_up: Callable[[], bool], mark: Any) -> bool:
        begun.set()
        while not given_up() and time.monotonic() < deadline:
            time.sleep(0.001)
        raise storage.GivenUpError

    monkeypatch.setattr(layout, "copy", copy)
    monkeypatch.setattr(layout, "link", lambda *_: False)
    return begun


def test_it_is_given_up_for_a_save_and_taken_up_when_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SyncCheckpoint(str(tmp_path / "first")).write(b"5")
    destination = tmp_path / "second"
    real = os.fsync

    def fsync(file: int) -> None:
        # Of what this thread saves, and not of what is carried.
        if threading.current_thread() is threading.main_thread():
            raise OSError(28, "full")
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    with monkeypatch.context() as patch:
        begun = held(patch)
        checkpoint = SyncCheckpoint(str(destination), str(tmp_path / "first"))
        checkpoint.read()
        assert begun.wait(10)
        with pytest.raises(StorageError):
            checkpoint.write(b"6")
        assert not destination.exists()
    with pytest.raises(StorageError):
        checkpoint.write(b"6")
    carried(checkpoint)
    monkeypatch.undo()
    assert SyncCheckpoint("", str(destination)).read() == b"5"
    checkpoint.write(b"6")
    assert SyncCheckpoint("", str(destination)).read() == b"6"


# On a local disk it takes no time; elsewhere, who is closed or collected waits for it ---------------------------------


@pytest.mark.parametrize("kind", FACES)
@pytest.mark.parametrize("can", ["clone", "link"])
def test_on_a_local_disk_it_is_done_when_the_load_returns(
    tmp_path: Path, kind: Any, can: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, destination = tmp_path / "first", tmp_path / "second"
    SyncCheckpoint(str(source)).write(os.urandom(1 << 20))
    if can == "clone":
        # Where the file system of the tests cannot.
        monkeypatch.setattr(local, "cloned", lambda source, target: os.sendfile(target, source, 0, 1 << 20) > 0)
    checkpoint = kind(str(destination), str(source))
    load(checkpoint)
    assert checkpoint._resumption.carry_forward._copying is None
    assert destination.read_bytes() == source.read_bytes()
    assert os.path.samefile(source, destination) == (can == "link")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]
    # And no change of the one is one of the other.
    content = source.read_bytes()
    save(checkpoint, b"6")
    assert source.read_bytes() == content


@pytest.mark.parametrize("kind", FACES)
def test_a_temporary_directory_ends_as_it_should(kind: Any) -> None:
    for _ in range(60):
        with tempfile.TemporaryDirectory() as folder:
            SyncCheckpoint(f"{folder}/first").write(b"5" * 100_000)
            load(kind(f"{folder}/second", f"{folder}/first"))


@pytest.mark.parametrize("kind", FACES)
@pytest.mark.parametrize("end", ["close", "with", "collected"])
def test_who_is_closed_or_collected_waits_for_the_copy(
    tmp_path: Path, kind: Any, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, destination = tmp_path / "first", tmp_path / "second"
    SyncCheckpoint(str(source)).write(b"5")
    original = layout.copy

    def slow(*arguments: Any) -> Any:
        time.sleep(0.3)
        return original(*arguments)

    monkeypatch.setattr(layout, "copy", slow)
    monkeypatch.setattr(layout, "link", lambda *_: False)
    checkpoint = kind(str(destination), str(source))
    if end == "with":
        with checkpoint as entered:
            assert entered is checkpoint
            load(checkpoint)
            assert not destination.exists()
    else:
        load(checkpoint)
        assert not destination.exists()
    if end == "close":
        checkpoint.close()
    del checkpoint
    assert destination.read_bytes() == b"5"


@pytest.mark.parametrize("kind", FACES)
def test_a_closed_checkpoint_has_removed_its_folder_and_may_be_used_again(tmp_path: Path, kind: Any) -> None:
    source = str(tmp_path / "first")
    SyncCheckpoint(source).write(b"5")
    checkpoint = kind(str(tmp_path / "second"), source)
    folder = load(checkpoint)
    checkpoint.close()
    checkpoint.close()
    assert not folder.exists()
    assert load(checkpoint).exists()
    save(checkpoint, b"6")


def test_a_failure_is_logged_and_disturbs_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    SyncCheckpoint(str(tmp_path / "first")).write(b"5")
    (tmp_path / "file").touch()
    checkpoint = SyncCheckpoint(str(tmp_path / "file" / "below"), str(tmp_path / "first"))
    with caplog.at_level(logging.WARNING, "flytekit_ckpt"):
        assert checkpoint.read() == b"5"
        carried(checkpoint)
    assert "was not carried forward" in caplog.text
    assert "file/below" in caplog.text


def test_small_objects_are_copied_in_few_requests(s3: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    source, first = attempt(SyncCheckpoint, s3, None)
    first.write(b"5")
    target = storage.at(s3.uri(), s3.settings)
    made = requests(target, monkeypatch)  # type: ignore[arg-type]
    storage.at(source, s3.settings).copy_to(target, lambda: False, {})
    assert made == ["head_object", "get_object", "put_object"]
    stored = target.get()
    assert stored is not None
    assert stored.metadata["crc32"]


def test_the_server_copies_large_objects_in_parts(s3: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "COPY_SIZE", 6 << 20)
    content = os.urandom(17 << 20)
    source, first = attempt(Checkpoint, s3, None)
    first.save_sync(content)
    target = storage.at(s3.uri(), s3.settings)
    made = requests(target, monkeypatch)  # type: ignore[arg-type]
    storage.at(source, s3.settings).copy_to(target, lambda: False, {})
    assert made.count("upload_part_copy") == 3
    assert "get_object" not in made
    stored = target.get()
    assert stored is not None
    assert b"".join(stored.chunks) == content
    answers = iter([False, False, True])
    other = storage.at(s3.uri(), s3.settings)
    with pytest.raises(storage.GivenUpError):
        storage.at(source, s3.settings).copy_to(other, lambda: next(answers), {})
    assert not other.exists()


def test_a_process_that_ends_finishes_first(place: Place) -> None:
    if place.root.startswith("memory"):
        pytest.skip("another process has a memory of its own")
    source, first = attempt(SyncCheckpoint, place, None)
    first.save(__file__)
    destination = place.uri()
    script = f"""
from flytekit_ckpt import SyncCheckpoint
cp = SyncCheckpoint({destination!r}, {source!r}, storage_options={place.options!r})
cp.restore()
raise SystemExit(3)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=60).returncode == 3
    assert attempt(SyncCheckpoint, place, destination)[1].read() == Path(__file__).read_bytes()


def test_a_forked_process_does_not_wait_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SyncCheckpoint(str(tmp_path / "first")).write(b"5")
    begun = held(monkeypatch)
    checkpoint = SyncCheckpoint(str(tmp_path / "second"), str(tmp_path / "first"))
    checkpoint.read()
    assert begun.wait(10)
    child = os.fork()
    if not child:
        checkpoint.write(b"6")
        os._exit(0)
    deadline = time.monotonic() + 30
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    if not ended[0]:
        os.kill(child, 9)
    checkpoint.write(b"7")
    assert ended == (child, 0)


def test_attempts_that_die_before_they_save_cost_no_progress(place: Place, task: Task) -> None:
    """flyteorg/flyte issue 2894."""
    if place.root.startswith("memory"):
        pytest.skip("another process has a memory of its own")
    target = task(
        """
        def work(folder: str) -> list[int]:
            cp = current_checkpoint()
            attempt = len(list(Path(folder).iterdir())) + 1
            Path(folder, str(attempt)).touch()
            progress = int(cp.read() or 0)
            if attempt == 1:
                cp.write(b"41")
                die()
            if attempt < 4:
                # A machine that vanishes before anything is saved.
                time.sleep(1)
                die()
            return [attempt, progress]
        """
    )
    attempts = Path(target.rpartition(":")[0]).parent / "attempts"
    attempts.mkdir()
    result = runner.run(target, {"folder": str(attempts)}, retries=5, root=place.root, report=lambda _: None)
    assert result == [4, 41]
