"""An object that is reached by requests of this package's own, over the connections of fsspec's filesystem."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from flytekit_ckpt.storage import forks
from flytekit_ckpt.storage.general import FsspecObject

PACE = 4 << 20
"""Bytes for which a request may take another `timeout`; one that is slower counts as failed, if never silent."""

CONNECT_TIMEOUT = 10.0
"""Seconds at most for a connection to be made."""

# Tells the objects of this upload from those of any other.
UPLOAD = "upload"


class RequestedObject(FsspecObject):
    """An object in a store that has an asynchronous filesystem."""

    def _requested(self, request: Callable[[Any], Any], moved: int = 0) -> Any:
        """Send a request that moves about so many bytes, again where its failure may pass."""
        from fsspec.asyn import sync

        filesystem = self._filesystem
        forks.remember(filesystem)
        limit = self._settings.timeout * (1 + moved / PACE)

        async def limited() -> Any:
            # Not left to go on: it could come to its end after a later one.
            return await asyncio.wait_for(request(filesystem), limit)

        return self._retrying(lambda: sync(filesystem.loop, limited))
