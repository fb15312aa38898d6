"""The previous attempt's checkpoint, brought to where the next attempt will look.

The next attempt only knows this attempt's destination. If this one dies before it has saved anything, what it has
loaded would be lost to all that follow (flyteorg/flyte issue 2894).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import os
import time
from collections.abc import Iterator
from typing import Any

from flytekit_ckpt import layout, storage
from flytekit_ckpt.background import finish_at_exit
from flytekit_ckpt.errors import CheckpointError
from flytekit_ckpt.locks import ForkSafeLock
from flytekit_ckpt.storage import Settings

logger = logging.getLogger("flytekit_ckpt")


class Carry:
    """Copies one checkpoint to a destination behind the caller, unless something is there or is being saved there.

    Parameters
    ----------
    source : str or None
        The previous attempt's checkpoint.
    destination : str
        This attempt's.
    settings : Settings
        How they are reached.
    is_wanted : bool
        Whether anything is done at all.
    """

    def __init__(self, source: str | None, destination: str, settings: Settings, *, is_wanted: bool) -> None:
        self._source = source
        self._destination = destination
        self._settings = settings
        self._is_wanted = is_wanted and source is not None and bool(destination)
        self._is_loaded = False
        self._saves = 0
        self._copying: concurrent.futures.Future[None] | None = None
        self._process = os.getpid()
        self._lock = ForkSafeLock()

    def __getstate__(self) -> dict[str, Any]:
        # The process that began it goes on with it.
        return {**vars(self), "_is_wanted": self._is_wanted and not self._is_loaded, "_saves": 0, "_copying": None}

    def begin(self) -> None:
        """Begin, once; called when the checkpoint has been loaded."""
        with self._lock:
            if not self._is_loaded:
                self._is_loaded = True
                self._start()

    @contextlib.contextmanager
    def making_way(self) -> Iterator[None]:
        """Give it up while something is saved, waiting until it has stopped; take it up again if the save failed."""
        with self._lock:
            self._saves += 1
            # A forked process has no part in what it began.
            if self._copying is not None and self._process == os.getpid():
                concurrent.futures.wait([self._copying])
        is_saved = False
        try:
            yield
            is_saved = True
        finally:
            with self._lock:
                self._saves -= 1
                self._is_wanted = self._is_wanted and not is_saved
                self._start()

    def _start(self) -> None:
        if not self._is_wanted or not self._is_loaded or self._saves:
            return
        pool = concurrent.futures.ThreadPoolExecutor(1, "flytekit_ckpt-carry")
        # Unless the interpreter is on its way out.
        with contextlib.suppress(RuntimeError):
            self._copying = pool.submit(self._copy)
            self._process = os.getpid()
            finish_at_exit(self._copying)
        pool.shutdown(wait=False)

    def _copy(self) -> None:
        assert self._source is not None
        places = storage.public(self._source), storage.public(self._destination)
        started = time.perf_counter()
        try:
            if layout.copy(self._source, self._destination, self._settings, lambda: self._saves > 0):
                logger.info("carried %s forward to %s in %.3f s", *places, time.perf_counter() - started)
        except storage.GivenUpError:
            logger.info("%s is not carried forward to %s: something is being saved there", *places)
        except (CheckpointError, OSError) as error:
            logger.warning("%s was not carried forward to %s: %s", *places, error)
        except Exception:
            logger.exception("%s was not carried forward to %s", *places)
