"""Locks and queues that a process does not inherit from another one's threads."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections import deque
from types import TracebackType


class ForkSafeLock:
    """A reentrant lock that is free in a forked process, whoever held it, and in one that it was sent to."""

    def __init__(self) -> None:
        self._renew()
        _all.add(self)

    def _renew(self) -> None:
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[type[ForkSafeLock], tuple[()]]:
        return ForkSafeLock, ()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Who forked while holding it has nothing to release in the new process.
        with contextlib.suppress(RuntimeError):
            self._lock.release()


class Queue:
    """Lets callers through one at a time, in the order in which they lined up; empty in a forked or another process."""

    def __init__(self) -> None:
        self._renew()
        _all.add(self)

    def _renew(self) -> None:
        self._changed = threading.Condition()
        self._places: deque[object] = deque()

    def __reduce__(self) -> tuple[type[Queue], tuple[()]]:
        return Queue, ()

    def line_up(self) -> object:
        """Take a place at the end; whoever takes one has to `leave` it."""
        place = object()
        with self._changed:
            self._places.append(place)
        return place

    def wait_for(self, place: object, cancelled: threading.Event) -> None:
        """Wait until a place is the first, or its owner is told by `cancel` that it need not wait."""
        with self._changed:
            self._changed.wait_for(lambda: cancelled.is_set() or self._places[0] is place)

    def cancel(self, cancelled: threading.Event) -> None:
        """Have whoever waits with this event wait no longer."""
        with self._changed:
            cancelled.set()
            self._changed.notify_all()

    def leave(self, place: object) -> None:
        """Give a place up, wherever in the queue it is."""
        with self._changed:
            # Not in a process that was forked meanwhile.
            with contextlib.suppress(ValueError):
                self._places.remove(place)
            self._changed.notify_all()


_all: weakref.WeakSet[ForkSafeLock | Queue] = weakref.WeakSet()


def _renew_all() -> None:
    for lock in list(_all):
        lock._renew()


os.register_at_fork(after_in_child=_renew_all)
