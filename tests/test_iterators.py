"""Steps of an iterator on any storage: what is saved, kept, listed, restored, and refused."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from flytekit_ckpt import CorruptCheckpointError, StorageError, SyncCheckpoint, storage, v2
from flytekit_ckpt.iterators import (
    CheckpointableIterator,
    IteratorCheckpoint,
    PipelineCheckpoint,
    StateDictIterator,
    StateHandler,
)
from tests.conftest import Place


class Data:
    """An iterator over shuffled numbers that can be saved."""

    def __init__(self, seed: int = 0, size: int = 20, **identity: object) -> None:
        self.order = np.random.default_rng(seed).permutation(size)
        self.at = 0
        self.identity = identity

    def __iter__(self) -> Data:
        return self

    def __next__(self) -> int:
        if self.at == len(self.order):
            raise StopIteration
        self.at += 1
        return int(self.order[self.at - 1])

    def get_state(self) -> dict[str, Any]:
        return {"at": self.at, "order": self.order, **self.identity}

    def set_state(self, state: dict[str, Any]) -> None:
        self.at, self.order = state["at"], state["order"]


def advanced(count: int, **arguments: Any) -> Data:
    data = Data(**arguments)
    for _ in itertools.islice(data, count):
        pass
    return data


# ---------------------------------------------------------------------------------------------------------------------
# Saving and restoring
# ---------------------------------------------------------------------------------------------------------------------


def test_a_restored_iterator_goes_on_where_it_was(place: Place) -> None:
    base = place.uri()
    checkpoint = IteratorCheckpoint(base)
    assert not checkpoint.has_checkpoint()
    assert checkpoint.get_latest_step() is None
    assert checkpoint.list_checkpoints() == {}
    data = advanced(7)
    assert isinstance(data, CheckpointableIterator)
    assert checkpoint.save_to_directory(data, step=7) == f"{base}/ckpt-7"
    assert checkpoint.has_checkpoint()
    other = Data(seed=1)
    assert IteratorCheckpoint(base).restore_latest(other) is other
    assert list(other) == list(data)
    assert IteratorCheckpoint(base).restore(Data(seed=2), step=7).at == 7


def test_the_unversioned_checkpoint_is_what_is_restored_where_there_are_no_steps(place: Place) -> None:
    base = place.uri()
    checkpoint = IteratorCheckpoint(base)
    assert checkpoint.save_to_directory(advanced(3)) == f"{base}/checkpoint"
    assert checkpoint.restore(Data(seed=1)).at == 3
    assert not checkpoint.has_checkpoint()
    with pytest.raises(ValueError, match="no checkpoints found in"):
        checkpoint.restore_latest(Data())
    with pytest.raises(ValueError, match="no checkpoint of step 5 found in"):
        checkpoint.restore(Data(), step=5)
    with pytest.raises(ValueError, match="overwrite=True"):
        checkpoint.save_to_directory(advanced(4))
    checkpoint.save_to_directory(advanced(4), overwrite=True)
    assert checkpoint.restore(Data()).at == 4
    checkpoint.save_to_directory(advanced(9), step=9)
    assert checkpoint.restore(Data()).at == 9


def test_a_step_that_is_there_is_not_overwritten_unasked(place: Place) -> None:
    checkpoint = IteratorCheckpoint(place.uri())
    checkpoint.save_to_directory(advanced(3), step=3)
    with pytest.raises(ValueError, match=r"ckpt-3 already: give overwrite=True"):
        checkpoint.save_to_directory(advanced(4), step=3)
    assert checkpoint.restore_latest(Data()).at == 3
    checkpoint.save_to_directory(advanced(4), step=3, overwrite=True)
    assert checkpoint.restore_latest(Data()).at == 4


def test_metadata_is_kept_beside_the_state(place: Place) -> None:
    base = place.uri()
    handler = StateHandler()
    metadata = {"loss": 0.5, "name": "a", "good": True, "epoch": 3}
    IteratorCheckpoint(base, handler).save_to_directory(advanced(3), step=3, metadata=metadata)
    assert handler.restore(base, step=3, metadata_only=True) == metadata
    assert handler.restore(base)["at"] == 3
    data = Data()
    assert handler.restore(base, data) is data
    assert data.at == 3
    handler.save_to_directory(base, {"x": 1}, step=4)
    assert handler.restore(base, metadata_only=True) is None


def test_a_step_is_a_tree_that_people_tar_and_flyte_can_look_into(place: Place, tmp_path: Path) -> None:
    flyte = pytest.importorskip("flyte")
    uri = IteratorCheckpoint(place.uri()).save_to_directory(advanced(3), step=3, metadata={"loss": 0.5})
    content = b"".join(bytes(chunk) for chunk in storage.at(uri, place.settings).get().chunks)  # type: ignore[union-attr]
    archive = tmp_path / "step.tar.gz"
    archive.write_bytes(content)
    listed = subprocess.check_output(["tar", "tzf", archive], text=True).split()
    assert listed == ["metadata.json", "state/0.npy", "state.json"]
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        assert json.load(tar.extractfile("state.json")) == {"at": 3, "order": {"$array": "state/0.npy"}}  # type: ignore[arg-type]
        assert json.load(tar.extractfile("metadata.json")) == {"loss": 0.5}  # type: ignore[arg-type]
    for kind in (flyte.Checkpoint, v2.Checkpoint):
        checkpoint = kind("", uri)
        root = checkpoint.load_sync()
        assert np.load(root / "state" / "0.npy").tolist() == Data().order.tolist()


@pytest.mark.parametrize("scheme", ["", "file://", "memory://"])
def test_a_base_directory_is_a_path_or_a_uri(tmp_path: Path, scheme: str) -> None:
    base = f"{scheme}{tmp_path}/{uuid.uuid4().hex}/steps"
    checkpoint = IteratorCheckpoint(base)
    assert checkpoint.base_dir == (base if scheme else Path(base))
    uri = checkpoint.save_to_directory(advanced(3), step=3)
    assert uri == f"{base}/ckpt-3"
    assert checkpoint.list_checkpoints() == {3: uri}
    assert IteratorCheckpoint(base + "/").restore_latest(Data()).at == 3


def test_storage_options_are_passed_on(s3: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FLYTE_AWS_ENDPOINT", "FLYTE_AWS_ACCESS_KEY_ID", "FLYTE_AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    checkpoint = IteratorCheckpoint(s3.uri(), storage_options=s3.options)
    checkpoint.save_to_directory(advanced(3), step=3)
    assert checkpoint.restore_latest(Data()).at == 3


def test_saving_every_so_many_steps(place: Place) -> None:
    checkpoint = PipelineCheckpoint(place.uri())
    data = Data()
    for step in range(20):
        saved = checkpoint.save_to_step(data, step, interval=4, keep=2)
        assert (saved is None) == (step % 4 != 0)
        next(data)
    assert list(checkpoint.list_checkpoints()) == [12, 16]
    assert checkpoint.restore_latest(Data()).at == 16


def test_the_root_of_a_store_is_a_base_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Where the root would be looked for, if its slash was lost.
    (tmp_path / "ckpt-77").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    checkpoint = IteratorCheckpoint("memory://")
    step = uuid.uuid4().int % 10**9
    assert checkpoint.save_to_directory(advanced(3), step=step, keep=0) == f"memory://ckpt-{step}"
    assert checkpoint.list_checkpoints()[step] == f"memory://ckpt-{step}"
    assert checkpoint.restore(Data(), step=step).at == 3
    for root in ("/", "file:///"):
        assert IteratorCheckpoint(root).list_checkpoints() == {}


def test_the_working_directory_is_a_base_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    handler = StateHandler()
    handler.save_to_directory("", {"x": 1}, step=3)
    assert (tmp_path / "ckpt-3").is_file()
    assert handler.list_checkpoints("") == {3: "./ckpt-3"}


def test_a_uri_that_became_a_path_is_refused() -> None:
    with pytest.raises(ValueError, match="give it as a string"):
        IteratorCheckpoint(Path("s3://bucket/run")).save_to_directory(advanced(3), step=3)


def test_a_step_is_no_base_directory_of_itself(s3: Place) -> None:
    uri = IteratorCheckpoint(s3.uri()).save_to_directory(advanced(3), step=3)
    assert IteratorCheckpoint(uri).list_checkpoints() == {}


def test_a_link_that_is_pruned_leaves_what_it_leads_to(tmp_path: Path) -> None:
    IteratorCheckpoint(tmp_path / "archive").save_to_directory(advanced(1), step=1)
    checkpoint = IteratorCheckpoint(tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "ckpt-1").symlink_to(tmp_path / "archive" / "ckpt-1")
    assert checkpoint.restore_latest(Data()).at == 1
    checkpoint.save_to_directory(advanced(2), step=2, keep=1)
    assert list(checkpoint.list_checkpoints()) == [2]
    assert IteratorCheckpoint(tmp_path / "archive").restore_latest(Data()).at == 1


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------


def test_what_is_no_iterator_is_refused(tmp_path: Path) -> None:
    checkpoint = IteratorCheckpoint(tmp_path)
    checkpoint.save_to_directory(advanced(3), step=3)

    class OnlyGets:
        def get_state(self) -> object:
            return [1]

    class OnlySets:
        def set_state(self, state: object) -> None:
            raise AssertionError

    with pytest.raises(ValueError, match="list has no method get_state"):
        checkpoint.save_to_directory([1], step=4)
    with pytest.raises(ValueError, match="OnlyGets must return a dict, not list"):
        checkpoint.save_to_directory(OnlyGets(), step=4)
    with pytest.raises(ValueError, match="OnlyGets has no method set_state"):
        checkpoint.restore(OnlyGets())
    with pytest.raises(ValueError, match="OnlySets has no method get_state"):
        checkpoint.restore(OnlySets())
    with pytest.raises(ValueError, match="not negative"):
        checkpoint.save_to_directory(Data(), step=-1)
    with pytest.raises(TypeError):
        checkpoint.save_to_directory(Data(), step=1.5)  # type: ignore[arg-type]
    assert checkpoint.list_checkpoints().keys() == {3}


def test_what_cannot_be_stored_is_named_before_anything_is_written(place: Place) -> None:
    checkpoint = IteratorCheckpoint(place.uri())
    checkpoint.save_to_directory(advanced(3), step=3)
    data = Data()
    data.identity = {"sampler": {"fn": print}}
    with pytest.raises(TypeError, match=r'state\["sampler"\]\["fn"\]'):
        checkpoint.save_to_directory(data, step=3, overwrite=True)
    with pytest.raises(TypeError, match=r'metadata\["fn"\]'):
        checkpoint.save_to_directory(Data(), step=4, metadata={"fn": print})  # type: ignore[dict-item]
    assert checkpoint.list_checkpoints().keys() == {3}
    assert checkpoint.restore_latest(Data()).at == 3


@pytest.mark.parametrize("field", ["sampler_repr", "data_source_repr", "shard_count", "worker_count"])
def test_the_state_of_another_pipeline_is_refused_and_the_iterator_stays(tmp_path: Path, field: str) -> None:
    checkpoint = IteratorCheckpoint(tmp_path)
    checkpoint.save_to_directory(advanced(3, **{field: 8}), step=3)
    other = advanced(5, seed=1, **{field: 4})
    with pytest.raises(ValueError, match=f"{field} was 8, and is 4"):
        checkpoint.restore_latest(other)
    assert (other.at, other.order.tolist()) == (5, Data(seed=1).order.tolist())
    # What only one of them knows of is not compared, nor is anything else.
    assert checkpoint.restore_latest(Data()).at == 3
    assert checkpoint.restore_latest(Data(**{field: 8, "shard_index": 1})).at == 3


@pytest.mark.parametrize("damage", ["payload", "foreign tree", "truncated", "flipped", "a file too many"])
def test_a_damaged_or_foreign_step_is_refused_and_the_iterator_stays(place: Place, damage: str, tmp_path: Path) -> None:
    base = place.uri()
    checkpoint = IteratorCheckpoint(base)
    uri = checkpoint.save_to_directory(advanced(3), step=3)
    item = storage.at(uri, place.settings)
    content = b"".join(bytes(chunk) for chunk in item.get().chunks)  # type: ignore[union-attr]
    if damage == "payload":
        SyncCheckpoint(uri).write(b"something else")
    elif damage in {"foreign tree", "a file too many"}:
        (tmp_path / "tree" / "state").mkdir(parents=True)
        (tmp_path / "tree" / "state" / "0.npy").write_bytes(b"no array")
        SyncCheckpoint(uri).save(tmp_path / "tree")
    else:
        half = len(content) // 2
        item.put([content[:half] if damage == "truncated" else content[:half] + b"\xff\x00" + content[half + 2 :]])
    data = advanced(5, seed=1)
    with pytest.raises(CorruptCheckpointError, match=r"ckpt-3"):
        checkpoint.restore_latest(data)
    with pytest.raises(ValueError, match=r"ckpt-3"):
        checkpoint.restore(data, step=3)
    assert (data.at, data.order.tolist()) == (5, Data(seed=1).order.tolist())


def test_a_sparse_file_takes_no_memory(tmp_path: Path) -> None:
    header = tarfile.TarInfo("state/0.bin")
    header.type = tarfile.GNUTYPE_SPARSE
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    # The size that it would have.
    block[483:495] = b"%011o\0" % (1 << 33)
    block[148:156] = b"%06o\0 " % sum(block[:148] + b" " * 8 + block[156:512])
    with gzip.open(tmp_path / "ckpt-3", "wb") as file:
        file.write(bytes(block) + bytes(10240))
    with pytest.raises(CorruptCheckpointError, match="ckpt-3"):
        IteratorCheckpoint(tmp_path).restore(Data())


def test_a_folder_in_the_place_of_a_step_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "ckpt-3").mkdir()
    (tmp_path / "ckpt-3" / "orbax").write_text("x")
    checkpoint = IteratorCheckpoint(tmp_path)
    with pytest.raises(ValueError, match="ckpt-3"):
        checkpoint.save_to_directory(Data(), step=3, overwrite=True)
    assert checkpoint.list_checkpoints() == {}
    assert (tmp_path / "ckpt-3" / "orbax").read_text() == "x"


@pytest.mark.long
def test_storage_that_refuses_is_a_storage_error(s3: Place) -> None:
    wrong = {**s3.options, "endpoint_url": "http://127.0.0.1:9", "config_kwargs": {"retries": {"max_attempts": 0}}}
    checkpoint = IteratorCheckpoint(s3.uri(), storage_options=wrong)
    with pytest.raises(StorageError, match="cannot list"):
        checkpoint.get_latest_step()


# ---------------------------------------------------------------------------------------------------------------------
# Keeping and listing
# ---------------------------------------------------------------------------------------------------------------------


class Steps(RuleBasedStateMachine):
    """Any sequence of saves, against what a dict would hold."""

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.checkpoint = IteratorCheckpoint(self.folder.name)
        self.expected: dict[int, int] = {}
        self.saved = 0

    @rule(step=st.integers(0, 12), keep=st.integers(-1, 4), overwrite=st.booleans())
    def save(self, step: int, keep: int, overwrite: bool) -> None:
        self.saved += 1
        if step in self.expected and not overwrite:
            with pytest.raises(ValueError, match="already"):
                self.checkpoint.save_to_directory(advanced(1), step=step, keep=keep)
            return
        self.checkpoint.save_to_directory(
            StateDictIterator(_Holding(self.saved)), step=step, keep=keep, overwrite=overwrite
        )
        self.expected[step] = self.saved
        if keep > 0:
            kept = {*sorted(self.expected)[-keep:], step}
            self.expected = {step: value for step, value in self.expected.items() if step in kept}

    @rule(step=st.integers(0, 12))
    def restore(self, step: int) -> None:
        holding = _Holding(0)
        if step in self.expected:
            self.checkpoint.restore(StateDictIterator(holding), step=step)
            assert holding.value == self.expected[step]
        else:
            with pytest.raises(ValueError, match="found"):
                self.checkpoint.restore(StateDictIterator(holding), step=step)

    @rule()
    def latest(self) -> None:
        latest = max(self.expected, default=None)
        assert self.checkpoint.get_latest_step() == latest
        assert list(self.checkpoint.list_checkpoints()) == sorted(self.expected)
        if latest is not None:
            holding = _Holding(0)
            self.checkpoint.restore_latest(StateDictIterator(holding))
            assert holding.value == self.expected[latest]

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()


class _Holding:
    def __init__(self, value: int) -> None:
        self.value = value

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.value = state["value"]


TestSteps = Steps.TestCase
TestSteps.settings = settings(
    max_examples=40, stateful_step_count=20, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def test_other_objects_are_neither_listed_nor_removed(place: Place) -> None:
    base = place.uri()
    others = ["ckpt-", "ckpt-x", "ckpt-01", "ckpt-5.tmp", "5", "xckpt-5", "ckpt-6/inner", "model/ckpt-7", "checkpoint"]
    for name in others:
        storage.at(f"{base}/{name}", place.settings).put([b"x"])
    checkpoint = IteratorCheckpoint(base)
    for step in (8, 9, 10):
        checkpoint.save_to_directory(advanced(step), step=step, keep=2)
    assert list(checkpoint.list_checkpoints()) == [9, 10]
    for name in others:
        assert storage.at(f"{base}/{name}", place.settings).get() is not None


def test_the_old_steps_are_removed_only_when_the_new_one_is_safe(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = IteratorCheckpoint(place.uri())
    for step in (1, 2):
        checkpoint.save_to_directory(advanced(step), step=step, keep=2)

    def fail(*_: object, **__: object) -> None:
        msg = "full"
        raise OSError(msg)

    with monkeypatch.context() as patch:
        patch.setattr(storage.LocalObject if place.is_local else storage.S3Object, "_put", fail)
        with pytest.raises(OSError, match="full"):
            checkpoint.save_to_directory(advanced(3), step=3, keep=1)
    assert list(checkpoint.list_checkpoints()) == [1, 2]
    with monkeypatch.context() as patch:
        patch.setattr(storage.LocalObject if place.is_local else storage.S3Object, "remove", fail)
        with pytest.raises(OSError, match="full"):
            checkpoint.save_to_directory(advanced(3), step=3, keep=1)
    assert checkpoint.restore_latest(Data()).at == 3
    checkpoint.save_to_directory(advanced(4), step=4, keep=1)
    assert list(checkpoint.list_checkpoints()) == [4]


@pytest.mark.long
def test_ten_thousand_steps_are_listed_in_one_pass(s3: Place) -> None:
    import s3fs

    base, count = s3.uri(), 2_500
    filesystem = s3fs.S3FileSystem(**s3.options)
    filesystem.pipe({f"{base}/ckpt-{step}": b"" for step in range(count)}, batch_size=64)
    filesystem.pipe({f"{base}/ckpt-{step}/inner": b"" for step in range(50)}, batch_size=64)
    checkpoint = IteratorCheckpoint(base, storage_options=s3.options)
    own = storage.at(base, s3.settings)._filesystem  # type: ignore[attr-defined]
    requests: list[str] = []
    own.s3.meta.events.register("before-call.s3", lambda model, **_: requests.append(model.name))
    assert checkpoint.list_checkpoints().keys() == set(range(count))
    # Of a thousand keys each.
    assert requests == ["ListObjectsV2"] * 3


@pytest.mark.parametrize("s3_too", [False, True])
def test_a_reader_always_finds_a_whole_step_while_another_process_saves_and_prunes(
    tmp_path: Path, s3_too: bool, request: pytest.FixtureRequest
) -> None:
    base = request.getfixturevalue("s3").uri() if s3_too else str(tmp_path)
    checkpoint = IteratorCheckpoint(base)
    checkpoint.save_to_directory(advanced(0), step=0)
    stop = threading.Event()

    def save() -> None:
        for step in itertools.count(1):
            if stop.is_set():
                return
            checkpoint.save_to_directory(Data(size=50), step=step, keep=1)

    thread = threading.Thread(target=save)
    thread.start()
    try:
        for _ in range(60):
            assert len(IteratorCheckpoint(base).restore_latest(Data()).order) in {20, 50}
    finally:
        stop.set()
        thread.join()


def test_a_step_that_is_pruned_while_it_is_being_read_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    base = f"memory://{uuid.uuid4().hex}"
    checkpoint = IteratorCheckpoint(base)
    checkpoint.save_to_directory(advanced(1), step=1)
    fetched = storage.FsspecObject._chunks

    def pruned(self: Any, part: Any) -> Any:
        monkeypatch.undo()
        checkpoint.save_to_directory(advanced(2), step=2, keep=1)
        return fetched(self, part)

    monkeypatch.setattr(storage.FsspecObject, "_chunks", pruned)
    assert IteratorCheckpoint(base).restore(Data()).at == 2


def test_a_killed_saver_never_leaves_a_torn_step(tmp_path: Path) -> None:
    code = """
    import itertools, sys
    import numpy as np
    from flytekit_ckpt.iterators import IteratorCheckpoint

    class Data:
        def get_state(self):
            return {"step": self.step, "array": np.full(200_000, self.step)}

    data, checkpoint = Data(), IteratorCheckpoint(sys.argv[1])
    start = checkpoint.get_latest_step() or 0
    for data.step in itertools.count(start + 1):
        checkpoint.save_to_directory(data, step=data.step, keep=2)
        print(data.step, flush=True)
    """

    class Holder:
        def __init__(self) -> None:
            self.state: dict[str, Any] = {}

        def get_state(self) -> dict[str, Any]:
            return self.state

        def set_state(self, state: dict[str, Any]) -> None:
            self.state = state

    generator = random.Random(1)
    last = 0
    for _ in range(12):
        command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(3):
                last = int(process.stdout.readline())
            time.sleep(generator.random() * 0.02)
            process.send_signal(signal.SIGKILL)
            rest = process.stdout.read().split()
            last = int(rest[-1]) if rest else last
        checkpoint = IteratorCheckpoint(tmp_path)
        state = checkpoint.restore_latest(Holder()).state
        # The last one that was reported, or one more that was not.
        assert state["step"] in {last, last + 1}
        assert (state["array"] == state["step"]).all()
        for step in checkpoint.list_checkpoints():
            assert checkpoint.restore(Holder(), step=step).state["step"] == step


# ---------------------------------------------------------------------------------------------------------------------
# Behind the caller
# ---------------------------------------------------------------------------------------------------------------------


def test_the_state_is_taken_at_the_call(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = IteratorCheckpoint(place.uri(), async_checkpointing=True)
    hold = threading.Event()
    kind = storage.LocalObject if place.is_local else storage.S3Object
    put = kind._put

    def slow(*arguments: Any) -> Any:
        assert hold.wait(30)
        return put(*arguments)

    monkeypatch.setattr(kind, "_put", slow)
    data = Data()
    for step in range(1, 3):
        next(data)
        data.order = data.order.copy()
        checkpoint.save_to_directory(data, step=step, keep=0)
        # In place, right after the call.
        data.order[:] = -1
    hold.set()
    checkpoint.wait_until_finished()
    assert list(checkpoint.list_checkpoints()) == [1, 2]
    assert checkpoint.restore(Data(), step=1).order.tolist() == Data().order.tolist()
    assert [checkpoint.restore(Data(), step=step).at for step in (1, 2)] == [1, 2]


def test_reading_waits_for_what_is_being_saved(tmp_path: Path) -> None:
    checkpoint = IteratorCheckpoint(tmp_path, async_checkpointing=True)
    for step in range(20):
        checkpoint.save_to_directory(advanced(step % 20), step=step)
        assert checkpoint.get_latest_step() == step
    assert checkpoint.restore_latest(Data()).at == 19


@pytest.mark.parametrize("asking", ["wait_until_finished", "save", "restore", "list_checkpoints", "close"])
def test_what_failed_behind_the_caller_is_raised_by_the_next_call_once(tmp_path: Path, asking: str) -> None:
    handler = StateHandler(async_checkpointing=True)
    checkpoint = IteratorCheckpoint(tmp_path, handler)
    checkpoint.save_to_directory(advanced(3), step=3)
    checkpoint.save_to_directory(advanced(4), step=3)
    ask = {
        "wait_until_finished": checkpoint.wait_until_finished,
        "save": lambda: (time.sleep(0.5), checkpoint.save_to_directory(advanced(5), step=5)),
        "restore": lambda: checkpoint.restore(Data()),
        "list_checkpoints": checkpoint.list_checkpoints,
        "close": handler.close,
    }[asking]
    with pytest.raises(ValueError, match="overwrite=True"):
        ask()
    checkpoint.wait_until_finished()
    assert checkpoint.restore_latest(Data()).at == 3


def test_what_cannot_be_stored_is_refused_at_the_call_itself(tmp_path: Path) -> None:
    checkpoint = IteratorCheckpoint(tmp_path, async_checkpointing=True)
    data = Data()
    data.identity = {"fn": print}
    with pytest.raises(TypeError, match=r'state\["fn"\]'):
        checkpoint.save_to_directory(data, step=3)
    checkpoint.wait_until_finished()
    assert checkpoint.list_checkpoints() == {}


@pytest.mark.parametrize("ending", ["", "sys.exit(3)", "raise RuntimeError"])
@pytest.mark.parametrize("kept", [True, False])
def test_a_process_that_ends_normally_finishes_first(place: Place, ending: str, kept: bool) -> None:
    code = f"""
    import sys
    from flytekit_ckpt.iterators import IteratorCheckpoint

    class Data:
        def get_state(self):
            return {{"at": self.at, "bytes": bytes(1_000_000)}}

    data, checkpoint = Data(), IteratorCheckpoint(sys.argv[1], async_checkpointing=True)
    for data.at in range(5):
        checkpoint.save_to_directory(data, step=data.at)
    {"" if kept else "del checkpoint"}
    {ending}
    """
    base = place.uri()
    environment = dict(os.environ)
    if not place.is_local:
        # By its name: looking that up takes a thread.
        environment["FLYTE_AWS_ENDPOINT"] = place.options["endpoint_url"].replace("127.0.0.1", "localhost")
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), base], env=environment, check=False, timeout=60)
    assert IteratorCheckpoint(base).get_latest_step() == 4
    assert StateHandler().restore(base)["at"] == 4


def test_only_two_states_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = IteratorCheckpoint(tmp_path, async_checkpointing=True)
    hold = threading.Event()
    put = storage.LocalObject._put
    monkeypatch.setattr(storage.LocalObject, "_put", lambda *arguments: (hold.wait(30), put(*arguments))[1])
    taken: list[int] = []

    def save() -> None:
        for step in range(4):
            checkpoint.save_to_directory(advanced(1), step=step, keep=0)
            taken.append(step)

    thread = threading.Thread(target=save)
    thread.start()
    thread.join(0.5)
    assert taken == [0, 1]
    hold.set()
    thread.join()
    assert list(checkpoint.list_checkpoints()) == [0, 1, 2, 3]


def test_a_relative_folder_is_where_it_was_at_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    checkpoint = IteratorCheckpoint("steps", async_checkpointing=True)
    for step in (1, 2):
        assert checkpoint.save_to_directory(advanced(1), step=step, keep=0) == f"steps/ckpt-{step}"
    os.chdir(tmp_path / "elsewhere")
    checkpoint.wait_until_finished()
    assert sorted(item.name for item in (tmp_path / "steps").iterdir()) == ["ckpt-1", "ckpt-2"]


@pytest.mark.parametrize("used_before", [True, False])
def test_a_fork_neither_waits_for_what_its_parent_saves_nor_loses_what_it_saves_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, used_before: bool
) -> None:
    checkpoint = IteratorCheckpoint(tmp_path, async_checkpointing=True)
    hold = threading.Event()
    put = storage.LocalObject._put
    if used_before:
        checkpoint.save_to_directory(advanced(1), step=1, keep=0)
        checkpoint.wait_until_finished()
        monkeypatch.setattr(storage.LocalObject, "_put", lambda *arguments: (hold.wait(60), put(*arguments))[1])
        checkpoint.save_to_directory(advanced(2), step=2, keep=0)
    process = os.getpid()

    def work() -> None:
        assert os.getpid() != process
        storage.LocalObject._put = put  # type: ignore[method-assign]
        checkpoint.save_to_directory(advanced(3), step=3, keep=0)
        checkpoint.wait_until_finished()

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(30)
    alive = child.is_alive()
    child.kill()
    hold.set()
    assert not alive
    assert child.exitcode == 0
    assert checkpoint.restore(Data(), step=3).at == 3
    assert list(checkpoint.list_checkpoints()) == ([1, 2, 3] if used_before else [3])


# ---------------------------------------------------------------------------------------------------------------------
# Inside a task, and iterators that people have
# ---------------------------------------------------------------------------------------------------------------------


def test_steps_in_a_folder_that_a_task_saves_come_back_with_it(place: Place, tmp_path: Path) -> None:
    folder = tmp_path / "state"
    IteratorCheckpoint(folder / "data").save_to_directory(advanced(6), step=6)
    (folder / "model").write_text("weights")
    uri = place.uri()
    SyncCheckpoint(uri).save(folder)
    task = SyncCheckpoint("", uri)
    restored = task.restore()
    assert restored is not None
    assert IteratorCheckpoint(restored / "data").restore_latest(Data()).at == 6


def test_any_handler_with_the_methods_is_used(tmp_path: Path) -> None:
    calls: list[Any] = []

    class Handler:
        def __getattr__(self, name: str) -> Any:
            def call(*arguments: Any, **keywords: Any) -> Any:
                calls.append((name, arguments, keywords))
                return {"restore": {"at": 3, "order": [1]}, "latest_step": 3}.get(name, name)

            return call

    checkpoint = PipelineCheckpoint(tmp_path, handler=Handler())
    data = advanced(2)
    assert checkpoint.save_to_step(data, 4, 2, 3, True, {"a": 1}) == "save_to_directory"
    name, (directory, state), keywords = calls.pop()
    assert (name, directory, state["at"]) == ("save_to_directory", tmp_path, 2)
    assert keywords == {"step": 4, "keep": 3, "overwrite": True, "metadata": {"a": 1}}
    assert checkpoint.restore_latest(data).at == 3
    assert checkpoint.list_checkpoints() == "list_checkpoints"  # type: ignore[comparison-overlap]
    checkpoint.wait_until_finished()
    assert calls[-1][0] == "wait_until_finished"


@pytest.mark.heavy
def test_grains_iterators_resume(place: Place) -> None:
    grain = pytest.importorskip("grain")
    dataset = grain.MapDataset.range(50).seed(3).shuffle().batch(4).to_iter_dataset()
    iterator = iter(dataset)
    for _ in range(5):
        next(iterator)
    checkpoint = IteratorCheckpoint(place.uri())
    checkpoint.save_to_directory(iterator, step=5)
    rest = [batch.tolist() for batch in iterator]
    other = checkpoint.restore_latest(iter(dataset))
    assert [batch.tolist() for batch in other] == rest
    assert len(rest) > 5


@pytest.mark.heavy
@pytest.mark.parametrize("workers", [0, 2])
def test_torchdatas_loader_resumes(place: Place, workers: int) -> None:
    import torch
    from torchdata.stateful_dataloader import StatefulDataLoader

    def loader(seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        return StatefulDataLoader(list(range(50)), batch_size=4, shuffle=True, generator=generator, num_workers=workers)

    first = loader(1)
    iterator = iter(first)
    for _ in range(5):
        next(iterator)
    checkpoint = IteratorCheckpoint(place.uri())
    checkpoint.save_to_directory(StateDictIterator(first), step=5)
    rest = [batch.tolist() for batch in iterator]
    other = checkpoint.restore_latest(StateDictIterator(loader(2)))
    assert [batch.tolist() for batch in other] == rest
    assert len(rest) > 5
