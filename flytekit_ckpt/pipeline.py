"""What flows between the rooms: chunks of bytes, worked on in threads, a bounded number of them in memory."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

Chunk = bytes | memoryview
"""What an iterator between two rooms gives."""

CHUNK_SIZE = 1 << 20
"""Bytes of content read, inflated or written at a time where nothing else decides."""

MEMORY_BUDGET = 256 << 20
"""Bytes that one save or load may hold in memory unless told otherwise; the rooms divide them."""


@dataclass(frozen=True)
class Range:
    """In the place of a chunk: bytes of the object as it was written before, to be carried over as they are."""

    start: int
    length: int


class Callback(Protocol):
    """A progress callback: the part used here of fsspec's (`fsspec.callbacks.Callback`, or `TqdmCallback`)."""

    def set_size(self, size: int) -> object:
        """Take the bytes that there are to move."""

    def relative_update(self, inc: int = 1) -> object:
        """Take the bytes that have been moved since the last call."""


LITTLE = 64 << 10
"""Bytes that are worked on in less time than a thread takes to start."""

WORKERS = "flytekit_ckpt"
"""What the names of this package's threads begin with."""

_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")


def processors() -> int:
    """Count the processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def in_order(
    function: Callable[[_Item], _Answer], items: Iterable[tuple[int, _Item]], *, threads: int, memory: int
) -> Iterator[_Answer]:
    """Map in threads; the answers come in order of the items, what is little is worked on without a thread.

    Parameters
    ----------
    function : callable
        Applied to each item.
    items : iterable of (int, item)
        Each with the bytes of memory that it takes until its answer is handed on.
    threads : int
        Number of threads.
    memory : int
        Bytes that the items under way may take, unless one item alone takes more.
    """
    source = iter(items)
    head = deque(itertools.islice(source, 2))
    spent = 0
    while len(head) == 1 or (head and spent + head[0][0] <= LITTLE):
        size, item = head.popleft()
        spent += size
        yield function(item)
        head.extend(itertools.islice(source, 1))
    if not head:
        return
    waiting: deque[tuple[int, Future[_Answer]]] = deque()
    held = 0
    with ThreadPoolExecutor(threads, thread_name_prefix=WORKERS) as pool:
        try:
            for size, item in _rest(head, source):
                # More than there are threads, so that none waits for the one who takes the answers.
                while waiting and (held + size > memory or len(waiting) >= 4 * threads):
                    done, answer = waiting.popleft()
                    yield answer.result()
                    held -= done
                waiting.append((size, pool.submit(function, item)))
                held += size
                # Nothing is kept longer than it is needed.
                del item
            while waiting:
                yield waiting.popleft()[1].result()
        finally:
            for _, answer in waiting:
                answer.cancel()


def _rest(head: deque[_Item], source: Iterator[_Item]) -> Iterator[_Item]:
    while head:
        yield head.popleft()
    yield from source


def ahead(source: Iterator[_Answer], *, count: int) -> Iterator[_Answer]:
    """Run an iterator in a thread of its own, up to `count` items ahead of the one who takes them."""
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix=WORKERS) as pool:
        waiting: deque[Future[object]] = deque()
        try:
            while True:
                while len(waiting) < count:
                    waiting.append(pool.submit(next, source, end))
                item = waiting.popleft().result()
                if item is end:
                    return
                yield item  # type: ignore[misc]
        finally:
            for answer in waiting:
                answer.cancel()
