"""What happens between SIGTERM, with which the end of a spot machine or a pod begins, and the end of the process."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

logger = logging.getLogger("flytekit_ckpt")


def on_termination(callback: Callable[[], object] | None = None) -> None:
    """Have SIGTERM wait for the saves in progress, then for a callback, before the process ends as it would have.

    What the signal did before, it does afterwards: ends the process, or calls the handler that was there. How long that
    may take, the platform says: Kubernetes kills a pod 30 seconds after SIGTERM unless told otherwise, and a spot
    machine is gone after 30 to 120 seconds.

    Parameters
    ----------
    callback : callable, optional
        Called once, in the main thread, with no save in progress; it may save. An exception that it raises is reported,
        and changes nothing.

    Raises
    ------
    ValueError
        Outside the main thread, where Python lets nobody handle signals.

    Notes
    -----
    A second call replaces the callback. Processes that are forked later have the handler too. Only saves of this
    package's checkpoints are waited for. Where the main thread waits in a call that is no Python code, the handler runs
    when it returns, as for every signal in Python.
    """
    if threading.current_thread() is not threading.main_thread():
        message = "on_termination() must be called in the main thread: Python lets no other handle signals"
        raise ValueError(message)
    _handler.callback = callback
    _handler.take_over()


def finish_within(seconds: float) -> None:
    """Have SIGTERM wait for the saves in progress, but no longer; nothing is done outside the main thread."""
    if threading.current_thread() is threading.main_thread():
        _handler.grace = seconds
        _handler.take_over()


def deadline() -> float | None:
    """Give the time, as `time.monotonic` does, at which a process that was told to end will not wait any longer."""
    return _handler.deadline


@contextlib.contextmanager
def saving() -> Iterator[None]:
    """Mark a save of the calling thread as in progress."""
    done = begun(threading.get_ident())
    try:
        yield
    finally:
        done()
        if _handler.is_due and threading.current_thread() is threading.main_thread() and not _progress.has_mine():
            # The signal came while this thread was saving, and could not wait for it then.
            _handler.finish()


def begun(thread: int | None = None) -> Callable[[], None]:
    """Mark a save as in progress, of a thread or of one that is yet to take it up; returns what ends that."""
    return _progress.begun(thread)


class _Progress:
    """The saves in progress."""

    def __init__(self) -> None:
        # By a token of each, the thread.
        self._saves: dict[object, int | None] = {}
        self._renew()
        os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        """Forget what only another process does; the threads of a process are not forked with it."""
        self._ended = threading.Condition()
        mine = threading.get_ident()
        self._saves = {token: thread for token, thread in self._saves.items() if thread == mine}

    def begun(self, thread: int | None) -> Callable[[], None]:
        token = object()
        self._saves[token] = thread

        def done() -> None:
            with self._ended:
                self._saves.pop(token, None)
                self._ended.notify_all()

        return done

    def has_mine(self) -> bool:
        return threading.get_ident() in list(self._saves.values())

    def wait(self, seconds: float | None) -> None:
        with self._ended:
            self._ended.wait_for(lambda: not self._saves, seconds)


class _Handler:
    """What handles SIGTERM."""

    def __init__(self) -> None:
        self.callback: Callable[[], object] | None = None
        self.previous: Any = None
        # Seconds that saves may take after the signal, if there is a limit, and until when that is.
        self.grace: float | None = None
        self.deadline: float | None = None
        self.is_due = False
        self._is_finishing = False

    def take_over(self) -> None:
        current = signal.getsignal(signal.SIGTERM)
        if current is not self:
            self.previous = current
            signal.signal(signal.SIGTERM, self)

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        # In the main thread, in the middle of whatever it does.
        self.is_due = True
        if self.grace is not None and self.deadline is None:
            self.deadline = time.monotonic() + self.grace
        if not _progress.has_mine():
            self.finish()

    def finish(self) -> None:
        if self._is_finishing:
            return
        self.is_due, self._is_finishing = False, True
        try:
            self._wait()
            if self.callback is not None:
                self.callback()
                # It may have begun saves in the background.
                self._wait()
        except Exception:
            logger.exception("the callback of on_termination() failed")
        finally:
            self._is_finishing = False
            self.callback = self.deadline = None
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self.previous is None else self.previous)
            os.kill(os.getpid(), signal.SIGTERM)

    def _wait(self) -> None:
        _progress.wait(None if self.deadline is None else max(0.0, self.deadline - time.monotonic()))


_progress = _Progress()
_handler = _Handler()
