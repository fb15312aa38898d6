"""Saves in the background: of what the files were, in order, none lost, whatever ends the program."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
import pickle
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from flytekit_ckpt import (
    AsyncCheckpoint,
    CheckpointError,
    SaveNotBegunError,
    SaveReplacedError,
    StorageError,
    SyncCheckpoint,
    asynchronous,
    background_saves,
    snapshots,
    storage,
    termination,
    v2,
)
from flytekit_ckpt.steps import StateHandler
from tests.conftest import Place

FACES = [AsyncCheckpoint, v2.AsyncCheckpoint]


def made(place: Place, kind: Any, uri: str, source: str | None = None, **options: Any) -> Any:
    return kind(uri, source, storage_options=place.options, **options)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stored(place: Place, uri: str) -> dict[str, bytes]:
    """Give all that a checkpoint holds."""
    with made(place, SyncCheckpoint, "", uri) as checkpoint:
        folder = checkpoint.restore()
        return {} if folder is None else tree(folder)


def save(checkpoint: Any, data: Any, **options: Any) -> Any:
    """Save with either API; give the future."""
    if isinstance(checkpoint, AsyncCheckpoint) and isinstance(data, bytes):
        return checkpoint.write_async(data)
    return checkpoint.save_async(data, **options)


class Gate:
    """Holds background saves of this process back until it is opened; they are done in a thread here."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.reached = threading.Event()
        self.calls: list[int] = []
        called = asynchronous.AsynchronousSaves._called

        def held(saves: Any, contents: list[Any], callback: Any) -> Any:
            self.reached.set()
            assert self.open.wait(60)
            self.calls.append(len(contents))
            return called(saves, contents, callback)

        patch.setattr(asynchronous.AsynchronousSaves, "_called", held)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate(monkeypatch)
    yield made
    made.open.set()


# A snapshot -----------------------------------------------------------------------------------------------------------


class Snapshots(RuleBasedStateMachine):
    """What is saved is what the files were at the call, whatever becomes of them at once after it.

    The oracle is a checkpoint that waits for its saves, and is given those that no later one has taken the place of.
    """

    place: Place
    folder: Path
    kind: Any

    @initialize(when_busy=st.sampled_from(["latest", "wait"]))
    def begin(self, when_busy: str) -> None:
        self.root = Path(self.folder, os.urandom(8).hex())
        self.root.mkdir()
        self.when_busy = when_busy
        self.uri, self.expected_uri = self.place.uri(), f"{self.root}/expected"
        self.checkpoint = made(self.place, self.kind, self.uri, when_busy=when_busy)
        self.expected = (SyncCheckpoint if self.kind is AsyncCheckpoint else v2.Checkpoint)(self.expected_uri)
        # What was saved since the last look: its part, what makes it again and gives what to save, and its future.
        self.saves: list[tuple[str, Callable[[], Any], Any]] = []

    def teardown(self) -> None:
        if hasattr(self, "checkpoint"):
            self.check_end()
            self.checkpoint.close()

    contents = st.dictionaries(st.sampled_from(["a", "b", "sub/a", "sub/c"]), st.binary(max_size=300), max_size=4)

    @rule(contents=contents, name=st.sampled_from(["one", "two"]), move=st.booleans(), large=st.booleans())
    def save_folder(self, contents: dict[str, bytes], name: str, move: bool, large: bool) -> None:
        def make() -> Path:
            folder = self.root / name
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            for file, content in contents.items():
                (folder / file).parent.mkdir(exist_ok=True)
                (folder / file).write_bytes(content + bytes(300_000 if large else 0))
            return folder

        self.save_path(make, name, move)

    @rule(content=st.binary(max_size=300), name=st.sampled_from(["a", "f"]), move=st.booleans())
    def save_file(self, content: bytes, name: str, move: bool) -> None:
        def make() -> Path:
            (self.root / name).write_bytes(content)
            return self.root / name

        self.save_path(make, name, move)

    def save_path(self, make: Callable[[], Path], name: str, move: bool) -> None:
        path = make()
        self.saves.append((name, make, self.checkpoint.save_async(path, move=move)))
        assert path.exists() is not move
        self.spoil(path)

    @rule(content=st.binary(max_size=300))
    def save_bytes(self, content: bytes) -> None:
        changing = bytearray(content)
        future = (
            self.checkpoint.write_async(changing)
            if self.kind is AsyncCheckpoint
            else self.checkpoint.save_async(changing)
        )
        changing[:] = b"spoilt"
        self.saves.append(("_dst_cp", lambda: content, future))

    @rule(content=st.binary(max_size=300), large=st.booleans())
    def save_reader(self, content: bytes, large: bool) -> None:
        if self.kind is not AsyncCheckpoint:
            return
        content += bytes(2 << 20 if large else 0)
        file = self.root / "stream"
        file.write_bytes(content)
        with file.open("rb") as reader:
            self.saves.append(("_dst_cp", lambda: content, self.checkpoint.save_async(reader)))
        self.spoil(file)

    @rule()
    def wait(self) -> None:
        self.check_end()

    def spoil(self, path: Path) -> None:
        """Change, truncate and delete everything."""
        for number, file in enumerate(sorted(path.rglob("*")) if path.is_dir() else [path]):
            if not file.is_file():
                continue
            with file.open("r+b") as opened:
                opened.write(b"spoilt")
                opened.truncate(3)
            if number % 2:
                file.unlink()
        if path.is_dir():
            (path / "later").write_bytes(b"spoilt")

    def check_end(self) -> None:
        self.checkpoint.wait_until_finished()
        for number, (name, make, future) in enumerate(self.saves):
            error = future.exception(60)
            if error is not None:
                # Only another save of the same takes its place.
                assert isinstance(error, SaveReplacedError)
                assert self.when_busy == "latest"
                later = [other for other, _, _ in self.saves[number + 1 :]]
                assert later if self.kind is v2.AsyncCheckpoint else name in later
                continue
            data = make()
            if self.kind is not AsyncCheckpoint:
                self.expected.save_sync(data)
            elif isinstance(data, bytes):
                self.expected.write(data)
            else:
                self.expected.save(data)
        self.saves.clear()
        assert stored(self.place, self.uri) == stored(Place(""), self.expected_uri)

    @invariant()
    def nothing_else_is_left(self) -> None:
        if hasattr(self, "root"):
            visible = {path.name for path in self.root.iterdir() if not path.name.startswith(".flytekit_ckpt-")}
            assert visible <= {"one", "two", "a", "f", "stream", "expected"}


