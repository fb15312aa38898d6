"""Locks that a process does not inherit from another one's threads."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
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


_all: weakref.WeakSet[ForkSafeLock] = weakref.WeakSet()


def _renew_all() -> None:
    for lock in list(_all):
        lock._renew()


os.register_at_fork(after_in_child=_renew_all)
