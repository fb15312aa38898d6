"""What is saved to one destination adds up: from several instances, threads and processes."""

from __future__ import annotations

import io
import logging
import multiprocessing
import os
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from flytekit_ckpt import (
    CheckpointError,
    CorruptCheckpointError,
    StorageError,
    SyncCheckpoint,
    adapter,
    layout,
    storage,
    v2,
)
from flytekit_ckpt.storage import failures, general, s3_client, turns
from flytekit_ckpt.storage import s3 as s3_objects
from flytekit_ckpt.storage.s3 import S3Object
from tests.conftest import Place
from tests.platforms import Flyte1
from tests.test_layout import bytes_at
from tests.trees import look, make


@pytest.fixture(params=["local", "s3", "gcs", "azure"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return Place(str(tmp_path / "checkpoints")) if request.param == "local" else request.getfixturevalue(request.param)


def found(place: Place, uri: str) -> dict[str, bytes]:
    """The files that the next attempt restores."""
    attempt = SyncCheckpoint("", uri, storage_options=place.options)
    folder = attempt.restore()
    assert folder is not None
    return {name: seen[1] for name, seen in look(folder).items() if seen[0] == "file"}  # type: ignore[misc]


def saver(place: Place, uri: str, source: str | None = None, **options: Any) -> SyncCheckpoint:
    return SyncCheckpoint(uri, source, storage_options=place.options, **options)


def save_rank(checkpoint: SyncCheckpoint, folder: Path, rank: int) -> None:
    checkpoint.save(folder / f"rank{rank}.pt")


RANKS = {f"rank{rank}.pt": b"%d" % rank * 100_000 for rank in range(3)}


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.parametrize("is_inherited", [True, False])
def test_every_process_of_an_attempt_adds_its_file(
    place: Place, tmp_path: Path, start: str, is_inherited: bool
) -> None:
    uri, folder = place.uri(), make(tmp_path / "ranks", RANKS)
    inherited = saver(place, uri)
    context: Any = multiprocessing.get_context(start)
    processes = [
        context.Process(target=save_rank, args=(inherited if is_inherited else saver(place, uri), folder, rank))
        for rank in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert found(place, uri) == RANKS
    inherited.write(b"of the parent")
    assert found(place, uri) == {**RANKS, "_dst_cp": b"of the parent"}


def test_instances_and_threads_add_up_at_once(place: Place, tmp_path: Path) -> None:
    uri = place.uri()
    files = {f"{number}": b"%d" % number for number in range(12)}
    folder = make(tmp_path / "files", files)
    instances = [saver(place, uri) for _ in range(4)]
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda number: instances[number % 4].save(folder / str(number)), range(12)))
    assert found(place, uri) == files


@pytest.mark.parametrize("size", [10, 20_000_000])
def test_without_turns_the_condition_alone_keeps_what_others_save(
    place: Place, tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from several machines, whose writers know nothing of each other."""
    uri, folder = place.uri(), make(tmp_path / "files", {"a": os.urandom(size), "b": b"2"})
    first, other = saver(place, uri), saver(place, uri)
    first.write(b"1")
    original, is_late = layout.put_tree, [True]

    def late(*arguments: Any, **named: Any) -> Any:
        # The other one comes to its end between the look of the first and its write.
        if is_late.pop() if is_late else False:
            with monkeypatch.context() as patch:
                patch.setattr(turns, "_locked", lambda *_: None)
                other.save(folder / "b")
        return original(*arguments, **named)

    monkeypatch.setattr(layout, "put_tree", late)
    first.save(folder / "a")
    assert {name: len(content) for name, content in found(place, uri).items()} == {"_dst_cp": 1, "a": size, "b": 1}


def test_a_folder_is_mirrored_though_others_save_in_between(place: Place, tmp_path: Path) -> None:
    uri, folder = place.uri(), make(tmp_path / "mine", {"kept": b"1", "dropped": b"2"})
    mine, other = saver(place, uri), saver(place, uri)
    other.save(make(tmp_path / "theirs", {"dropped too": b"3", "theirs": b"4"}))
    mine.save(folder)
    other.write(b"5")
    (folder / "dropped").unlink()
    make(folder / "new", {})
    (folder / "later").write_bytes(b"6")
    mine.save(folder)
    assert found(place, uri) == {
        "_dst_cp": b"5", "dropped too": b"3", "theirs": b"4", "kept": b"1", "later": b"6"
    }  # fmt: skip


def test_what_a_restarted_attempt_saved_before_stays(place: Place, tmp_path: Path) -> None:
    uri, files = place.uri(), make(tmp_path / "files", {"model.pt": b"1", "opt.pt": b"2"})
    saver(place, uri).save(files / "model.pt")
    saver(place, uri).save(files / "opt.pt")
    assert found(place, uri) == {"model.pt": b"1", "opt.pt": b"2"}


@pytest.mark.parametrize("saves", ["here", "in another process"])
@pytest.mark.parametrize("source", ["tree", "payload", "flytekit's"])
def test_what_was_only_carried_forward_is_replaced(place: Place, tmp_path: Path, source: str, saves: str) -> None:
    before, uri = place.uri(), place.uri()
    files = make(tmp_path / "files", {"old": b"1", "new": b"2"})
    if source == "tree":
        saver(place, before).save(files / "old")
    elif source == "payload":
        saver(place, before).write(b"old")
    else:
        for name in ("old", "older"):
            storage.at(f"{before}/{name}", place.settings).put([b"1"])
    with saver(place, uri, before) as loading:
        loading.restore()
    assert layout.get(uri, place.settings) is not None, "it is carried forward"
    if saves == "here":
        saver(place, uri, before).save(files / "new")
    else:
        script = (
            "import sys; from pathlib import Path; from flytekit_ckpt import SyncCheckpoint; "
            f"SyncCheckpoint({uri!r}, {before!r}, storage_options={place.options!r}).save(Path({str(files / 'new')!r}))"
        )
        subprocess.run([sys.executable, "-c", script], check=True)
    assert found(place, uri) == {"new": b"2"}
    assert "old" in found(place, before) or b"old" in found(place, before).values()
    saver(place, uri, before).save(files / "old")
    assert found(place, uri) == {"new": b"2", "old": b"1"}


def test_the_same_bytes_saved_as_were_carried_forward_stay(place: Place, tmp_path: Path) -> None:
    before, uri = place.uri(), place.uri()
    saver(place, before).write(b"5")
    first = saver(place, uri, before)
    first.read()
    first._resumption.carry_forward.close()
    first.write(b"5")
    saver(place, uri, before).save(make(tmp_path / "files", {"a": b"1"}) / "a")
    assert found(place, uri) == {"_dst_cp": b"5", "a": b"1"}


def test_a_source_that_is_the_destination_is_added_to(place: Place, tmp_path: Path) -> None:
    uri, files = place.uri(), make(tmp_path / "files", {"model.pt": b"1", "opt.pt": b"2"})
    saver(place, uri, uri).save(files / "model.pt")
    again = saver(place, uri, uri)
    assert again.read() == b"1"
    again.save(files / "opt.pt")
    assert found(place, uri) == {"model.pt": b"1", "opt.pt": b"2"}


@pytest.mark.parametrize("odd", ["unsorted", "hard link", "twice"])
def test_another_programs_archive_is_added_to(place: Place, tmp_path: Path, odd: str) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for name in {"unsorted": ("z", "b"), "hard link": ("b", "z"), "twice": ("b", "b", "z")}[odd]:
            info = tarfile.TarInfo(name)
            if (odd, name) == ("hard link", "z"):
                info.type, info.linkname = tarfile.LNKTYPE, "b"
                tar.addfile(info)
            else:
                info.size = 1
                tar.addfile(info, io.BytesIO(b"1"))
    uri = place.uri()
    storage.at(uri, place.settings).put([content.getvalue()])
    saver(place, uri).save(make(tmp_path / "files", {"a": b"2", "b": b"3"}))
    assert found(place, uri) == {"a": b"2", "b": b"3", "z": b"1"}


def test_a_damaged_object_at_the_destination_is_an_error_and_stays(place: Place, tmp_path: Path) -> None:
    """Where it has to be read, because nothing tells where its members lie."""
    uri, files = place.uri(), make(tmp_path / "files", {"a": os.urandom(10_000), "b": b"2"})
    saver(place, uri).save(files / "a")
    damaged = bytearray(bytes_at(place, uri))
    damaged[5000] ^= 1
    damaged[-20] ^= 1
    storage.at(uri, place.settings).put([bytes(damaged)])
    with pytest.raises(CheckpointError, match=f"{uri} cannot be used"):
        saver(place, uri).save(files / "b")
    assert bytes_at(place, uri) == damaged


def test_damage_at_the_destination_is_carried_over_as_damage(place: Place, tmp_path: Path) -> None:
    """What is not read when something is added to it is still found to be damaged when it is loaded."""
    uri, files = place.uri(), make(tmp_path / "files", {"a": os.urandom(10_000), "b": b"2"})
    saver(place, uri).save(files / "a")
    damaged = bytearray(bytes_at(place, uri))
    damaged[5000] ^= 1
    storage.at(uri, place.settings).put([bytes(damaged)])
    saver(place, uri).save(files / "b")
    loaded = SyncCheckpoint("", uri, storage_options=place.options)
    with pytest.raises(CorruptCheckpointError, match=f"{uri} cannot be used"):
        loaded.restore(tmp_path)
    # What was saved since is not lost for that.
    assert loaded.restore(tmp_path, only="b") == tmp_path
    assert (tmp_path / "b").read_bytes() == b"2"


class Stream(io.RawIOBase):
    """Gives some bytes once."""

    def __init__(self, content: bytes) -> None:
        self._content = io.BytesIO(content)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return self._content.read(size)


@pytest.mark.parametrize("can_seek", [True, False])
def test_a_stream_is_read_again_if_it_can_be(place: Place, can_seek: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = place.uri()
    stream: Any = Stream(b"1") if not can_seek else io.BufferedReader(io.BytesIO(b"01"))
    if can_seek:
        stream.seek(1)
    original, is_late = layout.put_payload, [True]

    def late(*arguments: Any, **named: Any) -> Any:
        written = original(*arguments, **named) if not is_late else None
        if is_late.pop() if is_late else False:
            # Somebody else is first.
            storage.at(uri, place.settings).put([b"theirs"])
            return original(*arguments, **named)
        return written

    monkeypatch.setattr(layout, "put_payload", late)
    if can_seek:
        saver(place, uri).save(stream)
        assert found(place, uri) == {"_dst_cp": b"1"}
    else:
        with pytest.raises(CheckpointError, match="cannot be read again"):
            saver(place, uri).save(stream)
        assert found(place, uri) == {"_dst_cp": b"theirs"}


def test_who_is_always_too_late_is_told(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "CONFLICTS", 3)
    monkeypatch.setattr(adapter.Destination, "_try", lambda *_: (_ for _ in ()).throw(storage.ConflictError))
    with pytest.raises(StorageError, match="changed it 3 times"):
        saver(place, place.uri()).write(b"1")


def test_a_store_that_knows_no_conditions_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    general.warn_of_no_conditions.cache_clear()
    for number in range(3):
        SyncCheckpoint(f"memory://conditions/{number}").write(b"1")
    assert caplog.text.count("memory:// knows no conditional writes") == 1


@pytest.mark.parametrize("size", [10, 20_000_000])
def test_an_s3_server_that_refuses_conditions_is_looked_at_and_written_to(
    s3: Place, tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, refused = s3_client.send_request, []

    async def sent(filesystem: Any, method: str, headers: Any, **arguments: Any) -> Any:
        if headers:
            refused.append(method)
            refusal = OSError("not implemented")
            refusal.response = {"Error": {"Code": "NotImplemented"}}  # type: ignore[attr-defined]
            raise refusal
        return await real(filesystem, method, headers, **arguments)

    monkeypatch.setattr(s3_client, "send_request", sent)
    monkeypatch.setattr(s3_objects, "_without_conditions", set())
    general.warn_of_no_conditions.cache_clear()
    uri, folder = s3.uri(), make(tmp_path / "files", {"a": os.urandom(size), "b": b"2"})
    for name in ("a", "b"):
        saver(s3, uri).save(folder / name)
    assert found(s3, uri) == {name: (folder / name).read_bytes() for name in ("a", "b")}
    assert len(refused) == 1
    assert caplog.text.count("knows no conditional writes") == 1
    with pytest.raises(storage.ConflictError):
        storage.at(uri, s3.settings).put([b"x" * size], replaced=None)


# Turns ----------------------------------------------------------------------------------------------------------------


def test_savers_of_one_machine_take_turns(tmp_path: Path) -> None:
    order: list[int] = []

    def save(number: int) -> None:
        with turns.turn(str(tmp_path / "object"), 10):
            order.extend((number, number))

    inside = threading.Event()
    with turns.turn(str(tmp_path / "object"), 10):
        threads = [threading.Thread(target=save, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.1)
        assert not order
        inside.set()
    for thread in threads:
        thread.join()
    assert order[::2] == order[1::2]
    assert sorted(order[::2]) == [0, 1, 2, 3]


def test_nobody_waits_for_one_who_gives_no_sign_of_life(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    uri = str(tmp_path / "object")
    with turns.turn(uri, 10), caplog.at_level(logging.INFO, "flytekit_ckpt"), turns.turn(uri, 0.2):
        pass
    assert "gives no sign of life" in caplog.text


def test_who_gives_up_waits_no_longer(tmp_path: Path) -> None:
    uri = str(tmp_path / "object")
    with turns.turn(uri, 10), pytest.raises(storage.GivenUpError), turns.turn(uri, 3600, lambda: True):
        pass


@pytest.mark.parametrize("kind", [SyncCheckpoint, v2.Checkpoint])
def test_a_fork_waits_for_what_its_parent_carries_forward(
    s3: Place, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ceph's gateway would let the one replace the other."""
    before, uri = s3.uri(), s3.uri()
    saver(s3, before).write(b"old")
    begun, original = threading.Event(), layout.copy

    def slow(*arguments: Any) -> Any:
        begun.set()
        time.sleep(1)
        return original(*arguments)

    monkeypatch.setattr(layout, "copy", slow)
    checkpoint = kind(uri, before, storage_options=s3.options)
    checkpoint.restore() if kind is SyncCheckpoint else checkpoint.load_sync()
    assert begun.wait(10)
    child = os.fork()
    if not child:
        started = time.monotonic()
        checkpoint.write(b"new") if kind is SyncCheckpoint else checkpoint.save_sync(b"new")
        os._exit(0 if time.monotonic() - started > 0.5 else 1)
    assert os.waitpid(child, 0) == (child, 0)
    assert found(s3, uri) == {"_dst_cp": b"new"}


def test_one_who_gives_signs_of_life_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_SIGN_INTERVAL", 0.0)
    uri, order = str(tmp_path / "object"), []

    def save() -> None:
        with turns.turn(uri, 0.3):
            order.append("second")

    with turns.turn(uri, 10) as sign:
        thread = threading.Thread(target=save)
        thread.start()
        for _ in range(20):
            time.sleep(0.05)
            sign()
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


@pytest.mark.parametrize("has_forked", [False, True])
def test_a_killed_saver_is_not_waited_for(tmp_path: Path, has_forked: bool) -> None:
    uri = str(tmp_path / "object")
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        with turns.turn(uri, 10):
            # What it has forked lives on, and is not to keep the turn.
            forked = os.fork() if has_forked else 0
            if has_forked and not forked:
                time.sleep(30)
                os._exit(0)
            os.write(write_end, b"%d" % forked)
            time.sleep(30)
            os._exit(0)
    forked = int(os.read(read_end, 20))
    os.kill(child, 9)
    os.waitpid(child, 0)
    begun = time.monotonic()
    with turns.turn(uri, 25):
        assert time.monotonic() - begun < 10
    if forked:
        os.kill(forked, 9)


# What it costs --------------------------------------------------------------------------------------------------------


def test_the_first_save_of_an_instance_takes_one_request_more(s3: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    original = S3Object._call

    def call(self: Any, method: str, **arguments: Any) -> Any:
        made.append(method)
        return original(self, method, **arguments)

    monkeypatch.setattr(S3Object, "_call", call)
    checkpoint = saver(s3, s3.uri())
    for _ in range(3):
        checkpoint.write(b"1")
    assert made == ["list_objects_v2", *["put_object"] * 3]


def test_a_new_face_replaces_what_was_saved_as_in_flyte(place: Place) -> None:
    uri = place.uri()
    legacy = saver(place, uri)
    legacy.write(b"1")
    v2.Checkpoint(uri, storage_options=place.options).save_sync(b"2")
    assert found(place, uri) == {"_dst_cp": b"2"}
    legacy.write(b"3")
    assert found(place, uri) == {"_dst_cp": b"3"}


# The ranks of Elastic tasks -------------------------------------------------------------------------------------------

ELASTIC = """
    import os
    from pathlib import Path
    import flytekit_ckpt.auto
    from flytekit import current_context, task
    from flytekit.exceptions.user import FlyteRecoverableException
    from flytekitplugins.kfpytorch import Elastic

    @task(task_config=Elastic(nnodes=1, nproc_per_node=2), retries=1)
    def work() -> int:
        checkpoint, rank = current_context().checkpoint, os.environ["RANK"]
        folder = checkpoint.restore()
        if folder is not None:
            return sum(int((folder / f"rank{one}.pt").read_text()) for one in range(2))
        path = Path(f"rank{rank}.pt").absolute()
        path.write_text(f"2{rank}")
        checkpoint.save(path)
        # No rank ends the attempt before the other has saved.
        import torch.distributed
        torch.distributed.init_process_group("gloo")
        torch.distributed.barrier()
        raise FlyteRecoverableException("simulated")
"""


@pytest.mark.heavy
@pytest.mark.parametrize("asynchronous", ["0", "1"])
def test_every_rank_of_an_elastic_task_adds_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: str
) -> None:
    pytest.importorskip("flytekit")
    monkeypatch.setenv("FLYTEKIT_CKPT_ASYNCHRONOUS", asynchronous)
    file = tmp_path / "elastic_ranks.py"
    file.write_text(textwrap.dedent(ELASTIC))
    run = Flyte1(file, "work", {}, str(tmp_path / "checkpoints"), tmp_path)
    assert run.run(retries=1) == 41
