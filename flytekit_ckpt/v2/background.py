"""Saves of one Flyte 2 checkpoint in the background: their contents as they are now, their turn among all saves."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from flytekit_ckpt import layout
from flytekit_ckpt.asynchronous import SENT_SIZE, AsynchronousSaves, Frozen
from flytekit_ckpt.home import Home
from flytekit_ckpt.layout import Known
from flytekit_ckpt.pipeline import Callback
from flytekit_ckpt.resumption import Resumption
from flytekit_ckpt.snapshots import Snapshot
from flytekit_ckpt.v2.base import Savable
from flytekit_ckpt.v2.destination import Destination

_Learnt = tuple[Known | None, Home | None]


def saves_of(destination: Destination, resumption: Resumption) -> AsynchronousSaves:
    """Prepare for saves to a destination; they take turns with those that are not in the background."""

    def learn(learnt: _Learnt) -> None:
        destination.known, home = learnt
        resumption.saved(home)

    saves = AsynchronousSaves(
        destination.uri,
        resumption,
        save=_save,
        state=lambda: destination,
        learn=learn,
        on_disk=_on_disk,
        line_up=lambda: _Turn(destination),
    )
    saves.prepare()
    return saves


def _save(destination: Destination, contents: Sequence[Savable], callback: Callback | None = None) -> _Learnt:
    """Save one thing after the other; done in another process."""
    with layout.in_background():
        for content in contents:
            destination.save(content, callback, threading.Event())
    return destination.known, destination.home


def frozen(content: Savable, uri: str, *, is_given: bool) -> Frozen:
    """Make of what is to be saved at a URI something that nothing changes any more."""
    if isinstance(content, bytes):
        return Frozen(content, len(content))
    assert isinstance(content, Path)
    exclude = layout.not_into_itself(uri)
    if is_given:
        snapshot = Snapshot.of_moved(content, exclude)
    elif content.is_dir():
        snapshot = Snapshot.of_folder(content, exclude)
    else:
        snapshot = Snapshot.of_file(content)
    return Frozen(snapshot.path, snapshot.size, snapshot)


def _on_disk(content: Savable) -> Frozen:
    if isinstance(content, bytes) and len(content) > SENT_SIZE:
        snapshot = Snapshot.of_chunks([content], len(content))
        return Frozen(snapshot.path, snapshot.size, snapshot)
    return Frozen(content, 0)


class _Turn:
    """A turn among all saves to a destination."""

    def __init__(self, destination: Destination) -> None:
        self._queue = destination.queue
        self._ticket = self._queue.line_up()

    def wait(self) -> None:
        self._queue.wait_for(self._ticket, threading.Event())

    def leave(self) -> None:
        self._queue.leave(self._ticket)
