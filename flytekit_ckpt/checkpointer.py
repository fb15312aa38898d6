"""The legacy API: flytekit's checkpointer, in Flyte 2's storage format.

Replaces `flytekit.core.checkpointer`: same names, signatures and behaviour.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from flytekit_ckpt import adapter, layout, parts, restoration, scratch, termination
from flytekit_ckpt.entries import EntryInfo
from flytekit_ckpt.layout import Found
from flytekit_ckpt.locks import ForkSafeLock
from flytekit_ckpt.options import AsyncOptions, CheckpointOptions, check_names
from flytekit_ckpt.patterns import EVERYTHING, Patterns
from flytekit_ckpt.pipeline import Callback
from flytekit_ckpt.resumption import Resumption
from flytekit_ckpt.running import named_uri

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


KEPT_SIZE = 1 << 20
"""Bytes up to which what was read is kept, to be answered again whatever becomes of the source."""


class Checkpoint(ABC):
    """What a task can do with its checkpoint (flytekit: `flytekit.Checkpoint`)."""

    @abstractmethod
    def prev_exists(self) -> bool:
        """Tell whether an earlier attempt's checkpoint was named to this one; it may turn out not to be there."""

    @abstractmethod
    def restore(self, path: Path | str) -> Path | None:
        """Restore the earlier attempt's files into a folder; see `SyncCheckpoint.restore`."""

    @abstractmethod
    def save(self, cp: Path | str | io.BufferedReader) -> None:
        """Save a file, a folder or what a binary reader gives; see `SyncCheckpoint.save`."""

    @abstractmethod
    def read(self) -> bytes | None:
        """Return the earlier attempt's bytes; see `SyncCheckpoint.read`."""

    @abstractmethod
    def write(self, b: bytes) -> None:
        """Save bytes; see `SyncCheckpoint.write`."""


