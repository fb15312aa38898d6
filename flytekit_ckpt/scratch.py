"""Folders that live no longer than they are needed, those of killed processes included."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tempfile
import weakref
from pathlib import Path

_PREFIX = ".flytekit_ckpt-"


def is_scratch(name: str) -> bool:
    """Tell whether a name is that of a folder of this package's, which is nobody's checkpoint."""
    return name.startswith(_PREFIX)


class Held:
    """A folder that nobody takes for one of a killed process: whoever uses it holds a lock on it.

    Parameters
    ----------
    path : pathlib.Path
        The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        _held.add(self)
        self._is_locked_by_others = False
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._is_locked_by_others = True
        except OSError:
            # Some file systems have no locks.
            pass

    @classmethod
    def made_inside(cls, folder: Path) -> Held:
        """Make a folder inside another one, and remove those of killed processes there."""
        remove_abandoned(folder)
        while True:
            held = cls(Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder)))
            # Unless somebody takes it for one of a killed process, or has done so, before it was locked.
            if not held._is_locked_by_others and held.path.is_dir():
                return held
            held.release()

    def rename(self) -> None:
        """Give the folder a name that says whose it is, where it is."""
        # The name is made and removed: of all that are free, it is one that nobody else takes.
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=self.path.parent))
        path.rmdir()
        self.path.rename(path)
        self.path = path

    def remove(self) -> None:
        """Remove the folder, with what is in it."""
        remove_tree(self.path)
        self.release()

    def release(self) -> None:
        """Let go of the folder."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


_held: weakref.WeakSet[Held] = weakref.WeakSet()


def _let_go() -> None:
    """Have a forked process not keep what its parent holds."""
    for held in list(_held):
        held.release()


os.register_at_fork(after_in_child=_let_go)


def remove_abandoned(folder: Path) -> None:
    """Remove what killed processes have left inside a folder."""
    for item in os.scandir(folder):
        if is_scratch(item.name) and item.is_dir(follow_symlinks=False):
            with contextlib.suppress(OSError):
                descriptor = os.open(item.path, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    remove_tree(Path(item.path))
                finally:
                    os.close(descriptor)


def workspace(owner: object, prefix: str) -> Path:
    """Make a temporary folder that is removed with its owner (in the process that made it)."""
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    weakref.finalize(owner, _remove_own, folder, os.getpid())
    return folder


def _remove_own(folder: Path, process: int) -> None:
    if os.getpid() == process:
        remove_tree(folder)


def remove_tree(folder: Path) -> None:
    """Remove a folder, with the read-only and the very deep ones inside it, which `shutil.rmtree` does not."""
    waiting = [str(folder)]
    emptied = []
    while waiting:
        path = waiting.pop()
        emptied.append(path)
        with contextlib.suppress(OSError):
            os.chmod(path, stat.S_IRWXU)
            for item in os.scandir(path):
                if item.is_dir(follow_symlinks=False):
                    waiting.append(item.path)
                else:
                    os.unlink(item.path)
    for path in reversed(emptied):
        with contextlib.suppress(OSError):
            os.rmdir(path)
