"""Saves and loads while requests to a real S3 server fail: nothing wrong, nothing lost, and an error that says so."""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pytest
import s3fs

from flytekit_ckpt import StorageError, SyncCheckpoint, v2
from flytekit_ckpt.iterators import IteratorCheckpoint, StateHandler
from tests.conftest import Place
from tests.faults import proxy
from tests.faults.proxy import Proxy
from tests.s3_server import S3Server
from tests.trees import Tree, look, make

# Trials: minutes of them.
pytestmark = pytest.mark.long

Result = TypeVar("Result")

# Three parts of a multipart upload, three ranged reads; compression takes nothing off.
LARGE = 20 << 20

# Longer than any retries last; what takes this long would never end.
FOR_EVER = 60.0


@pytest.fixture(autouse=True)
def server(s3_server_running: S3Server, s3: Place) -> S3Server:
    if not s3_server_running.kind.startswith("Ceph"):
        pytest.skip("tried with Ceph's gateway only")
    return s3_server_running


@pytest.fixture
def faulty(server: S3Server) -> Iterator[Proxy]:
    with proxy.serve(server.endpoint, seed=5) as faulty:
        yield faulty
    # Each holds some megabytes for as long as the process lives.
    for kind_of_filesystem in s3fs.S3FileSystem.__subclasses__():
        kind_of_filesystem.clear_instance_cache()


# ---------------------------------------------------------------------------------------------------------------------
# What is saved and loaded
# ---------------------------------------------------------------------------------------------------------------------


class Work(ABC):
    """One task's checkpoints at one URI, of which there are numbered versions.

    Parameters
    ----------
    place
        Where, and through what.
    uri
        The object.
    folder
        Room on the local disk.
    patience
        `retries` and `timeout`, where they are not the defaults.
    """

    rounds = 25

    def __init__(self, place: Place, uri: str, folder: Path, **patience: Any) -> None:
        self.place, self.uri, self.folder = place, uri, folder
        self.options = {"storage_options": place.options, **patience}

    def through(self, place: Place, **patience: Any) -> Work:
        """Give the same work over another connection."""
        return type(self)(place, self.uri, self.folder, **patience)

    @abstractmethod
    def steps(self, number: int) -> Iterator[tuple[Callable[[], object], object]]:
        """Give what saves a version, step by step, each with what is to be loaded after it."""

    @abstractmethod
    def load(self) -> object:
        """Load what is there; `None` if nothing is."""

    def save(self, number: int) -> object:
        """Save a version, and give what is to be loaded after it."""
        content: object = None
        for step, content in self.steps(number):  # noqa: B007 - the last one is wanted
            step()
        return content

    def legacy(self, source: str | None = None) -> SyncCheckpoint:
        return SyncCheckpoint(self.uri, source, carry_forward=False, **self.options)

    def new(self, source: str | None = None) -> v2.Checkpoint:
        return v2.Checkpoint(self.uri, source, carry_forward=False, **self.options)

    def made(self, number: int, tree: Tree) -> Path:
        """Make a folder, once for every version."""
        folder = self.folder / f"version-{number}"
        return folder if folder.exists() else make(folder, tree)


class LegacyBytes(Work):
    """As short as a counter: half of it is nothing at all."""

    def steps(self, number: int) -> Iterator[tuple[Callable[[], object], object]]:
        content = b"%c" % (48 + number)
        yield lambda: self.legacy().write(content), content

    def load(self) -> object:
        return self.legacy(self.uri).read()


class LegacyParts(Work):
    """What is saved first is carried into the second object by the server."""

    rounds = 5

    def steps(self, number: int) -> Iterator[tuple[Callable[[], object], object]]:
        checkpoint = self.legacy()
        tree = {"model.bin": noise(number), "optimizer.bin": f"version {number}".encode()}
        folder = self.made(number, tree)
        whole = look(folder, modes=False)
        first = {name: what for name, what in whole.items() if name == "model.bin"}
        yield lambda: checkpoint.save(folder / "model.bin"), first
        yield lambda: checkpoint.save(folder / "optimizer.bin"), whole

    def load(self) -> object:
        checkpoint = self.legacy(self.uri)
        folder = checkpoint.restore()
        return None if folder is None else look(folder, modes=False)


