"""Which checkpoint an attempt goes on from, whatever the attempts before it have died of."""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import subprocess
import sys
import textwrap
import uuid
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import flytekit_ckpt
from flytekit_ckpt import (
    CorruptCheckpointError,
    StorageError,
    SyncCheckpoint,
    credentials,
    installation,
    runner,
    running,
    storage,
)
from flytekit_ckpt.home import LATEST, Home, Pointer
from flytekit_ckpt.running import Running
from flytekit_ckpt.v2 import Checkpoint
from tests.conftest import Place, Task
from tests.platforms import needs
from tests.test_storage import requests

FACES = [SyncCheckpoint, Checkpoint]


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "local":
        return Place(str(tmp_path / "checkpoints"))
    s3: Place = request.getfixturevalue("s3")
    # The destinations of attempts are named here, and those of one test are not those of another.
    return replace(s3, root=s3.uri())


def task_attempt(place: Place, number: int, run: str = "r", *, source: bool = True, **known: Any) -> Running:
    """An attempt that finds nothing at its source, unless one is told."""
    at = f"{place.root}/{run}/{known.get('node', 'n0')}"
    before = f"{at}/{number - 1}" if source and number else None
    return Running(f"{at}/{number}", before, "p", "d", run, "task", known.get("node", "n0"), number)


def made(place: Place, attempt: Running, kind: Any = SyncCheckpoint, **options: Any) -> Any:
    with running.as_running(attempt):
        return kind(attempt.destination, attempt.source, storage_options=place.options, **options)


def in_another_process(place: Place, code: str, **variables: str) -> str:
    """Run code with `destination`, `source` and `make`, and return what it prints."""
    script = f"""
import os
from flytekit_ckpt import SyncCheckpoint
options = {place.options!r}
{textwrap.dedent(code)}
"""
    environment = {**os.environ, **variables}
    return subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, env=environment, timeout=60
    ).stdout.strip()


# Its own destination --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["TORCHELASTIC_RESTART_COUNT", "JOBSET_RESTART_ATTEMPT"])
def test_a_restarted_attempt_goes_on_from_its_own_newest(place: Place, variable: str) -> None:
    source, destination = place.uri(), place.uri()
    SyncCheckpoint(source, storage_options=place.options).write(b"old")
    save = f"cp = SyncCheckpoint({destination!r}, {source!r}, storage_options=options); cp.write(b'new')"
    in_another_process(place, save)
    load = f"print(SyncCheckpoint({destination!r}, {source!r}, storage_options=options).read())"
    assert in_another_process(place, load, **{variable: "1"}) == "b'new'"
    assert in_another_process(place, load, **{variable: "0"}) == "b'old'"


def test_a_restarted_attempt_does_not_take_what_was_carried_for_saved(place: Place) -> None:
    source, destination = place.uri(), place.uri()
    SyncCheckpoint(source, storage_options=place.options).write(b"old")
    code = f"""
    with SyncCheckpoint({destination!r}, {source!r}, storage_options=options) as cp:
        pass
    """
    in_another_process(place, code)
    assert storage.at(destination, place.settings).exists()
    load = f"""
    import logging
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=__import__("sys").stdout)
    SyncCheckpoint({destination!r}, {source!r}, storage_options=options).read()
    """
    told = in_another_process(place, load, JOBSET_RESTART_ATTEMPT="1")
    assert "(source; passed over: own destination: nothing was saved there)" in told


def test_an_attempt_that_nobody_says_was_restarted_finds_its_own_where_the_source_has_nothing(place: Place) -> None:
    destination = place.uri()
    in_another_process(place, f"SyncCheckpoint({destination!r}, storage_options=options).write(b'1')")
    load = f"print(SyncCheckpoint({destination!r}, storage_options=options).read())"
    assert in_another_process(place, load) == "b'1'"


@pytest.mark.parametrize("origin", ["nothing", "source", "run"])
def test_a_rank_that_starts_later_loads_what_the_others_have_loaded(place: Place, origin: str) -> None:
    source, destination, other = place.uri(), place.uri(), place.uri()
    SyncCheckpoint(other, storage_options=place.options).write(b"other run")
    if origin == "source":
        SyncCheckpoint(source, storage_options=place.options).write(b"source")
    resume = f", resume_from={other!r}" if origin == "run" else ""
    make = f"cp = SyncCheckpoint({destination!r}, {source!r}, storage_options=options{resume})"
    ranks = {"WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": "0"}
    first = in_another_process(place, f"{make}; print(cp.read()); cp.write(b'since')", **ranks, RANK="0")
    later = in_another_process(place, f"{make}; print(cp.read())", **ranks, RANK="1")
    expected = {"nothing": "None", "source": "b'source'", "run": "b'other run'"}[origin]
    assert [first, later] == [expected, expected]


