"""Which checkpoint belongs to the running code."""

from __future__ import annotations

from dataclasses import dataclass

from flytekit_ckpt.attempts import of_flyte, of_flytekit, of_runner, unavailable
from flytekit_ckpt.checkpointer import Checkpoint
from flytekit_ckpt.endings import recoverable_type
from flytekit_ckpt.installation import install, uninstall

__all__ = ["Context", "current_checkpoint", "current_context", "install", "uninstall"]


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
        # The innermost: the local runner's task may run tasks of its own.
        found = of_flyte() or of_flytekit() or of_runner()
        if found is None:
            raise unavailable()
        return found


def current_context() -> Context:
    """Return the context of the running task attempt (flytekit: `flytekit.current_context`)."""
    return Context()


def current_checkpoint() -> Checkpoint:
    """Return the running task attempt's legacy checkpoint; short for `current_context().checkpoint`."""
    return current_context().checkpoint


def __getattr__(name: str) -> object:
    if name != "FlyteRecoverableException":
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    return recoverable_type()
