"""Checkpoints of data iterators: where they were, in which epoch, with which shuffle.

Takes the place of `datarax.checkpoint.iterators`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

from flytekit_ckpt import storage
from flytekit_ckpt.options import StorageOptions
from flytekit_ckpt.steps import CheckpointableIterator, Metadata, StateHandler

__all__ = [
    "CheckpointableIterator",
    "Handler",
    "IteratorCheckpoint",
    "Metadata",
    "PipelineCheckpoint",
    "StateDictIterator",
    "StateHandler",
]

IDENTITY = ("sampler_repr", "data_source_repr", "shard_count", "worker_count")
"""Keys of a state that must be the same in the iterator that it is restored into."""

Checkpointable = TypeVar("Checkpointable")


class Handler(Protocol):
    """What `IteratorCheckpoint` asks of a handler; datarax's `OrbaxCheckpointHandler` fits too."""

    def save_to_directory(
        self,
        directory: Any,
        target: Any,
        step: int | None = None,
        keep: int | None = 1,
        overwrite: bool = False,  # noqa: FBT001, FBT002 - datarax's signature
        metadata: Any = None,
    ) -> str: ...

    def restore(self, directory: Any, target: Any = None, step: int | None = None) -> Any: ...

    def latest_step(self, directory: Any) -> int | None: ...

    def list_checkpoints(self, directory: Any) -> dict[int, str]: ...

    def wait_until_finished(self) -> None: ...


class IteratorCheckpoint:
    """Saves and restores iterators (datarax: `datarax.checkpoint.IteratorCheckpoint`).

    Parameters
    ----------
    base_dir : str or pathlib.Path
        URI or path that the checkpoints lie below.
    handler : object, optional
        What stores the states; a `StateHandler` if not given.
    async_checkpointing : bool, default False
        Whether states are saved in the background; see `StateHandler`, which it is passed to.
    storage_options : mapping, keyword only, optional
        Keyword arguments of the fsspec filesystem; passed to `StateHandler` too.

    Attributes
    ----------
    base_dir : pathlib.Path or str
        A path, or a URI.
    handler : object

    Examples
    --------
    >>> class Counter:
    ...     def __init__(self): self.at = 0
    ...     def get_state(self): return {"at": self.at}
    ...     def set_state(self, state): self.at = state["at"]
    >>> counter = Counter()
    >>> counter.at = 5
    >>> checkpoint = IteratorCheckpoint("/tmp/counter-state")
    >>> checkpoint.save_to_directory(counter, step=5, overwrite=True)
    '/tmp/counter-state/ckpt-5'
    >>> checkpoint.restore_latest(Counter()).at
    5
    """

    def __init__(
        self,
        base_dir: str | Path,
        handler: Handler | None = None,
        async_checkpointing: bool = False,  # noqa: FBT001, FBT002 - datarax's signature
        *,
        storage_options: StorageOptions | None = None,
    ) -> None:
        self.base_dir: str | Path = base_dir if "://" in os.fspath(base_dir) else Path(base_dir)
        self.handler: Handler = handler or StateHandler(async_checkpointing, storage_options=storage_options)

    def save_to_directory(
        self,
        iterator: Any,
        step: int | None = None,
        keep: int = 1,
        overwrite: bool = False,  # noqa: FBT001, FBT002 - datarax's signature
        metadata: Metadata | None = None,
    ) -> str:
        """Save an iterator's state.

        Parameters
        ----------
        iterator : CheckpointableIterator
            Its `get_state` returns a dict.
        step : int, optional
            Without one, the unversioned checkpoint is saved.
        keep : int, default 1
            How many steps stay; all if less than 1.
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
            If the iterator has no `get_state`, or it returns no dict; if the step is there and not to be overwritten.
        TypeError
            If something in the state cannot be stored; the message names it.
        StorageError
            If it cannot be stored; what was there before stays.
        """
        return self.handler.save_to_directory(
            self.base_dir, _state(iterator), step=step, keep=keep, overwrite=overwrite, metadata=metadata
        )

    def restore(self, iterator: Checkpointable, step: int | None = None) -> Checkpointable:
        """Set an iterator to a saved state.

        Parameters
        ----------
        iterator : CheckpointableIterator
            It stays as it is if anything is wrong.
        step : int, optional
            The latest if not given.

        Returns
        -------
        CheckpointableIterator
            The iterator.

        Raises
        ------
        ValueError
            If the iterator has no `get_state` or `set_state`, if there is no such checkpoint, or if it was saved by
            another pipeline: one of `sampler_repr`, `data_source_repr`, `shard_count`, `worker_count` is in both
            states, and differs.
        CorruptCheckpointError, StorageError
            If it is damaged, or cannot be read.
        """
        set_state = getattr(iterator, "set_state", None)
        if not callable(set_state):
            message = f"a {type(iterator).__name__} has no method set_state"
            raise ValueError(message)  # noqa: TRY004 - datarax's error for it
        live = _state(iterator)
        saved = self.handler.restore(self.base_dir, step=step, target=None)
        if not isinstance(saved, dict):
            message = f"the checkpoint in {storage.public(str(self.base_dir))} is no dict, but {type(saved).__name__}"
            raise ValueError(message)  # noqa: TRY004 - as above
        for field in IDENTITY:
            if field in saved and field in live and saved[field] != live[field]:
                message = (
                    f"the checkpoint in {storage.public(str(self.base_dir))} was saved by another pipeline: "
                    f"{field} was {saved[field]!r}, and is {live[field]!r}. Build the iterator as it was"
                )
                raise ValueError(message)
        set_state(saved)
        return iterator

    def restore_latest(self, iterator: Checkpointable) -> Checkpointable:
        """Set an iterator to the state with the highest step; see `restore`.

        Raises
        ------
        ValueError
            If there is none, too.
        """
        latest = self.get_latest_step()
        if latest is None:
            message = f"no checkpoints found in {storage.public(str(self.base_dir))}"
            raise ValueError(message)
        # Not that one by its number: another process may have saved a later one meanwhile and removed it.
        return self.restore(iterator)

    def get_latest_step(self) -> int | None:
        """Return the highest step; `None` if there is none."""
        return self.handler.latest_step(self.base_dir)

    def list_checkpoints(self) -> dict[int, str]:
        """Return the steps and their URIs or paths."""
        return self.handler.list_checkpoints(self.base_dir)

    def has_checkpoint(self) -> bool:
        """Tell whether there is a step."""
        return self.get_latest_step() is not None

    def wait_until_finished(self) -> None:
        """Wait for the background saves, and raise what failed."""
        self.handler.wait_until_finished()