@pytest.mark.parametrize("kind", FACES)
def test_what_is_saved_is_what_the_files_were(place: Place, tmp_path: Path, kind: Any) -> None:
    machine = type("Machine", (Snapshots,), {"place": place, "folder": tmp_path, "kind": kind})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=6, stateful_step_count=8, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


def test_a_snapshot_has_modes_times_and_links(tmp_path: Path) -> None:
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    (folder / "sub").mkdir(parents=True)
    outside.write_bytes(b"outside")
    (folder / "sub" / "script").write_bytes(b"#!")
    (folder / "sub" / "script").chmod(0o751)
    os.utime(folder / "sub" / "script", ns=(1, 1_234_567_891_234_567_891))
    (folder / "inside").symlink_to("sub/script")
    (folder / "out").symlink_to("../outside")
    (folder / "sub").chmod(0o555)
    for number, kind in enumerate((SyncCheckpoint, AsyncCheckpoint)):
        with kind(str(tmp_path / f"{number}")) as checkpoint:
            checkpoint.save(folder)
    moved = AsyncCheckpoint(str(tmp_path / "2"))
    moved.save(folder, move=True)
    moved.close()
    loaded = []
    for number in range(3):
        checkpoint = SyncCheckpoint("", str(tmp_path / f"{number}"))
        root = checkpoint.restore()
        assert root is not None
        loaded.append(
            {
                path.relative_to(root): (
                    stat.S_IMODE(path.lstat().st_mode),
                    path.lstat().st_mtime_ns,
                    os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes(),
                )
                for path in root.rglob("*")
            }
        )
    assert loaded[0] == loaded[1] == loaded[2]
    assert loaded[0][Path("out")][2] == b"outside"
    assert not list(tmp_path.glob(".flytekit_ckpt-*"))


