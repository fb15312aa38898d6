"""Turns at one destination: those who save there from one machine do so one after the other.

It saves work: without it, each but one would find at its end that another one came first, and begin anew. That nothing
is lost is up to the condition under which an object is written, so nobody waits for one who hangs. Where a server
ignores that condition, it is what keeps those on one machine apart.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from flytekit_ckpt.storage import slots
from flytekit_ckpt.storage.failures import GivenUpError
from flytekit_ckpt.storage.uris import local_path, public

logger = logging.getLogger("flytekit_ckpt")

_SIGN_INTERVAL = 1.0
"""Seconds between two signs of life."""

_held: set[int] = set()


@contextlib.contextmanager
def turn(uri: str, patience: float, given_up: Callable[[], bool] = lambda: False) -> Iterator[Callable[[], None]]:
    """Wait for the others who save to a URI from this machine, as long as they give signs of life.

    Parameters
    ----------
    uri : str
        The destination.
    patience : float
        Seconds without a sign of life after which nobody is waited for any more.
    given_up : callable, optional
        Called repeatedly; tells whether to wait no longer, which is a `GivenUpError`.

    Yields
    ------
    callable
        Gives a sign of life; to be called repeatedly.
    """
    name = _name(uri)
    lock = None if name is None else _locked(name, uri, patience, given_up)
    if name is None or lock is None:
        yield lambda: None
        return
    due = time.monotonic()

    def sign() -> None:
        nonlocal due
        if lock in _held and time.monotonic() >= due:
            due = time.monotonic() + _SIGN_INTERVAL
            os.utime(lock)

    _held.add(lock)
    try:
        yield sign
    finally:
        # A fork has let go of it.
        if lock in _held:
            _held.remove(lock)
            with contextlib.suppress(OSError):
                name.unlink()
            os.close(lock)


def _let_go() -> None:
    """Have a forked process not keep what its parent holds."""
    for lock in _held:
        os.close(lock)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


def _name(uri: str) -> Path | None:
    """The file whose lock says that somebody saves; `None` where there can be none."""
    path = local_path(uri)
    destination = uri.rstrip("/") if path is None else os.path.realpath(path)
    with contextlib.suppress(OSError):
        folder = Path(tempfile.gettempdir(), f"flytekit_ckpt-{os.getuid()}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        status = folder.lstat()
        # Anybody may have made it.
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid():
            return folder / f"{hashlib.sha256(os.fsencode(destination)).hexdigest()[:32]}.lock"
    return None


def _locked(name: Path, uri: str, patience: float, given_up: Callable[[], bool]) -> int | None:
    """Open and lock a file; `None` if that cannot be done, or its owner is silent for too long."""
    seen, since = 0, time.monotonic()
    wait = 0.001
    while True:
        try:
            lock = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError:
            return None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sign = os.fstat(lock).st_mtime_ns
            os.close(lock)
        except OSError:
            os.close(lock)
            return None
        else:
            # Unless its owner has removed it in this moment.
            if slots.is_at(lock, name):
                return lock
            os.close(lock)
            continue
        if sign != seen:
            seen, since = sign, time.monotonic()
        elif time.monotonic() - since > patience:
            logger.info("who saves to %s gives no sign of life: saving meanwhile", public(uri))
            return None
        if given_up():
            raise GivenUpError
        time.sleep(wait)
        wait = min(2 * wait, 0.05)