class PipelineCheckpoint(IteratorCheckpoint):
    """Saves at every so many steps (datarax: `datarax.checkpoint.PipelineCheckpoint`)."""

    def save_to_step(
        self,
        data_stream: Any,
        step: int,
        interval: int = 1000,
        keep: int = 5,
        overwrite: bool = False,  # noqa: FBT001, FBT002 - datarax's signature
        metadata: Metadata | None = None,
    ) -> str | None:
        """Save if the step is a multiple of the interval; see `save_to_directory`.

        Returns
        -------
        str or None
            URI or path of the checkpoint; `None` if it is not yet time.
        """
        if step % interval:
            return None
        return self.save_to_directory(data_stream, step=step, keep=keep, overwrite=overwrite, metadata=metadata)


class StateDictIterator:
    """Gives what has `state_dict` and `load_state_dict` the methods of a `CheckpointableIterator`.

    For example torchdata's `StatefulDataLoader`: `checkpoint.save_to_directory(StateDictIterator(loader), step)`.
    PyTorch's tensors in the state come back as tensors.

    Parameters
    ----------
    wrapped : object
        What has the two methods.
    """

    def __init__(self, wrapped: Any) -> None:
        self.wrapped = wrapped

    def __iter__(self) -> Iterator[Any]:
        return iter(self.wrapped)

    def get_state(self) -> dict[str, Any]:
        """Return the state dict."""
        try:
            return {key: _marked(value) for key, value in self.wrapped.state_dict().items()}
        except RecursionError:
            message = f"the state of a {type(self.wrapped).__name__} is nested too deeply to be stored"
            raise ValueError(message) from None

    def set_state(self, state: dict[str, Any]) -> None:
        """Load a state dict."""
        self.wrapped.load_state_dict({key: _unmarked(value) for key, value in state.items()})


_TENSOR = "torch.Tensor"


def _marked(value: Any) -> Any:
    """Mark tensors, which are stored as arrays."""
    if isinstance(value, dict):
        return {key: _marked(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        # Of a named tuple, the values are kept.
        return (list if isinstance(value, list) else tuple)(map(_marked, value))
    torch = sys.modules.get("torch")
    return {_TENSOR: value} if torch is not None and isinstance(value, torch.Tensor) else value


def _unmarked(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_TENSOR} and type(value[_TENSOR]).__name__ == "ndarray":
            import torch

            return torch.from_numpy(value[_TENSOR])
        return {key: _unmarked(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_unmarked, value))
    return value


def _state(iterator: Any) -> dict[str, Any]:
    get_state = getattr(iterator, "get_state", None)
    if not callable(get_state):
        message = f"a {type(iterator).__name__} has no method get_state"
        raise ValueError(message)  # noqa: TRY004 - datarax's error for it
    found = get_state()
    if not isinstance(found, dict):
        message = f"get_state of a {type(iterator).__name__} must return a dict, not {type(found).__name__}"
        raise ValueError(message)  # noqa: TRY004 - as above
    return found