def test_a_link_to_a_folder_is_given_away_without_the_folder(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(b"1")
    (tmp_path / "link").symlink_to("folder")
    with AsyncCheckpoint(str(tmp_path / "cp")) as checkpoint:
        checkpoint.save(tmp_path / "link", move=True)
    assert not (tmp_path / "link").is_symlink()
    assert tree(tmp_path / "folder") == stored(Place(""), str(tmp_path / "cp")) == {"file": b"1"}


@pytest.mark.parametrize("kind", FACES)
def test_a_folder_that_the_checkpoint_lies_in_cannot_be_given_away(tmp_path: Path, kind: Any) -> None:
    (tmp_path / "file").write_bytes(b"1")
    checkpoint = kind(str(tmp_path / "cp"))
    with pytest.raises(ValueError, match="cannot be given away"):
        save(checkpoint, tmp_path, move=True)
    # It is left out, where it is copied.
    save(checkpoint, tmp_path).result()
    with pytest.warns(RuntimeWarning, match="left out of the checkpoint"):
        save(checkpoint, tmp_path)
    checkpoint.close()
    assert stored(Place(""), str(tmp_path / "cp")) == {"file": b"1"}


@pytest.mark.parametrize("kind", FACES)
def test_where_there_is_no_room_the_caller_waits(
    tmp_path: Path, kind: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(b"1")
    monkeypatch.setattr(snapshots, "SPARE", 1 << 60)
    checkpoint = kind(str(tmp_path / "cp"))
    assert save(checkpoint, tmp_path / "folder").done()
    assert "there is no room on the disk for a snapshot" in caplog.text
    assert stored(Place(""), str(tmp_path / "cp")) == {"file": b"1"}
    checkpoint.close()


def test_a_stream_for_which_there_is_no_room_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "SPARE", 1 << 60)
    (tmp_path / "file").write_bytes(bytes(3 << 20))
    with AsyncCheckpoint(str(tmp_path / "cp")) as checkpoint:
        with subprocess.Popen(["cat", str(tmp_path / "file")], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            with pytest.raises(StorageError, match="which cannot be read again"):
                checkpoint.save(process.stdout)  # type: ignore[arg-type]
        # One that can be read again is saved while the caller waits.
        with (tmp_path / "file").open("rb") as reader:
            assert checkpoint.save_async(reader).done()
    assert stored(Place(""), str(tmp_path / "cp")) == {"_dst_cp": bytes(3 << 20)}


def test_what_a_killed_process_has_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"""
    import os, signal
    from flytekit_ckpt import AsyncCheckpoint, asynchronous
    asynchronous.AsynchronousSaves._called = lambda *_: signal.pause()
    checkpoint = AsyncCheckpoint({str(tmp_path / "cp")!r})
    checkpoint.save({str(tmp_path / "copied")!r})
    checkpoint.save({str(tmp_path / "moved")!r}, move=True)
    os.kill(os.getpid(), signal.SIGKILL)
    """
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("copied", "moved"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"1")
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False, timeout=60)
    assert len(list(tmp_path.glob(".flytekit_ckpt-*"))) == 2
    with AsyncCheckpoint(str(tmp_path / "cp")) as checkpoint:
        checkpoint.save(tmp_path / "copied")
    assert not list(tmp_path.glob(".flytekit_ckpt-*"))
    assert tree(tmp_path / "copied") == {"file": b"1"}


# Several saves --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FACES)
def test_a_newer_save_takes_the_place_of_one_that_waits(
    tmp_path: Path, kind: Any, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "flytekit_ckpt")
    checkpoint = kind(str(tmp_path / "cp"))
    futures = [save(checkpoint, b"0")]
    assert gate.reached.wait(60)
    futures += [save(checkpoint, b"%d" % number) for number in (1, 2, 3)]
    gate.open.set()
    checkpoint.wait_until_finished()
    assert [future.done() for future in futures] == [True] * 4
    assert futures[0].result() is futures[3].result() is None
    for future in futures[1:3]:
        with pytest.raises(SaveReplacedError):
            future.result()
    assert gate.calls == [1, 1]
    assert caplog.text.count("a later save of the same has taken the place") == 2
    assert SyncCheckpoint("", str(tmp_path / "cp")).read() == b"3"


def test_different_parts_that_wait_are_saved_together(tmp_path: Path, gate: Gate) -> None:
    checkpoint = AsyncCheckpoint(str(tmp_path / "cp"))
    checkpoint.write(b"0")
    assert gate.reached.wait(60)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"in {name}").write_bytes(b"1")
        checkpoint.save(tmp_path / name)
    (tmp_path / "file").write_bytes(b"2")
    checkpoint.save(tmp_path / "file")
    checkpoint.write(b"3")
    gate.open.set()
    checkpoint.close()
    assert gate.calls == [1, 4]
    expected = {"_dst_cp": b"3", "in a": b"1", "in b": b"1", "file": b"2"}
    assert stored(Place(""), str(tmp_path / "cp")) == expected
    # Each is a part of its own: saved again, it replaces what it brought.
    again = AsyncCheckpoint(str(tmp_path / "cp"))
    again._destination.saved = checkpoint._destination.saved
    (tmp_path / "a" / "in a").rename(tmp_path / "a" / "anew")
    again.save(tmp_path / "a")
    again.close()
    assert stored(Place(""), str(tmp_path / "cp")) == {"_dst_cp": b"3", "anew": b"1", "in b": b"1", "file": b"2"}


