"""What is saved to one Flyte 2 checkpoint: each save takes the place of the one before."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from flytekit_ckpt import archive, layout, storage, termination
from flytekit_ckpt.files import file_chunks
from flytekit_ckpt.folders import folder_size, scan_folder
from flytekit_ckpt.home import Home
from flytekit_ckpt.locks import Queue
from flytekit_ckpt.pipeline import Callback, Chunk
from flytekit_ckpt.resumption import Resumption
from flytekit_ckpt.v2.base import Savable


class Destination:
    """What is saved to one checkpoint, in the order of the calls.

    Parameters
    ----------
    uri : str
        The object.
    resumption : Resumption
        What the attempt goes on from, which is told of each save.

    Attributes
    ----------
    queue : Queue
        Those who are about to save.
    known : layout.Known or None
        The tree that was saved last; may be set to what another process has come to know.
    """

    def __init__(self, uri: str, resumption: Resumption) -> None:
        self.uri = uri
        self.queue = Queue()
        self.known: layout.Known | None = None
        self._resumption = resumption

    @property
    def home(self) -> Home | None:
        """The attempt's home, and what is known of it."""
        return self._resumption.home

    def save_in_turn(
        self, ticket: object, data: Savable, callback: Callback | None, cancelled: threading.Event
    ) -> None:
        """Save when those have saved who are before a ticket in the queue, unless it is cancelled; then leave it."""
        try:
            self.queue.wait_for(ticket, cancelled)
            if not cancelled.is_set():
                self.save(data, callback, cancelled)
        finally:
            self.queue.leave(ticket)

    def save(self, data: Savable, callback: Callback | None, cancelled: threading.Event) -> None:
        """Save at once, unless it is cancelled before that is done: then what was there stays."""
        turn = storage.turn(self.uri, self._resumption.settings.timeout, cancelled.is_set)
        with termination.saving(), self._resumption.carry_forward.paused(), turn as sign:
            self._resumption.record(self._save(data, callback, cancelled, sign))

    def _save(
        self, data: Savable, callback: Callback | None, cancelled: threading.Event, sign: Callable[[], None]
    ) -> storage.Written:
        def step() -> None:
            sign()
            if cancelled.is_set():
                raise storage.GivenUpError

        settings = replace(self._resumption.settings, cancelled=cancelled)
        options = replace(self._resumption.put_options, step=step)
        chunks: Iterable[Chunk]
        file: Path | None = None
        if not isinstance(data, (str, os.PathLike)):
            content = layout.as_bytes(data)
            chunks, length = [content], len(content)
        else:
            path = Path(data)
            if path.is_dir():
                return self._save_folder(path, settings, options, callback)
            if not path.is_file():
                raise layout.not_savable(path)
            length = path.stat().st_size
            file, chunks = path, file_chunks(path, length)
        self.known = None
        return layout.put_payload(
            self.uri,
            chunks,
            settings,
            size=length,
            file=file,
            keep_archives=True,
            callback=callback,
            options=options,
        )

    def _save_folder(
        self, folder: Path, settings: storage.Settings, options: layout.PutOptions, callback: Callback | None
    ) -> storage.Written:
        exclude = layout.not_into_itself(self.uri)

        def put(known: layout.Known | None) -> storage.Written:
            items = archive.unchanged(
                scan_folder(folder, exclude), known.units if known else [], is_verified=self._resumption.is_verified
            )
            written, units = layout.put_tree(
                self.uri,
                items,
                settings,
                size=functools.partial(folder_size, folder, exclude),
                previous=None if known is None else known.previous(settings),
                callback=callback,
                options=options,
            )
            self.known = layout.Known(layout.written_uri(self.uri), written, units)
            return written

        # Where somebody has replaced or removed what the units lie in, everything is saved anew.
        with contextlib.suppress(storage.ConflictError):
            return put(self.known or self._resumption.loaded())
        self.known = None
        return put(None)
