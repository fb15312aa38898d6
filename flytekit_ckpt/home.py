"""A home: small objects that say where the newest checkpoint of each task of each run is, whatever attempts die."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from typing import Any
from urllib.parse import quote

from flytekit_ckpt import storage
from flytekit_ckpt.errors import CheckpointError, CorruptCheckpointError
from flytekit_ckpt.locks import ForkSafeLock
from flytekit_ckpt.pipeline import in_order
from flytekit_ckpt.running import Running
from flytekit_ckpt.storage import Settings

logger = logging.getLogger("flytekit_ckpt")

LATEST = "latest"
"""Stands for the run whose checkpoint is the newest."""

OLDER = 16
"""Checkpoints of earlier attempts that a pointer still names."""


@dataclass(frozen=True)
class Pointer:
    """Says where a checkpoint is.

    Attributes
    ----------
    checkpoint : str
        Its URI, without credentials.
    attempt : int or None
        The number of the attempt that saved it, counted from 0 within its run; `None` if the platform does not tell.
    saved : str
        When, in UTC, as ISO 8601 has it.
    size : int or None
        Bytes; `None` where it was found, and not written.
    version : str or None
        The storage's name for what was written, such as an ETag.
    crc32 : str or None
        The CRC-32 of its bytes, eight hexadecimal digits; `None` where parts of it were not written anew.
    resumed_from : str or None
        The checkpoint that this attempt had resumed from, if it had found it in a home.
    older : list of Pointer
        What earlier attempts saved last, the newest first.
    """

    checkpoint: str
    attempt: int | None
    saved: str
    size: int | None
    version: str | None = None
    crc32: str | None = None
    resumed_from: str | None = None
    older: list[Pointer] = field(default_factory=list)

    @classmethod
    def of(cls, read: dict[str, Any]) -> Pointer:
        names = cls.__annotations__.keys() & read.keys()
        older = [cls.of(one) for one in read.get("older", [])]
        pointer = cls(**{**{name: read[name] for name in names}, "older": older})
        pointer.rank  # noqa: B018 - an error if it cannot be compared with others
        return pointer

    @property
    def rank(self) -> tuple[int, datetime]:
        """What orders the pointers of a run: a later attempt's is newer, whatever the clocks of the machines say."""
        return (-1 if self.attempt is None else self.attempt), datetime.fromisoformat(self.saved).astimezone(
            timezone.utc
        )


