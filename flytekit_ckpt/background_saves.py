"""Background saves, which a process that ends normally finishes first."""

from __future__ import annotations

import concurrent.futures
import logging
import os
import threading
from collections import deque
from collections.abc import Callable

from flytekit_ckpt import termination

logger = logging.getLogger("flytekit_ckpt")


class BackgroundSaves:
    """Does what it is given in a thread, in order; keeps the first error for whoever asks next."""

    # The states that wait are in memory: one that is being saved, and the next one.
    LIMIT = 2

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "flytekit_ckpt-save")
        self._waiting: deque[concurrent.futures.Future[None]] = deque()
        self._error: BaseException | None = None

    def do(self, save: Callable[[], None]) -> None:
        self._check()
        while len(self._waiting) >= self.LIMIT:
            self._waiting.popleft().result()
        # It is promised from now on.
        done = termination.begun()
        future = self._thread.submit(self._run, save)
        future.add_done_callback(lambda _: done())
        self._waiting.append(future)
        finish_at_exit(future)

    def wait(self) -> None:
        if self._process == os.getpid():
            concurrent.futures.wait(self._waiting)
        self._check()

    def close(self) -> None:
        if self._process == os.getpid():
            self._thread.shutdown()
        self._check()

    def _run(self, save: Callable[[], None]) -> None:
        try:
            save()
        except BaseException as error:
            # Whoever never asks should find it in the log.
            logger.exception("an iterator's checkpoint was not saved")
            self._error = self._error or error

    def _check(self) -> None:
        """Raise what failed."""
        if self._process != os.getpid():
            # A fork has no threads; what they were saving, the process that it was forked from saves.
            self._begin()
        error, self._error = self._error, None
        if error is not None:
            raise error


_unfinished: set[concurrent.futures.Future[None]] = set()


os.register_at_fork(after_in_child=_unfinished.clear)


def finish_at_exit(future: concurrent.futures.Future[None]) -> None:
    """Have the interpreter wait for some work before it exits."""
    _unfinished.add(future)
    future.add_done_callback(_unfinished.discard)


def _finish() -> None:
    concurrent.futures.wait(list(_unfinished))


# Before the interpreter forbids new work to threads, which saving needs; `atexit` comes after that. The exit functions
# of `threading` are called in reverse order, and that of concurrent.futures is there since it was imported.
threading._register_atexit(_finish)  # type: ignore[attr-defined]
