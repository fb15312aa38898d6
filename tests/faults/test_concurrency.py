"""Threads, forks and spawned processes around the same checkpoints; and nothing that piles up."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from flytekit_ckpt import SyncCheckpoint
from flytekit_ckpt.v2 import Checkpoint
from tests.conftest import Place
from tests.faults import proxy
from tests.faults.soak import TASKS, WARM_UP, growth, soak
from tests.s3_server import S3Server
from tests.trees import look, make


class Held(io.RawIOBase):
    """Has its reader wait until it is released."""

    def __init__(self) -> None:
        self.begun, self.released = threading.Event(), threading.Event()
        self.content = b"x" * 100_000

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        self.begun.set()
        assert self.released.wait(60)
        content, self.content = self.content, b""
        return content

    def seek(self, position: int, whence: int = 0) -> int:
        # From the beginning again, where somebody else has come first.
        self.content = b"" if whence else b"x" * 100_000
        return len(b"x" * 100_000) if whence else position

    def tell(self) -> int:
        return 0


@contextlib.contextmanager
def in_a_fork() -> Iterator[bool]:
    """Give `True` in a forked process and `False` here, where it is waited for; one that hangs is killed."""
    child = os.fork()
    if not child:
        try:
            yield True
        except BaseException:  # noqa: BLE001 - the parent sees the code
            os._exit(1)
        os._exit(0)
    yield False
    deadline = time.monotonic() + 60
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, 9)
        time.sleep(0.01)
    assert ended == (child, 0)


def test_a_fork_saves_and_loads_while_a_thread_of_its_parent_is_in_the_middle_of_both(place: Place) -> None:
    source, mine, forked = place.uri(), place.uri(), place.uri()
    SyncCheckpoint(source, storage_options=place.options).write(b"5")
    # The fork waits so long for what its parent saves to the same destination.
    checkpoint = SyncCheckpoint(mine, source, storage_options=place.options, timeout=2)
    other = SyncCheckpoint(forked, mine, storage_options=place.options)
    held = Held()
    thread = threading.Thread(target=checkpoint.save, args=(held,))

    class Reading:
        """Holds up a load."""

        begun, released = threading.Event(), threading.Event()

        def set_size(self, size: int) -> None: ...

        def relative_update(self, inc: int = 1) -> None:
            self.begun.set()
            assert self.released.wait(60)

    loading = threading.Thread(target=checkpoint.restore, kwargs={"callback": Reading()})
    for one in (thread, loading):
        one.start()
    assert held.begun.wait(10)
    assert Reading.begun.wait(10)
    with in_a_fork() as is_child:
        if is_child:
            assert checkpoint.read() == b"5"
            checkpoint.write(b"of the fork")
            other.write(b"6")
    assert SyncCheckpoint("", mine, storage_options=place.options).read() == b"of the fork"
    assert SyncCheckpoint("", forked, storage_options=place.options).read() == b"6"
    held.released.set()
    Reading.released.set()
    thread.join()
    loading.join()
    assert SyncCheckpoint("", mine, storage_options=place.options).read() == b"x" * 100_000


def test_a_new_face_is_forked_in_the_middle_of_a_save(place: Place, tmp_path: Path) -> None:
    uri = place.uri()
    # The fork waits so long for what its parent saves there.
    checkpoint = Checkpoint(uri, storage_options=place.options, timeout=2)
    begun, released = threading.Event(), threading.Event()

    class Saving:
        def set_size(self, size: int) -> None: ...

        def relative_update(self, inc: int = 1) -> None:
            begun.set()
            assert released.wait(60)

    (tmp_path / "file").write_bytes(b"x" * 10)
    thread = threading.Thread(target=checkpoint.save_sync, args=(tmp_path / "file",), kwargs={"callback": Saving()})
    thread.start()
    assert begun.wait(10)
    with in_a_fork() as is_child:
        if is_child:
            checkpoint.save_sync(b"of the fork")
            assert checkpoint.path.is_dir()
    released.set()
    thread.join()
    assert SyncCheckpoint("", uri, storage_options=place.options).read() == b"x" * 10


def add_part(checkpoint: Any, part: Path) -> None:
    checkpoint.save(part)


def test_a_spawned_process_goes_on_with_what_was_saved(place: Place, tmp_path: Path) -> None:
    uri = place.uri()
    parts = make(tmp_path / "parts", {"a": b"1", "b": b"2"})
    checkpoint = SyncCheckpoint(uri, storage_options=place.options)
    checkpoint.save(parts / "a")
    process = multiprocessing.get_context("spawn").Process(target=add_part, args=(checkpoint, parts / "b"))
    process.start()
    process.join()
    assert process.exitcode == 0
    target = make(tmp_path / "target", {})
    SyncCheckpoint("", uri, storage_options=place.options).restore(target)
    assert look(target) == look(parts)


@pytest.mark.parametrize("kind", [SyncCheckpoint, Checkpoint])
def test_many_instances_in_many_threads_keep_to_themselves(place: Place, tmp_path: Path, kind: Any) -> None:
    def task(number: int) -> None:
        source = None
        for attempt in range(4):
            uri = place.uri()
            checkpoint = kind(uri, source, storage_options=place.options)
            found = checkpoint.restore() if isinstance(checkpoint, SyncCheckpoint) else checkpoint.load_sync()
            before = None if found is None else look(found, modes=False)
            assert before == (None if source is None else {"at": ("file", f"{number} {attempt - 1}".encode(), 0)})
            folder = make(tmp_path / f"{number}-{attempt}", {"at": f"{number} {attempt}".encode()})
            checkpoint.save(folder) if isinstance(checkpoint, SyncCheckpoint) else checkpoint.save_sync(folder)
            source = uri

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(task, range(32)))


@pytest.mark.long
def test_nothing_piles_up_while_requests_fail(s3: Place, s3_server_running: S3Server, tmp_path: Path) -> None:
    with proxy.serve(s3_server_running.endpoint, rate=0.05, kinds=proxy.QUICK) as faulty:
        place = Place(s3.root, {**s3.options, "endpoint_url": faulty.endpoint})
        with contextlib.closing(soak(place, tmp_path, seconds=math.inf)) as rounds:
            samples = list(itertools.islice(rounds, 3 * WARM_UP))
    assert faulty.history
    grown = growth(samples)
    # A leak of one descriptor, thread or part in every attempt would be far above.
    assert grown.threads <= 1
    assert grown.descriptors <= 3 * TASKS
    assert grown.memory < 64 << 20
