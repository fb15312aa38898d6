"""What the asynchronous saves of both APIs have in common: a snapshot, a promise, and a process that keeps it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from flytekit_ckpt import storage, termination
from flytekit_ckpt.background_saves import BackgroundSaves, Job, SaveFuture, replaced
from flytekit_ckpt.locks import ForkSafeLock
from flytekit_ckpt.options import GRACE
from flytekit_ckpt.pipeline import Callback
from flytekit_ckpt.processes import ProcessUnavailableError, SavingProcess
from flytekit_ckpt.resumption import Resumption
from flytekit_ckpt.scratch import remove_tree
from flytekit_ckpt.snapshots import NoRoomError, Snapshot

logger = logging.getLogger("flytekit_ckpt")

SENT_SIZE = 8 << 20
"""Bytes of memory at most that are sent to the other process as they are."""


@dataclass(frozen=True)
class Frozen:
    """What a save was given, as it was then.

    Attributes
    ----------
    content : object
        Can be saved in the place of what was given.
    size : int
        Its bytes.
    snapshot : Snapshot or None
        What was copied for it.
    """

    content: Any
    size: int
    snapshot: Snapshot | None = None

    def discard(self) -> None:
        """Remove what was copied for it."""
        if self.snapshot is not None:
            self.snapshot.discard()


class Turn(Protocol):
    """A place among saves that are done one after the other."""

    def wait(self) -> None:
        """Wait until those before have been done."""

    def leave(self) -> None:
        """Let those that follow go on."""


class AsynchronousSaves:
    """Saves of one checkpoint, in the background.

    Parameters
    ----------
    destination : str
        What it is saved to.
    resumption : Resumption
        What the attempt goes on from.
    save : callable
        A function of a module, which another process can import: saves what is in its second argument, a list of the
        contents of saves in order, and returns what there is to know of it. Its first argument is what `state` gives.
    state : callable
        Gives what `save` needs to know.
    learn : callable
        Takes what `save` returns.
    on_disk : callable
        Puts what is large and in memory on the disk, of the contents of a save.
    line_up : callable, optional
        Gives a save its turn among others than those in the background; saves that wait are done one by one then, and
        not together.
    """

    def __init__(
        self,
        destination: str,
        resumption: Resumption,
        *,
        save: Callable[..., Any],
        state: Callable[[], Any],
        learn: Callable[[Any], None],
        on_disk: Callable[[Any], Frozen],
        line_up: Callable[[], Turn] | None = None,
    ) -> None:
        self._resumption = resumption
        self._call = save
        self._state = state
        self._learn = learn
        self._on_disk = on_disk
        when_busy = resumption.options.get("when_busy", "latest")
        if when_busy not in ("latest", "wait"):
            message = f"when_busy={when_busy!r} is not known: give 'latest' or 'wait'"
            raise ValueError(message)
        self._waits = when_busy == "wait"
        self._grace = resumption.options.get("grace", GRACE)
        self._lock = ForkSafeLock()
        self._line_up = line_up
        self._saves = BackgroundSaves(self._save, are_joint=line_up is None)
        self._process = SavingProcess(destination) if storage.is_shared(destination) else None

    def prepare(self) -> None:
        """Begin the process that will save, and see to what SIGTERM does."""
        termination.finish_within(self._grace)
        if self._process is not None:
            # It is tried again, and then told of.
            with contextlib.suppress(ProcessUnavailableError):
                self._process.begin()

    def save(
        self, name: str, freeze: Callable[[], Frozen], original: Any, callback: Callback | None = None
    ) -> SaveFuture:
        """Promise a save of what something is now.

        Parameters
        ----------
        name : str
            What is saved: a later save of the same name replaces it whole.
        freeze : callable
            Makes the snapshot.
        original : object
            What is saved, while the caller waits, if there is no room for a snapshot.
        callback : fsspec callback, optional
            Progress callback.

        Raises
        ------
        Exception
            That of an earlier save, which nobody was given yet; or what `freeze` raises.
        """
        # A signal waits until the save is promised.
        with termination.saving(), self._lock:
            self._saves.check()
            older = None
            if self._waits:
                self._saves.wait_for_room()
            else:
                older = self._saves.withdraw(name)
                if older is not None:
                    # The disk never holds more than what is being saved, and one that waits.
                    older.discard()
            try:
                frozen = freeze()
            except NoRoomError:
                logger.warning("there is no room on the disk for a snapshot: saving while the caller waits")
                frozen = None
            except BaseException as error:
                if older is not None:
                    self._saves.fail(older, error)
                raise
            if older is not None:
                replaced(older)
            future = self._submit(name, frozen or Frozen(original, 0), callback)
            if frozen is None:
                future.result()
            return future

    def _submit(self, name: str, frozen: Frozen, callback: Callback | None) -> SaveFuture:
        turn = None if self._line_up is None else self._line_up()

        def discard() -> None:
            frozen.discard()
            if turn is not None:
                turn.leave()

        return self._saves.submit(Job(name, _Promised(frozen, callback, turn), frozen.size, discard))

    def _save(self, jobs: Sequence[Job]) -> None:
        promised: list[_Promised] = [job.content for job in jobs]
        callbacks = [one.callback for one in promised if one.callback is not None]
        callback = _Callbacks(callbacks) if callbacks else None
        for one in promised:
            if one.turn is not None:
                one.turn.wait()
        with self._resumption.carry_forward.paused():
            self._learn(self._called([one.frozen.content for one in promised], callback))
        snapshots = [one.frozen.snapshot.folder for one in promised if one.frozen.snapshot is not None]
        if self._process is not None and snapshots:
            # Here, each of a thousand files would cost the time that another thread keeps the interpreter's lock.
            with contextlib.suppress(ProcessUnavailableError):
                self._process.call(_remove, snapshots)

    def _called(self, contents: list[Any], callback: Callback | None) -> Any:
        if self._process is not None:
            with contextlib.ExitStack() as stack:
                try:
                    sent = []
                    for content in contents:
                        frozen = self._on_disk(content)
                        stack.callback(frozen.discard)
                        sent.append(frozen.content)
                    return self._process.call(self._call, self._state(), sent, callback=callback)
                except NoRoomError:
                    # Then it stays in memory, once.
                    pass
                except ProcessUnavailableError as error:
                    logger.warning(
                        "saving in a thread, which holds up other threads more than another process would: %s", error
                    )
        return self._call(self._state(), contents, callback=callback)

    def wait(self) -> None:
        """Wait until all saves are done, and raise what failed."""
        self._saves.wait()

    def close(self) -> None:
        """Finish, and end the process; raise what failed."""
        try:
            self._saves.close()
        finally:
            if self._process is not None:
                self._process.close()


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        remove_tree(folder)


@dataclass(frozen=True)
class _Promised:
    frozen: Frozen
    callback: Callback | None
    turn: Turn | None


class _Callbacks:
    """Several progress callbacks as one."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = callbacks

    def set_size(self, size: int) -> None:
        for callback in self._callbacks:
            callback.set_size(size)

    def relative_update(self, inc: int = 1) -> None:
        for callback in self._callbacks:
            callback.relative_update(inc)
