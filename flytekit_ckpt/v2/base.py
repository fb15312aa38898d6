"""What a Flyte 2 task can do with its checkpoint, whatever keeps it."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path

Savable = os.PathLike[str] | str | bytes | bytearray | memoryview
"""What can be saved: the path of a file or folder, or bytes."""


class BaseCheckpoint(ABC):
    """What a Flyte 2 task can do with its checkpoint (flyte: `flyte.BaseCheckpoint`)."""

    @property
    @abstractmethod
    def path(self) -> Path:
        """Local folder that checkpoints are loaded into."""

    @abstractmethod
    def prev_exists(self) -> bool:
        """Tell whether an earlier attempt's checkpoint was named to this one."""

    @abstractmethod
    async def load(self) -> Path | None:
        """Load the earlier attempt's checkpoint; see `Checkpoint.load_sync`."""

    @abstractmethod
    async def save(self, data: Savable) -> None:
        """Save this attempt's checkpoint; see `Checkpoint.save_sync`."""

    @abstractmethod
    def load_sync(self) -> Path | None:
        """Load the earlier attempt's checkpoint, waiting for it; see `Checkpoint.load_sync`."""

    @abstractmethod
    def save_sync(self, data: Savable) -> None:
        """Save this attempt's checkpoint, waiting for it; see `Checkpoint.save_sync`."""