@pytest.mark.parametrize("kind", FACES)
def test_the_caller_is_held_until_nothing_waits_if_that_is_asked_for(tmp_path: Path, kind: Any, gate: Gate) -> None:
    checkpoint = kind(str(tmp_path / "cp"), when_busy="wait")
    futures = [save(checkpoint, b"0")]
    assert gate.reached.wait(60)
    futures.append(save(checkpoint, b"1"))
    third = threading.Thread(target=lambda: futures.append(save(checkpoint, b"2")))
    third.start()
    third.join(0.2)
    assert third.is_alive()
    gate.open.set()
    third.join(60)
    checkpoint.close()
    assert [future.exception() for future in futures] == [None] * 3
    assert SyncCheckpoint("", str(tmp_path / "cp")).read() == b"2"


def test_an_unknown_when_busy_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="when_busy='never' is not known"):
        AsyncCheckpoint(str(tmp_path / "cp"), when_busy="never")  # type: ignore[arg-type]


def test_saves_that_wait_and_saves_that_do_not_come_in_the_order_of_the_calls(tmp_path: Path, gate: Gate) -> None:
    checkpoint = v2.Checkpoint(str(tmp_path / "cp"))
    checkpoint.save_async(b"0")
    assert gate.reached.wait(60)
    waiting = threading.Thread(target=checkpoint.save_sync, args=(b"1",))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    last = checkpoint.save_async(b"2")
    gate.open.set()
    waiting.join(60)
    assert last.result() is None
    assert (tmp_path / "cp").read_bytes() == b"2"
    checkpoint.close()


def test_saves_of_threads_are_all_kept(place: Place, tmp_path: Path) -> None:
    uri = place.uri()
    checkpoint = made(place, AsyncCheckpoint, uri)

    def work(number: int) -> None:
        for value in range(3):
            file = tmp_path / f"file {number}"
            file.write_bytes(b"%d" % value)
            checkpoint.save(file)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    checkpoint.close()
    assert stored(place, uri) == {f"file {number}": b"2" for number in range(6)}


@pytest.mark.parametrize("kind", FACES)
def test_two_instances_save_to_one_destination(place: Place, tmp_path: Path, kind: Any) -> None:
    uri = place.uri()
    first, second = made(place, kind, uri), made(place, kind, uri)
    for number, checkpoint in enumerate((first, second, first)):
        file = tmp_path / f"file {number}"
        file.write_bytes(b"1")
        save(checkpoint, file).result()
    first.close()
    second.close()
    expected = {f"file {number}": b"1" for number in range(3)} if kind is AsyncCheckpoint else {"_dst_cp": b"1"}
    assert stored(place, uri) == expected


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def forbidden(tmp_path: Path) -> Path:
    """A destination that cannot be written: what it would lie in is a file."""
    (tmp_path / "file").write_bytes(b"")
    return tmp_path / "file" / "cp"