class LegacyFolder(Work):
    rounds = 5

    def steps(self, number: int) -> Iterator[tuple[Callable[[], object], object]]:
        folder = self.made(number, large_tree(number))
        yield lambda: self.legacy().save(folder), look(folder, modes=False)

    def load(self) -> object:
        checkpoint = self.legacy(self.uri)
        folder = checkpoint.restore()
        return None if folder is None else look(folder, modes=False)


class NewBytes(Work):
    def steps(self, number: int) -> Iterator[tuple[Callable[[], object], object]]:
        content = b"%c" % (48 + number)
        yield lambda: self.new().save_sync(content), content

    def load(self) -> object:
        checkpoint = self.new(self.uri)
        path = checkpoint.load_sync()
        return None if path is None else path.read_bytes()


class NewFile(NewBytes):
    """A payload that is no archive: nothing in it says whether it is whole."""

    rounds = 5

    def steps(self, number: int) -> Iterator[tuple[Callable[[], object], object]]:
        content = noise(number)
        file = self.made(number, {"weights.bin": content}) / "weights.bin"
        yield lambda: self.new().save_sync(file), content


class NewFolder(Work):
    rounds = 5

    def steps(self, number: int) -> Iterator[tuple[Callable[[], object], object]]:
        folder = self.made(number, large_tree(number))
        yield lambda: self.new().save_sync(folder), look(folder, modes=False)

    def load(self) -> object:
        checkpoint = self.new(self.uri)
        folder = checkpoint.load_sync()
        return None if folder is None else look(folder, modes=False)


