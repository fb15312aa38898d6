"""Processes that start in milliseconds, to be killed by the hundred."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import Any

from tests.conftest import Place

Work = Callable[..., None]
"""Runs in the process: takes where it reports to, then the arguments of `started`."""


class Worker:
    """A process that reports to this one, with temporary files of its own."""

    def __init__(self, place: Place, work: Work, arguments: tuple[Any, ...]) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="worker-", ignore_cleanup_errors=True)
        self.reports, sending = _context().Pipe(duplex=False)
        options = (place.options, self._scratch.name)
        self._process = _context().Process(target=_run, args=(sending, *options, work, arguments), daemon=True)
        self._process.start()
        sending.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.reports.close()
        self._scratch.cleanup()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def join(self) -> None:
        self._process.join()

    def result(self) -> Any:
        """Wait for the next report; a process that ended without one is an `EOFError`, one that failed an error."""
        result = self.reports.recv()
        if not isinstance(result, _Failure):
            return result
        raise RuntimeError(result.trace)

    def last(self, before: Any) -> Any:
        """Give the last report that a process which has ended had sent, `before` if there was none."""
        with contextlib.suppress(EOFError):
            while True:
                before = self.result()
        return before


def started(place: Place, work: Work, *arguments: Any) -> Worker:
    """Run a function of a module in a new process, which reaches the S3 server of a place."""
    return Worker(place, work, arguments)


def variables(options: dict[str, str]) -> dict[str, str]:
    """Give the variables by which everyone finds the server that a place's options name."""
    names = {"endpoint_url": "ENDPOINT", "key": "ACCESS_KEY_ID", "secret": "SECRET_ACCESS_KEY"}
    return {f"FLYTE_AWS_{names[option]}": value for option, value in options.items()}


class _Failure:
    def __init__(self, trace: str) -> None:
        self.trace = trace


_preloaded: list[str] = []


def preload(module: str) -> None:
    """Have a module imported before all processes, which must be asked for before the first of them."""
    _preloaded.append(module)


@functools.cache
def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    # What it imports has neither threads nor connections yet: neither would survive a fork.
    context.set_forkserver_preload(["__main__", "tests.faults.preloaded", *_preloaded])
    return context


def _run(reports: Connection, options: dict[str, str], scratch: str, work: Work, arguments: tuple[Any, ...]) -> None:
    os.environ.update(variables(options))
    os.environ["TMPDIR"] = tempfile.tempdir = scratch
    os.chmod(scratch, 0o777)
    # What the peers log of their failures is no part of the trial.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    try:
        work(reports, *arguments)
    except Exception:  # noqa: BLE001 - whatever it is, the test that waits must hear of it
        reports.send(_Failure(traceback.format_exc()))
    reports.close()