@pytest.mark.parametrize("kind", FACES)
@pytest.mark.parametrize("how", ["next call", "wait", "close", "future"])
def test_an_error_is_raised_once(forbidden: Path, kind: Any, how: str, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = kind(str(forbidden))
    future = save(checkpoint, b"1")
    deadline = time.monotonic() + 60
    while not future.done() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "a checkpoint was not saved in the background" in caplog.text
    calls = {
        "next call": lambda: save(checkpoint, b"2"),
        "wait": checkpoint.wait_until_finished,
        "close": checkpoint.close,
        "future": future.result,
    }
    with pytest.raises(StorageError, match="file/cp"):
        calls[how]()
    checkpoint.wait_until_finished()
    with pytest.raises(StorageError, match="file/cp"):
        future.result()
    checkpoint.close()


@pytest.mark.parametrize("kind", FACES)
def test_a_later_save_heals_an_error(forbidden: Path, kind: Any, gate: Gate) -> None:
    checkpoint = kind(str(forbidden))
    failing = save(checkpoint, b"1")
    assert gate.reached.wait(60)
    healing = save(checkpoint, b"2")
    forbidden.parent.unlink()
    forbidden.parent.write_bytes(b"")
    # The first fails, and then it is possible.
    original = checkpoint._saves._saves._end if kind is AsyncCheckpoint else checkpoint._background._saves._end

    def ended(jobs: Any, error: Any) -> None:
        forbidden.parent.unlink(missing_ok=True) if forbidden.parent.is_file() else None
        original(jobs, error)

    saves = checkpoint._saves._saves if kind is AsyncCheckpoint else checkpoint._background._saves
    saves._end = ended
    gate.open.set()
    assert healing.result() is None
    checkpoint.wait_until_finished()
    assert isinstance(failing.exception(), StorageError)
    checkpoint.close()


@pytest.mark.parametrize("kind", FACES)
def test_a_snapshot_that_fails_is_an_error_at_once(tmp_path: Path, kind: Any, gate: Gate) -> None:
    checkpoint = kind(str(tmp_path / "cp"))
    with pytest.raises(FileNotFoundError):
        save(checkpoint, tmp_path / "nothing")
    save(checkpoint, b"0")
    assert gate.reached.wait(60)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(b"1")
    waiting = save(checkpoint, tmp_path / "folder")
    with pytest.MonkeyPatch.context() as patch:

        def vanished(*_: object) -> None:
            raise FileNotFoundError(2, "gone", "file")

        patch.setattr(snapshots, "_copy_file", vanished)
        with pytest.raises(CheckpointError, match="was removed while it was being saved"):
            save(checkpoint, tmp_path / "folder")
    gate.open.set()
    # The one that it was to replace is not there any more, and says so.
    with pytest.raises(CheckpointError, match="was removed while it was being saved"):
        waiting.result()
    checkpoint.close()
    assert not list(tmp_path.glob(".flytekit_ckpt-*"))


def test_a_future_cannot_be_cancelled(tmp_path: Path, gate: Gate) -> None:
    checkpoint = v2.Checkpoint(str(tmp_path / "cp"))

    async def work() -> None:
        future = checkpoint.save_async(b"1")
        waiting = asyncio.ensure_future(asyncio.wrap_future(future))
        await asyncio.sleep(0)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting
        assert not future.cancelled()
        gate.open.set()
        assert await asyncio.wrap_future(checkpoint.save_async(b"2")) is None

    asyncio.run(work())
    checkpoint.close()
    assert (tmp_path / "cp").read_bytes() == b"2"


# The other process ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FACES)
def test_if_the_process_that_saves_is_killed_another_one_does_its_work(
    place: Place, tmp_path: Path, kind: Any, caplog: pytest.LogCaptureFixture
) -> None:
    uri = place.uri()
    checkpoint = made(place, kind, uri)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_bytes(os.urandom(20 << 20))
    future = save(checkpoint, folder)
    saves = checkpoint._saves if kind is AsyncCheckpoint else checkpoint._background
    process = saves._process._process
    time.sleep(0.1)
    process.kill()
    assert future.result() is None
    checkpoint.close()
    assert stored(place, uri) == tree(folder)


def test_a_process_that_cannot_be_begun_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    with AsyncCheckpoint(str(tmp_path / "cp")) as checkpoint:
        checkpoint.write(b"1")
    assert SyncCheckpoint("", str(tmp_path / "cp")).read() == b"1"
    assert "saving in a thread" in caplog.text


def test_options_that_another_process_cannot_make_are_used_by_a_thread(tmp_path: Path) -> None:
    """Objects of the program's own module, which is imported nowhere else."""
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent("""
        import logging
        from flytekit_ckpt import AsyncCheckpoint, SyncCheckpoint

        class Option:
            pass

        logging.basicConfig()
        with AsyncCheckpoint("cp", storage_options={"option": Option()}) as checkpoint:
            checkpoint.write(b"1")
        assert SyncCheckpoint("", "cp").read() == b"1"
        """)
    )
    run = subprocess.run([sys.executable, program], cwd=tmp_path, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "saving in a thread" in run.stderr
    assert "killed" not in run.stderr


@pytest.mark.parametrize("kind", FACES)
def test_storage_that_another_process_does_not_reach_is_written_to_by_a_thread(kind: Any) -> None:
    import fsspec

    with kind("memory://asynchronous/cp") as checkpoint:
        save(checkpoint, b"1")
    assert SyncCheckpoint("", "memory://asynchronous/cp").read() == b"1"
    fsspec.filesystem("memory").rm("asynchronous", recursive=True)


def test_it_goes_where_the_caller_was_and_by_what_the_caller_knows(
    s3: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with AsyncCheckpoint("relative/cp") as checkpoint:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        monkeypatch.chdir(tmp_path)
        checkpoint.write(b"1")
    assert SyncCheckpoint("", str(tmp_path / "relative" / "cp")).read() == b"1"
    # Variables that were set after it was begun.
    uri = s3.uri()
    checkpoint = AsyncCheckpoint(uri)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLYTE_AWS_SECRET_ACCESS_KEY", "wrong")
        with pytest.raises(StorageError):
            checkpoint.write_async(b"1").result()
    checkpoint.write_async(b"2").result()
    checkpoint.close()
    assert SyncCheckpoint("", uri).read() == b"2"


def test_a_progress_callback_is_called(tmp_path: Path) -> None:
    class Callback:
        size = done = 0

        def set_size(self, size: int) -> None:
            self.size = size

        def relative_update(self, inc: int = 1) -> None:
            self.done += inc

    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(os.urandom(5 << 20))
    callback = Callback()
    with AsyncCheckpoint(str(tmp_path / "cp")) as checkpoint:
        checkpoint.save(tmp_path / "folder", callback=callback)
    assert callback.size == callback.done == 5 << 20


def test_large_bytes_go_by_the_disk(tmp_path: Path) -> None:
    for kind in FACES:
        content = os.urandom(asynchronous.SENT_SIZE + 1)
        with kind(str(tmp_path / kind.__module__)) as checkpoint:
            save(checkpoint, content)
        assert SyncCheckpoint("", str(tmp_path / kind.__module__)).read() == content


# Forks, pickles, event loops ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FACES)
def test_a_fork_saves_for_itself_and_its_parent_too(place: Place, kind: Any, gate: Gate) -> None:
    if not place.is_local:
        pytest.skip("fsspec's clients are not made to be used in forks of a process with threads")
    uri = place.uri()
    checkpoint = made(place, kind, uri)
    future = save(checkpoint, b"parent")
    assert gate.reached.wait(60)
    child = os.fork()
    if not child:
        try:
            gate.open.set()
            mine = made(place, kind, f"{uri}-child")
            save(mine, b"child")
            mine.close()
            # It was the parent's.
            checkpoint.wait_until_finished()
            save(checkpoint, b"child").result()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status == 0
    assert stored(place, f"{uri}-child") == {"_dst_cp": b"child"}
    gate.open.set()
    assert future.result() is None
    checkpoint.close()
    assert stored(place, uri) == {"_dst_cp": b"parent"}


@pytest.mark.parametrize("kind", FACES)
def test_it_can_be_pickled(tmp_path: Path, kind: Any) -> None:
    with kind(str(tmp_path / "cp")) as checkpoint:
        save(checkpoint, b"1").result()
        with pickle.loads(pickle.dumps(checkpoint)) as other:
            save(other, b"2").result()
    assert SyncCheckpoint("", str(tmp_path / "cp")).read() == b"2"


def test_awaited_saves_come_in_the_order_of_the_calls(tmp_path: Path) -> None:
    checkpoint = v2.AsyncCheckpoint(str(tmp_path / "cp"), when_busy="wait")

    async def work() -> None:
        await asyncio.gather(*(checkpoint.save(b"%d" % number) for number in range(20)))

    asyncio.run(work())
    checkpoint.close()
    assert (tmp_path / "cp").read_bytes() == b"19"


@pytest.mark.parametrize("kind", FACES)
def test_the_next_attempt_reads_it_with_either_api_and_carrying_forward_goes_on(
    place: Place, tmp_path: Path, kind: Any
) -> None:
    first, second = place.uri(), place.uri()
    with made(place, kind, first) as checkpoint:
        save(checkpoint, b"1")
    with made(place, kind, second, first) as checkpoint:
        content = checkpoint.read() if kind is AsyncCheckpoint else checkpoint.load_sync().read_bytes()
        assert content == b"1"
        save(checkpoint, b"2").result()
        # What the first had left was only carried here, and has been replaced.
        (tmp_path / "file").write_bytes(b"3")
        save(checkpoint, tmp_path / "file")
    expected = {"_dst_cp": b"2", "file": b"3"} if kind is AsyncCheckpoint else {"_dst_cp": b"3"}
    assert stored(place, second) == expected


# The ends of a program ------------------------------------------------------------------------------------------------

PROGRAM = """
import os, signal, sys, threading, time
from pathlib import Path
from flytekit_ckpt import AsyncCheckpoint, asynchronous
from flytekit_ckpt.v2 import AsyncCheckpoint as New

root = Path(sys.argv[1])
called = asynchronous.AsynchronousSaves._called
def slowly(*arguments):
    time.sleep(DELAY)
    return called(*arguments)
asynchronous.AsynchronousSaves._called = slowly
DELAY = 0.3
"""


def run(tmp_path: Path, body: str) -> tuple[int, str]:
    code = PROGRAM + textwrap.dedent(body)
    process = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], check=False, capture_output=True, text=True, timeout=120
    )
    return process.returncode, process.stdout + process.stderr


