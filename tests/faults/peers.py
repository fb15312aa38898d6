"""The four checkpointers that the trials are run against, behind one interface; each is imported when it is used."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from flytekit_ckpt.errors import CheckpointError

Folder = dict[str, tuple[object, ...]]
"""Relative names and what is there, as `look` gives them."""

Content = bytes | Folder

BYSTANDER = "mine"
"""File that lies in the user's folder before a checkpoint is restored into it."""


class Attempt(ABC):
    """The checkpoint of one task attempt.

    Parameters
    ----------
    destination : str
        Where it saves to.
    source : str
        Where the attempt before saved to.
    """

    errors: ClassVar[tuple[type[Exception], ...]] = (Exception,)
    """What a failure may raise to count as a clear one."""

    def __init__(self, destination: str, source: str = "") -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="attempt-"))
        (self.folder / BYSTANDER).write_bytes(b"the user's own")
        self._checkpoint = self._made(destination, source)

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(self.scratch, ignore_errors=True)

    @property
    def scratch(self) -> Path:
        """A folder for what is to be saved."""
        folder = self.folder.with_name(f"{self.folder.name}-scratch")
        folder.mkdir(exist_ok=True)
        return folder

    @abstractmethod
    def _made(self, destination: str, source: str) -> Any:
        """Make the package's object."""

    @abstractmethod
    def save_bytes(self, content: bytes) -> None: ...

    @abstractmethod
    def save_folder(self, folder: Path) -> None: ...

    @abstractmethod
    def load_bytes(self) -> bytes | None:
        """Load as a task does that saves bytes."""

    @abstractmethod
    def load_folder(self) -> Folder | None:
        """Load as a task does that saves folders."""

    def is_untouched(self) -> bool:
        """Tell whether the folders that a load writes to are as they were before it."""
        return list(look(self.folder)) == [BYSTANDER]

    def load(self, kind: type) -> Content | None:
        return self.load_bytes() if kind is bytes else self.load_folder()


class _Flytekit(Attempt):
    def save_bytes(self, content: bytes) -> None:
        self._checkpoint.write(content)

    def save_folder(self, folder: Path) -> None:
        self._checkpoint.save(folder)

    def load_bytes(self) -> bytes | None:
        content: bytes | None = self._checkpoint.read()
        return content

    def load_folder(self) -> Folder | None:
        restored = self._checkpoint.restore(self.folder)
        if restored is None:
            return None
        return {name: what for name, what in look(self.folder).items() if name != BYSTANDER}


class _Flyte(Attempt):
    def save_bytes(self, content: bytes) -> None:
        self._checkpoint.save_sync(content)

    def save_folder(self, folder: Path) -> None:
        self._checkpoint.save_sync(folder)

    def load_bytes(self) -> bytes | None:
        path = self._checkpoint.load_sync()
        if path is None:
            return None
        # A task that saves bytes opens what it gets, and fails if that is a folder.
        content: bytes = path.read_bytes()
        return content

    def load_folder(self) -> Folder | None:
        return None if self._checkpoint.load_sync() is None else look(self._checkpoint.path)

    def is_untouched(self) -> bool:
        return super().is_untouched() and not look(self._checkpoint.path)


class LegacyFace(_Flytekit):
    """This package, with flytekit's API."""

    errors = (CheckpointError,)

    def _made(self, destination: str, source: str) -> Any:
        from flytekit_ckpt.checkpointer import SyncCheckpoint

        return SyncCheckpoint(destination, source)


class NewFace(_Flyte):
    """This package, with Flyte 2's API."""

    errors = (CheckpointError,)

    def _made(self, destination: str, source: str) -> Any:
        from flytekit_ckpt.v2 import Checkpoint

        return Checkpoint(destination, source)


class Flytekit(_Flytekit):
    """flytekit 1, which stores loose files below a prefix."""

    def _made(self, destination: str, source: str) -> Any:
        from flytekit.configuration import DataConfig
        from flytekit.core.checkpointer import SyncCheckpoint
        from flytekit.core.context_manager import FlyteContextManager

        # It has read the environment when it was imported, which may have been in another process.
        FlyteContextManager.current_context().file_access._data_config = DataConfig.auto()
        return SyncCheckpoint(destination, source)


class Flyte(_Flyte):
    """Flyte 2."""

    def _made(self, destination: str, source: str) -> Any:
        from flyte import Checkpoint

        return Checkpoint(destination, source)


OURS: dict[str, type[Attempt]] = {"flytekit_ckpt, legacy face": LegacyFace, "flytekit_ckpt, new face": NewFace}
PEERS: dict[str, type[Attempt]] = {**OURS, "flytekit": Flytekit, "flyte": Flyte}


def look(folder: Path) -> Folder:
    """Describe everything below a folder; unlike `tests.trees.look`, whatever a damaged archive may have put there."""
    seen: Folder = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(root, name)
            status = path.lstat()
            relative = path.relative_to(folder).as_posix()
            if stat.S_ISREG(status.st_mode):
                seen[relative] = ("file", path.read_bytes())
            elif stat.S_ISLNK(status.st_mode):
                seen[relative] = ("link", os.readlink(path))
            else:
                seen[relative] = ("other", stat.S_IFMT(status.st_mode))
    return seen
