"""Steps of an iterator's checkpoint: one object each, listed, saved, read and removed."""

from __future__ import annotations

import operator
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from flytekit_ckpt import layout, state, storage, termination
from flytekit_ckpt.background_saves import BackgroundSaves, Job
from flytekit_ckpt.entries import stream_entry
from flytekit_ckpt.errors import CorruptCheckpointError, StorageError
from flytekit_ckpt.options import StateOptions, check_names

if TYPE_CHECKING:
    from typing_extensions import Unpack

Metadata = Mapping[str, int | str | float | bool]
"""What a checkpoint may carry beside the state."""

_STEP = re.compile(r"ckpt-(0|[1-9][0-9]*)")
_UNVERSIONED = "checkpoint"
_FILE = re.compile(r"(state|metadata)(\.json|/[0-9]+\.(npy|bin))")


@runtime_checkable
class CheckpointableIterator(Protocol):
    """What can be saved and restored (Grain's `DatasetIterator` and datarax's iterators are such)."""

    def get_state(self) -> dict[str, Any]:
        """Return what `set_state` needs in order to go on from here."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from where a state was taken."""


class StateHandler:
    """Stores states as objects `<directory>/ckpt-<step>`, or `<directory>/checkpoint` without a step.

    Takes the place of datarax's `OrbaxCheckpointHandler`. Each object is a gzip-compressed tar that holds `state.json`,
    `metadata.json` and the arrays; `flyte.Checkpoint` loads it, `tar tzf` shows it. Reading it runs no code.

    Parameters
    ----------
    async_checkpointing : bool, default False
        Whether states are saved in the background, in order. The state is taken at the call; an error is raised by the
        next call or by `wait_until_finished`. While two states are being saved, a third one waits. A process that ends
        normally finishes first.
    **options
        Those of `flytekit_ckpt.options.StateOptions`: `storage_options`, `memory_budget`, `retries`, `timeout`,
        `restore_limit`.
    """

    def __init__(
        self,
        async_checkpointing: bool = False,  # noqa: FBT001, FBT002 - datarax's signature
        **options: Unpack[StateOptions],
    ) -> None:
        check_names(options, StateOptions, type(self).__name__)
        self.async_checkpointing = async_checkpointing
        self._settings = storage.Settings.of(options)
        self._background = BackgroundSaves(_do, are_joint=False) if async_checkpointing else None

    def save_to_directory(
        self,
        directory: str | os.PathLike[str],
        target: Any,
        step: int | None = None,
        keep: int | None = 1,
        overwrite: bool = False,  # noqa: FBT001, FBT002 - datarax's signature
        metadata: Metadata | None = None,
    ) -> str:
        """Save a state, atomically, and remove the oldest steps when it is safe.

        Parameters
        ----------
        directory : str or path-like
            URI or path that the steps lie below.
        target : dict or CheckpointableIterator
            The state, or what has one.
        step : int, optional
            Not negative; without one, the unversioned checkpoint is saved, and nothing is removed.
        keep : int, optional, default 1
            How many steps stay, those with the highest numbers and the one that is being saved; all if `None` or less
            than 1.
        overwrite : bool, default False
            Whether a checkpoint that is there already is replaced.
        metadata : mapping, optional
            Is kept beside the state.

        Returns
        -------
        str
            URI or path of the checkpoint.

        Raises
        ------
        ValueError
            If the step is there and not to be overwritten, or is negative.
        TypeError
            If something in the state cannot be stored; the message names it, and nothing has been written.
        StorageError
            If it cannot be stored; what was there before stays.
        """
        name = _UNVERSIONED if step is None else f"ckpt-{_checked(step)}"
        uri = _join(_base(directory), name)
        # Where it is now: the working directory may be another one when it is saved.
        base = _base(directory)
        base = os.path.abspath(base) if storage.local_path(base) == Path(base) else base
        target_uri = _join(base, name)
        taken = target.get_state() if isinstance(target, CheckpointableIterator) else target
        copied = self._background is not None
        files = state.encode(taken, "state", "state", copied=copied)
        files += state.encode(dict(metadata or {}), "metadata", "metadata", copied=copied)

        def save() -> None:
            names = self._at(base).names()
            path = storage.local_path(target_uri)
            if (name in names and not overwrite) or (path is not None and path.is_dir()):
                message = f"there is a checkpoint at {storage.public(uri)} already: give overwrite=True to replace it"
                raise ValueError(message)
            self._put(target_uri, files)
            if step is not None and keep is not None and keep > 0:
                for old in sorted({*_steps(names), step})[:-keep]:
                    if old != step:
                        self._at(_join(base, f"ckpt-{old}")).remove()

        if self._background is None:
            with termination.saving():
                save()
        else:
            # Each step is a checkpoint of its own, and none takes the place of another.
            self._background.check()
            self._background.wait_for_room()
            self._background.submit(Job(uri, save, sum(file.size for file in files)))
        return uri

    def restore(
        self,
        directory: str | os.PathLike[str],
        target: Any = None,
        step: int | None = None,
        metadata_only: bool = False,  # noqa: FBT001, FBT002 - datarax's signature
    ) -> Any:
        """Read a state.

        Parameters
        ----------
        directory : str or path-like
            URI or path that the steps lie below.
        target : CheckpointableIterator, optional
            What the state is set in.
        step : int, optional
            The highest one if not given, and the unversioned checkpoint if there are no steps.
        metadata_only : bool, default False
            Whether the metadata is wanted instead of the state.

        Returns
        -------
        object
            The target if there is one, the state or the metadata if not. `None` for metadata that was not given.

        Raises
        ------
        ValueError
            If there is no such checkpoint.
        CorruptCheckpointError
            If it is damaged, or not one of this package's.
        StorageError
            If it cannot be read.
        """
        self.wait_until_finished()
        base = _base(directory)
        found = self._read(_join(base, f"ckpt-{_checked(step)}")) if step is not None else self._read_latest(base)
        if found is None:
            wanted = "no checkpoints" if step is None else f"no checkpoint of step {step}"
            message = f"{wanted} found in {storage.public(base)}"
            raise ValueError(message)
        saved, metadata = found
        if metadata_only:
            return metadata or None
        if isinstance(target, CheckpointableIterator):
            target.set_state(saved)
            return target
        return saved

    def latest_step(self, directory: str | os.PathLike[str]) -> int | None:
        """Return the highest step; `None` if there is none."""
        return max(self.list_checkpoints(directory), default=None)

    def list_checkpoints(self, directory: str | os.PathLike[str]) -> dict[int, str]:
        """Return the steps, ascending, and their URIs or paths."""
        self.wait_until_finished()
        base = _base(directory)
        return {step: _join(base, f"ckpt-{step}") for step in _steps(self._at(base).names())}

    def wait_until_finished(self) -> None:
        """Wait for the background saves, and raise what failed."""
        if self._background is not None:
            self._background.wait()

    def close(self) -> None:
        """Finish what is being saved, and end the thread that does it."""
        if self._background is not None:
            self._background.close()

    def __enter__(self) -> StateHandler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _at(self, uri: str) -> storage.StoredObject:
        return storage.at(uri, self._settings)

    def _put(self, uri: str, files: list[state.File]) -> None:
        ordered = sorted(files, key=lambda file: file.name.split("/"))
        size = sum(file.size for file in files)
        entries = (stream_entry(file.name, file.chunks(), file.size) for file in ordered)
        layout.put_tree(uri, entries, self._settings, size=lambda: size)

    def _read_latest(self, base: str) -> tuple[Any, Any] | None:
        # Another process may remove the latest step after it was listed, once it has saved a later one.
        for _ in range(5):
            steps = _steps(self._at(base).names())
            name = f"ckpt-{steps[-1]}" if steps else _UNVERSIONED
            try:
                found = self._read(_join(base, name))
            except StorageError:
                # It may have been removed while it was being read.
                if name in self._at(base).names() or not steps:
                    raise
                continue
            if found is not None or not steps:
                return found
        return None

    def _read(self, uri: str) -> tuple[Any, Any] | None:
        started = time.perf_counter()
        found = layout.get(uri, self._settings)
        if found is None:
            return None
        with layout.naming(uri):
            if isinstance(found, layout.Payload):
                message = "it is not the state of an iterator"
                raise CorruptCheckpointError(message)
            files = {}
            size = 0
            for entry in found.entries:
                if entry.info.isdir():
                    continue
                if not _FILE.fullmatch(entry.name) or not entry.info.isreg() or entry.info.issparse():
                    message = f"it is not the state of an iterator, but holds {entry.name}"
                    raise CorruptCheckpointError(message)
                try:
                    files[entry.name] = state.read_file(entry.name, entry.chunks())
                except CorruptCheckpointError:
                    raise
                except ValueError as error:
                    raise CorruptCheckpointError(str(error)) from error
                size += entry.info.size
            try:
                content = state.decode("state", files), state.decode("metadata", files)
            except ValueError as error:
                raise CorruptCheckpointError(str(error)) from error
        layout.Event("restored", "tree", size, time.perf_counter() - started, storage.public(uri)).log()
        return content


def _do(jobs: Sequence[Job]) -> None:
    for job in jobs:
        job.content()


def _base(directory: str | os.PathLike[str]) -> str:
    """Give a directory as text that names can be joined to."""
    text = os.fspath(directory) or "."
    if isinstance(directory, Path) and re.match(r"[a-z][a-z0-9+.-]+:/(?!/)", text) and not text.startswith("file:"):
        message = f"{text} was a URI before it became a pathlib.Path: give it as a string"
        raise ValueError(message)
    stripped = text.rstrip("/")
    # The root of a disk, or of a store.
    return text if not stripped or stripped.endswith(":") else stripped


def _join(base: str, name: str) -> str:
    return base + name if base.endswith("/") else f"{base}/{name}"


def _checked(step: int) -> int:
    number = operator.index(step)
    if number < 0:
        message = f"a step is not negative, but {step} is"
        raise ValueError(message)
    return number


def _steps(names: list[str]) -> list[int]:
    """Give the steps among the names of objects, ascending."""
    return sorted(int(match[1]) for name in names if (match := _STEP.fullmatch(name)))
