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
        self._tickets: deque[object] = deque()

    def __reduce__(self) -> tuple[type[Queue], tuple[()]]:
        return Queue, ()

    def line_up(self) -> object:
        """Take a ticket, the last one; whoever takes one has to `leave` the queue with it."""
        ticket = object()
        with self._changed:
            self._tickets.append(ticket)
        return ticket

    def wait_for(self, ticket: object, cancelled: threading.Event) -> None:
        """Wait until a ticket is the first one, or `cancel` is called with this event."""
        with self._changed:
            self._changed.wait_for(lambda: cancelled.is_set() or self._tickets[0] is ticket)

    def cancel(self, cancelled: threading.Event) -> None:
        """Have whoever waits with this event wait no longer."""
        with self._changed:
            cancelled.set()
            self._changed.notify_all()

    def leave(self, ticket: object) -> None:
        """Leave the queue, from wherever in it."""
        with self._changed:
            # Not in a process that was forked meanwhile.
            with contextlib.suppress(ValueError):
                self._tickets.remove(ticket)
            self._changed.notify_all()


_all: weakref.WeakSet[ForkSafeLock | Queue] = weakref.WeakSet()


def _renew_all() -> None:
    for lock in list(_all):
        lock._renew()


os.register_at_fork(after_in_child=_renew_all)