ENDS = {
    "normally": ("", 0),
    "sys.exit": ("sys.exit(3)", 3),
    "an exception": ("raise ValueError", 1),
    "SIGTERM": ("os.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(60)", -signal.SIGTERM),
    "SIGTERM in a wait": (
        "threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()\nold.wait_until_finished()\n"
        "time.sleep(60)",
        -signal.SIGTERM,
    ),
    "a handler of its own": (
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(60)",
        5,
    ),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_program_ends_when_its_saves_are_safe(tmp_path: Path, end: str) -> None:
    body, code = ENDS[end]
    begun = """
    old, new = AsyncCheckpoint(str(root / "old")), New(str(root / "new"))
    for number in range(3):
        old.write(b"%d" % number)
        new.save_sync(b"%d" % number)
    """
    found = run(tmp_path, textwrap.dedent(begun) + body)
    assert found[0] == code, found
    assert SyncCheckpoint("", str(tmp_path / "old")).read() == b"2"
    assert SyncCheckpoint("", str(tmp_path / "new")).read() == b"2"


def test_the_signal_in_the_middle_of_a_snapshot_waits_for_it(tmp_path: Path) -> None:
    body = """
    from flytekit_ckpt import snapshots
    copy = snapshots._copy_file
    def interrupted(*paths):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        return copy(*paths)
    snapshots._copy_file = interrupted
    (root / "file").write_bytes(b"1")
    AsyncCheckpoint(str(root / "cp")).save(root / "file")
    print("never")
    """
    code, output = run(tmp_path, body)
    assert (code, "never" in output) == (-signal.SIGTERM, False), output
    assert stored(Place(""), str(tmp_path / "cp")) == {"file": b"1"}


def test_after_sigterm_what_cannot_be_done_in_time_is_not_begun(tmp_path: Path) -> None:
    body = """
    cp = AsyncCheckpoint(str(root / "cp"), grace=1.5)
    DELAY = 1.0
    cp.write_async(b"0").result()
    cp.write(b"1")
    time.sleep(0.2)
    (root / "file").write_bytes(b"2")
    cp.save(root / "file")
    cp.write(b"3")
    started = time.monotonic()
    def ended(*_):
        print("seconds", time.monotonic() - started, flush=True)
        os._exit(0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, ended)
    from flytekit_ckpt import termination
    termination.finish_within(1.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
    """
    code, output = run(tmp_path, body)
    assert code == 0, output
    # What was under way has come to its end, and there was no time for more.
    assert stored(Place(""), str(tmp_path / "cp")) == {"_dst_cp": b"1"}
    assert output.count("was not begun: the process was told to end") == 2, output


def test_after_sigterm_the_newest_is_saved_first(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    opened = threading.Event()

    def save_all(jobs: Any) -> None:
        opened.wait(60)
        begun.extend(job.name for job in jobs)

    saves = background_saves.BackgroundSaves(save_all, are_joint=True)
    first = saves.submit(background_saves.Job("first", None))
    while saves._waiting:
        time.sleep(0.01)
    waiting = [saves.submit(background_saves.Job(name, None)) for name in ("second", "third")]
    monkeypatch.setattr(termination, "deadline", lambda: time.monotonic() + 60)
    opened.set()
    saves.close()
    assert begun == ["first", "third", "second"]
    # With too little time, none is begun, and each says so.
    saves._pace = (1, 5.0)
    monkeypatch.setattr(termination, "deadline", lambda: time.monotonic() + 1)
    late = saves.submit(background_saves.Job("late", None))
    with pytest.raises(SaveNotBegunError):
        late.result(60)
    saves.finish()
    assert begun == ["first", "third", "second"]
    assert [future.result() for future in (first, *waiting)] == [None] * 3


@pytest.mark.parametrize("is_told_to_end", [False, True])
def test_who_waits_is_given_the_error_however_late_it_is_noted(
    monkeypatch: pytest.MonkeyPatch, is_told_to_end: bool
) -> None:
    def broken(_: Any) -> None:
        raise StorageError("broken")

    saves = background_saves.BackgroundSaves(broken, are_joint=True)
    noted = saves.fail

    def late(*arguments: Any) -> None:
        time.sleep(0.3)
        noted(*arguments)

    monkeypatch.setattr(saves, "fail", late)
    if is_told_to_end:
        saves._pace = (1, 5.0)
        monkeypatch.setattr(termination, "deadline", lambda: time.monotonic() + 1)
    saves.submit(background_saves.Job("name", None))
    with pytest.raises(SaveNotBegunError if is_told_to_end else StorageError):
        saves.wait()


def test_the_process_that_saves_does_not_outlive_the_program_in_the_middle_of_a_save(tmp_path: Path) -> None:
    body = """
    from flytekit_ckpt.processes import SavingProcess
    process = SavingProcess("/tmp")
    threading.Thread(target=process.call, args=(time.sleep, 120), daemon=True).start()
    while process._process is None:
        time.sleep(0.01)
    # Until it has begun.
    time.sleep(1)
    print(process._process.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
    """
    code, output = run(tmp_path, body)
    assert code == -signal.SIGKILL, output
    wait_until_gone(int(output))


def wait_until_gone(process: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and Path(f"/proc/{process}").exists():
        time.sleep(0.05)
    assert not Path(f"/proc/{process}").exists()


def test_a_killed_program_leaves_a_whole_checkpoint_and_nobody_behind(tmp_path: Path) -> None:
    body = """
    DELAY = 0
    cp = AsyncCheckpoint(str(root / "cp"))
    (root / "folder").mkdir()
    print(os.getpid(), cp._saves._process._process.pid, flush=True)
    for number in range(10**6):
        for name in ("one", "two"):
            (root / "folder" / name).write_bytes(b"%d" % number * 400_000)
        cp.save(root / "folder")
        if number == 5:
            cp.wait_until_finished()
            os.kill(os.getpid(), signal.SIGKILL)
    """
    code, output = run(tmp_path, body)
    assert code == -signal.SIGKILL, output
    found = stored(Place(""), str(tmp_path / "cp"))
    assert found["one"] == found["two"] == b"5" * 400_000
    wait_until_gone(int(output.split()[1]))


# Iterators ------------------------------------------------------------------------------------------------------------


def test_steps_of_an_iterator_do_not_take_each_others_place(tmp_path: Path) -> None:
    with StateHandler(async_checkpointing=True) as handler:
        for step in range(5):
            handler.save_to_directory(str(tmp_path / "steps"), {"at": step}, step=step, keep=None)
    assert list(StateHandler().list_checkpoints(str(tmp_path / "steps"))) == list(range(5))


def test_reading_from_bytes_io_takes_the_rest_of_it(tmp_path: Path) -> None:
    with AsyncCheckpoint(str(tmp_path / "cp")) as checkpoint:
        stream = io.BytesIO(b"0123456789")
        stream.seek(4)
        checkpoint.save(stream)  # type: ignore[arg-type]
        stream.seek(0)
        stream.write(b"spoilt    ")
    assert SyncCheckpoint("", str(tmp_path / "cp")).read() == b"456789"


def test_shared_storage_is_told_from_this_processs_own() -> None:
    assert [storage.is_shared(uri) for uri in ("/a", "file:///a", "s3://a/b", "memory://a")] == [
        True,
        True,
        True,
        False,
    ]
