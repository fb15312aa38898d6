"""The options of checkpoints, in one place: keyword arguments of both APIs, of `install()` and of state handlers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal, TypedDict

StorageOptions = Mapping[str, Any]
"""Keyword arguments of the fsspec filesystem, for example `{"endpoint_url": ..., "key": ..., "secret": ...}`."""


class StateOptions(TypedDict, total=False):
    """Options of whatever is saved; all may be left out.

    Attributes
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
    """Options of a task attempt's checkpoint, with either API: those of `StateOptions`, and more.

    Attributes
    ----------
    carry_forward : bool, default True
        Whether the previous checkpoint is carried forward to `checkpoint_dest`, from the moment in which this attempt
        is known, unless something is there or is being saved: so that an attempt which dies before its first save does
        not lose it.
    home : str, optional
        URI or path of a folder in which every save leaves a pointer to itself, under a key that all attempts of one
        task of one run share. A load that finds neither the source nor what this attempt has saved asks there, so that
        any number of attempts may die before they carry anything forward. The variable `FLYTEKIT_CKPT_HOME` for the
        checkpoints that the platform gives if not given; needs a Flyte container or `flytekit-ckpt run`.
    resume_from : str, optional
        Where to resume from if the run has no checkpoint of its own: the URI or path of a checkpoint, or, with a home,
        the name of a run of the same task, or `"latest"` for the newest of them. The variable
        `FLYTEKIT_CKPT_RESUME_FROM` for the checkpoints that the platform gives if not given.
    fallback : "older", optional
        Whether a damaged checkpoint is passed over, with a warning, for the newest whole one. An error if not given.
    verify_unchanged : bool, default False
        Whether files of a folder that are the same by size, times and inode as when they were saved are read, and
        compared by checksum, before what was saved of them is used again. Needed where another process changes files
        through a memory map, which their times may not show.
    """

    carry_forward: bool
    home: str | None
    resume_from: str | None
    fallback: Literal["older"] | None
    verify_unchanged: bool


class AsyncOptions(CheckpointOptions, total=False):
    """Options of a checkpoint that is saved in the background: those of `CheckpointOptions`, and more.

    Attributes
    ----------
    when_busy : {"latest", "wait"}, default "latest"
        What a save does while an earlier one is under way and another one waits: `"latest"` takes the place of the one
        that waits, if it replaces that whole; `"wait"` holds the caller until nothing waits.
    grace : float, default 25
        Seconds that saves may go on for after SIGTERM; what cannot be done in that time is not begun. Kubernetes kills
        a pod 30 seconds after SIGTERM unless told otherwise.
    """

    when_busy: Literal["latest", "wait"]
    grace: float


class InstallOptions(AsyncOptions, total=False):
    """Options of `install`: those of `AsyncOptions`, for the checkpoints of task attempts, and more.

    Attributes
    ----------
    asynchronous : bool, default False
        Whether task attempts get checkpoints that are saved in the background. The variable
        `FLYTEKIT_CKPT_ASYNCHRONOUS`, `1` or `0`, if not given.
    """

    asynchronous: bool


GRACE = 25.0
"""Seconds that saves may go on for after SIGTERM unless told otherwise."""

of_attempts = InstallOptions()
"""What `install` was given, for the checkpoints of task attempts."""

_VARIABLES = {"home": "FLYTEKIT_CKPT_HOME", "resume_from": "FLYTEKIT_CKPT_RESUME_FROM"}


def is_asynchronous() -> bool:
    """Tell whether task attempts get checkpoints that are saved in the background."""
    said = os.environ.get("FLYTEKIT_CKPT_ASYNCHRONOUS", "").strip().lower()
    return of_attempts.get("asynchronous", said not in ("", "0", "false", "no", "off"))


def completed(given: AsyncOptions, *, is_attempts: bool) -> AsyncOptions:
    """Fill in what was not given for the checkpoint of the running attempt; any other has what it was given."""
    if not is_attempts:
        return given
    environment = {name: value for name, variable in _VARIABLES.items() if (value := os.environ.get(variable))}
    return AsyncOptions(**{**environment, **of_attempts, **given})  # type: ignore[typeddict-item]


def check_names(options: Mapping[str, object], known: type, function: str) -> None:
    """Refuse an option that there is not, as Python refuses a keyword argument."""
    for name in options:
        if name not in known.__annotations__:
            message = f"{function}() got an unexpected keyword argument {name!r}"
            raise TypeError(message)
