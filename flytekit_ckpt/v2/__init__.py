"""Flyte 2's checkpoint API, over the same code and the same objects as the legacy one."""

from flytekit_ckpt.v2.asynchronous import AsyncCheckpoint
from flytekit_ckpt.v2.base import BaseCheckpoint
from flytekit_ckpt.v2.checkpoint import Checkpoint
from flytekit_ckpt.v2.loaded import PayloadPath, latest_checkpoint

__all__ = ["AsyncCheckpoint", "BaseCheckpoint", "Checkpoint", "PayloadPath", "latest_checkpoint"]