class SyncCheckpoint(Checkpoint):
    """The checkpoint of one task attempt, saved and restored while the caller waits.

    Takes the place of `flytekit.core.checkpointer.SyncCheckpoint`. What is saved to one destination accumulates in
    one object, whoever saves it; `flyte.Checkpoint` and `flytekit_ckpt.v2.Checkpoint` can load that. An instance may be
    used from several threads.

    Parameters
    ----------
    checkpoint_dest : str
        URI or path of the object that this attempt saves to. Parents are created.
    checkpoint_src : str, optional
        URI or path of the object that the previous attempt saved, or of the folder that flytekit 1 saved. Blank, or a
        pair of quotes, means that there was none.
    **options
        Those of `flytekit_ckpt.options.CheckpointOptions`: `storage_options`, `memory_budget`, `retries`, `timeout`,
        `restore_limit`, `carry_forward`, `home`, `resume_from`, `fallback`.

    Examples
    --------
    >>> cp = SyncCheckpoint("/tmp/counter/attempt-1")
    >>> cp.write(b"5")
    >>> SyncCheckpoint("/tmp/counter/attempt-2", "/tmp/counter/attempt-1").read()
    b'5'
    """

    SRC_LOCAL_FOLDER = "prev_cp"
    TMP_DST_PATH = layout.LEGACY_PAYLOAD_NAME

    def __init__(
        self,
        checkpoint_dest: str,
        checkpoint_src: str | None = None,
        **options: Unpack[CheckpointOptions],
    ) -> None:
        check_names(options, CheckpointOptions, type(self).__name__)
        self._initialize(checkpoint_dest, checkpoint_src, cast("AsyncOptions", options))

    def _initialize(self, checkpoint_dest: str, checkpoint_src: str | None, options: AsyncOptions) -> None:
        self._checkpoint_dest = os.fspath(checkpoint_dest)
        self._checkpoint_src = named_uri(checkpoint_src)
        self._resumption = Resumption(self._checkpoint_dest, self._checkpoint_src, options)
        self._destination = adapter.Destination(self._checkpoint_dest, self._resumption)
        self._temporary: Path | None = None
        self._restored: Path | None = None
        self._restored_names: list[str] = []
        self._loaded_uri = self._checkpoint_src or self._checkpoint_dest
        self._was_read = False
        self._content: bytes | None = None
        self._lock = ForkSafeLock()
        self._resumption.carry_forward.close_with(self)

    def __getstate__(self) -> dict[str, Any]:
        # In another process it restores anew, and goes on with what has been saved.
        state = {**vars(self), "_restored_names": [], "_was_read": False}
        return {**state, **dict.fromkeys(("_temporary", "_restored", "_content"))}

    def close(self) -> None:
        """Wait until the previous checkpoint has been carried forward, and remove the temporary folder; done by `with`.

        What was loaded is loaded again then.
        """
        self._resumption.carry_forward.close()
        with self._lock:
            if self._temporary is not None:
                scratch.remove_tree(self._temporary)
                self._temporary = self._restored = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def prev_exists(self) -> bool:
        """Tell whether there may be a checkpoint, which only `read` or `restore` can tell.

        True if a source was given, the platform has restarted this attempt, or there is a home or a run to resume from.
        """
        return self._resumption.may_find

    def restore(
        self,
        path: Path | str | None = None,
        *,
        only: str | Sequence[str] | None = None,
        callback: Callback | None = None,
    ) -> Path | None:
        """Restore the previous attempt's checkpoint, all of it or nothing.

        Bytes that were written are the file `_dst_cp`. Files of the same names are replaced, others stay.

        Parameters
        ----------
        path : pathlib.Path or str, optional
            An existing folder to restore into; a temporary one, kept as long as this instance, if not given.
        only : str or sequence of str, keyword only, optional
            Patterns of the entries to restore, as of `pathlib.Path.glob`: `"trainer_state.json"`, `["model/*"]`. One
            that matches a folder takes all that is in it. Nothing else is fetched. This may be asked for again and
            again, and is not the one restore that further calls return to.
        callback : fsspec.callbacks.Callback, keyword only, optional
            Progress callback, called with the object's bytes as they arrive.

        Returns
        -------
        pathlib.Path or None
            The folder; `None` if there is no previous checkpoint. Once restored, further calls restore nothing and
            return the first folder, whatever their `path`; as in flytekit, `read` counts as a call without a path.

        Raises
        ------
        ValueError
            If `path` is not an existing folder, or no entry can match a pattern.
        CorruptCheckpointError
            If the checkpoint is damaged or unsafe to restore.
        StorageError
            If it cannot be read, or the folder cannot be written.
        """
        wanted = Patterns.of(only)
        with self._lock:
            if wanted is None and self._restored is not None:
                return self._restored
            folder = None if path is None or (self._was_read and wanted is None) else Path(path)
            if folder is not None and not folder.is_dir():
                message = "Checkpoints can be restored to a directory only."
                raise ValueError(message)
            if wanted is not None:
                return self._resumption.load(lambda found: self._restore_some(found, folder, wanted), callback, wanted)
            return self._resumption.load(lambda found: self._restore(found, folder), callback)

    def entries(self) -> list[EntryInfo] | None:
        """List what the previous attempt's checkpoint holds: names, kinds, sizes and times.

        Of what this package has saved, only the index is fetched; anything else is read through.

        Returns
        -------
        list of EntryInfo or None
            `None` if there is no previous checkpoint. Bytes that were written are the file `_dst_cp`.

        Raises
        ------
        CorruptCheckpointError, StorageError
            As for `restore`.
        """
        take = functools.partial(restoration.listed, payload_name=self.TMP_DST_PATH)
        with self._lock:
            return self._resumption.load(take, only=EVERYTHING)

    def _restore_some(self, found: Found, folder: Path | None, only: Patterns) -> Path:
        folder = folder or Path(tempfile.mkdtemp(dir=self._workspace()))
        restoration.restore(found, self.TMP_DST_PATH, folder, self._resumption.settings, only=only)
        return folder

    def _workspace(self) -> Path:
        if self._temporary is None:
            self._temporary = scratch.workspace(self, "flytekit_ckpt-")
        return self._temporary

    def _restore(self, found: Found, folder: Path | None) -> Path:
        if folder is None:
            folder = self._workspace() / self.SRC_LOCAL_FOLDER
            folder.mkdir(exist_ok=True)
        self._restored_names = restoration.restore(found, self.TMP_DST_PATH, folder, self._resumption.settings)
        self._loaded_uri = found.uri
        self._restored = folder
        return folder

    def save(self, cp: Path | str | io.BufferedReader, *, callback: Callback | None = None) -> None:
        """Add to this attempt's checkpoint, and store it.

        A file is kept under its name, what a reader gives as `_dst_cp`. Folders are merged file by file, what is saved
        later winning; a folder saved again replaces what it held before.

        Parameters
        ----------
        cp : pathlib.Path, str or binary reader
            A file, a folder, or a reader, which is read from its position to its end and left open.
        callback : fsspec.callbacks.Callback, keyword only, optional
            Progress callback, called with the bytes of the files as they are stored.

        Raises
        ------
        FileNotFoundError
            If the path is not there.
        TypeError
            If the reader gives text.
        ValueError
            If `cp` is of another type, or a path to neither a file nor a folder.
        StorageError
            If it cannot be stored, or other writers always come first; what was stored before stays.
        CorruptCheckpointError
            If what is at the destination is damaged, and nothing can be added to it.
        CheckpointError
            If a file shrinks or vanishes while it is being saved, if a stream that cannot seek would have to be read
            again, or if somebody has removed what was saved before.
        """
        part = self._part(cp)
        with self._saving():
            self._destination.save([part], callback)
        if isinstance(cp, io.BytesIO):
            cp.seek(0, io.SEEK_END)

    def _part(self, cp: Path | str | io.BufferedReader) -> parts.Part:
        """Make of what is to be saved a part of the checkpoint."""
        if isinstance(cp, (str, Path)):
            path = Path(cp)
            if path.is_dir():
                return parts.Folder.at(path, self._checkpoint_dest)
            if path.is_file():
                return parts.File(path.name, path)
            raise layout.not_savable(path)
        if isinstance(cp, io.TextIOBase):
            message = "a checkpoint is bytes, but the reader gives text: open it in binary mode"
            raise TypeError(message)
        if isinstance(cp, io.BytesIO):
            # In one piece, its checksum is known before it is sent.
            return parts.Bytes(cp.getbuffer()[cp.tell() :])
        if isinstance(cp, io.IOBase):
            return parts.Reader(cast("IO[bytes]", cp), self._checkpoint_dest)
        message = f"Only a valid path or IOBase type (reader) should be provided, received {type(cp)}"
        raise ValueError(message)

    def read(self) -> bytes | None:
        """Return the content of the previous attempt's single entry.

        Returns
        -------
        bytes or None
            `None` if there is no previous checkpoint, or one without any entry.

        Raises
        ------
        ValueError
            If the checkpoint has more than one entry.
        IsADirectoryError
            If its entry is a folder.
        CorruptCheckpointError, StorageError
            As for `restore`.
        """
        with self._lock:
            if self._restored is not None:
                return self._read_single(self._restored, self._restored_names)
            if type(self).restore is not SyncCheckpoint.restore:
                # In flytekit, `read` calls `restore`, and a subclass's override sees it.
                folder = self.restore()
                return None if folder is None else self._read_single(folder, os.listdir(folder))
            if self._content is not None:
                return self._content
            content = self._resumption.load(self._read)
            if content is not None and len(content) <= KEPT_SIZE:
                self._content = content
            return content

    def _read(self, found: Found) -> bytes | None:
        self._was_read = True
        return adapter.read_single(found.uri, found.content, found.origin)

    def _read_single(self, folder: Path, names: list[str]) -> bytes | None:
        adapter.check_single(self._loaded_uri, names)
        return (folder / names[0]).read_bytes() if names else None

    def write(self, b: bytes) -> None:
        """Add bytes to this attempt's checkpoint as `_dst_cp`, in place of those written before, and store it.

        Parameters
        ----------
        b : bytes-like
            What `read` will return to the next attempt.

        Raises
        ------
        TypeError
            If `b` is not bytes-like.
        StorageError
            If it cannot be stored; what was stored before stays.
        """
        # In flytekit, `write` calls `save`, and a subclass's override sees it.
        self.save(cast("io.BufferedReader", io.BytesIO(layout.as_bytes(b))))

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        with termination.saving(), self._resumption.carry_forward.paused():
            yield