@pytest.mark.parametrize("kind", FACES)
def test_another_instance_of_the_process_does_not_load_what_the_first_has_saved_since(place: Place, kind: Any) -> None:
    uri = place.uri()
    SyncCheckpoint(uri, storage_options=place.options).write(b"since")
    checkpoint = kind(uri, storage_options=place.options)
    assert (checkpoint.read() if kind is SyncCheckpoint else checkpoint.load_sync()) is None


def test_an_attempt_that_uses_no_checkpoint_costs_one_request(s3: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = requests(storage.at(s3.uri(), s3.settings), monkeypatch)  # type: ignore[arg-type]
    checkpoint = SyncCheckpoint(s3.uri(), s3.uri(), storage_options=s3.options)
    checkpoint.close()
    assert sent == ["list_objects_v2"]


def test_what_has_been_carried_forward_is_not_looked_at_again(s3: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    source, destination = s3.uri(), s3.uri()
    SyncCheckpoint(source, storage_options=s3.options).write(b"5")
    first = SyncCheckpoint(destination, source, storage_options=s3.options)
    first.close()
    sent = requests(storage.at(source, s3.settings), monkeypatch)  # type: ignore[arg-type]
    second = Checkpoint(destination, source, storage_options=s3.options)
    second.load_sync()
    second._resumption.carry_forward.close()
    assert sent == ["get_object"]


@needs("flytekit")
def test_the_clients_of_stores_are_imported_by_no_other_thread(s3: Place, tmp_path: Path) -> None:
    """Two threads in the midst of one package block each other, and Python fails one of their imports."""
    script = f"""
import sys
sys.argv = ["pyflyte-execute", "--checkpoint-path", {s3.uri()!r}, "--prev-checkpoint", {s3.uri()!r}]
import flytekit_ckpt.auto
import time
time.sleep(1)
assert not {{"s3fs", "fsspec", "aiobotocore"}} & {{*sys.modules}}
import flytekit, s3fs
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, timeout=60)


def test_a_package_that_is_being_imported_is_not_asked_for_its_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("flytekit", "flyte", "flyte.storage"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__spec__._initializing = True  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    given = {"key": "k", "secret": "s", "endpoint_url": "http://localhost"}
    assert credentials.resolved("s3", given).items() >= given.items()


def test_the_options_of_install_reach_the_workers_of_elastic_tasks() -> None:
    """torch elastic sends the function to them, and asks for its name."""
    flytekit_ckpt.install(home="s3://bucket/home")
    try:
        worker = installation._with_options(installation._flytekit_worker)
        flytekit_ckpt.install(retries=3)
        sent = pickle.loads(pickle.dumps(worker))
    finally:
        flytekit_ckpt.uninstall()
    assert sent.args == ({"home": "s3://bucket/home", "retries": 3},)
    assert sent.__name__ == "_flytekit_worker"


# A home ---------------------------------------------------------------------------------------------------------------


def test_with_a_home_any_number_of_attempts_may_die_before_their_first_breath(place: Place) -> None:
    home = place.uri()
    made(place, task_attempt(place, 0), home=home).write(b"5")
    later = made(place, task_attempt(place, 7), home=home)
    assert later.prev_exists()
    assert later.read() == b"5"
    # And the one after it needs no home.
    later.close()
    assert made(place, task_attempt(place, 8)).read() == b"5"
    for stranger in (task_attempt(place, 1, "another"), task_attempt(place, 1, node="n1")):
        assert made(place, stranger, home=home).read() is None


@pytest.mark.parametrize("kind", FACES)
def test_a_home_is_told_of_what_is_loaded_too(place: Place, kind: Any) -> None:
    """Who saved it may have been killed before it could tell."""
    home = place.uri()
    made(place, task_attempt(place, 0)).write(b"5")
    loading = made(place, task_attempt(place, 1), kind, home=home, carry_forward=False)
    assert (loading.read() if kind is SyncCheckpoint else loading.load_sync().read_bytes()) == b"5"
    assert made(place, task_attempt(place, 7), home=home).read() == b"5"


def test_a_pointer_says_what_was_saved(place: Place) -> None:
    home, attempt = place.uri(), task_attempt(place, 3)
    made(place, attempt, Checkpoint, home=home).save_sync(b"123456789")
    stored = storage.at(f"{home}/p/d/task/n0/r", place.settings).get()
    assert stored is not None
    pointer = json.loads(b"".join(stored.chunks))
    assert pointer["checkpoint"] == attempt.destination
    assert (pointer["attempt"], pointer["size"], pointer["crc32"]) == (3, 9, "cbf43926")


def test_a_later_attempts_pointer_stays(place: Place) -> None:
    home = place.uri()
    old, new = (made(place, task_attempt(place, number), home=home) for number in (0, 1))
    old.write(b"0")
    new.write(b"1")
    old.write(b"0 again")
    assert made(place, task_attempt(place, 9), home=home).read() == b"1"


def test_pointers_of_several_writers_are_never_lost(place: Place) -> None:
    home = Home(place.uri(), task_attempt(place, 0), place.settings)
    homes = [Home(home._root, task_attempt(place, number), place.settings) for number in (2, 0, 3, 1)]
    for one in (*homes, *reversed(homes)):
        one.record(str(one._attempt.destination), storage.Written(1, None), None)
    pointer = home.find()
    assert pointer is not None
    assert pointer.attempt == 3
    assert [older.attempt for older in pointer.older] == [2]


@pytest.mark.parametrize("kind", FACES)
def test_a_pointer_to_what_is_gone_is_passed_over(place: Place, kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    home, attempts = place.uri(), [task_attempt(place, number) for number in (0, 1)]
    for attempt in attempts:
        made(place, attempt, home=home).write(b"%d" % (attempt.number or 0))
    storage.at(str(attempts[1].destination), place.settings).remove()
    checkpoint = made(place, task_attempt(place, 5), kind, home=home)
    found = checkpoint.read() if kind is SyncCheckpoint else checkpoint.load_sync().read_bytes()
    assert found == b"0"
    assert "leads to a checkpoint that is gone" in caplog.text


def test_without_permission_for_the_home_a_task_runs(s3: Place, caplog: pytest.LogCaptureFixture) -> None:
    # Nobody may write to another user's bucket, and nobody made this one.
    forbidden = s3_of_another_user(s3)
    checkpoint = made(s3, task_attempt(s3, 0), home=forbidden)
    assert checkpoint.read() is None
    checkpoint.write(b"1")
    checkpoint.write(b"2")
    assert made(s3, task_attempt(s3, 1), home=forbidden).read() == b"2"
    # Once for each instance: by the first save, and by the load.
    assert caplog.text.count("the home does not know the checkpoint") == 2


def s3_of_another_user(s3: Place) -> str:
    """Make a bucket that its policy lets nobody use."""
    import s3fs

    bucket = f"forbidden-{uuid.uuid4().hex[:8]}"
    filesystem = s3fs.S3FileSystem(**s3.options)
    filesystem.call_s3("create_bucket", Bucket=bucket)
    policy = {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Effect": "Deny",
                "Principal": {"AWS": ["*"]},
                "Action": ["s3:GetObject", "s3:PutObject", "s3:ListBucket"],
                "Resource": [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"],
            }
        ],
    }
    filesystem.call_s3("put_bucket_policy", Bucket=bucket, Policy=json.dumps(policy))
    return f"s3://{bucket}/home"


@pytest.mark.parametrize("kind", FACES)
def test_a_home_that_cannot_be_reached_is_an_error_for_a_load_and_a_warning_for_a_save(
    tmp_path: Path, kind: Any, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    checkpoint = made(Place(str(tmp_path)), task_attempt(Place(str(tmp_path)), 0), kind, home=f"{tmp_path}/file/home")
    with pytest.raises(StorageError, match="file/home"):
        checkpoint.read() if kind is SyncCheckpoint else checkpoint.load_sync()
    checkpoint.write(b"1") if kind is SyncCheckpoint else checkpoint.save_sync(b"1")
    assert "the home does not know the checkpoint" in caplog.text


def test_a_container_of_flyte_1_tells_its_task_and_each_of_a_map_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"EXECUTION_PROJECT": "p", "EXECUTION_DOMAIN": "d", "EXECUTION_ID": "r", "TASK_NAME": "train.work"}
    for name, value in variables.items():
        monkeypatch.setenv(f"FLYTE_INTERNAL_{name}", value)

    def told(command: str, outputs: str, attempt: str, **more: str) -> Running:
        options = ["--checkpoint-path", "s3://b/2", "--prev-checkpoint=s3://b/1", "--test", "--output-prefix", outputs]
        monkeypatch.setattr(sys, "argv", [f"/usr/bin/{command}", *options, "--", "task-name", "work"])
        monkeypatch.setenv("FLYTE_ATTEMPT_NUMBER", attempt)
        for name, value in more.items():
            monkeypatch.setenv(name, value)
        return running.running()

    single = told("pyflyte-execute", "s3://b/metadata/p-d-r/n0/data/1", "1")
    assert single == Running("s3://b/2", "s3://b/1", "p", "d", "r", "train.work", "n0/data", 1)
    assert told("pyflyte-execute", "s3://b/metadata/p-d-r/n0/data/2", "2").node == single.node
    index = {"BATCH_JOB_ARRAY_INDEX_VAR_NAME": "FLYTE_K8S_ARRAY_INDEX"}
    nodes = [
        told("pyflyte-map-execute", "s3://b/metadata/p-d-r/n0/data/0", "0", **index, FLYTE_K8S_ARRAY_INDEX=number).node
        for number in ("0", "1", "11")
    ]
    assert len({single.node, *nodes}) == 4
    # Where the attempt's number is not the end, it may be another task's.
    assert told("pyflyte-execute", "s3://b/metadata/p-d-r/n0/data/3", "0").node == ""
    assert told("train.py", "s3://b/metadata/p-d-r/n0/data/0", "0") == Running()


def test_a_container_of_flyte_2_tells_its_task(monkeypatch: pytest.MonkeyPatch) -> None:
    options = "--checkpoint-path s3://b/2 --project p --domain d --run-name {{.runName}} --name a0 --prev-checkpoint"
    resolver = ["--resolver", "r", "mod", "train", "instance", "work"]
    monkeypatch.setattr(sys, "argv", ["a0", *options.split(), "", *resolver])
    monkeypatch.setenv("RUN_NAME", "monday")
    monkeypatch.setenv("FLYTE_ATTEMPT_NUMBER", "4")
    assert running.running() == Running("s3://b/2", None, "p", "d", "monday", "train.work", "a0", 4)


def test_outside_of_a_platform_a_home_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    SyncCheckpoint(str(tmp_path / "checkpoint"), home=str(tmp_path / "home")).write(b"1")
    assert not (tmp_path / "home").exists()
    assert "nothing tells which task of which run this is" in caplog.text


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"checkpoint": "x", "attempt": 0, "saved": 1, "size": 0}'])
def test_a_damaged_pointer_is_an_error(place: Place, content: bytes) -> None:
    home, attempt = place.uri(), task_attempt(place, 0)
    storage.at(f"{home}/p/d/task/n0/r", place.settings).put([content or b"\0"])
    with pytest.raises(CorruptCheckpointError, match="the pointer at"):
        made(place, attempt, home=home).read()


@given(names=st.lists(st.text(max_size=8), min_size=2, max_size=2, unique=True))
def test_no_two_tasks_share_a_pointer(names: list[str]) -> None:
    keys = [Home("s3://b", Running("d", None, "p", "d", name, "t", "n0", 0), storage.Settings()).uri for name in names]
    assert keys[0] != keys[1]
    assert all(key.removeprefix("s3://b/p/d/t/n0/").isascii() and key.count("/") == 7 for key in keys)


# Another run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["uri", "name", "latest"])
def test_a_run_goes_on_from_another_one_where_it_has_nothing_of_its_own(place: Place, how: str) -> None:
    home = place.uri()
    for run in ("monday", "tuesday"):
        made(place, task_attempt(place, 0, run), home=home).write(run.encode())
    resume_from = {"uri": str(task_attempt(place, 0, "tuesday").destination), "name": "tuesday", "latest": LATEST}[how]
    first = made(place, task_attempt(place, 0, "today"), home=home, resume_from=resume_from)
    assert first.prev_exists()
    assert first.read() == b"tuesday"
    first.close()
    # What was only carried forward keeps where it came from.
    second = made(place, task_attempt(place, 1, "today"))
    assert second.read() == b"tuesday"
    second.write(b"today")
    state = storage.at(str(task_attempt(place, 1, "today").destination), place.settings).state()
    assert "tuesday" in state.metadata["resumed"]
    third = made(place, task_attempt(place, 2, "today"), home=home, resume_from=resume_from)
    assert third.read() == b"today"


def test_nothing_is_resumed_from_another_run_unless_it_is_asked_for(place: Place) -> None:
    home = place.uri()
    made(place, task_attempt(place, 0, "monday"), home=home).write(b"1")
    assert made(place, task_attempt(place, 0, "today"), home=home).read() is None
    nothing = made(place, task_attempt(place, 0, "today"), home=home, resume_from="sunday")
    assert nothing.read() is None


def test_a_uri_to_resume_from_that_is_wrong_is_an_error(place: Place) -> None:
    with pytest.raises(StorageError, match="correct the URI"):
        made(place, task_attempt(place, 0), resume_from=place.uri()).read()
    with pytest.raises(ValueError, match="names a run"):
        made(place, task_attempt(place, 0), resume_from="monday")
    with pytest.raises(ValueError, match="is not known"):
        made(place, task_attempt(place, 0), fallback="newest")


# Damage ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FACES)
def test_damage_is_an_error_unless_an_older_one_will_do(
    place: Place, kind: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home, attempts = place.uri(), [task_attempt(place, number) for number in range(3)]
    folder = tmp_path / "folder"
    folder.mkdir()
    for attempt in attempts[:2]:
        (folder / "file").write_bytes(b"%d" % (attempt.number or 0) * 1000)
        made(place, attempt, home=home).save(folder)
    target = storage.at(str(attempts[1].destination), place.settings)
    stored = target.get()
    assert stored is not None
    damaged = bytearray(b"".join(stored.chunks))
    damaged[len(damaged) // 2] ^= 1
    target.put([bytes(damaged)], describe=lambda: stored.metadata)

    def load(**options: Any) -> Path:
        checkpoint = made(place, attempts[2], kind, home=home, **options)
        loaded: Path = checkpoint.restore() if kind is SyncCheckpoint else checkpoint.load_sync()
        assert sorted(path.name for path in loaded.iterdir()) == ["file"]
        checkpoints.append(checkpoint)
        return loaded / "file"

    checkpoints: list[Any] = []
    with pytest.raises(CorruptCheckpointError):
        load()
    with caplog.at_level(logging.INFO, "flytekit_ckpt"):
        assert load(fallback="older").read_bytes() == b"0" * 1000
    assert "an older checkpoint is looked for" in caplog.text
    assert "is damaged" in caplog.text


# The local runner -----------------------------------------------------------------------------------------------------


def test_the_local_runner_takes_a_home_and_a_run_to_resume_from(place: Place, task: Task) -> None:
    target = task(
        """
        def work(n: int) -> int:
            cp = current_checkpoint()
            start = int(cp.read() or 0)
            cp.write(b"%d" % (start + n))
            return start + n
        """
    )
    options = {"home": place.uri(), "resume_from": LATEST}
    for expected in (2, 4, 6):
        result = runner.run(target, {"n": "2"}, root=place.root, options=options, report=lambda _: None)  # type: ignore[arg-type]
        assert result == expected


def test_pointers_are_ordered_by_attempt_and_then_by_time() -> None:
    def pointer(attempt: int | None, saved: str) -> Pointer:
        return Pointer("uri", attempt, saved, 1)

    early, late = "2026-01-01T00:00:00+00:00", "2026-01-01T00:30:00+01:00"
    assert pointer(1, early).rank > pointer(0, late).rank
    assert pointer(1, late).rank < pointer(1, early).rank


# Workers that torch elastic restarts ---------------------------------------------------------------------------------


@pytest.mark.heavy
def test_workers_that_torchrun_restarts_go_on_from_their_own_newest(place: Place, tmp_path: Path) -> None:
    """One of two workers is killed in the middle; all are restarted, and none goes back to the source."""
    pytest.importorskip("torch")
    source, destination = place.uri(), place.uri()
    SyncCheckpoint(source, storage_options=place.options).write(b"0")
    file = tmp_path / "train.py"
    file.write_text(f"""
import os, signal
import torch, torch.distributed
from flytekit_ckpt import SyncCheckpoint

torch.distributed.init_process_group("gloo")
rank, count = torch.distributed.get_rank(), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
cp = SyncCheckpoint({destination!r}, {source!r}, storage_options={place.options!r})
start = int(cp.read())
print(f"rank {{rank}} after {{count}} restarts starts at {{start}}", flush=True)
torch.distributed.barrier()
for step in range(start, 6):
    total = torch.tensor([step])
    torch.distributed.all_reduce(total)
    if rank == 0:
        cp.write(b"%d" % (step + 1))
    torch.distributed.barrier()
    if step == 3 and count == 0 and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
torch.distributed.destroy_process_group()
""")
    at = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1", *at, str(file)]
    # In the store of the agent, gloo finds the addresses of the workers that are gone.
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert ended.returncode == 0, ended.stderr
    # Lines of two processes may run into one another.
    starts = sorted(re.findall(r"rank (\d) after (\d) restarts starts at (\d+)", ended.stdout))
    assert [(rank, count) for rank, count, _ in starts] == [("0", "0"), ("0", "1"), ("1", "0"), ("1", "1")]
    assert [start for _, count, start in starts if count == "0"] == ["0", "0"]
    restarted = [start for _, count, start in starts if count == "1"]
    # The surviving one may have come to save a step more.
    assert restarted in (["4", "4"], ["5", "5"])
