"""Flyte 2's API with saves in the background."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

from flytekit_ckpt.locks import Queue
from flytekit_ckpt.options import AsyncOptions
from flytekit_ckpt.pipeline import Callback
from flytekit_ckpt.v2.base import Savable
from flytekit_ckpt.v2.checkpoint import Checkpoint

if TYPE_CHECKING:
    from typing_extensions import Unpack


class AsyncCheckpoint(Checkpoint):
    """The checkpoint of one task attempt, all of whose saves are done in the background.

    `save_sync` and `await save()` do as `save_async` does, and return when a snapshot is taken. A cancelled `await
    save()` may have promised it.
    """

    def __init__(
        self,
        checkpoint_dest: str,
        checkpoint_src: str | None = None,
        **options: Unpack[AsyncOptions],
    ) -> None:
        super().__init__(checkpoint_dest, checkpoint_src, **options)
        self._calls = Queue()
        # So that its process is ready when the first save comes.
        self._in_background  # noqa: B018

    async def save(self, data: Savable, *, move: bool = False, callback: Callback | None = None) -> None:
        """Promise a save without blocking the event loop; see `save_async`."""
        ticket = self._calls.line_up()

        def promise() -> None:
            try:
                self._calls.wait_for(ticket, threading.Event())
                self.save_async(data, move=move, callback=callback)
            finally:
                self._calls.leave(ticket)

        await asyncio.get_running_loop().run_in_executor(None, promise)

    def save_sync(self, data: Savable, *, move: bool = False, callback: Callback | None = None) -> None:
        """Promise a save; see `save_async`."""
        self.save_async(data, move=move, callback=callback)
