"""Temporary files beside a file that is to be replaced, those of killed writers included."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def temporary(path: Path) -> Iterator[tuple[int, Path]]:
    """Open a new file beside another one, for whoever means to rename it to that; remove it if it is still there.

    The names are numbered, and whoever writes to one holds a lock on it. A file whose lock is free was left by a writer
    that was killed: the next one removes it. So it takes no look at the folder, which may hold a million others.
    """
    descriptor, name = _first_free(path)
    try:
        yield descriptor, name
    finally:
        # Still locked, so that nobody takes it for one that was left; once renamed, it is no more what it was.
        if is_at(descriptor, name):
            with contextlib.suppress(OSError):
                name.unlink()
        os.close(descriptor)


def is_temporary(name: str, path: Path) -> bool:
    """Tell whether a name is that of a temporary file beside a file."""
    return name.startswith(_prefix(path)) and name.endswith(_SUFFIX)


def _prefix(path: Path) -> str:
    return f".{path.name[:200]}."


_SUFFIX = ".tmp"


def _first_free(path: Path) -> tuple[int, Path]:
    for number in itertools.count():
        name = path.with_name(f"{_prefix(path)}{number}{_SUFFIX}")
        try:
            descriptor = _taken(name)
        except _LocksMissingError:
            name = path.with_name(f"{_prefix(path)}{uuid.uuid4().hex}{_SUFFIX}")
            return os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), name
        if descriptor is not None:
            for later in itertools.count(number + 1):
                left = path.with_name(f"{_prefix(path)}{later}{_SUFFIX}")
                if not left.exists():
                    return descriptor, name
                with contextlib.suppress(OSError, _LocksMissingError):
                    unused = _taken(left)
                    if unused is not None:
                        left.unlink()
                        os.close(unused)
    raise AssertionError


class _LocksMissingError(Exception):
    """The file system has no locks."""


def _taken(name: Path) -> int | None:
    """Make a new file of this name, locked; `None` if somebody is writing to it."""
    for _ in range(_TRIES):
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            # Whoever finds it in this moment removes it.
            if _locked(descriptor, name) and is_at(descriptor, name):
                return descriptor
            os.close(descriptor)
            continue
        try:
            descriptor = os.open(name, os.O_WRONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue
        except OSError:
            # Someone else's, which is not ours to remove.
            return None
        try:
            if not _locked(descriptor, name):
                return None
            # Unless its writer has just finished, and the name means nothing, or another one's file.
            if is_at(descriptor, name):
                name.unlink()
        finally:
            os.close(descriptor)
    return None


# More than there are writers that could get in the way by chance.
_TRIES = 100


def _locked(descriptor: int, name: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if os.fstat(descriptor).st_size == 0:
            with contextlib.suppress(OSError):
                name.unlink()
        raise _LocksMissingError from error
    return True


def is_at(descriptor: int, name: Path) -> bool:
    """Tell whether an open file is the one of this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(name))
    except FileNotFoundError:
        return False