class Pipeline:
    """An iterator that is at a step."""

    def __init__(self, number: int = 0) -> None:
        self.state: dict[str, Any] = {"at": number, "epoch": number // 3}

    def get_state(self) -> dict[str, Any]:
        return self.state

    def set_state(self, state: dict[str, Any]) -> None:
        self.state = state


class Steps(Work):
    """Every save lists the steps and removes an old one, every load lists them."""

    rounds = 15

    def iterators(self) -> IteratorCheckpoint:
        return IteratorCheckpoint(self.uri, StateHandler(**self.options))

    def steps(self, number: int) -> Iterator[tuple[Callable[[], object], object]]:
        pipeline = Pipeline(number)
        yield lambda: self.iterators().save_to_directory(pipeline, step=number, keep=2), pipeline.state

    def load(self) -> object:
        checkpoint = self.iterators()
        return checkpoint.restore_latest(Pipeline()).state if checkpoint.has_checkpoint() else None


WORKS = [LegacyBytes, LegacyParts, LegacyFolder, NewBytes, NewFile, NewFolder, Steps]
every_work = pytest.mark.parametrize("kind_of_work", WORKS)


@functools.lru_cache(maxsize=4)
def noise(number: int) -> bytes:
    return random.Random(number).randbytes(LARGE)


def large_tree(number: int) -> Tree:
    return {"weights.bin": noise(number), "sub": None, "sub/step": str(number).encode(), "sub/last": "step"}


@pytest.fixture
def work(kind_of_work: type[Work], s3: Place, tmp_path: Path) -> Work:
    """The work without faults."""
    return kind_of_work(s3, s3.uri(), tmp_path)


def through(faulty: Proxy, s3: Place) -> Place:
    return Place(s3.root, {**s3.options, "endpoint_url": faulty.endpoint})


def ending(call: Callable[[], Result]) -> Result:
    """Call, and fail if that does not end; the proxy's end will end it."""
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(FOR_EVER)
    if thread.is_alive():
        pytest.fail("it never ends")
    if errors:
        raise errors[0]
    return results[0]


def attempted(work: Work, number: int, before: object) -> list[object]:
    """Save a version while requests fail; give what may be loaded afterwards: if all went well, that version only."""
    for step, after in work.steps(number):
        try:
            ending(step)
        except StorageError:
            return [before, after]
        before = after
    return [before]


def check_loads(work: Work, allowed: list[object]) -> None:
    """Load while requests fail."""
    with contextlib.suppress(StorageError):
        assert ending(work.load) in allowed


def open_uploads(work: Work, s3: Place) -> list[str]:
    """Ask the server itself for the multipart uploads that have neither been completed nor aborted."""
    place = urlsplit(work.uri)
    answer = s3fs.S3FileSystem(**s3.options).call_s3(
        "list_multipart_uploads", Bucket=place.netloc, Prefix=place.path.strip("/")
    )
    return [upload["UploadId"] for upload in answer.get("Uploads", [])]


# ---------------------------------------------------------------------------------------------------------------------
# Chance
# ---------------------------------------------------------------------------------------------------------------------


@every_work
@pytest.mark.parametrize("rate", [0.01, 0.05])
def test_a_few_faults_are_not_noticed(work: Work, faulty: Proxy, s3: Place, rate: float) -> None:
    faulty.kinds, faulty.rate = proxy.QUICK, rate
    hindered = work.through(through(faulty, s3))
    for number in itertools.count():
        saved = ending(functools.partial(hindered.save, number))
        assert ending(hindered.load) == saved
        if number >= work.rounds and faulty.history:
            break
    # If the answer that names a new upload is lost, nobody can abort it.
    nameless = [kind for method, target, kind in faulty.history if is_create(method, target) and kind in UNANSWERED]
    assert len(open_uploads(work, s3)) <= len(nameless)


@every_work
def test_many_faults_are_survived_or_reported(work: Work, faulty: Proxy, s3: Place) -> None:
    faulty.kinds, faulty.rate = proxy.QUICK, 0.2
    before = work.save(0)
    hindered = work.through(through(faulty, s3), retries=1)
    for number in range(1, work.rounds):
        allowed = attempted(hindered, number, before)
        check_loads(hindered, allowed)
        before = work.load()
        assert before in allowed
    assert faulty.history


def dealt(works: list[type[Work]]) -> pytest.MarkDecorator:
    """Try every kind of fault with a third of the works, and every work with a third of the kinds."""
    pairs = itertools.product(enumerate(works), enumerate(proxy.KINDS))
    return pytest.mark.parametrize(
        ("kind_of_work", "kind"), [(work, kind) for (at, work), (turn, kind) in pairs if (at + turn) % 3 == 0]
    )


@dealt(WORKS)
def test_nothing_but_one_fault(work: Work, faulty: Proxy, s3: Place, kind: str) -> None:
    before = work.save(0)
    faulty.kinds, faulty.rate = (kind,), 1.0
    hindered = work.through(through(faulty, s3), retries=1, timeout=0.4)
    check_loads(hindered, [before])
    allowed = attempted(hindered, 1, before)
    assert faulty.history
    faulty.rate = 0.0
    assert ending(hindered.load) in allowed
    assert work.load() in allowed
    saved = work.save(2)
    assert work.load() == saved


# ---------------------------------------------------------------------------------------------------------------------
# One fault where it hurts
# ---------------------------------------------------------------------------------------------------------------------

# Kinds that leave the server with the work done and the client without a word of it.
UNANSWERED = {"reset_after", "truncated"}

Operation = Callable[[str, str], bool]


def is_create(method: str, target: str) -> bool:
    return method == "POST" and "uploadId" not in target and "uploads" in target


def is_part(method: str, target: str) -> bool:
    return method == "PUT" and "partNumber" in target


def is_complete(method: str, target: str) -> bool:
    return method == "POST" and "uploadId" in target


def is_abort(method: str, target: str) -> bool:
    return method == "DELETE" and "uploadId" in target


def is_list(method: str, target: str) -> bool:
    return method == "GET" and "list-type" in target


def is_get(method: str, target: str) -> bool:
    return method == "GET" and "list-type" not in target


def is_head(method: str, target: str) -> bool:
    return method == "HEAD"


def is_put(method: str, target: str) -> bool:
    return method == "PUT" and "partNumber" not in target


def is_delete(method: str, target: str) -> bool:
    return method == "DELETE" and "uploadId" not in target


def once_each(operation: Operation, kind: str) -> Callable[[str, str], str | None]:
    """Give the fault to every request of an operation, but to none that repeats it."""
    seen = set()

    def choose(method: str, target: str) -> str | None:
        if not operation(method, target) or (method, target) in seen:
            return None
        seen.add((method, target))
        return kind

    return choose


@pytest.mark.parametrize("kind", proxy.QUICK)
@pytest.mark.parametrize(
    ("kind_of_work", "operation"),
    [
        *((LegacyParts, operation) for operation in (is_create, is_part, is_complete, is_head, is_get)),
        *((Steps, operation) for operation in (is_put, is_list, is_get, is_delete)),
    ],
)
def test_one_fault_in_an_operation_is_not_noticed(
    work: Work, faulty: Proxy, s3: Place, operation: Operation, kind: str
) -> None:
    for number in range(2):
        work.save(number)
    hindered = work.through(through(faulty, s3))
    faulty.choose = once_each(operation, kind)
    saved = ending(functools.partial(hindered.save, 2))
    assert ending(hindered.load) == saved
    assert faulty.history
    assert work.load() == saved


@dealt([LegacyParts, NewFile, NewFolder])
@pytest.mark.parametrize("operation", [is_part, is_complete])
def test_an_upload_that_fails_is_aborted(work: Work, faulty: Proxy, s3: Place, operation: Operation, kind: str) -> None:
    before = work.save(0)
    faulty.choose = lambda method, target: kind if operation(method, target) else None
    hindered = work.through(through(faulty, s3), retries=1, timeout=0.4)
    allowed = attempted(hindered, 1, before)
    assert faulty.history
    assert work.load() in allowed
    assert not open_uploads(work, s3)


@pytest.mark.parametrize("kind_of_work", [NewFile])
def test_an_upload_whose_first_abort_is_lost_is_aborted(work: Work, faulty: Proxy, s3: Place) -> None:
    once = once_each(is_abort, "reset")

    def choose(method: str, target: str) -> str | None:
        return "error_500" if is_part(method, target) else once(method, target)

    before = work.save(0)
    faulty.choose = choose
    hindered = work.through(through(faulty, s3), retries=1, timeout=0.4)
    with pytest.raises(StorageError):
        ending(functools.partial(hindered.save, 1))
    assert [kind for method, target, kind in faulty.history if is_abort(method, target)] == ["reset"]
    assert work.load() == before
    assert not open_uploads(work, s3)


@pytest.mark.parametrize("kind_of_work", [Steps])
def test_steps_are_listed_and_removed_while_requests_fail(work: Work, faulty: Proxy, s3: Place) -> None:
    faulty.kinds, faulty.rate = proxy.QUICK, 0.05
    hindered = work.through(through(faulty, s3))
    assert isinstance(hindered, Steps)
    for number, keep in zip(range(20), itertools.cycle([1, 3, 2])):
        ending(lambda number=number, keep=keep: hindered.iterators().save_to_directory(Pipeline(number), number, keep))
        kept = sorted(ending(hindered.iterators().list_checkpoints))
        assert kept[-1] == number
        assert len(kept) <= keep
        restored = ending(lambda kept=kept: hindered.iterators().restore(Pipeline(), kept[0]))
        assert restored.state == Pipeline(kept[0]).state
    assert faulty.history
