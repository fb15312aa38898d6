"""The options of checkpoints, in one place: keyword arguments of both APIs, of `install()` and of state handlers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

StorageOptions = Mapping[str, Any]
"""Keyword arguments of the fsspec filesystem, for example `{"endpoint_url": ..., "key": ..., "secret": ...}`."""


class StateOptions(TypedDict, total=False):
    """Options of whatever is saved; all may be left out.

    Parameters
    ----------
    storage_options : mapping, optional
        Keyword arguments of the fsspec filesystem, for example `{"endpoint_url": ..., "key": ..., "secret": ...}`. What
        is not given is taken from `flyte.init(storage=...)`, the `FLYTE_AWS_*` variables, flytekit's configuration,
        fsspec's configuration and the cloud SDK, in this order.
    memory_budget : int, default 256 MiB
        Bytes that one save or load may hold in memory, however large the checkpoint. On S3, three upload parts are held
        in any case: of 8 MiB each, or of a ten-thousandth of an object above 80 GB.
    retries : int, default 8
        Times that a request to an object store is repeated after a failure that may pass.
    timeout : float, default 60
        Seconds that an object store may be silent, and may take for 4 MiB, before a request counts as failed. Also the
        seconds that a save waits for another saver on this machine that gives no sign of life.
    restore_limit : int, optional
        Bytes that the files of a checkpoint may have to be restored; more is an `UnsafeCheckpointError`. As much as the
        disk has room for if not given.
    """

    storage_options: StorageOptions | None
    memory_budget: int
    retries: int
    timeout: float
    restore_limit: int | None


class CheckpointOptions(StateOptions, total=False):
    """Options of a task attempt's checkpoint, with either API: those of `StateOptions`, and one more.

    Parameters
    ----------
    carry_forward : bool, default True
        Whether the previous checkpoint, once loaded, is carried forward to `checkpoint_dest`, unless something is there
        or is being saved: so that an attempt which dies before its first save does not lose it.
    """

    carry_forward: bool


def check_names(options: Mapping[str, object], known: type, function: str) -> None:
    """Refuse an option that there is not, as Python refuses a keyword argument."""
    for name in options:
        if name not in known.__annotations__:
            message = f"{function}() got an unexpected keyword argument {name!r}"
            raise TypeError(message)
