"""The previous attempt's checkpoint, brought to where the next attempt will look.

The next attempt only knows this attempt's destination. If this one dies before it has saved anything, what it was given
would be lost to all that follow (flyteorg/flyte issue 2894).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import marshal
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from flytekit_ckpt import layout, storage
from flytekit_ckpt.background_saves import finish_at_exit
from flytekit_ckpt.errors import CheckpointError
from flytekit_ckpt.locks import ForkSafeLock
from flytekit_ckpt.pipeline import WORKERS
from flytekit_ckpt.processes import ProcessUnavailableError, SavingProcess
from flytekit_ckpt.storage import Settings

logger = logging.getLogger("flytekit_ckpt")


class _Destination:
    """A destination, and what of this process is saved and copied there."""

    def __init__(self) -> None:
        self.lock = ForkSafeLock()
        self.saves = 0
        # Whether something is there, saved or copied: then nothing is left to carry.
        self.is_taken = False
        self.carry_forwards: weakref.WeakSet[CarryForward] = weakref.WeakSet()

    @staticmethod
    def of(destination: str) -> _Destination:
        """Give what is shared by everyone who saves to a URI."""
        with _lock:
            return _destinations.setdefault(storage.canonical(destination), _Destination())


_lock = ForkSafeLock()
_destinations: weakref.WeakValueDictionary[str, _Destination] = weakref.WeakValueDictionary()


class CarryForward:
    """Carries one checkpoint forward to a destination, unless something is there or is being saved there.

    At once where that takes no time, as on a local disk; otherwise in the background, by another process where the
    storage's client is not imported yet: it would take the caller longer than all the rest.

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
        self._mark: storage.Metadata = {}
        self._is_wanted = is_wanted and bool(destination)
        self._is_begun = False
        self._copy_made: storage.Written | None = None
        self._copying: concurrent.futures.Future[None] | None = None
        self._process = os.getpid()
        self._join()

    def _join(self) -> None:
        self._shared = _Destination.of(self._destination)
        # Someone who saves there may be looking at them.
        with self._shared.lock:
            self._shared.carry_forwards.add(self)

    def __getstate__(self) -> dict[str, Any]:
        # The process that began it goes on with it.
        return {**vars(self), "_is_begun": False, "_copying": None, "_shared": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._join()

    def begin(self) -> None:
        """Begin, unless it has been begun or done; called when the attempt is known, and when it has loaded."""
        with self._shared.lock:
            self._is_begun = True
            self._start()

    def begin_from(self, source: str, mark: storage.Metadata) -> None:
        """Carry another checkpoint forward than the previous attempt's, where that has none; `mark` says which."""
        with self._shared.lock:
            # One that is under way would find nothing.
            concurrent.futures.wait([copying for copying in [self._under_way()] if copying is not None])
            self._source, self._mark = source, mark
        self.begin()

    def has_carried(self, state: storage.State) -> bool:
        """Tell whether what is at the destination was only carried there, though nothing marks it."""
        # What has metadata would be marked; and where a version is one of the content, the same may have been saved.
        if not state.metadata:
            with self._shared.lock:
                if any(state.object == other._copy_made for other in self._shared.carry_forwards):
                    return True
        return self._source is not None and layout.is_linked(self._source, self._destination)

    def close(self) -> None:
        """Wait for it to end."""
        copying = self._under_way()
        if copying is not None:
            concurrent.futures.wait([copying])

    def close_with(self, owner: object) -> None:
        """Wait for it to end when its owner is collected, if that is the local disk's business.

        A folder that holds both may be about to be removed. Of an object store nothing is removed so; and collecting
        happens in any thread, the one included that the requests to an object store are sent from.
        """
        if all(uri is not None and storage.local_path(uri) is not None for uri in (self._source, self._destination)):
            weakref.finalize(owner, self._close_unless_in_a_worker).atexit = False

    def _close_unless_in_a_worker(self) -> None:
        if not threading.current_thread().name.startswith(WORKERS):
            self.close()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Give it up while something is saved, waiting until it has stopped; take it up again if the save failed.

        Also what others are copying there: the two checkpoints of an attempt, for example.
        """
        with self._shared.lock:
            self._shared.saves += 1
            concurrent.futures.wait(copying for other in self._shared.carry_forwards if (copying := other._under_way()))
        is_saved = False
        try:
            yield
            is_saved = True
        finally:
            with self._shared.lock:
                self._shared.saves -= 1
                self._shared.is_taken = self._shared.is_taken or is_saved
                for other in list(self._shared.carry_forwards):
                    other._start()

    def _under_way(self) -> concurrent.futures.Future[None] | None:
        # A forked process has no part in what it began.
        return self._copying if self._process == os.getpid() else None

    def _start(self) -> None:
        if not self._is_wanted or not self._is_begun or self._source is None:
            return
        if self._shared.saves or self._shared.is_taken:
            return
        # The two checkpoints of an attempt, for example, have one to carry.
        same = [other for other in self._shared.carry_forwards if other._source == self._source]
        under_way = [copying for other in same if (copying := other._under_way()) is not None and not copying.done()]
        if under_way:
            self._copying, self._process = under_way[0], os.getpid()
            return
        if self._has_linked():
            return
        process = self._other_process()
        if process is None:
            self._import_clients()
        pool = concurrent.futures.ThreadPoolExecutor(1, f"{WORKERS}-carry")
        # Unless the interpreter is on its way out.
        with contextlib.suppress(RuntimeError):
            self._copying = pool.submit(self._carry, process)
            self._process = os.getpid()
            finish_at_exit(self._copying)
        pool.shutdown(wait=False)

    def _has_linked(self) -> bool:
        assert self._source is not None
        try:
            # One and the same file cannot be marked.
            is_done = not self._mark and layout.link(self._source, self._destination, self._settings)
        except storage.ConflictError:
            is_done = True
        except (CheckpointError, OSError):
            # The copy says what is wrong.
            return False
        if is_done:
            self._shared.is_taken = True
            logger.info(
                "carried %s forward to %s at once", storage.public(self._source), storage.public(self._destination)
            )
        return is_done

    def _is_given_up(self) -> bool:
        return self._shared.saves > 0

    def _other_process(self) -> SavingProcess | None:
        """Give one that is to copy, where this one would have to import a client."""
        assert self._source is not None
        uris = self._source, self._destination
        missing = [uri for uri in uris if not storage.is_client_imported(uri)]
        if not missing or not all(map(storage.is_shared, uris)):
            return None
        try:
            # What is made of Python's own types alone is the same everywhere.
            marshal.dumps(dict(self._settings.options))
        except ValueError:
            return None
        # Until it has copied, an attempt that is killed costs progress: it does not stand back.
        return SavingProcess(missing[0], niceness=0)

    def _are_clients_imported(self) -> bool:
        return all(map(storage.is_client_imported, (self._source or "", self._destination)))

    def _import_clients(self) -> None:
        assert self._source is not None
        for uri in (self._source, self._destination):
            storage.import_client(uri)

    def _carry(self, process: SavingProcess | None) -> None:
        assert self._source is not None
        uris = storage.public(self._source), storage.public(self._destination)
        started = time.perf_counter()
        try:
            self._copy_made = self._copied() if process is None else self._copied_by(process)
            if self._copy_made is not None:
                self._shared.is_taken = True
                logger.info("carried %s forward to %s in %.3f s", *uris, time.perf_counter() - started)
        except storage.GivenUpError:
            logger.info("%s is not carried forward to %s: something else is saved there", *uris)
        except storage.ConflictError:
            self._shared.is_taken = True
            logger.info("%s is not carried forward to %s: something is there already", *uris)
        except (CheckpointError, OSError) as error:
            logger.warning("%s was not carried forward to %s: %s", *uris, error)
        except Exception:
            logger.exception("%s was not carried forward to %s", *uris)

    def _copied(self) -> storage.Written | None:
        assert self._source is not None
        return _copy(self._source, self._destination, self._settings, self._mark, given_up=self._is_given_up)

    def _copied_by(self, process: SavingProcess) -> storage.Written | None:
        try:
            # Once the task has imported the client, as for a load, nobody is faster than this process.
            is_ready = process.await_ready(lambda: self._is_given_up() or self._are_clients_imported())
            if self._is_given_up():
                raise storage.GivenUpError
            if is_ready:
                return process.call(
                    _copy, self._source, self._destination, self._settings, self._mark, given_up=self._is_given_up
                )
        except ProcessUnavailableError as error:
            logger.info("carrying forward in a thread, as no other process can: %s", error)
            # In this thread only where nothing else is left: it may be in the way of an import of the task's.
            self._import_clients()
        finally:
            process.close()
        return self._copied()


def _copy(
    source: str, destination: str, settings: Settings, mark: storage.Metadata, *, given_up: Callable[[], bool]
) -> storage.Written | None:
    """Copy a checkpoint in its turn; called in this process or in another one."""
    with storage.turn(destination, settings.timeout, given_up) as sign:

        def step() -> bool:
            sign()
            return given_up()

        return layout.copy(source, destination, settings, step, mark)
