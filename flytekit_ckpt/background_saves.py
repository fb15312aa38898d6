"""Saves in the background: in order, a newer one in the place of an older one that waits, finished at every end."""

from __future__ import annotations

import concurrent.futures
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from flytekit_ckpt import termination
from flytekit_ckpt.errors import SaveNotBegunError, SaveReplacedError

logger = logging.getLogger("flytekit_ckpt")


LARGE = 8 << 20
"""Bytes from which on the time that a save takes is taken to grow with its size."""


class SaveFuture(concurrent.futures.Future[None]):
    """What becomes of a save; remembers whether somebody has been given its error."""

    is_told = False

    def cancel(self) -> bool:
        """Refuse: what was promised is done, also if nobody waits for it any more."""
        return False

    def result(self, timeout: float | None = None) -> None:
        self.exception(timeout)
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        error = super().exception(timeout)
        self.is_told = self.is_told or error is not None
        return error


@dataclass(eq=False)
class Job:
    """A save that was promised.

    Attributes
    ----------
    name : str
        What it saves: it may take the place of an older one of the same name.
    content : object
        What is to be saved, as `BackgroundSaves` hands it on.
    size : int
        Bytes of it.
    discard : callable
        Removes what was kept for it, when it has been saved or will never be; once more, it does nothing.
    future : SaveFuture
        What becomes of it.
    """

    name: str
    content: Any
    size: int = 0
    discard: Callable[[], object] = lambda: None
    future: SaveFuture = field(default_factory=SaveFuture)


class BackgroundSaves:
    """Does jobs in a thread, in order, and keeps the error of each for whoever asks next.

    Parameters
    ----------
    save : callable
        Saves what several jobs, in order, hold.
    are_joint : bool
        Whether the jobs that wait are saved together, in one call.
    """

    def __init__(self, save: Callable[[Sequence[Job]], None], *, are_joint: bool) -> None:
        self._save = save
        self._are_joint = are_joint
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._thread = _new_thread()
        self._changed = threading.Condition()
        self._waiting: list[Job] = []
        self._under_way: Sequence[Job] = ()
        self._failures: dict[str, tuple[SaveFuture, BaseException]] = {}
        # Bytes and seconds of the last save that came to its end.
        self._pace: tuple[int, float] | None = None

    def _renew(self) -> None:
        # A fork has no threads; what they were saving, the process that it was forked from saves.
        if self._process != os.getpid():
            self._begin()

    def submit(self, job: Job) -> SaveFuture:
        """Promise a save."""
        self._renew()
        done = termination.begun()
        job.future.add_done_callback(lambda _: done())
        finish_at_exit(job.future)
        with self._changed:
            self._waiting.append(job)
        self._thread.submit(self._drain)
        return job.future

    def withdraw(self, name: str) -> Job | None:
        """Take back the job of a name, if it has not been begun."""
        self._renew()
        with self._changed:
            found = next((job for job in self._waiting if job.name == name), None)
            if found is not None:
                self._waiting.remove(found)
            return found

    def wait_for_room(self) -> None:
        """Wait until no job waits."""
        self._renew()
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting)

    def finish(self) -> None:
        """Wait until all jobs are done."""
        self._renew()
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._under_way)

    def wait(self) -> None:
        """Wait until all jobs are done, and raise what failed."""
        self.finish()
        self.check()

    def check(self) -> None:
        """Raise the error of a job that nobody has been given yet, once."""
        self._renew()
        with self._changed:
            while self._failures:
                future, error = self._failures.pop(next(iter(self._failures)))
                if not future.is_told:
                    future.is_told = True
                    _raised.append(error)
                    raise error

    def close(self) -> None:
        """Finish, and end the thread; raise what failed."""
        self._renew()
        self._thread.shutdown()
        self._thread = _new_thread()
        self.check()

    def _drain(self) -> None:
        while jobs := self._take():
            started = time.monotonic()
            error: BaseException | None = None
            try:
                self._save(jobs)
            except BaseException as failure:
                # Whoever never asks should find it in the log.
                logger.exception("a checkpoint was not saved in the background")
                error = failure
            else:
                self._pace = sum(job.size for job in jobs), time.monotonic() - started
            self._end(jobs, error)

    def _take(self) -> Sequence[Job]:
        """Take what is to be done next; of what waits, give up what the process has no time left for."""
        hopeless: list[Job] = []
        with self._changed:
            deadline = termination.deadline()
            if deadline is None:
                jobs = self._waiting if self._are_joint else self._waiting[:1]
            else:
                # The newest first, one by one.
                left = deadline - time.monotonic()
                jobs = [job for job in reversed(self._waiting) if self._estimate(job.size) < left][:1]
                hopeless = [] if jobs else self._waiting
            self._waiting = [job for job in self._waiting if job not in (*jobs, *hopeless)]
            self._under_way = jobs or hopeless
            self._changed.notify_all()
        for job in hopeless:
            message = f"a save of {job.size} bytes was not begun: the process was told to end, and has too little time"
            logger.error(message)
            self.fail(job, SaveNotBegunError(message))
        if hopeless:
            self._let_go()
        return jobs

    def _estimate(self, size: int) -> float:
        """Tell how many seconds a save may take."""
        if self._pace is None:
            return 0.0
        last, seconds = self._pace
        # A small one takes no less time for being smaller.
        return seconds * max(1.0, size / max(last, LARGE))

    def _end(self, jobs: Sequence[Job], error: BaseException | None) -> None:
        for job in jobs:
            if error is None:
                with self._changed:
                    # A later save of the same heals it.
                    self._failures.pop(job.name, None)
                job.discard()
                job.future.set_result(None)
            else:
                self.fail(job, error)
        self._let_go()

    def _let_go(self) -> None:
        """Let those go on who wait; they find all that belongs to the jobs done."""
        with self._changed:
            self._under_way = ()
            self._changed.notify_all()

    def fail(self, job: Job, error: BaseException) -> None:
        """Give up a job."""
        with self._changed:
            self._failures[job.name] = job.future, error
        job.discard()
        job.future.set_exception(error)


def _new_thread() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(1, "flytekit_ckpt-save")


# By which the end of an attempt tells them from the task's own.
_raised: list[BaseException] = []


def has_raised(error: BaseException) -> bool:
    """Tell whether an error is that of a save in the background, raised by a later call."""
    return any(error is raised for raised in _raised)


def replaced(job: Job) -> None:
    """Tell whoever waits for a job that a later one has taken its place."""
    job.discard()
    message = "a later save of the same has taken the place of this one, which had not been begun"
    logger.info(message)
    job.future.set_exception(SaveReplacedError(message))


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
