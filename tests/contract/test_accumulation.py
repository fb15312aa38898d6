"""What several instances and processes save to one destination, killed in between, against flytekit's folder."""

from __future__ import annotations

import multiprocessing
import shutil
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from flytekit_ckpt import SyncCheckpoint
from tests.conftest import Place
from tests.contract.test_flytekit import flytekit_finds_the_server  # noqa: F401 - a fixture
from tests.trees import look, make

theirs = pytest.importorskip("flytekit.core.checkpointer")

Files = dict[str, bytes]


def work(orders: Connection, uri: str, options: dict[str, str]) -> None:
    """Save what is ordered, each time through the instance that is named."""
    instances: dict[int, SyncCheckpoint] = {}
    while True:
        instance, item = orders.recv()
        checkpoint = instances.setdefault(instance, SyncCheckpoint(uri, storage_options=options))
        try:
            checkpoint.write(item) if isinstance(item, bytes) else checkpoint.save(item)
            orders.send(None)
        except BaseException as error:  # noqa: BLE001 - the test is to hear of it
            orders.send(repr(error))


class Worker:
    """A process that saves to a destination."""

    def __init__(self, uri: str, place: Place) -> None:
        context = multiprocessing.get_context("spawn")
        self._orders, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, uri, place.options), daemon=True)
        self._process.start()

    def begin(self, instance: int, item: Path | bytes) -> None:
        self._orders.send((instance, item))

    def end(self) -> None:
        assert self._orders.poll(60), "it does not come to its end"
        assert self._orders.recv() is None

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


_FILES = st.dictionaries(st.sampled_from(["model.pt", "opt.pt", "a", "z"]), st.binary(max_size=40), min_size=1)
_SIZES = st.sampled_from([0, 0, 0, 200_000, 3_000_000])
_INSTANCES = st.integers(0, 1)
_WORKERS = st.integers(0, 2)


class Accumulation(RuleBasedStateMachine):
    """Workers save; flytekit saves the same to a folder of its own, one thing after the other."""

    place: Place

    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.uri = self.place.uri()
        self.workers: dict[int, Worker] = {}
        self.sources = 0

    def teardown(self) -> None:
        for worker in self.workers.values():
            worker.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def worker(self, number: int) -> Worker:
        if number not in self.workers:
            self.workers[number] = Worker(self.uri, self.place)
        return self.workers[number]

    def source(self, files: Files) -> Path:
        self.sources += 1
        return make(self.folder / f"source-{self.sources}", files)

    def saved_by_flytekit(self, item: Path | bytes) -> None:
        checkpoint = theirs.SyncCheckpoint(str(self.folder / "flytekit"))
        checkpoint.write(item) if isinstance(item, bytes) else checkpoint.save(item)

    def item(self, files: Files, size: int, as_file: bool) -> Path | bytes:
        """A file or a folder to be saved."""
        name = next(iter(files))
        files[name] += bytes(size)
        folder = self.source(files)
        return folder / name if as_file else folder

    @rule(worker=_WORKERS, instance=_INSTANCES, content=st.binary(max_size=40))
    def write(self, worker: int, instance: int, content: bytes) -> None:
        self.worker(worker).begin(instance, content)
        self.worker(worker).end()
        self.saved_by_flytekit(content)

    @rule(worker=_WORKERS, instance=_INSTANCES, files=_FILES, size=_SIZES, as_file=st.booleans())
    def save(self, worker: int, instance: int, files: Files, size: int, as_file: bool) -> None:
        item = self.item(files, size, as_file)
        self.worker(worker).begin(instance, item)
        self.worker(worker).end()
        self.saved_by_flytekit(item)

    @rule(instance=_INSTANCES, sizes=st.tuples(_SIZES, _SIZES, _SIZES), as_files=st.booleans())
    def save_at_once(self, instance: int, sizes: tuple[int, int, int], as_files: bool) -> None:
        items = [self.item({f"rank-{rank}.pt": b"%d" % self.sources}, sizes[rank], as_files) for rank in range(3)]
        for rank, item in enumerate(items):
            self.worker(rank).begin(instance, item)
        for rank, item in enumerate(items):
            self.worker(rank).end()
            self.saved_by_flytekit(item)

    @rule(worker=_WORKERS, instance=_INSTANCES, files=_FILES, size=_SIZES, wait=st.floats(0, 0.04))
    def be_killed_while_saving(self, worker: int, instance: int, files: Files, size: int, wait: float) -> None:
        item = self.item(files, size, as_file=False)
        self.worker(worker).begin(instance, item)
        time.sleep(wait)
        self.workers.pop(worker).kill()
        before = self.wanted()
        if self.found() != before:
            self.saved_by_flytekit(item)

    def wanted(self) -> object:
        folder = self.folder / "flytekit"
        return look(folder, modes=False) if folder.exists() else None

    def found(self) -> object:
        attempt = SyncCheckpoint("", self.uri, storage_options=self.place.options)
        folder = attempt.restore()
        return None if folder is None else look(folder, modes=False)

    @invariant()
    def everything_is_there(self) -> None:
        if hasattr(self, "folder"):
            assert self.found() == self.wanted()


@pytest.mark.long
def test_what_anybody_saves_accumulates_as_in_flytekits_folder(place: Place) -> None:
    machine = type("Machine", (Accumulation,), {"place": place})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=12, stateful_step_count=10, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


@pytest.mark.parametrize("package", ["flytekit_ckpt", "flytekit"])
def test_what_flytekit_has_saved_there_already_stays(place: Place, tmp_path: Path, package: str) -> None:
    uri = place.uri()
    parts = make(tmp_path / "parts", {"model.pt": b"1", "opt.pt": b"2", "sub": None, "sub/a": b"3"})
    first = theirs.SyncCheckpoint(uri) if package == "flytekit" else SyncCheckpoint(uri)
    first.save(parts / "model.pt")
    first.save(parts / "sub")
    SyncCheckpoint(uri).save(parts / "opt.pt")
    attempt = SyncCheckpoint("", uri)
    folder = attempt.restore()
    assert folder is not None
    assert {name: seen[1] for name, seen in look(folder).items()} == {"a": b"3", "model.pt": b"1", "opt.pt": b"2"}
