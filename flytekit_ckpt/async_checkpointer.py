"""The legacy API with saves in the background; flytekit's documentation promises it, and flytekit has none."""

from __future__ import annotations

import errno
import io
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from flytekit_ckpt import adapter, layout, parts
from flytekit_ckpt.asynchronous import SENT_SIZE, AsynchronousSaves, Frozen
from flytekit_ckpt.checkpointer import SyncCheckpoint
from flytekit_ckpt.errors import StorageError
from flytekit_ckpt.home import Home
from flytekit_ckpt.options import AsyncOptions, check_names
from flytekit_ckpt.pipeline import CHUNK_SIZE, Callback
from flytekit_ckpt.snapshots import NoRoomError, Snapshot

if TYPE_CHECKING:
    from typing_extensions import Unpack


class AsyncCheckpoint(SyncCheckpoint):
    """The checkpoint of one task attempt, saved in the background.

    `save` and `write` return when a snapshot is taken: whatever becomes of the files after that, what is saved is what
    they were. All else is as in `SyncCheckpoint`. Saves are done in order, by another process, and finished before the
    program ends: normally, by an exception, by `sys.exit` or, within `grace` seconds, by SIGTERM.

    Parameters
    ----------
    checkpoint_dest : str
        URI or path of the object that this attempt saves to. Parents are created.
    checkpoint_src : str, optional
        URI or path of the object that the previous attempt saved, or of the folder that flytekit 1 saved. Blank, or a
        pair of quotes, means that there was none.
    **options
        Those of `flytekit_ckpt.options.AsyncOptions`: those of `SyncCheckpoint`, `when_busy` and `grace`.

    Notes
    -----
    The error of a save is raised once, by the next call that saves, `wait_until_finished` or `close`, unless the save's
    future has given it before, or a later save of the same has succeeded. It is in the log at once.

    Saves that wait while an earlier one is under way are sent together, as one. One that waits and that a later one
    replaces whole is not sent (`when_busy="latest"`): its future gives a `SaveReplacedError`.

    A snapshot of a file or folder is a clone where the file system makes such, and else a copy, in the folder for
    temporary files if that is on the same disk, and beside it if not. Where the disk has no room for it, the caller
    waits until it is saved, with a warning in the log.

    Examples
    --------
    >>> with AsyncCheckpoint("/tmp/loop/attempt-1") as cp:
    ...     for step in range(3):
    ...         cp.write(b"%d" % step)
    >>> AsyncCheckpoint("/tmp/loop/attempt-2", "/tmp/loop/attempt-1").read()
    b'2'
    """

    def __init__(
        self,
        checkpoint_dest: str,
        checkpoint_src: str | None = None,
        **options: Unpack[AsyncOptions],
    ) -> None:
        check_names(options, AsyncOptions, type(self).__name__)
        self._initialize(checkpoint_dest, checkpoint_src, options)
        self._begin()

    def _begin(self) -> None:
        self._saves = AsynchronousSaves(
            self._checkpoint_dest,
            self._resumption,
            save=_save,
            state=lambda: self._destination,
            learn=self._learn,
            on_disk=_on_disk,
        )
        self._saves.prepare()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_saves"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    def close(self) -> None:
        """Finish what is being saved, and all that `SyncCheckpoint.close` does; done by `with`.

        Raises
        ------
        CheckpointError
            That of a save, as `wait_until_finished` does.
        """
        try:
            self._saves.close()
        finally:
            super().close()

    def wait_until_finished(self) -> None:
        """Wait until everything is saved that was given to be saved.

        Raises
        ------
        CheckpointError
            That of a save which failed, unless it has been raised before, or a later save of the same has succeeded.
        """
        self._saves.wait()

    def save(self, cp: Path | str | io.BufferedReader, *, move: bool = False, callback: Callback | None = None) -> None:
        """Add to this attempt's checkpoint what something is now, and store it in the background.

        Parameters
        ----------
        cp : pathlib.Path, str or binary reader
            A file, a folder, or a reader, which is read to its end.
        move : bool, keyword only, default False
            Whether a file or folder is given away: it is renamed instead of copied, and gone when this returns.
        callback : fsspec.callbacks.Callback, keyword only, optional
            Progress callback, called in another thread.

        Raises
        ------
        FileNotFoundError, TypeError, ValueError
            As for `SyncCheckpoint.save`.
        CheckpointError
            If no snapshot can be taken; or that of an earlier save, and then this one is not done.
        """
        self.save_async(cp, move=move, callback=callback)

    def save_async(
        self, cp: Path | str | io.BufferedReader, *, move: bool = False, callback: Callback | None = None
    ) -> Future[None]:
        """Do as `save` does.

        Returns
        -------
        concurrent.futures.Future
            Of `None`, once it is safe; of the error, if it fails. It cannot be cancelled.
        """
        part = self._part(cp)
        if move and isinstance(part, parts.Folder):
            layout.check_is_outside(self._checkpoint_dest, part.path)
        return self._saves.save(part.name, lambda: _frozen(part, is_given=move), part, callback)

    def write(self, b: bytes) -> None:
        """Add bytes to this attempt's checkpoint as `_dst_cp`, and store them in the background.

        Parameters
        ----------
        b : bytes-like
            Copied if they can be changed.

        Raises
        ------
        TypeError
            If `b` is not bytes-like.
        CheckpointError
            That of an earlier save, and then this one is not done.
        """
        super().write(b)

    def write_async(self, b: bytes) -> Future[None]:
        """Do as `write` does; returns what `save_async` does."""
        return self.save_async(cast("io.BufferedReader", io.BytesIO(layout.as_bytes(b))))

    def _part(self, cp: Path | str | io.BufferedReader) -> parts.Part:
        if isinstance(cp, io.BytesIO):
            # As long as nobody writes to it, they are its own.
            content = cp.getvalue()[cp.tell() :]
            cp.seek(0, io.SEEK_END)
            return parts.Bytes(content)
        return super()._part(cp)

    def _learn(self, learnt: tuple[adapter.Saved, Home | None]) -> None:
        self._destination.saved, home = learnt
        self._resumption.saved(home)


