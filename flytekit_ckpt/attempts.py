"""Which attempt runs here, and its checkpoint with either API."""

from __future__ import annotations

import functools
import os
import sys
import threading
import types
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

from flytekit_ckpt import errors, running, v2
from flytekit_ckpt.async_checkpointer import AsyncCheckpoint
from flytekit_ckpt.carry_forward import CarryForward
from flytekit_ckpt.checkpointer import Checkpoint, SyncCheckpoint
from flytekit_ckpt.options import completed, is_asynchronous
from flytekit_ckpt.replacement import original
from flytekit_ckpt.running import Running, named_uri
from flytekit_ckpt.storage import Settings


class Attempt:
    """One attempt's checkpoint: both APIs of it, each made when it is first asked for.

    The previous attempt's checkpoint is carried forward from now on.
    """

    def __init__(self, running_attempt: Running) -> None:
        self._running = running_attempt
        options = completed({}, is_attempts=True)
        self.carry_forward = CarryForward(
            running_attempt.source,
            self._destination,
            Settings.of(options),
            is_wanted=options.get("carry_forward", True),
        )
        self.carry_forward.begin()

    @property
    def _destination(self) -> str:
        return self._running.destination or ""

    @functools.cached_property
    def legacy(self) -> SyncCheckpoint:
        kind = AsyncCheckpoint if is_asynchronous() else SyncCheckpoint
        with running.as_running(self._running):
            return kind(self._destination, self._running.source)

    @functools.cached_property
    def new(self) -> v2.Checkpoint:
        kind = v2.AsyncCheckpoint if is_asynchronous() else v2.Checkpoint
        with running.as_running(self._running):
            return kind(self._destination, self._running.source)

    def finish(self) -> Iterator[Exception]:
        """Wait until everything is saved that was given to be saved; yields what failed."""
        # Not by asking for them, which would make those that nobody has asked for.
        for name in ("legacy", "new"):
            checkpoint = vars(self).get(name)
            if isinstance(checkpoint, (AsyncCheckpoint, v2.Checkpoint)):
                try:
                    checkpoint.wait_until_finished()
                except Exception as error:  # noqa: BLE001 - whatever a save raised
                    yield error


# For whoever asks first, and for taking names over: every thread must see the same.
lock = threading.RLock()

# A fork must not come with the lock of a thread that it does not have.
os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)

# Both Flytes make one checkpoint of their own for every attempt, which tells the attempts of a process apart.
attempts: weakref.WeakKeyDictionary[Any, Attempt] = weakref.WeakKeyDictionary()

# The local runner gives a whole process to an attempt, and the attempt may start threads of its own, which would not
# see a context variable.
runners: list[Attempt] = []


# The attempt that the command line names, which is known before the platform has made a checkpoint for it; `None` once
# it has.
named: dict[tuple[str | None, str | None], Attempt | None] = {}


def set_runner_checkpoint(running_attempt: Running) -> None:
    """Make a checkpoint the current one for the rest of this process; called by the local runner."""
    runners.append(Attempt(running_attempt))


def begin() -> None:
    """Begin to carry forward for the attempt that is known already; called by `install`."""
    with lock:
        known = running.running()
        key = known.destination, known.source
        if known.destination is not None and known.source is not None and key not in named:
            named[key] = Attempt(known)


def attempt_of(theirs: Any, known: Running) -> Attempt:
    """Give the attempt that a checkpoint of flytekit's or flyte's own belongs to."""
    if theirs not in attempts:
        key = known.destination, known.source
        attempts[theirs] = named.get(key) or Attempt(known)
        if key in named:
            # Once: attempts of a local run of Flyte 2 have their places in common.
            named[key] = None
    return attempts[theirs]


def runner_attempt() -> Attempt | None:
    """Give the attempt that the local runner has begun in this process."""
    return runners[-1] if runners else None


def running_attempts() -> list[Attempt]:
    """Give the attempts of this process whose checkpoints have been asked for."""
    with lock:
        return [*attempts.values(), *runners]


def of_runner() -> SyncCheckpoint | None:
    """Give the legacy checkpoint of the local runner's attempt."""
    with lock:
        attempt = runner_attempt()
        return attempt.legacy if attempt is not None else None


def of_flyte() -> SyncCheckpoint | None:
    """Give the legacy checkpoint of the task that runs on flyte."""
    # Not by an import statement: that waits for threads that are importing the package, and `_patch` has those wait for
    # this lock.
    flyte: Any = sys.modules.get("flyte")
    with lock:
        attempt = flyte_attempt(flyte.ctx()) if isinstance(flyte, types.ModuleType) and hasattr(flyte, "ctx") else None
        return attempt.legacy if attempt is not None else None


def flyte_attempt(task: Any) -> Attempt | None:
    """What belongs to a `flyte.models.TaskContext`."""
    checkpoint = original(type(task), "checkpoint")
    # Releases before 2.1.3 have none.
    theirs = checkpoint.fget(task) if checkpoint is not None else None
    if theirs is None:
        return None
    # A restarted worker of a cluster has a source of its own making: its destination.
    return attempt_of(theirs, running.of_flyte(task))


def attempt_of_context(task: Any) -> Attempt | None:
    """Give the attempt of a `flyte.models.TaskContext`, or the local runner's."""
    with lock:
        return flyte_attempt(task) or runner_attempt()


def of_flytekit() -> Checkpoint | None:
    """The checkpoint that flytekit was given, in its container or its local sandbox."""
    if sys.modules.get("flytekit") is None:
        return None
    import flytekit

    try:
        return taken_over(flytekit.current_context().checkpoint)
    except NotImplementedError:
        return None


def taken_over(theirs: Any) -> Checkpoint:
    """The legacy checkpoint in place of flytekit's own checkpoint; any other, a subclass too, is the user's."""
    kind = type(theirs)
    is_theirs = (kind.__module__, kind.__qualname__) == ("flytekit.core.checkpointer", "SyncCheckpoint")
    # Where flytekit makes it after `install`, it is this package's already, but one whose saves are waited for.
    if not is_theirs and not (kind is SyncCheckpoint and is_asynchronous()):
        return cast("Checkpoint", theirs)
    with lock:
        # flytekit has no public name for the two prefixes.
        destination, source = theirs._checkpoint_dest, theirs._checkpoint_src
        known = replace(running.running(), destination=destination, source=named_uri(source))
        return attempt_of(theirs, known).legacy


def unavailable() -> errors.CheckpointUnavailableError:
    """Make the error for code that no checkpoint belongs to."""
    flyte = sys.modules.get("flyte")
    if isinstance(flyte, types.ModuleType) and hasattr(flyte, "TaskEnvironment") and not hasattr(flyte, "Checkpoint"):
        message = (
            f"flyte {getattr(flyte, '__version__', '')} gives its tasks no checkpoints. "
            "Update it to 2.1.3 or later, or make a flytekit_ckpt.SyncCheckpoint(destination, source) of your own"
        )
        return errors.CheckpointUnavailableError(message)
    message = (
        "no checkpoint belongs to this code: it runs neither as a Flyte task nor under `flytekit-ckpt run`. "
        "Outside of both, make a flytekit_ckpt.SyncCheckpoint(destination, source) of your own"
    )
    return errors.CheckpointUnavailableError(message)
