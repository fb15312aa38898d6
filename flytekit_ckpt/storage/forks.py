"""Connections that a forked process has from its parent, and must not touch."""

from __future__ import annotations

import contextlib
import os
import weakref
from typing import Any

# By the event loop of an asynchronous filesystem, the process that it runs in.
_processes: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_filesystems: weakref.WeakSet[Any] = weakref.WeakSet()
_inherited: list[Any] = []


def remember(filesystem: Any) -> None:
    """Remember that an asynchronous filesystem is used in this process."""
    _processes.setdefault(filesystem.loop, os.getpid())
    _filesystems.add(filesystem)


def is_inherited(loop: Any) -> bool:
    """Tell whether an event loop runs in the process that this one was forked from."""
    return _processes.get(loop, os.getpid()) != os.getpid()


def _let_go() -> None:
    """Part from what the parent's loops wait with, and leave its connections open, which are no concern of this one.

    On Linux what a loop waits with is one and the same for both processes: a connection closed here, if only by the
    garbage collector, would be taken from what the parent's loop waits for, and its request would never be answered.
    """
    _inherited.extend(_filesystems)
    # adlfs closes its connections when a process ends, and would wait for the loop for ever, which does not run here.
    for finalizer in list(getattr(weakref.finalize, "_registry", ())):
        found = finalizer.peek()
        if found is not None and any(found[0] is filesystem for filesystem in _inherited):
            finalizer.atexit = False
    for loop in list(_processes):
        # Not every loop has one.
        with contextlib.suppress(AttributeError, OSError, ValueError):
            waiting = loop._selector.fileno()
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, waiting, inheritable=False)
            os.close(null)


os.register_at_fork(after_in_child=_let_go)
