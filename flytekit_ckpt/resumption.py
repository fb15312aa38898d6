"""What an attempt goes on from, and what it leaves to those that follow it."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Callable, Iterator
from typing import TypeVar
from urllib.parse import quote, unquote

from flytekit_ckpt import layout, storage
from flytekit_ckpt.carry_forward import CarryForward
from flytekit_ckpt.errors import CheckpointError, CorruptCheckpointError, StorageError, UnsafeCheckpointError
from flytekit_ckpt.home import Home
from flytekit_ckpt.layout import Found
from flytekit_ckpt.locks import ForkSafeLock
from flytekit_ckpt.options import AsyncOptions, completed
from flytekit_ckpt.patterns import Patterns
from flytekit_ckpt.pipeline import Callback
from flytekit_ckpt.running import has_other_ranks, is_restarted, running
from flytekit_ckpt.storage import Settings

logger = logging.getLogger("flytekit_ckpt")

_Taken = TypeVar("_Taken")


class Resumption:
    """Finds the newest checkpoint that an attempt can go on from, wherever it is.

    Parameters
    ----------
    destination : str
        What this attempt saves to.
    source : str or None
        What the previous one saved to.
    options : AsyncOptions
        As the user gave them.
    """

    def __init__(self, destination: str, source: str | None, options: AsyncOptions) -> None:
        attempt = running()
        self.options = options = completed(options, is_attempts=attempt.destination == destination)
        self._destination = destination
        self._source = source
        self.settings = Settings.of(options)
        self._home = Home.of(options.get("home"), attempt, self.settings)
        self._resume_from = os.fspath(options.get("resume_from") or "") or None
        self.is_verified = options.get("verify_unchanged", False)
        fallback = options.get("fallback")
        if fallback not in (None, "older"):
            message = f"fallback={fallback!r} is not known: give 'older', or leave it out"
            raise ValueError(message)
        self._falls_back = fallback is not None
        if self._resume_from is not None and not _is_uri(self._resume_from) and not options.get("home"):
            message = (
                f"resume_from={self._resume_from!r} names a run, which only a home can find: give `home` too, "
                "or the URI of a checkpoint"
            )
            raise ValueError(message)
        # What this attempt had resumed from, if neither a source nor an earlier save of its own led there.
        self._resumed_from: str | None = None
        # What was loaded last, until something has been saved.
        self._loaded: str | None = None
        self._lock = ForkSafeLock()
        self.carry_forward = CarryForward(
            source, destination, self.settings, is_wanted=options.get("carry_forward", True)
        )
        self.carry_forward.begin()

    @property
    def may_find(self) -> bool:
        """Whether anything but what this attempt itself has saved may be found."""
        return self._source is not None or is_restarted() or self._home is not None or self._resume_from is not None

    def load(
        self, take: Callable[[Found], _Taken], callback: Callback | None = None, only: Patterns | None = None
    ) -> _Taken | None:
        """Hand on the first checkpoint that is found; `None` if there is none.

        Parameters
        ----------
        take : callable
            Reads the checkpoint.
        callback : fsspec callback, optional
            Progress callback, called with the object's bytes as they are read.
        only : Patterns, optional
            Which entries of a tree are wanted.

        Raises
        ------
        CorruptCheckpointError
            If it is damaged, or, with `fallback="older"`, if all are.
        StorageError
            If one of the places cannot be looked at.
        """
        passed: list[str] = []
        damage: CorruptCheckpointError | None = None
        for place, uri in self._places(passed):
            try:
                content = layout.get(uri, self.settings, callback, only)
                if content is None:
                    self._miss(place, uri, passed)
                    continue
                taken = take(Found(uri, content, layout.Origin(place, tuple(passed))))
            except UnsafeCheckpointError:
                raise
            except CorruptCheckpointError as error:
                if not self._falls_back:
                    raise
                damage = damage or error
                logger.warning("an older checkpoint is looked for: %s", error)
                passed.append(f"{_told(place, uri)} is damaged")
                continue
            self._go_on_from(place, uri, content)
            self._loaded = uri
            return taken
        if damage is not None:
            raise damage
        layout.log_nothing(layout.Origin("", tuple(passed)))
        return None

    @property
    def put_options(self) -> layout.PutOptions:
        """What is kept with each save: where this attempt resumed from."""
        return layout.PutOptions(mark=self._mark(), is_summed=self._home is not None)

    def _mark(self) -> storage.Metadata:
        return {layout.RESUMED: quote(self._resumed_from)} if self._resumed_from is not None else {}

    def record(self, written: storage.Written) -> None:
        """Remember a save of this process, and tell the home of it."""
        self.saved()
        if self._home is not None:
            self._home.record(self._destination, written, self._resumed_from)

    def saved(self, home: Home | None = None) -> None:
        """Remember that this process has saved, if another one has done it and told its `home`."""
        with self._lock:
            _saved_here.add(storage.canonical(self._destination))
            self._home = home or self._home

    def loaded(self) -> layout.Known | None:
        """Where the units of what was loaded lie, which the first save may find unchanged; told once."""
        uri, self._loaded = self._loaded, None
        # It is a help, and who cannot have it saves everything.
        with contextlib.suppress(CheckpointError):
            return None if uri is None else layout.known(uri, self.settings)
        return None

    @property
    def home(self) -> Home | None:
        """The home, and what is known of it."""
        return self._home

    def _places(self, passed: list[str]) -> Iterator[tuple[str, str]]:
        """Yield the places and URIs to look at, one after the other; say in `passed` why others are left out."""
        is_own_tried = False
        if is_restarted() and self._destination:
            is_own_tried = self._is_saved(layout.state(self._destination, self.settings))
            if is_own_tried:
                yield "own destination", self._destination
            else:
                passed.append("own destination: nothing was saved there")
        if self._source is not None:
            yield "source", self._source
        else:
            passed.append("source: none was given")
        if self._destination and self._destination != self._source and not is_own_tried:
            state = layout.state(self._destination, self.settings)
            if state.object is None and not state.has_files:
                passed.append("own destination: nothing is there")
            elif self._is_saved(state) and (has_other_ranks() or storage.canonical(self._destination) in _saved_here):
                # What the others have saved since they loaded is not what they have loaded.
                passed.append("own destination: it was saved since by those who run beside this")
                resumed_from = state.metadata.get(layout.RESUMED)
                if resumed_from is not None:
                    yield "what this attempt has resumed from", unquote(resumed_from)
                return
            else:
                yield "own destination", self._destination
        if self._home is None:
            passed.append("home: none was given")
        else:
            yield from self._pointed_at(self._home, passed)
        if self._resume_from is not None:
            yield from self._other_run(self._resume_from, passed)

    def _is_saved(self, state: storage.State) -> bool:
        if state.object is None or layout.CARRIED in state.metadata:
            return state.has_files
        return not self.carry_forward.has_carried(state)

    def _pointed_at(self, home: Home, passed: list[str]) -> Iterator[tuple[str, str]]:
        pointer = home.find()
        if pointer is None:
            passed.append(f"home: nothing is at {storage.public(home.uri)}")
            return
        tried = {storage.public(uri) for uri in (self._source, self._destination) if uri}
        for one in (pointer, *pointer.older):
            if one.checkpoint not in tried:
                yield "home", one.checkpoint

    def _other_run(self, resume_from: str, passed: list[str]) -> Iterator[tuple[str, str]]:
        if _is_uri(resume_from):
            yield "other run", resume_from
        elif self._home is not None:
            pointer = self._home.find_in(resume_from)
            if pointer is None:
                passed.append(f"other run: the home knows no checkpoint of this task in {resume_from!r}")
                logger.warning("resume_from=%s: the home knows no checkpoint of this task there", resume_from)
            else:
                yield from (("other run", one.checkpoint) for one in (pointer, *pointer.older))

    def _miss(self, place: str, uri: str, passed: list[str]) -> None:
        """Pass over a place without a checkpoint, which is to be expected of some and not of others."""
        if uri == self._resume_from:
            message = f"there is no checkpoint at {storage.public(uri)}, which `resume_from` names: correct the URI"
            raise StorageError(errno.ENOENT, message)
        if place in ("home", "other run", "what this attempt has resumed from"):
            logger.warning("%s leads to a checkpoint that is gone: %s", place, storage.public(uri))
            passed.append(f"{_told(place, uri)} is gone")
        else:
            passed.append(f"{_told(place, uri)}: nothing is there")

    def _go_on_from(self, place: str, uri: str, content: layout.Payload | layout.Tree) -> None:
        kept = content.metadata.get(layout.RESUMED) if layout.CARRIED in content.metadata else None
        if place in ("source", "own destination"):
            self._resumed_from = None if kept is None else unquote(kept)
            if self._home is not None:
                self._home.confirm(uri, content.version, is_own=place == "own destination")
        else:
            self._resumed_from = storage.public(uri)
        if place == "source":
            self.carry_forward.begin()
        elif place in ("home", "other run"):
            self.carry_forward.begin_from(uri, self._mark())


# The destinations that this process, or the one that it was forked from, has saved to.
_saved_here: set[str] = set()


def _told(place: str, uri: str) -> str:
    return f"{place} {storage.public(uri)}"


def _is_uri(resume_from: str) -> bool:
    """Tell the URI or path of a checkpoint from the name of a run."""
    return "/" in resume_from
