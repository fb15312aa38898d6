"""Flyte 2's checkpoint, over the same code and the same objects as the legacy one."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flytekit_ckpt import layout, restoration, scratch
from flytekit_ckpt.asynchronous import AsynchronousSaves
from flytekit_ckpt.entries import EntryInfo
from flytekit_ckpt.layout import Found
from flytekit_ckpt.locks import ForkSafeLock
from flytekit_ckpt.options import AsyncOptions, check_names
from flytekit_ckpt.patterns import EVERYTHING, Patterns
from flytekit_ckpt.pipeline import Callback
from flytekit_ckpt.resumption import Resumption
from flytekit_ckpt.running import named_uri
from flytekit_ckpt.v2 import background
from flytekit_ckpt.v2.base import BaseCheckpoint, Savable
from flytekit_ckpt.v2.destination import Destination
from flytekit_ckpt.v2.loaded import PayloadPath

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class Checkpoint(BaseCheckpoint):
    """The checkpoint of one task attempt, as in `flyte.Checkpoint`.

    Parameters
    ----------
    checkpoint_dest : str
        URI or path of the object that this attempt saves to. Parents are created.
    checkpoint_src : str, optional
        URI or path of the object that the previous attempt saved, with either API, or of the folder that flytekit 1
        saved. Blank, or a pair of quotes, means that there was none.
    **options
        Those of `flytekit_ckpt.options.AsyncOptions`: `storage_options`, `memory_budget`, `retries`, `timeout`,
        `restore_limit`, `carry_forward`, `home`, `resume_from`, `fallback`; for `save_async`, `when_busy` and `grace`.

    Examples
    --------
    >>> Checkpoint("/tmp/counter/attempt-1").save_sync(b"5")
    >>> cp = Checkpoint("/tmp/counter/attempt-2", "/tmp/counter/attempt-1")
    >>> cp.load_sync().read_bytes()
    b'5'
    """

    def __init__(
        self,
        checkpoint_dest: str,
        checkpoint_src: str | None = None,
        **options: Unpack[AsyncOptions],
    ) -> None:
        check_names(options, AsyncOptions, type(self).__name__)
        self._checkpoint_dest = os.fspath(checkpoint_dest)
        self._checkpoint_src = named_uri(checkpoint_src)
        self._resumption = Resumption(self._checkpoint_dest, self._checkpoint_src, options)
        self._workspace: Path | None = None
        self._loaded: Path | None = None
        self._lock = ForkSafeLock()
        self._destination = Destination(self._checkpoint_dest, self._resumption)
        self._background: AsynchronousSaves | None = None
        self._resumption.carry_forward.close_with(self)

    def __getstate__(self) -> dict[str, Any]:
        # In another process it loads anew.
        return {**vars(self), "_workspace": None, "_loaded": None, "_background": None}

    @property
    def remote_destination(self) -> str:
        """URI that `save` writes to."""
        return self._checkpoint_dest

    @property
    def remote_source(self) -> str | None:
        """URI that `load` reads from, `None` if there was no earlier attempt."""
        return self._checkpoint_src

    @property
    def path(self) -> Path:
        """Local folder that checkpoints are loaded into, temporary, kept as long as this instance."""
        with self._lock:
            if self._workspace is None:
                self._workspace = scratch.workspace(self, "flytekit_ckpt-")
            return self._workspace

    def close(self) -> None:
        """Finish what is being saved or carried forward, and remove the local folder; done by `with`.

        Raises
        ------
        CheckpointError
            That of a save in the background, as `wait_until_finished` does.
        """
        try:
            if self._background is not None:
                self._background.close()
        finally:
            self._resumption.carry_forward.close()
            with self._lock:
                if self._workspace is not None:
                    scratch.remove_tree(self._workspace)
                self._workspace = self._loaded = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def prev_exists(self) -> bool:
        """Tell whether there may be a checkpoint, which only loading can tell.

        True if a source was given, the platform has restarted this attempt, or there is a home or a run to resume from.
        """
        return self._resumption.may_find

    async def load(self, *, only: str | Sequence[str] | None = None, callback: Callback | None = None) -> Path | None:
        """Load the previous attempt's checkpoint without blocking the event loop; see `load_sync`."""
        return await asyncio.to_thread(self.load_sync, only=only, callback=callback)

    async def save(self, data: Savable, *, callback: Callback | None = None) -> None:
        """Save without blocking the event loop; see `save_sync`.

        If it is cancelled, it is undone before it returns: unless it has just come to its end, what was stored before
        stays.
        """
        loop, cancelled = asyncio.get_running_loop(), threading.Event()
        ticket = self._destination.queue.line_up()
        try:
            saving = loop.run_in_executor(None, self._destination.save_in_turn, ticket, data, callback, cancelled)
        except BaseException:
            self._destination.queue.leave(ticket)
            raise
        try:
            await asyncio.shield(saving)
        except asyncio.CancelledError:
            self._destination.queue.cancel(cancelled)
            while not saving.done():
                # Another cancellation changes nothing.
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([saving])
            # Whatever came of it is of no interest now, but asyncio would complain that nobody has asked.
            saving.exception()
            raise

    def load_sync(self, *, only: str | Sequence[str] | None = None, callback: Callback | None = None) -> Path | None:
        """Load the previous attempt's checkpoint into `path`, all of it or nothing.

        Parameters
        ----------
        only : str or sequence of str, keyword only, optional
            Patterns of the entries to load, as of `pathlib.Path.glob`: `"trainer_state.json"`, `["model/*"]`. One that
            matches a folder takes all that is in it. Nothing else is fetched. They are loaded into a temporary folder
            of their own, which is returned; this is not the one load that further calls return to.
        callback : fsspec.callbacks.Callback, keyword only, optional
            Progress callback, called with the object's bytes as they arrive.

        Returns
        -------
        pathlib.Path or None
            For a folder, `path`, emptied and with the folder's contents. For bytes or a file, the file
            `path / "payload"`, which joined with `"payload"` is itself: Flyte documents both ways. `None` if there is
            no previous checkpoint. Once loaded, further calls return the same path.

        Raises
        ------
        CorruptCheckpointError
            If the checkpoint is damaged or unsafe to restore.
        StorageError
            If it cannot be read, or the workspace cannot be written.
        ValueError
            If no entry can match a pattern.
        """
        wanted = Patterns.of(only)
        if wanted is not None:
            return self._resumption.load(lambda found: self._load_some(found, wanted), callback, wanted)
        with self._lock:
            if self._loaded is None:
                self._loaded = self._resumption.load(self._restore, callback)
            return self._loaded

    def entries(self) -> list[EntryInfo] | None:
        """List what the previous attempt's checkpoint holds: names, kinds, sizes and times.

        Of what this package has saved, only the index is fetched; anything else is read through.

        Returns
        -------
        list of EntryInfo or None
            `None` if there is no previous checkpoint. Bytes are the file `payload`.

        Raises
        ------
        CorruptCheckpointError, StorageError
            As for `load_sync`.
        """
        take = functools.partial(restoration.listed, payload_name=layout.PAYLOAD_NAME)
        return self._resumption.load(take, only=EVERYTHING)

    def _load_some(self, found: Found, only: Patterns) -> Path:
        folder = scratch.workspace(self, "flytekit_ckpt-")
        restoration.restore(found, layout.PAYLOAD_NAME, folder, self._resumption.settings, only=only)
        return folder

    def _restore(self, found: Found) -> Path:
        restoration.restore(found, layout.PAYLOAD_NAME, self.path, self._resumption.settings, emptied=True)
        is_payload = isinstance(found.content, layout.Payload)
        return PayloadPath(self.path / layout.PAYLOAD_NAME) if is_payload else self.path

    def save_sync(self, data: Savable, *, callback: Callback | None = None) -> None:
        """Save this attempt's checkpoint in place of what it saved before.

        Saves of one instance happen one after the other, in the order of the calls, `save` included.

        Parameters
        ----------
        data : path-like, str, bytes, bytearray or memoryview
            A folder, stored as a gzip-compressed tar of its entries; or a file or bytes, stored as they are.
        callback : fsspec.callbacks.Callback, keyword only, optional
            Progress callback, called with the bytes of the files as they are stored.

        Raises
        ------
        FileNotFoundError
            If the path is not there.
        TypeError
            If `data` is neither a path nor bytes.
        StorageError
            If it cannot be stored; what was stored before stays.
        CheckpointError
            If a file shrinks or vanishes while it is being saved; what was stored before stays.
        """
        self._destination.save_in_turn(self._destination.queue.line_up(), data, callback, threading.Event())

    def save_async(self, data: Savable, *, move: bool = False, callback: Callback | None = None) -> Future[None]:
        """Save what something is now, in the background.

        Returns when a snapshot is taken: whatever becomes of the files after that, what is saved is what they were. A
        save that waits while an earlier one is under way is not done if a later one comes (`when_busy="latest"`): its
        future gives a `SaveReplacedError`. See `flytekit_ckpt.AsyncCheckpoint` for snapshots and for the end of the
        program.

        Parameters
        ----------
        data : path-like, str, bytes, bytearray or memoryview
            As for `save_sync`.
        move : bool, keyword only, default False
            Whether a file or folder is given away: it is renamed instead of copied, and gone when this returns.
        callback : fsspec.callbacks.Callback, keyword only, optional
            Progress callback, called in another thread.

        Returns
        -------
        concurrent.futures.Future
            Of `None`, once it is safe; of the error, if it fails. It cannot be cancelled. `await` it as
            `asyncio.wrap_future(future)`.

        Raises
        ------
        FileNotFoundError, TypeError, ValueError
            As for `save_sync`.
        CheckpointError
            If no snapshot can be taken; or that of an earlier save in the background, which nobody has been given yet:
            then this one is not done.
        """
        content: Savable
        if isinstance(data, (str, os.PathLike)):
            content = path = Path(data)
            if path.is_dir():
                if move:
                    layout.check_is_outside(self._checkpoint_dest, path)
            elif not path.is_file():
                raise layout.not_savable(path)
        else:
            content = layout.as_bytes(data)
        return self._in_background.save(
            "", lambda: background.frozen(content, self._checkpoint_dest, is_given=move), content, callback
        )

    def wait_until_finished(self) -> None:
        """Wait until everything is saved that was given to `save_async`.

        Raises
        ------
        CheckpointError
            That of a save which failed, unless it has been raised before, or a later save has succeeded.
        """
        if self._background is not None:
            self._background.wait()

    @property
    def _in_background(self) -> AsynchronousSaves:
        with self._lock:
            if self._background is None:
                self._background = background.saves_of(self._destination, self._resumption)
            return self._background