def _save(
    destination: adapter.Destination, contents: Sequence[parts.Part], callback: Callback | None = None
) -> tuple[adapter.Saved, Home | None]:
    """Save parts; done in another process."""
    with layout.in_background():
        destination.save(contents, callback)
    return destination.saved, destination.home


def _frozen(part: parts.Part, *, is_given: bool) -> Frozen:
    """Make of a part one that nothing changes any more."""
    if isinstance(part, parts.Bytes):
        return Frozen(part, part.size())
    if isinstance(part, parts.Reader):
        size = part.size()
        if size is not None and size <= CHUNK_SIZE:
            content = b"".join(part.chunks())
            return Frozen(parts.Bytes(content), len(content))
        try:
            snapshot = Snapshot.of_chunks(part.chunks(), size)
        except NoRoomError as error:
            if size is not None:
                raise
            # A part of it is gone.
            message = "the disk has no room for what a stream gives, which cannot be read again: save from a file"
            raise StorageError(errno.ENOSPC, message) from error
        return Frozen(parts.Content(snapshot.path), snapshot.size, snapshot)
    if isinstance(part, parts.Folder):
        exclude = layout.not_into_itself(part.uri)
        snapshot = (Snapshot.of_moved if is_given else Snapshot.of_folder)(part.path, exclude)
        return Frozen(parts.Folder(part.name, snapshot.path, part.uri), snapshot.size, snapshot)
    assert isinstance(part, parts.File)
    snapshot = Snapshot.of_moved(part.path) if is_given else Snapshot.of_file(part.path)
    return Frozen(parts.File(part.name, snapshot.path), snapshot.size, snapshot)


def _on_disk(part: parts.Part) -> Frozen:
    if isinstance(part, parts.Bytes) and len(part.content) > SENT_SIZE:
        snapshot = Snapshot.of_chunks(part.chunks(), part.size())
        return Frozen(parts.Content(snapshot.path), snapshot.size, snapshot)
    return Frozen(part, 0)