class Home:
    """What a home says of one task of one run, and of the same task in other runs.

    Parameters
    ----------
    uri : str
        Folder or URI that the pointers of all tasks of all runs lie below.
    attempt : Running
        Which task of which run.
    settings : Settings
        How it is reached.
    """

    def __init__(self, uri: str, attempt: Running, settings: Settings) -> None:
        self._root = uri.rstrip("/")
        self._attempt = attempt
        self._settings = settings
        # What is there, once it has been looked at, until somebody else turns out to have changed it.
        self._seen: tuple[storage.Written | None, Pointer | None] | None = None
        self._is_forbidden = False
        self._lock = ForkSafeLock()

    @classmethod
    def of(cls, uri: str | None, attempt: Running, settings: Settings) -> Home | None:
        """Give the home at a URI, if there is one and the platform tells which task runs here."""
        if not uri:
            return None
        uri = os.fspath(uri)
        if not (attempt.run and attempt.node):
            logger.warning(
                "the home %s is not used: nothing tells which task of which run this is, as Flyte's containers and "
                "`flytekit-ckpt run` do",
                storage.public(uri),
            )
            return None
        return cls(uri, attempt, settings)

    @property
    def uri(self) -> str:
        """The object with the pointer of this task of this run."""
        return self._uri_of(self._attempt.run)

    def _uri_of(self, run: str) -> str:
        return f"{self._folder}/{_part(run)}"

    @property
    def _folder(self) -> str:
        attempt = self._attempt
        parts = (attempt.project, attempt.domain, attempt.task, attempt.node)
        return "/".join([self._root, *map(_part, parts)])

    def find(self) -> Pointer | None:
        """Give the newest pointer of this task of this run; none, with a warning, to who may not read it.

        Raises
        ------
        StorageError
            If it cannot be read.
        CorruptCheckpointError
            If it is none.
        """
        with self._lock:
            try:
                self._seen = self._read(self.uri)
            except CheckpointError as error:
                self._forbidden(error)
                return None
            return self._seen[1]

    def find_in(self, run: str) -> Pointer | None:
        """Give the newest pointer of this task in another run, or in the `LATEST` other run that has one."""
        if not self._attempt.task:
            message = (
                f"cannot resume from the run {run!r}: the platform does not tell which task this is. "
                "Give the URI of the checkpoint as `resume_from`"
            )
            raise CheckpointError(message)
        try:
            if run != LATEST:
                return self._read(self._uri_of(run))[1]
            return max(self._of_other_runs(), key=lambda pointer: pointer.rank[1], default=None)
        except CheckpointError as error:
            self._forbidden(error)
            return None

    def _of_other_runs(self) -> Iterator[Pointer]:
        own = _part(self._attempt.run)
        names = (name for name in storage.at(self._folder, self._settings).names() if name != own)
        sized: Iterable[tuple[int, str]] = ((storage.PART_SIZE, f"{self._folder}/{name}") for name in names)
        for _, pointer in in_order(self._read, sized, threads=storage.CONCURRENCY, memory=self._settings.share):
            if pointer is not None:
                yield pointer

    def record(self, checkpoint: str, written: storage.Written, resumed_from: str | None) -> None:
        """Point at what has been saved, unless a later attempt has saved something; a warning where that fails."""
        pointer = Pointer(
            storage.public(checkpoint),
            self._attempt.number,
            _now(),
            written.size,
            written.version,
            written.crc32,
            resumed_from,
        )
        self._record(pointer, self._write)

    def confirm(self, checkpoint: str, version: str | None, *, is_own: bool) -> None:
        """Point at what has been loaded, this attempt's own or that of the one before it, if nothing does.

        Who saved it may have been killed before it could say so.
        """
        number = self._attempt.number
        if number is not None and not is_own:
            number -= 1
        self._record(Pointer(storage.public(checkpoint), number, _now(), None, version), self._write_if_unknown)

    def _record(self, pointer: Pointer, write: Callable[[Pointer], None]) -> None:
        with self._lock:
            if self._is_forbidden:
                return
            try:
                storage.undisturbed(lambda: write(pointer), uri=self.uri)
            except (CheckpointError, OSError) as error:
                self._is_forbidden = storage.is_forbidden(error)
                logger.warning("the home does not know the checkpoint %s: %s", pointer.checkpoint, error)

    def _write_if_unknown(self, pointer: Pointer) -> None:
        self._seen = self._seen or self._read(self.uri)
        current = self._seen[1]
        if current is None or current.checkpoint != pointer.checkpoint:
            self._write(pointer)

    def _write(self, pointer: Pointer) -> None:
        there, current = self._seen or self._read(self.uri)
        self._seen = None
        if current is not None:
            if current.rank > pointer.rank and current.checkpoint != pointer.checkpoint:
                logger.info("the home's pointer %s is of a later attempt, and stays", storage.public(self.uri))
                return
            older = current.older
            if current.checkpoint != pointer.checkpoint:
                older = [replace(current, older=[]), *older]
            pointer = replace(pointer, older=older[:OLDER])
        content = json.dumps(asdict(pointer), indent=1).encode()
        written = storage.at(self.uri, self._settings).put([content], size=lambda: len(content), replaced=there)
        self._seen = written, pointer

    def _read(self, uri: str) -> tuple[storage.Written | None, Pointer | None]:
        stored = storage.at(uri, self._settings).get()
        if stored is None:
            return None, None
        try:
            pointer = Pointer.of(json.loads(b"".join(stored.chunks)))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            message = (
                f"the pointer at {storage.public(uri)} cannot be read ({error}): remove it, and give the URI of the "
                "checkpoint as `resume_from`"
            )
            raise CorruptCheckpointError(message) from error
        return storage.Written(stored.size, stored.version), pointer

    def _forbidden(self, error: CheckpointError) -> None:
        """Pass over a home that may not be read; other failures say nothing of what is there."""
        if not storage.is_forbidden(error):
            raise error
        logger.warning("the home is not used: %s", error)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat()


def _part(text: str) -> str:
    """Make one part of a key: readable, and different for different texts."""
    safe = quote(text, safe="").replace("~", "%7E").replace("%", "~")
    return f"~2E{safe[1:]}" if safe.startswith(".") else safe or "~"
