"""One checkpoint format for Flyte 1 and Flyte 2: flytekit's checkpointer API over Flyte 2's storage layout."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flytekit_ckpt.async_checkpointer import AsyncCheckpoint as AsyncCheckpoint
    from flytekit_ckpt.checkpointer import Checkpoint as Checkpoint
    from flytekit_ckpt.checkpointer import SyncCheckpoint as SyncCheckpoint
    from flytekit_ckpt.context import current_checkpoint as current_checkpoint
    from flytekit_ckpt.context import current_context as current_context
    from flytekit_ckpt.context import install as install
    from flytekit_ckpt.context import uninstall as uninstall
    from flytekit_ckpt.entries import EntryInfo as EntryInfo
    from flytekit_ckpt.errors import CheckpointError as CheckpointError
    from flytekit_ckpt.errors import CheckpointUnavailableError as CheckpointUnavailableError
    from flytekit_ckpt.errors import CorruptCheckpointError as CorruptCheckpointError
    from flytekit_ckpt.errors import FlyteRecoverableException as FlyteRecoverableException
    from flytekit_ckpt.errors import SaveNotBegunError as SaveNotBegunError
    from flytekit_ckpt.errors import SaveReplacedError as SaveReplacedError
    from flytekit_ckpt.errors import StorageError as StorageError
    from flytekit_ckpt.errors import UnsafeCheckpointError as UnsafeCheckpointError
    from flytekit_ckpt.termination import on_termination as on_termination
    from flytekit_ckpt.v2 import latest_checkpoint as latest_checkpoint

__version__ = "0.1.0"

_HOMES = {
    "AsyncCheckpoint": "async_checkpointer",
    "Checkpoint": "checkpointer",
    "SyncCheckpoint": "checkpointer",
    "current_checkpoint": "context",
    "current_context": "context",
    "FlyteRecoverableException": "context",
    "install": "context",
    "uninstall": "context",
    "EntryInfo": "entries",
    "CheckpointError": "errors",
    "CheckpointUnavailableError": "errors",
    "CorruptCheckpointError": "errors",
    "SaveNotBegunError": "errors",
    "SaveReplacedError": "errors",
    "StorageError": "errors",
    "UnsafeCheckpointError": "errors",
    "latest_checkpoint": "v2",
    "on_termination": "termination",
}
__all__ = sorted(_HOMES)  # noqa: PLE0605 - a list, though not a literal one


def __getattr__(name: str) -> object:
    # Each name is imported on its first use: this package lands in images whose start-up time matters.
    if name not in _HOMES:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    value: object = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
