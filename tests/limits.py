"""Limits to what a test may take of the machine, whatever the code does."""

from __future__ import annotations

import contextlib
import resource
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def file_size(size: int) -> Iterator[None]:
    """Let no file become larger: it is an error of the disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def seconds(number: int) -> Iterator[None]:
    """End what would run for ever, with an `AssertionError` in the main thread."""

    def stop(*_: object) -> None:
        message = f"it does not come to an end, not in {number} seconds"
        raise AssertionError(message)

    handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(number)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
