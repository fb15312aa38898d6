"""Which checkpoint belongs to the running code: the local runner's, Flyte 2's or Flyte 1's."""

from __future__ import annotations

import importlib.util
import sys
import threading
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flytekit_ckpt import errors
from flytekit_ckpt.checkpointer import Checkpoint, SyncCheckpoint

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Context:
    """What the running task attempt has (flytekit: `flytekit.current_context()`)."""

    @property
    def checkpoint(self) -> Checkpoint:
        """The attempt's legacy checkpoint, the same instance at every use.

        Raises
        ------
        CheckpointUnavailableError
            Outside a task; programs written for flytekit catch it as `NotImplementedError`.
        """
        found = _runners or _flyte_2() or _flyte_1()
        if not found:
            message = (
                "no checkpoint belongs to this code: it runs neither as a Flyte task nor under `flytekit-ckpt run`. "
                "Outside of both, make a flytekit_ckpt.SyncCheckpoint(destination, source) of your own"
            )
            raise errors.CheckpointUnavailableError(message)
        return found[-1]


def current_context() -> Context:
    """Return the context of the running task attempt (flytekit: `flytekit.current_context`)."""
    return Context()


def current_checkpoint() -> Checkpoint:
    """Return the running task attempt's legacy checkpoint; short for `current_context().checkpoint`."""
    return current_context().checkpoint


# The local runner gives a whole process to an attempt, and the attempt may start threads of its own, which would not
# see a context variable.
_runners: list[Checkpoint] = []

_instances: weakref.WeakKeyDictionary[Any, Checkpoint] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def set_runner_checkpoint(checkpoint: Checkpoint) -> None:
    """Make a checkpoint the current one for the rest of this process; called by the local runner."""
    _runners.append(checkpoint)
    if "flytekit" in sys.modules:
        _show_to_flytekit(checkpoint)


def _show_to_flytekit(checkpoint: Checkpoint) -> None:
    """Give flytekit's own current context the checkpoint, as its container entry point does."""
    from flytekit.core.context_manager import ExecutionState, FlyteContextManager

    context = FlyteContextManager.current_context()
    builder = context.user_space_params.new_builder(context.user_space_params)
    builder.checkpoint = checkpoint
    state = context.new_execution_state().with_params(
        mode=ExecutionState.Mode.LOCAL_TASK_EXECUTION, user_space_params=builder.build()
    )
    FlyteContextManager.push_context(context.with_execution_state(state).build())


def _flyte_2() -> list[Checkpoint]:
    """The legacy face over the object of `flyte.ctx().checkpoint`."""
    flyte = sys.modules.get("flyte")
    task = flyte.ctx() if flyte is not None else None
    theirs = task.checkpoint if task is not None else None
    if theirs is None:
        return []
    return [_adapted(theirs, theirs.remote_destination, theirs.remote_source)]


def _flyte_1() -> list[Checkpoint]:
    """The legacy face over what flytekit's container entry point was told."""
    if "flytekit" not in sys.modules:
        return []
    import flytekit

    try:
        theirs = flytekit.current_context().checkpoint
    except NotImplementedError:
        return []
    if isinstance(theirs, Checkpoint):
        return [theirs]
    # flytekit has no public name for the two prefixes.
    return [_adapted(theirs, theirs._checkpoint_dest, theirs._checkpoint_src)]


def _adapted(theirs: Any, destination: str, source: str | None) -> Checkpoint:
    """One instance for each of theirs, which both Flytes make one of for every attempt."""
    with _lock:
        if theirs not in _instances:
            _instances[theirs] = SyncCheckpoint(destination, source)
        return _instances[theirs]


def __getattr__(name: str) -> object:
    # Where flytekit is installed its own exception is the one that its platform retries.
    if name != "FlyteRecoverableException":
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    if importlib.util.find_spec("flytekit") is None:
        return errors.FlyteRecoverableException
    from flytekit.exceptions.user import FlyteRecoverableException

    return FlyteRecoverableException
