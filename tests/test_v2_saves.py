"""Saves of one new-face checkpoint: in the order of the calls, and undone when they are cancelled."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flytekit_ckpt import storage
from flytekit_ckpt.storage import s3 as s3_objects
from flytekit_ckpt.v2 import Checkpoint
from tests.conftest import Place


def stored(place: Place, uri: str) -> bytes | None:
    found = storage.at(uri, place.settings).get()
    return None if found is None else b"".join(bytes(chunk) for chunk in found.chunks)


@pytest.fixture
def big(tmp_path: Path) -> Path:
    path = tmp_path / "big"
    path.write_bytes(os.urandom(60 << 20))
    return path


@pytest.mark.parametrize("wait", [0, 0.01, 0.1])
def test_a_cancelled_save_never_replaces_a_later_one(place: Place, big: Path, wait: float) -> None:
    uri = place.uri()

    async def main() -> None:
        checkpoint = Checkpoint(uri, storage_options=place.options)
        task = asyncio.create_task(checkpoint.save(big))
        await asyncio.sleep(wait)
        task.cancel()
        await checkpoint.save(b"new")
        assert task.done(), "it is over before the next one begins"
        assert stored(place, uri) == b"new"

    asyncio.run(main())
    assert stored(place, uri) == b"new"


def test_a_cancelled_save_is_undone_before_the_await_returns(place: Place, big: Path) -> None:
    uri, begun = place.uri(), threading.Event()

    class Begun:
        def set_size(self, size: int) -> None: ...

        def relative_update(self, inc: int = 1) -> None:
            begun.set()

    async def main() -> None:
        checkpoint = Checkpoint(uri, storage_options=place.options)
        await checkpoint.save(b"before")
        task = asyncio.create_task(checkpoint.save(big, callback=Begun()))
        await asyncio.to_thread(begun.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert stored(place, uri) == b"before"
        if place.is_local:
            assert [path.name for path in Path(uri).parent.iterdir()] == [Path(uri).name]
        else:
            filesystem: Any = storage.at(uri, place.settings)._filesystem  # type: ignore[attr-defined]
            bucket = place.root.removeprefix("s3://")
            assert not filesystem.call_s3("list_multipart_uploads", Bucket=bucket).get("Uploads")

    asyncio.run(main())


def test_a_cancelled_save_does_not_wait_for_its_retries(s3: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the tries that it has, it would take a quarter of an hour."""
    failed = threading.Event()

    def call(*_: Any, **__: Any) -> Any:
        failed.set()
        raise ConnectionError

    async def main() -> None:
        checkpoint = Checkpoint(s3.uri(), storage_options=s3.options, retries=100)
        item = storage.at(s3.uri(), s3.settings)
        original = type(item)._requested  # type: ignore[attr-defined]

        def requested(self: Any, request: Any, moved: int) -> Any:
            return self._retrying(call)

        monkeypatch.setattr(s3_objects.S3Object, "_requested", requested)
        task = asyncio.create_task(checkpoint.save(b"1"))
        await asyncio.to_thread(failed.wait, 10)
        await asyncio.sleep(3)
        task.cancel()
        await asyncio.wait([task], timeout=60)
        assert task.cancelled()
        monkeypatch.setattr(s3_objects.S3Object, "_requested", original)
        await checkpoint.save(b"2")

    asyncio.run(main())


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["await", "sync", "cancel"]), st.sampled_from([1, 1000, 3 << 20]), st.floats(0, 0.01)
        ),
        min_size=1,
        max_size=8,
    )
)
def test_the_last_call_that_is_not_cancelled_wins(tmp_path: Path, calls: list[tuple[str, int, float]]) -> None:
    uri = str(tmp_path / "checkpoint")
    checkpoint = Checkpoint(uri)
    checkpoint.save_sync(b"first")
    # What a cancelled call may have come to its end with, and what must have.
    allowed: list[bytes] = [b"first"]

    async def main() -> None:
        tasks = []
        for number, (kind, size, wait) in enumerate(calls):
            content = b"%d " % number * size
            saving: Any = pool.submit(checkpoint.save_sync, content) if kind == "sync" else checkpoint.save(content)
            task: Any = asyncio.wrap_future(saving) if kind == "sync" else asyncio.create_task(saving)
            # A thread calls when it has begun to run.
            await asyncio.sleep(0.02 if kind == "sync" else wait)
            if kind == "cancel":
                task.cancel()
                allowed.append(content)
            else:
                allowed[:] = [content]
            tasks.append(task)
        await asyncio.gather(*tasks, return_exceptions=True)

    with ThreadPoolExecutor(8) as pool:
        asyncio.run(main())
    assert Path(uri).read_bytes() in allowed


def test_saves_from_threads_and_loops_come_one_after_the_other(tmp_path: Path) -> None:
    checkpoint = Checkpoint(str(tmp_path / "checkpoint"))
    running, most = [0], [0]
    original = checkpoint._destination._save

    def save(*arguments: Any) -> None:
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.002)
        original(*arguments)
        running[0] -= 1

    checkpoint._destination._save = save  # type: ignore[method-assign]
    threads = [threading.Thread(target=checkpoint.save_sync, args=(b"%d" % number,)) for number in range(10)]
    for thread in threads:
        thread.start()

    async def main() -> None:
        await asyncio.gather(*(checkpoint.save(b"%d" % number) for number in range(20)))

    asyncio.run(main())
    for thread in threads:
        thread.join()
    assert most == [1]


def test_a_fork_does_not_wait_for_its_parents_saves(tmp_path: Path) -> None:
    checkpoint = Checkpoint(str(tmp_path / "checkpoint"))
    ticket = checkpoint._destination.queue.line_up()
    child = os.fork()
    if not child:
        checkpoint.save_sync(b"of the fork")
        os._exit(0)
    deadline = time.monotonic() + 30
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    if not ended[0]:
        os.kill(child, 9)
    checkpoint._destination.queue.leave(ticket)
    assert ended == (child, 0)
